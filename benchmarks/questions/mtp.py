"""Does guessing ahead pay?

A small model is trained for a short while on real text, then continues held-out prompts one by one without and with
the guesses of its multi-token prediction, in turns, in FP32. A step without guesses makes one token. A step with
guesses of depth d reads d + 1 tokens at once, and keeps as many as the trunk agrees with. Predicted: from how often
trunk and guess agree on held-out text, and what the operations of a step cost by this machine's rates.
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

NAME = "mtp"
TEMPERATURES = (0.0, 0.8)

figure = Figures(
    NAME,
    higher={"acceptance": "", "tokens_per_step": "tokens", "speedup": "x", "tokens_per_s": "tokens/s"},
    neither={"same_continuations": "prompts"},
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Numbers of tokens and steps to train and to generate."""

    model: ModelConfig
    steps: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    depths: tuple[int, ...]
    seconds: float
    """Estimated time of a depth."""


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
        plain, guessing = in_turns(model, prompts, temperature, of.new_tokens)
        yield from _figures({"depth": depth, "temperature": temperature}, expected, cost, plain, guessing)


def trained(depth: int, setting: Setting, of: Size) -> tuple[Transformer, Corpus]:
    """Return a model of this depth, trained for a short while on the default corpus, to generate in FP32."""
    model_config = dataclasses.replace(of.model, n_mtp_layers=depth)
    config = RunConfig(model=model_config, train=TrainConfig(steps=of.steps, batch_size=BATCH))
    made = trainer(config, setting, of.steps)
    made.loader.close()
    made.model.compute_dtype = None  # BF16 logits tie, and ties are broken otherwise in steps of several tokens
    return made.model.eval(), made.corpus


def _figures(
    case: Mapping[str, Value], expected: float, cost: float, plain: list[Stats], guessing: list[Stats]
) -> Iterator[Figure]:
    """Tell what guesses gained.

    Args:
        expected: tokens of a step.
        cost: of a step with guesses, in steps without.
    """
    drafted_kept = (expected - 1) / int(case["depth"])  # of all guesses, those behind a refused one included
    faster = [g.tokens_per_s / p.tokens_per_s for p, g in zip(plain, guessing, strict=True)]
    note = "predicted from held-out text; quartiles over prompts"
    yield figure("acceptance", case, [s.acceptance_rate for s in guessing], predicted=drafted_kept, note=note)
    yield figure("tokens_per_step", case, [s.tokens_per_step for s in guessing], predicted=expected, note=note)
    note = "predicted: tokens a step over the cost of a step, by counted operations; quartiles over prompts"
    yield figure("speedup", case, faster, predicted=expected / cost, note=note)
    for name, stats in (("no guesses", plain), ("guesses", guessing)):
        yield figure("tokens_per_s", {**case, "with": name}, [s.tokens_per_s for s in stats])
    if not case["temperature"]:  # in_turns raises where continuations differ
        note = "greedy, with guesses and without"
        yield figure("same_continuations", case, len(guessing), predicted=len(plain), exact=True, note=note)


def step_seconds(model: Transformer, prompt: Tensor, speculative: bool, roofs: Roofs) -> float:
    """Predict the seconds of a decoding step, from the operations that it counts."""
    generation = Generation(model, [prompt.tolist()], 8, speculative=speculative)
    for _ in range(2):  # reads the prompt; prepares what later steps reuse
        next(generation)
    return prediction.seconds(count(lambda: next(generation), roofs.cache_bytes), roofs)


def tokens_per_step(kept: list[float]) -> float:
    """Compute the expected tokens of a step: one, and for each depth the chance that all guesses up to it are kept.

    Args:
        kept: at k - 1 the probability that the guess of depth k is kept if those before it were.
    """
    return 1.0 + sum(itertools.accumulate(kept, operator.mul))


@torch.inference_mode()
def expected_acceptance(model: Transformer, tokens: Tensor, temperature: float) -> list[float]:
    """Compute for each depth how probably its guess is kept after real text, if the guesses before it were right.

    That is the sum of min(p, q) over the vocabulary; in greedy decoding, the share of places where both prefer the
    same token.
    """
    out = model.run(tokens, mtp=True)
    kept: list[float] = []
    for k, logits in enumerate(out.mtp_logits, 1):
        pair = out.logits[:, k:].float(), logits.float()  # both of token i + k + 1
        if temperature:
            p, q = ((each / temperature).softmax(-1) for each in pair)
            kept.append(torch.minimum(p, q).sum(-1).mean().item())
        else:
            p, q = (each.argmax(-1) for each in pair)
            kept.append((p == q).float().mean().item())
    return kept


def in_turns(
    model: Transformer, prompts: list[Tensor], temperature: float, new_tokens: int
) -> tuple[list[Stats], list[Stats]]:
    """Continue each prompt without and with guesses, in turns; one more at first, which does not count."""
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
        assert temperature or torch.equal(*rows), f"guesses changed the greedy continuation of prompt {i}"
    return stats[False], stats[True]


def finding(figures: list[Figure]) -> str:
    told, faster = [], 0
    for f in pick(figures, "speedup"):
        tokens = values(figures, "tokens_per_step", **f.case)
        if f.measured is not None and tokens:
            how = f"at temperature {f.case['temperature']}" if f.case["temperature"] else "greedily"
            gain = f"{f.measured:.2f} times as fast with {tokens[0]:.2f} tokens a step"
            told.append(f"depth {f.case['depth']} {how} {gain}")
            faster += (f.low or 0.0) > 1  # beyond what prompts differ by
    pays = f"pays in {faster} of {len(told)} cases" if faster else "does not pay"
    return f"On a toy this small guessing ahead {pays}: {'; '.join(told)}." if told else ""


def plots(figures: list[Figure]) -> list[Plot]:
    drawn: list[Plot] = []
    for metric, title, y in (
        ("tokens_per_step", "Tokens of a decoding step", "tokens a step"),
        ("speedup", "Speed with guesses", "times the speed without"),
    ):
        found = {f"depth {f.case['depth']}, temperature {f.case['temperature']}": f for f in pick(figures, metric)}
        drawn += over_labels(title, y, {"measured": found}, kind="bars", predicted=True)
    return drawn
