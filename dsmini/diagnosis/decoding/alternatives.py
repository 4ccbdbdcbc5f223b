"""Alternatives to a plain decoding step: one thing made free in each, and the reason where it does not apply.

    free_cache           1 cached token in place of all: the gain is the share of cached attention
    expanded_mla         keys and values of all cached tokens are made again; dsmini decodes absorbed
    mha_baseline         multi-head attention of as many heads, which caches the keys and values of each
    uniform_routing      tokens visit all experts in turn; one token visits different experts in any case
    dense_active         a dense feed-forward with as many active parameters: what routing costs
    drafts               multi-token prediction guesses, at the share of guesses that is accepted
    all_threads          as in training
    bfloat16_weights     weights of 2 bytes
    fp8_weights          weights of 1 byte, with scales

A negative gain is what the way in use saves: expanded_mla at -50 % says that a step would take half as long again.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from dsmini import ops
from dsmini.diagnosis.decoding.arm import Alternative, Arm
from dsmini.diagnosis.decoding.drafts import guessing_steps
from dsmini.diagnosis.decoding.steps import module_steps
from dsmini.diagnosis.decoding.subject import DecodingSubject
from dsmini.diagnosis.decoding.variants import (
    with_dense,
    with_fp8_weights,
    with_mha,
    with_uniform_routing,
    with_weights_in,
)
from dsmini.diagnosis.interventions.intervention import Intervention, Step
from dsmini.diagnosis.interventions.machine import THREADS
from dsmini.nn import Transformer
from dsmini.planner.binding import Axis

FEW = 1
"""Cached tokens where the cache is free."""
ABSORBED = Arm(make=module_steps("absorbed"), rates_of="prefill")
EXPANDED = Arm(make=module_steps("expanded"), rates_of="prefill")
ROUTED = Arm(make=module_steps("auto"), rates_of="prefill")
MHA = Arm(change=with_mha)


def _in_bfloat16(model: Transformer) -> Transformer:
    return with_weights_in(model, torch.bfloat16)


BFLOAT16 = Arm(change=_in_bfloat16, dtype="bfloat16", keeps_attention=True)
FP8 = Arm(change=with_fp8_weights, dtype="fp8", keeps_attention=True)
ALTERNATIVES = {
    "free_cache": Alternative(instead=Arm(point=lambda point: point.at(FEW))),
    "expanded_mla": Alternative(instead=EXPANDED, of=ABSORBED),
    "mha_baseline": Alternative(instead=MHA),
    "uniform_routing": Alternative(
        instead=Arm(change=with_uniform_routing, make=ROUTED.make, rates_of="prefill"), of=ROUTED
    ),
    "dense_active": Alternative(instead=Arm(change=with_dense, keeps_attention=True)),
    "drafts": Alternative(instead=Arm(make=guessing_steps)),
    "bfloat16_weights": Alternative(instead=BFLOAT16),
    "fp8_weights": Alternative(instead=FP8),
}
WhyNot = Callable[[DecodingSubject], str | None]


def tokens_of(subject: DecodingSubject, name: str) -> float:
    """Return the tokens of a sequence that a step of an alternative makes."""
    accepted = subject.acceptance if name == "drafts" else None
    return 1.0 if accepted is None else accepted.tokens_per_step


def applied(name: str) -> Callable[[DecodingSubject], AbstractContextManager[Step]]:
    """Return what lets an alternative be timed. The subject stays as it is: an arm has steps of its own."""

    @contextmanager
    def apply(subject: DecodingSubject) -> Iterator[Step]:
        yield lambda base: ALTERNATIVES[name].seconds(base, subject.seconds, tokens_of(subject, name))

    return apply


def _few_tokens(subject: DecodingSubject) -> str | None:
    return None if subject.context > FEW else f"there is only {subject.context} cached token"


def no_forms(subject: DecodingSubject) -> str | None:
    """Return why the two forms of MLA cannot be compared; None if they can."""
    c = subject.config
    if not c.is_mla:
        return f"only MLA has two forms, and the attention is {c.attention}"
    return "normed heads have no absorbed form (qk_norm)" if c.qk_norm else None


def no_mha(subject: DecodingSubject) -> str | None:
    """Return why there is no multi-head attention to compare with; None if there is."""
    c = subject.config
    if c.attention == "mha":
        return "the attention is multi-head attention already"
    if c.qk_nope_head_dim % 2:
        return f"heads of qk_nope_head_dim={c.qk_nope_head_dim} cannot be rotated in pairs"
    return None


def no_experts(subject: DecodingSubject) -> str | None:
    """Return why experts cannot be replaced; None if they can."""
    c = subject.config
    return None if c.n_dense_layers < c.n_layers else "the model has no routed experts"


def _one_token(subject: DecodingSubject) -> str | None:
    if why := no_experts(subject):
        return why
    few = subject.batch * subject.config.n_activated_experts <= subject.config.n_activated_experts
    return "one token visits different experts, however they are chosen; try --batch 8" if few else None


def _no_guesses(subject: DecodingSubject) -> str | None:
    c, depths = subject.config, len(subject.model.mtp)
    if not depths:
        return "the model has no multi-token prediction"
    if subject.context + 1 + depths > c.max_seq_len:
        return f"{subject.context} cached tokens leave no room for a guess in max_seq_len={c.max_seq_len}"
    return None


def no_kernels(subject: DecodingSubject) -> str | None:
    """Return why weights of fewer bytes save nothing here; None if kernels read them as they lie."""
    if ops.serving(subject.device.type) != "cpu":
        return "no kernels serve here, and without them such weights are made wider in every step"
    return "the model multiplies in simulated FP8" if subject.config.precision == "fp8" else None


def _are_short(subject: DecodingSubject) -> str | None:
    if why := no_kernels(subject):
        return why
    return "the weights have 2 bytes already" if subject.weight_dtype == "bfloat16" else None


def _of(name: str, axis: Axis, words: str, action: str, why_not: WhyNot) -> Intervention[DecodingSubject]:
    return Intervention(name=name, axis=axis, words=words, action=action, why_not=why_not, apply=applied(name))


INTERVENTIONS: tuple[Intervention[DecodingSubject], ...] = (
    _of(
        "free_cache",
        Axis.MACHINE,
        "1 cached token in place of all: the rest is not attended to",
        "Keep contexts shorter, or the cache smaller: fewer kv_lora_rank numbers a token, --cache-dtype fp8.",
        _few_tokens,
    ),
    _of(
        "expanded_mla",
        Axis.ALGORITHM,
        "keys and values of all cached tokens are made again, instead of absorbing",
        "Expand: at so few cached tokens absorbing costs more than it saves.",
        no_forms,
    ),
    _of(
        "mha_baseline",
        Axis.ALGORITHM,
        "multi-head attention of as many heads, which caches keys and values of each",
        'Set model.attention = "mha" where contexts stay this short: its cache is larger, its projections are fewer.',
        no_mha,
    ),
    _of(
        "uniform_routing",
        Axis.ALGORITHM,
        "tokens visit all experts in turn",
        "Choose experts that more sequences of a batch share, or balance them in training.",
        _one_token,
    ),
    _of(
        "dense_active",
        Axis.ALGORITHM,
        "a dense feed-forward with as many active parameters stands in for the experts",
        "Make fewer and wider experts: routing and small products cost more than they save at this size.",
        no_experts,
    ),
    _of(
        "drafts",
        Axis.ALGORITHM,
        "multi-token prediction guesses, and one step checks all guesses",
        "Add --speculative to dsmini.generate.",
        _no_guesses,
    ),
    THREADS,
    _of(
        "bfloat16_weights",
        Axis.MACHINE,
        "weights are held in BF16",
        "Make a folder in BF16 with python -m dsmini.convert RUN FOLDER --dtype bfloat16, and decode from it.",
        _are_short,
    ),
    _of(
        "fp8_weights",
        Axis.MACHINE,
        "weights inside the blocks are held as FP8 codes with scales",
        "Make a folder in FP8 with python -m dsmini.convert RUN FOLDER --fp8, and decode with --fp8 keep.",
        no_kernels,
    ),
)
