"""Is speculative decoding with multi-token prediction faster?

A small model trains for a short while on real text. It then continues held-out prompts one by one, without and with
drafts of its multi-token prediction, in turns, in FP32. A step without drafts makes one token. A step with d drafts
reads d + 1 tokens at once and keeps those that the main model accepts. Predicted: from the agreement of main model and
drafts on held-out text, and from the cost of a step at this machine's rates.
"""

import dataclasses
import itertools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, Figure, Figures, Plot, Setting, Value, pick, values
from benchmarks.trained import trainer, training_flops
from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.data.corpus import Corpus
from dsmini.inference.generation import Generation, Stats, generate
from dsmini.measure import prediction
from dsmini.measure.counting import count
from dsmini.measure.rates import Roofs
from dsmini.report.charts import over_labels
from dsmini.report.verdicts import compared

NAME = "mtp"
TEMPERATURES = (0.0, 0.8)

figure = Figures(
    NAME,
    higher={"acceptance": "", "tokens_per_step": "tokens", "speedup": "x", "tokens_per_s": "tokens/s"},
    neither={"same_continuations": "prompts"},
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the training and of the generation."""

    model: ModelConfig
    steps: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    depths: tuple[int, ...]
    seconds: float
    """Estimated seconds of a depth."""


FULL = Size(model=ModelConfig(), steps=160, prompts=6, prompt_tokens=64, new_tokens=160, depths=(1, 2), seconds=55)
TOY = ModelConfig(
    dim=128,
    inter_dim=384,
    moe_inter_dim=64,
    n_layers=3,
    n_routed_experts=8,
    n_activated_experts=2,
    n_expert_groups=1,
    n_limited_groups=1,
)
QUICK = Size(model=TOY, steps=60, prompts=3, prompt_tokens=48, new_tokens=64, depths=(1,), seconds=8)
BATCH = 4
"""Sequences of a training step."""


def cases(setting: Setting) -> list[Case]:
    of = QUICK if setting.quick else FULL
    out = []
    for depth in of.depths:
        model = dataclasses.replace(of.model, n_mtp_layers=depth)
        flops = training_flops(model, of.steps * BATCH)
        key, run = f"depth={depth} steps={of.steps}", partial(measure, depth, setting, of)
        out.append(Case(key=key, seconds=of.seconds, flops=flops, run=run))
    return out


def measure(depth: int, setting: Setting, of: Size) -> Iterator[Figure]:
    model, corpus = trained(depth, setting, of)
    windows = corpus.windows(model.config.max_seq_len, of.prompts * model.config.max_seq_len)
    tokens = torch.cat([tokens for tokens, _ in windows.blocks(of.prompts)]).to(setting.device)
    prompts = [row[: of.prompt_tokens] for row in tokens]
    cost = step_seconds(model, prompts[0], True, setting.roofs) / step_seconds(model, prompts[0], False, setting.roofs)
    for temperature in TEMPERATURES:
        expected = tokens_per_step(expected_acceptance(model, tokens, temperature))
        plain, drafting = in_turns(model, prompts, temperature, of.new_tokens)
        yield from _figures({"depth": depth, "temperature": temperature}, expected, cost, plain, drafting)


def trained(depth: int, setting: Setting, of: Size) -> tuple[Transformer, Corpus]:
    """Return a model of this depth after a short training on the default corpus, ready to generate in FP32."""
    model_config = dataclasses.replace(of.model, n_mtp_layers=depth)
    config = RunConfig(model=model_config, train=TrainConfig(steps=of.steps, batch_size=BATCH))
    made = trainer(config, setting, of.steps)
    made.loader.close()
    made.model.compute_dtype = None  # BF16 logits tie, and steps of several tokens break ties differently
    return made.model.eval(), made.corpus


def _figures(
    case: Mapping[str, Value], expected: float, cost: float, plain: list[Stats], drafting: list[Stats]
) -> Iterator[Figure]:
    """Yield acceptance, tokens per step and speedup of drafts.

    Args:
        expected: predicted tokens of a step.
        cost: predicted time of a step with drafts, over that of a step without.
    """
    accepted_of_all = (expected - 1) / int(case["depth"])  # of all drafts, those after a rejected one included
    faster = [g.tokens_per_s / p.tokens_per_s for p, g in zip(plain, drafting, strict=True)]
    note = "predicted from held-out text; quartiles over prompts"
    yield figure("acceptance", case, [s.acceptance_rate for s in drafting], predicted=accepted_of_all, note=note)
    yield figure("tokens_per_step", case, [s.tokens_per_step for s in drafting], predicted=expected, note=note)
    note = "predicted: tokens a step over the cost of a step from counted operations; quartiles over prompts"
    yield figure("speedup", case, faster, predicted=expected / cost, note=note)
    for name, stats in (("no drafts", plain), ("drafts", drafting)):
        yield figure("tokens_per_s", {**case, "with": name}, [s.tokens_per_s for s in stats])
    if not case["temperature"]:  # in_turns raises if continuations differ
        note = "greedy, with drafts and without"
        yield figure("same_continuations", case, len(drafting), predicted=len(plain), exact=True, note=note)


def step_seconds(model: Transformer, prompt: Tensor, speculative: bool, roofs: Roofs) -> float:
    """Predict the seconds of a decoding step from its counted operations."""
    generation = Generation(model, [prompt.tolist()], 8, speculative=speculative)
    for _ in range(2):  # the first reads the prompt, the second fills caches that later steps use
        next(generation)
    return prediction.seconds(count(lambda: next(generation), roofs.cache_bytes), roofs)


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


def in_turns(
    model: Transformer, prompts: list[Tensor], temperature: float, new_tokens: int
) -> tuple[list[Stats], list[Stats]]:
    """Continue each prompt without and with drafts, in turns, after a first one that warms up."""
    stats: dict[bool, list[Stats]] = {False: [], True: []}
    for i, prompt in enumerate([prompts[0], *prompts]):
        rows: list[Tensor] = []
        for speculative in (False, True):
            generator = torch.Generator(prompt.device).manual_seed(i)
            how = {"temperature": temperature, "speculative": speculative, "generator": generator}
            done = generate(model, prompt[None], new_tokens, **how)
            rows.append(done.tokens)
            if i:
                stats[speculative].append(done.stats)
        assert temperature or torch.equal(*rows), f"drafts changed the greedy continuation of prompt {i}"
    return stats[False], stats[True]


def finding(figures: list[Figure]) -> str:
    told, faster = [], 0
    for f in pick(figures, "speedup"):
        tokens = values(figures, "tokens_per_step", **f.case)
        if f.measured is not None and tokens:
            how = f"at temperature {f.case['temperature']}" if f.case["temperature"] else "greedily"
            gain = f"{compared(f, words='as fast')} with {tokens[0]:.2f} tokens a step"
            told.append(f"depth {f.case['depth']} {how} {gain}")
            faster += (f.low or 0.0) > 1  # by more than prompts differ
    pays = f"is faster in {faster} of {len(told)} cases" if faster else "is not faster"
    return f"On a model this small speculative decoding {pays}: {'; '.join(told)}." if told else ""


def plots(figures: list[Figure]) -> list[Plot]:
    drawn: list[Plot] = []
    for metric, title, y in (
        ("tokens_per_step", "Tokens of a decoding step", "tokens a step"),
        ("speedup", "Speed with drafts", "times the speed without"),
    ):
        found = {f"depth {f.case['depth']}, temperature {f.case['temperature']}": f for f in pick(figures, metric)}
        drawn += over_labels(title, y, {"measured": found}, kind="bars", predicted=True)
    return drawn
