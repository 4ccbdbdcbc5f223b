"""Speculative decoding with multi-token prediction.

A small model trains for a short while on real text. It then continues held-out prompts one by one, without and with
drafts of its multi-token prediction, in turns, in FP32. A step without drafts makes one token. A step with d drafts
reads d + 1 tokens at once and keeps those that the main model accepts. Predicted: from the agreement of main model and
drafts on held-out text, and from the cost of a step at this machine's rates.
"""

import dataclasses
import itertools
import operator
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.models import trainer, training_flops
from benchmarks.question import Case, Figure, Question, Setting, drawing, figure, pick, times
from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.data.corpus import Corpus
from dsmini.inference.generation import Generated, Generation, Stats, generate
from dsmini.measure.prediction import predicted_seconds
from dsmini.measure.rates import Roofs
from dsmini.measure.turns import Turns, in_turns, reported

TEMPERATURES = (0.0, 0.8)


class Size(NamedTuple):
    """Sizes of the training and of the generation."""

    model: ModelConfig
    steps: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    depths: tuple[int, ...]
    seconds: float
    """Estimated seconds of a depth."""


GROUPS: dict[str, Any] = {"n_expert_groups": 1, "n_limited_groups": 1, "n_routed_experts": 8, "n_activated_experts": 2}
TOY = ModelConfig(dim=128, inter_dim=384, moe_inter_dim=64, n_layers=3, **GROUPS)
FULL = Size(ModelConfig(), steps=160, prompts=7, prompt_tokens=64, new_tokens=160, depths=(1, 2), seconds=60)
QUICK = Size(TOY, steps=60, prompts=5, prompt_tokens=48, new_tokens=40, depths=(1,), seconds=8)
BATCH = 4
"""Sequences of a training step."""


def cases(setting: Setting) -> list[Case]:
    of = QUICK if setting.quick else FULL
    out = []
    for depth in of.depths:
        flops = training_flops(dataclasses.replace(of.model, n_mtp_layers=depth), of.steps * BATCH)
        run = partial(measure, depth, setting, of)
        out.append(Case(key=f"depth={depth} steps={of.steps}", seconds=of.seconds, flops=flops, run=run))
    return out


def measure(depth: int, setting: Setting, of: Size) -> Iterator[Figure]:
    model, corpus = trained(depth, setting, of)
    windows = corpus.windows(model.config.max_seq_len, of.prompts * model.config.max_seq_len)
    tokens = torch.cat([tokens for tokens, _ in windows.blocks(of.prompts)]).to(setting.device)
    prompts = [row[: of.prompt_tokens] for row in tokens]
    drafting, plain = (step_seconds(model, prompts[0], drafts, setting.roofs) for drafts in (True, False))
    for temperature in TEMPERATURES:
        case = {"depth": depth, "temperature": temperature}
        expected = tokens_per_step(expected_acceptance(model, tokens, temperature))
        turns, stats = continued(model, prompts, temperature, of.new_tokens)
        note = "predicted from held-out text; median over prompts"
        share = (expected - 1) / depth  # of all drafts, those after a rejected one included
        yield figure("acceptance", case, [s.acceptance_rate for s in stats], predicted=share, note=note)
        yield figure("tokens_per_step", case, [s.tokens_per_step for s in stats], predicted=expected, note=note)
        for name, seconds in turns.seconds.items():
            yield figure("tokens_per_s", {**case, "with": name}, [1 / s for s in seconds])
        note = "a token without drafts, over one with; predicted: tokens a step over the cost of a step"
        ratio = turns.ratio("no drafts", "drafts")
        yield figure("times_as_long", case, ratio, predicted=expected * plain / drafting, note=note)
        if not temperature:  # continued raises if they differ
            note = "greedy, with drafts and without"
            yield figure("same_continuations", case, len(stats), predicted=len(prompts), exact=True, note=note)


