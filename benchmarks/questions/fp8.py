"""FP8 in training: the error of each product, and the bytes and time of a step.

Errors: a model of the shape of configs/fp8.toml (quick: a smaller one) trains natively for a few steps on real text.
One more step yields inputs, weights and output gradients of all Linears and experts that FP8 training rounds. Each of
their products y = x w^T (fprop), dx = dy w (dgrad) and dw = dy^T x (wgrad) is then computed by dsmini.fp8_matmul, and
in FP32 without rounding. Simplified: the input of w2 is rounded itself, not its two factors.

Bytes and time: those that the Linears of configs/fp8.toml save for backward, and whole training steps, with kernels and
in plain PyTorch; all sides take turns. Simulated: values are rounded to FP8 and multiplied in BF16 with sums in FP32,
so FP8 costs time here, while FP8 hardware saves some. Source: DeepSeek-V3 report, section 3.3.
"""

import dataclasses
import math
import operator
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import models
from benchmarks.models import recipe, trainer, training_flops
from benchmarks.question import (
    Case,
    Figure,
    Question,
    Setting,
    drawing,
    figure,
    left_out,
    pick,
    race,
    seconds_of_products,
    times,
)
from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer, accounting, fp8_matmul, ops
from dsmini.measure.memory import saved_for_backward
from dsmini.measure.roofs import why_unusable
from dsmini.nn.fp8 import fp8_weights
from dsmini.numerics import AMAX_MIN, E4M3, E5M2, SMALLEST_AMAX, Format, round_tiles

QUICK = dataclasses.replace(
    models.TRAINED, n_layers=2, inter_dim=512, moe_inter_dim=128, q_lora_rank=128, kv_lora_rank=128
)
"""Small model with whole tiles: each sum runs over a multiple of 128."""
STEPS, QUICK_STEPS, BATCH = 24, 20, 4
ROWS, QUICK_ROWS = 4, 2
"""Sequences of the step whose products are computed twice."""
PRODUCTS = ("fprop", "dgrad", "wgrad")


def operand_error(format: Format) -> float:
    """Return the expected relative error (RMS) of rounding to a format, within its normal numbers.

    A value with fraction f, 1 <= f < 2, has a uniform error of at most half a step of 2^-m. Its relative RMS error is
    2^-m / sqrt(12) / f. With arbitrary scales log f is uniform, and the mean of 1 / f^2 is 3 / (8 ln 2).
    """
    return 2.0**-format.mantissa_bits / math.sqrt(12) * math.sqrt(3 / (8 * math.log(2)))


def product_error(a: Format, b: Format) -> float:
    """Return the expected relative error of a product of two rounded matrices.

    It does not depend on the length of the sums: with terms of either sign, errors add up as the terms do.
    """
    return math.hypot(operand_error(a), operand_error(b))


EXPECTED = product_error(E4M3, E4M3)


# --- the products of a step


class Gemm(NamedTuple):
    """Product y = x w^T of a training step: x [n, k], w [o, k], and the gradient dy [n, o]."""

    name: str
    """Name of the parameter w."""
    x: Tensor
    w: Tensor
    dy: Tensor

    def exact(self) -> tuple[Tensor, ...]:
        """Return y, dx and dw without rounding."""
        return self.x @ self.w.T, self.dy @ self.w, self.dy.T @ self.x

    def rounded(self, **how: Any) -> tuple[Tensor, ...]:
        """Return y, dx and dw as FP8 training computes them; the arguments are those of fp8_matmul."""
        x, w = self.x.clone().requires_grad_(), self.w.clone().requires_grad_()
        saved: Any = "e5m6" if self.name.endswith("wo.weight") else "e4m3"  # of the Linear after attention
        y = fp8_matmul(x, w, saved_format=saved, **how)
        return (y.detach(), *torch.autograd.grad(y, (x, w), self.dy))

    def rounded_whole(self) -> tuple[Tensor, ...]:
        """Return y, dx and dw of operands with one scale for a whole matrix."""
        operands = ((self.x, AMAX_MIN), (self.w, AMAX_MIN), (self.dy, SMALLEST_AMAX))
        x, w, dy = (round_tiles(t, (t.shape[0], t.shape[1]), "ue8m0", "e4m3", a, torch.float32) for t, a in operands)
        return Gemm(self.name, x, w, dy).exact()


