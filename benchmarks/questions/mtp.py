"""Speculative decoding with multi-token prediction: how often guesses are right, and what that gains."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.question import Case, Figure, Plot, Question, Series, Setting, Value, pick
from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.data.corpus import Corpus, load_corpus
from dsmini.inference.generation import Generation, Stats, generate
from dsmini.measure import prediction
from dsmini.measure.counting import count
from dsmini.measure.timing import spread
from dsmini.training.trainer import Trainer

NAME = "mtp"
CORPUS = Path("runs/corpus")
TEMPERATURES = (0.0, 0.8)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is trained and generated."""

    model: ModelConfig
    steps: int
    batch_size: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    depths: tuple[int, ...]
    seconds: float
    """Of a depth, estimated."""


FULL = Size(
    model=ModelConfig(),
    steps=160,
    batch_size=4,
    prompts=6,
    prompt_tokens=64,
    new_tokens=160,
    depths=(1, 2),
    seconds=55,
)
QUICK = Size(
    model=ModelConfig(
        dim=128,
        inter_dim=384,
        moe_inter_dim=64,
        n_layers=3,
        n_routed_experts=8,
        n_activated_experts=2,
        n_expert_groups=1,
        n_limited_groups=1,
    ),
    steps=60,
    batch_size=4,
    prompts=3,
    prompt_tokens=48,
    new_tokens=64,
    depths=(1,),
    seconds=8,
)


def size(quick: bool) -> Size:
    return QUICK if quick else FULL


def tokens_per_step(kept: list[float]) -> float:
    """Expected, where the guess of depth k is kept with probability kept[k - 1] if those before it were: one token, and
    for each depth the product up to it. Depth 1: 1 + acceptance; evenly good guesses: a geometric series."""
    total = probability = 1.0
    for each in kept:
        probability *= each
        total += probability
    return total


def trained(depth: int, setting: Setting, of: Size) -> tuple[Transformer, Corpus]:
    """A model of this depth, trained for a short while on the default corpus, to generate in FP32."""
    torch.manual_seed(0)
    model_config = dataclasses.replace(of.model, n_mtp_layers=depth)
    config = RunConfig(model=model_config, train=TrainConfig(steps=of.steps, batch_size=of.batch_size))
    corpus = load_corpus(config.data, config.seq_len, model_config.vocab_size, CORPUS)
    with torch.device(setting.device):
        model = Transformer(model_config, compute_dtype=setting.dtype)
    trainer = Trainer(model, corpus, config, setting.device)
    for _ in range(of.steps):
        trainer.step()
    trainer.loader.close()
    model.compute_dtype = None  # BF16 logits tie, and ties are broken otherwise in steps of several tokens
    return model.eval(), corpus


def step_seconds(model: Transformer, prompt: Tensor, speculative: bool, setting: Setting) -> float:
    """Expected of a decoding step, from the operations that it counts."""
    generation = Generation(model, [prompt.tolist()], 8, speculative=speculative)
    for _ in range(2):  # reads the prompt; prepares what later steps reuse
        next(generation)
    return prediction.seconds(count(lambda: next(generation), setting.roofs.cache_bytes), setting.roofs)


@torch.inference_mode()
def expected_acceptance(model: Transformer, tokens: Tensor, temperature: float) -> list[float]:
    """For each depth, how probably its guess is kept behind text as it is, given that the guesses before it were right:
    sum of min(p, q) over the vocabulary, or for greedy decoding whether both prefer the same token."""
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


def _measure(depth: int, setting: Setting) -> Iterator[Figure]:
    of = size(setting.quick)
    model, corpus = trained(depth, setting, of)
    windows = corpus.windows(model.config.max_seq_len, of.prompts * model.config.max_seq_len)
    tokens = torch.cat([tokens for tokens, _ in windows.blocks(of.prompts)]).to(setting.device)
    prompts = [row[: of.prompt_tokens] for row in tokens]
    cost = step_seconds(model, prompts[0], True, setting) / step_seconds(model, prompts[0], False, setting)
    for temperature in TEMPERATURES:
        expected = expected_acceptance(model, tokens, temperature)
        plain, guessing = _turns(model, prompts, temperature, of)
        yield from _figures(depth, temperature, expected, cost, plain, guessing)


def _turns(model: Transformer, prompts: list[Tensor], temperature: float, of: Size) -> tuple[list[Stats], list[Stats]]:
    """Each prompt continued without and with guesses, in turns; one more at first, which does not count."""
    stats: dict[bool, list[Stats]] = {False: [], True: []}
    for i, prompt in enumerate([prompts[0], *prompts]):
        rows: list[Tensor] = []
        for speculative in (False, True):
            generator = torch.Generator(prompt.device).manual_seed(i)
            done = generate(
                model,
                prompt[None],
                of.new_tokens,
                temperature=temperature,
                speculative=speculative,
                generator=generator,
            )
            rows.append(done.tokens)
            if i:
                stats[speculative].append(done.stats)
        assert temperature or torch.equal(*rows), f"guesses changed the greedy continuation of prompt {i}"
    return stats[False], stats[True]