def trained(depth: int, setting: Setting, of: Size) -> tuple[Transformer, Corpus]:
    """Return a model of this depth after a short training on the default corpus, ready to generate in FP32."""
    model_config = dataclasses.replace(of.model, n_mtp_layers=depth)
    config = RunConfig(model=model_config, train=TrainConfig(steps=of.steps, batch_size=BATCH))
    made = trainer(config, setting, of.steps)
    made.loader.close()
    made.model.compute_dtype = None  # BF16 logits tie, and steps of several tokens break ties differently
    return made.model.eval(), made.corpus


def step_seconds(model: Transformer, prompt: Tensor, speculative: bool, roofs: Roofs) -> float:
    """Predict the seconds of a decoding step from its counted operations."""
    generation = Generation(model, [prompt.tolist()], 8, speculative=speculative)
    next(generation)  # reads the prompt
    return predicted_seconds(lambda: next(generation), roofs)


def tokens_per_step(accepted: list[float]) -> float:
    """Compute the expected tokens of a step: one, and for each depth the probability that its draft is accepted.

    Args:
        accepted: at k - 1 the probability that draft k is accepted if all drafts before it were.
    """
    return 1.0 + sum(itertools.accumulate(accepted, operator.mul))


@torch.inference_mode()
def expected_acceptance(model: Transformer, tokens: Tensor, temperature: float) -> list[float]:
    """Compute the probability that the draft of each depth is accepted after real text, if those before it were.

    It is the sum of min(p, q) over the vocabulary; in greedy decoding, the share of positions with equal argmax.
    """
    out = model.run(tokens, mtp=True)
    accepted: list[float] = []
    for k, logits in enumerate(out.mtp_logits, 1):
        pair = out.logits[:, k:].float(), logits.float()  # both predict token i + k + 1
        if temperature:
            p, q = ((each / temperature).softmax(-1) for each in pair)
            accepted.append(torch.minimum(p, q).sum(-1).mean().item())
        else:
            p, q = (each.argmax(-1) for each in pair)
            accepted.append((p == q).float().mean().item())
    return accepted


def continued(
    model: Transformer, prompts: list[Tensor], temperature: float, new_tokens: int
) -> tuple[Turns, list[Stats]]:
    """Continue each prompt without and with drafts, after a first one that warms up.

    Returns: the seconds of a token, a turn for each prompt, and what drafting did.

    Raises: AssertionError where drafts change a greedy continuation.
    """
    done: dict[str, list[Generated]] = {"no drafts": [], "drafts": []}

    def token(name: str) -> float:
        """Continue the next prompt; return the seconds of a token."""
        i = len(done[name])
        generator = torch.Generator(prompts[0].device).manual_seed(i)
        how = {"temperature": temperature, "speculative": name == "drafts", "generator": generator}
        done[name].append(generate(model, prompts[max(0, i - 1)][None], new_tokens, **how))
        return 1 / done[name][-1].stats.tokens_per_s

    turns = in_turns({name: partial(token, name) for name in done}, count=len(prompts), clock=reported)
    for i, (plain, drafted) in enumerate(zip(*done.values(), strict=True)):
        equal = temperature or torch.equal(plain.tokens, drafted.tokens)
        assert equal, f"drafts changed the greedy continuation of prompt {i}"
    return turns, [each.stats for each in done["drafts"][1:]]


def _label(f: Figure) -> str:
    how = f"at temperature {f.case['temperature']}" if f.case["temperature"] else "greedy"
    return f"depth {f.case['depth']}, {how}"


def answer(figures: list[Figure]) -> str:
    told = []
    for f in pick(figures, "times_as_long"):
        tokens = [step.measured for step in pick(figures, "tokens_per_step", **f.case) if step.measured]
        if f.measured is not None and tokens:
            told.append(f"{_label(f)}: {times(f)} as fast, with {tokens[0]:.2f} tokens a step")
    return f"Speculative decoding of a small model, next to decoding without drafts: {'; '.join(told)}." if told else ""


QUESTION = Question(
    name="mtp",
    title="Is speculative decoding with multi-token prediction faster?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=tuple(
        drawing(metric, title, label=_label, y=y, kind="bars", predicted=True)
        for metric, title, y in (
            ("tokens_per_step", "Tokens of a decoding step", "tokens a step"),
            ("times_as_long", "Speed with drafts", "times the speed without"),
        )
    ),
)