WAYS: Mapping[str, Callable[[Gemm], tuple[Tensor, ...]]] = {
    "tiles": Gemm.rounded,
    "one scale": Gemm.rounded_whole,
    "e5m2 gradients": partial(Gemm.rounded, grad_format="e5m2"),
    "fp32 scales": partial(Gemm.rounded, scale="fp32"),
}
"""DeepSeek-V3's way to round, and alternatives."""


class _Recorder(TorchFunctionMode):
    """Record each product with one of these parameters, in PyTorch code."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in parameters.items()}
        self.gemms: list[Gemm] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func in (F.linear, torch.Tensor.matmul, torch.Tensor.__matmul__):
            x, w = args[0], args[1] if func is F.linear else args[1].mT
            # an expert's matrix is a view of the stack
            if name := self.names.get(id(args[1] if args[1]._base is None else args[1]._base)):
                y.register_hook(lambda dy: self._add(name, x, w, dy))
        return y

    def _add(self, name: str, x: Tensor, w: Tensor, dy: Tensor) -> None:
        self.gemms.append(Gemm(name, x.detach().flatten(0, -2), w.detach(), dy.flatten(0, -2)))


def record(model: Transformer, tokens: Tensor, targets: Tensor) -> list[Gemm]:
    """Return every product that precision "fp8" rounds, in one step of a native model in FP32."""
    with ops.use("reference"), _Recorder({n: model.get_parameter(n) for n in fp8_weights(model)}) as recorder:
        model.losses(tokens, targets).total.backward()
    model.zero_grad(set_to_none=True)
    return recorder.gemms


def errors_of(gemms: Sequence[Gemm]) -> dict[tuple[str, str, str], float]:
    """Return the relative error of products by way, parameter and product; experts of a block count together."""
    sums: dict[tuple[str, str, str], Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    for g in gemms:
        exact = g.exact()
        for way, rounded in WAYS.items():
            for product, y, want in zip(PRODUCTS, rounded(g), exact, strict=True):
                sums[way, g.name, product] += torch.stack(((y - want).square().sum(), want.square().sum())).cpu()
    return {key: math.sqrt(off / whole) if whole else 0.0 for key, (off, whole) in sums.items()}


def error_cases(setting: Setting) -> list[Case]:
    config = QUICK if setting.quick else dataclasses.replace(recipe("fp8").model, precision="native")
    steps, seconds = (QUICK_STEPS, 3.0) if setting.quick else (STEPS, 70.0)
    seconds += seconds_of_products(training_flops(config, steps * BATCH), setting.dtype, setting)
    return [Case(key=f"steps={steps}", seconds=seconds, run=lambda: errors(setting, config, steps))]


def errors(setting: Setting, model: ModelConfig, steps: int) -> Iterator[Figure]:
    """Train natively for a few steps, and yield the errors of the products of one more."""
    config = RunConfig(model=model, train=TrainConfig(steps=max(2, steps), batch_size=BATCH))
    trained = trainer(config, setting, steps)
    trained.loader.close()
    trained.model.compute_dtype = torch.float32
    rows = QUICK_ROWS if setting.quick else ROWS
    tokens, targets = trained.corpus.batch(trained.sequences, rows, config.seq_len, 0)
    found = errors_of(record(trained.model, tokens.to(setting.device), targets.to(setting.device)))
    others: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (way, name, product), error in found.items():
        if way == "tiles":
            yield figure("error", {"weight": name, "product": product}, error, predicted=EXPECTED)
        elif plain := found["tiles", name, product]:
            others[way, product].append(error / plain)
    for (way, product), ratios in others.items():
        e5m2 = way == "e5m2 gradients" and product != "fprop"
        predicted = None if way == "one scale" else product_error(E4M3, E5M2) / EXPECTED if e5m2 else 1.0
        note = "median over all products of the error, over that with a power-of-two scale a tile"
        case = {"rounded with": way, "product": product}
        yield figure("times_the_error", case, statistics.median(ratios), predicted=predicted, note=note)


def error_answer(figures: list[Figure]) -> str:
    measured = [f for f in pick(figures, "error") if f.measured is not None]
    if not measured:
        return ""
    by_product = {p: [f.measured or 0.0 for f in measured if f.case["product"] == p] for p in PRODUCTS}
    parts = [f"{product} {statistics.median(found):.1%}" for product, found in by_product.items() if found]
    worst = max(measured, key=lambda f: f.measured or 0.0)
    where = " of ".join(str(worst.case[key]) for key in ("product", "weight"))
    text = f"Median relative errors of FP8 products: {', '.join(parts)} ({EXPECTED:.1%} are expected from rounding)"
    text += f"; at most {worst.measured:.1%}, in {where}"
    one = [f.measured for f in pick(figures, "times_the_error", **{"rounded with": "one scale"}) if f.measured]
    more = f"; with one scale for a whole matrix they are {statistics.median(one):.2f} times as large" if one else ""
    return f"{text}{more}."


ERRORS = Question(
    name="fp8-error",
    title="How large is the error of each product in FP8?",
    about=__doc__,
    cases=error_cases,
    answer=error_answer,
    plots=(
        drawing(
            *("error", "Relative error of FP8 products; experts of a layer together", "{weight}"),
            by="product",
            line=("rounding alone", EXPECTED),
        ),
    ),
)


# --- a whole step

BF16, FP8, PLAIN = "bfloat16", "fp8", "fp8 in plain PyTorch"
KEPT = (1 + 4 / 128) / 2
"""Bytes of an activation in FP8, a code and its share of an FP32 scale, over those in BF16."""


def step_cases(setting: Setting) -> list[Case]:
    bf16 = dataclasses.replace(setting, dtype=torch.bfloat16)
    return [Case(key="step", seconds=6.0 if setting.quick else 60.0, run=partial(measure, bf16))]


def measure(setting: Setting) -> Iterator[Figure]:
    """Yield the bytes saved for backward, and the time of training steps, with kernels and in plain PyTorch."""
    if reason := why_unusable(torch.bfloat16, setting.roofs.peak):
        yield left_out("times_as_long", {"format": FP8}, reason)
        return
    run, trainers = trained_config(setting.quick), {}
    for name in (BF16, FP8, PLAIN):
        config = dataclasses.replace(run.model, precision="native" if name == BF16 else "fp8")
        trainers[name] = trainer(dataclasses.replace(run, model=config), setting)
    b, s = run.train.batch_size, run.seq_len
    tokens = torch.randint(0, run.model.vocab_size, (b, s + 1)).to(setting.device)
    saved = {name: saved_for_backward(trainers[name].model, tokens) for name in (BF16, FP8)}
    for name, held in saved.items():
        size: Any = {"batch_size": b, "seq_len": s, "dtype": "bfloat16"}
        least = accounting.activation_bytes(trainers[name].config.model, **size).total
        note = f"of a training step on {b * s:,} tokens; predicted: lower bound, with fused attention"
        yield figure("kept", {"format": name}, float(held.total), predicted=least, bound=True, note=note)
    for what, part in (("Linears", "by_linears"), ("all", "total")):
        ratio, predicted = (getattr(saved[name], part) for name in (FP8, BF16)), KEPT if what == "Linears" else None
        note = "predicted: a code and its share of a scale" * (what == "Linears")
        yield figure("kept_ratio", {"what": what}, operator.truediv(*ratio), predicted=predicted, note=note)

    def step(name: str) -> None:
        with ops.use("eager" if name == PLAIN else None):
            trainers[name].step()

    note = "a whole training step; values are rounded to FP8 and multiplied as BF16"
    yield from race(setting, {}, {n: partial(step, n) for n in trainers}, key="format", note=note)
    for each in trainers.values():
        each.loader.close()


def trained_config(quick: bool) -> RunConfig:
    """Return configs/fp8.toml; for quick two layers and 320 tokens, a number that is none of its widths."""
    config = recipe("fp8")
    if not quick:
        return config
    model = dataclasses.replace(config.model, n_layers=2, n_mtp_layers=0, max_seq_len=160)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, batch_size=2))


def step_answer(figures: list[Figure]) -> str:
    told = [f"a step takes {times(f)} as long" for f in pick(figures, "times_as_long", format=FP8) if f.measured]
    words = {"Linears": "its Linears store {:.0%} of the bytes for backward", "all": "all that it stores is {:.0%}"}
    told += [words[str(f.case["what"])].format(f.measured) for f in pick(figures, "kept_ratio")]
    return f"Training in simulated FP8, next to BF16: {'; '.join(told)}." if told else ""


STEP = Question(
    name="fp8",
    title="How many bytes does FP8 save in training, and how much time does it cost here?",
    about=__doc__,
    cases=step_cases,
    answer=step_answer,
    plots=(drawing("times_as_long", "Time of a training step in FP8, next to BF16", "{format}", kind="bars"),),
)