def _figures(
    depth: int,
    temperature: float,
    expected: list[float],
    cost: float,
    plain: list[Stats],
    guessing: list[Stats],
) -> Iterator[Figure]:
    case: Mapping[str, Value] = {"depth": depth, "temperature": temperature}
    tokens = tokens_per_step(expected)
    drafted_kept = (tokens - 1) / depth  # of all guesses, those behind a refused one included
    faster = [g.tokens_per_s / p.tokens_per_s for p, g in zip(plain, guessing, strict=True)]
    note = "predicted from held-out text; quartiles over prompts"
    figures: list[tuple[str, str, float, Callable[[Stats], float]]] = [
        ("acceptance", "", drafted_kept, lambda s: s.acceptance_rate),
        ("tokens_per_step", "tokens", tokens, lambda s: s.tokens_per_step),
    ]
    for metric, unit, predicted, read in figures:
        yield Figure(
            question=NAME,
            case=case,
            metric=metric,
            unit=unit,
            predicted=predicted,
            better="higher",
            note=note,
            **spread([read(s) for s in guessing]),
        )
    yield Figure(
        question=NAME,
        case=case,
        metric="speedup",
        unit="x",
        predicted=tokens / cost,
        better="higher",
        note="predicted: tokens a step over the cost of a step, by counted operations; quartiles over prompts",
        **spread(faster),
    )
    for name, stats in (("no guesses", plain), ("guesses", guessing)):
        yield Figure(
            question=NAME,
            case={**case, "with": name},
            metric="tokens_per_s",
            unit="tokens/s",
            better="higher",
            **spread([s.tokens_per_s for s in stats]),
        )
    if temperature == 0:
        yield Figure(
            question=NAME,
            case=case,
            metric="same_continuations",
            unit="prompts",
            measured=len(guessing),  # else _turns would have raised
            predicted=len(plain),
            exact=True,
            note="greedy, with guesses and without",
        )


def cases(setting: Setting) -> list[Case]:
    of = size(setting.quick)
    return [
        Case(
            key=f"depth={depth} steps={of.steps}", seconds=of.seconds, run=lambda depth=depth: _measure(depth, setting)
        )
        for depth in of.depths
    ]


def finding(figures: list[Figure]) -> str:
    told = []
    for f in pick(figures, "speedup"):
        steps = pick(figures, "tokens_per_step", **f.case)
        if f.measured is not None and steps and steps[0].measured is not None:
            how = f"at temperature {f.case['temperature']}" if f.case["temperature"] else "greedily"
            gain = f"{f.measured:.2f} times as fast"
            told.append(f"depth {f.case['depth']} {how} {gain} with {steps[0].measured:.2f} tokens a step")
    if not told:
        return "Nothing was measured yet."
    faster = sum((f.low or 0.0) > 1 for f in pick(figures, "speedup"))  # beyond what prompts differ by
    pays = f"pays in {faster} of {len(told)} cases" if faster else "does not pay"
    return f"On a toy this small guessing ahead {pays}: {'; '.join(told)}."


def plots(figures: list[Figure]) -> list[Plot]:
    drawn: list[Plot] = []
    for metric, title, y in (
        ("tokens_per_step", "Tokens of a decoding step", "tokens a step"),
        ("speedup", "Speed with guesses", "times the speed without"),
    ):
        found = [f for f in pick(figures, metric) if f.measured is not None]
        if not found:
            continue
        x = list(range(len(found)))
        measured = Series(
            label="measured",
            x=x,
            y=[f.measured or 0.0 for f in found],
            low=[f.low or 0.0 for f in found],
            high=[f.high or 0.0 for f in found],
            kind="bars",
        )
        predicted = Series(label="predicted", x=x, y=[f.predicted or 0.0 for f in found], kind="points")
        labels = [f"depth {f.case['depth']}, temperature {f.case['temperature']}" for f in found]
        drawn.append(Plot(title=title, x="", y=y, series=[measured, predicted], labels=labels))
    return drawn


QUESTION = Question(
    name=NAME,
    title="Does guessing ahead pay?",
    cases=cases,
    finding=finding,
    plots=plots,
    about=(
        "A small model is trained for a short while on real text, then continues held-out prompts one by one without "
        "and with the guesses of its multi-token prediction, in turns, in FP32. Predicted: from how often trunk and "
        "guess agree on held-out text, and what the operations of a step cost by this machine's rates."
    ),
)
