"""Which products of a training step lose how much to FP8, measured on the matrices of a real one."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.question import Case, Figure, Plot, Question, Series, Setting, pick
from dsmini import RunConfig, Transformer
from dsmini.checkpoint.slots import fp8_weights
from dsmini.config import ModelConfig, TrainConfig
from dsmini.data.corpus import load_corpus
from dsmini.measure.timing import spread
from dsmini.nn import Experts, Linear
from dsmini.numerics import (
    ACTIVATION_TILE,
    AMAX_MIN,
    E4M3,
    E5M2,
    SMALLEST_AMAX,
    TOKEN_TILE,
    WEIGHT_TILE,
    Format,
    round_tiles,
    tile_scales,
)
from dsmini.numerics.tiles import FormatName, Scale, Tile
from dsmini.training.trainer import Trainer

NAME = "fp8-error"
CORPUS = Path("runs/corpus")
QUICK = ModelConfig(
    dim=256,
    inter_dim=512,
    moe_inter_dim=128,
    n_layers=2,
    n_heads=4,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_mtp_layers=0,
)
"""Small, and its tiles exist: all that is summed over is a multiple of 128."""
STEPS, QUICK_STEPS = 24, 20
ROWS, QUICK_ROWS = 4, 2
"""Sequences of the step whose matrices are looked at."""
PRODUCTS = ("fprop", "dgrad", "wgrad")
OPERANDS = ("input", "weight", "gradient", "gradient by token")


def operand_error(format: Format) -> float:
    """Expected relative error (RMS) of rounding to a format, within its normal numbers.

    A value with fraction f, 1 <= f < 2, is off by at most half a step of 2^-m, uniformly, so by 2^-m / sqrt(12) / f of
    itself; over fractions as they come when scales are arbitrary, evenly by logarithm, 1 / f^2 is 3 / (8 ln 2).
    """
    return 2.0**-format.mantissa_bits / math.sqrt(12) * math.sqrt(3 / (8 * math.log(2)))


def product_error(a: Format, b: Format) -> float:
    """Expected relative error of a product of two rounded matrices, however long its sums: where terms are of either
    sign their errors add up as they do."""
    return math.hypot(operand_error(a), operand_error(b))


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """y = x w^T of a training step, in FP32: x [n, k], w [o, k], and the gradient dy [n, o]."""

    block: str
    linear: str
    x: Tensor
    w: Tensor
    dy: Tensor
    saved_format: FormatName = "e4m3"
    """What x is kept in for wgrad."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How operands are rounded."""

    scale: Scale = "ue8m0"
    grad_format: FormatName = "e4m3"
    tiles: bool = True
    """A scale for each tile, or one for the whole matrix."""

    def round(self, t: Tensor, tile: Tile, format: FormatName = "e4m3", amax_min: float = AMAX_MIN) -> Tensor:
        return round_tiles(t, self.tile(t, tile), self.scale, format, amax_min, torch.float32)

    def gradient(self, dy: Tensor, tile: Tile) -> Tensor:
        return self.round(dy, tile, self.grad_format, SMALLEST_AMAX)

    def tile(self, t: Tensor, tile: Tile) -> Tile:
        return tile if self.tiles else (t.shape[0], t.shape[1])


WAYS = {
    "tiles": Way(),
    "one scale": Way(tiles=False),
    "e5m2 gradients": Way(grad_format="e5m2"),
    "fp32 scales": Way(scale="fp32"),
}


def rounded_products(g: Gemm, way: Way) -> dict[str, Tensor]:
    """fprop, dgrad and wgrad of rounded operands, multiplied and summed in FP32."""
    x, w = way.round(g.x, ACTIVATION_TILE), way.round(g.w, WEIGHT_TILE)
    if g.saved_format == "e4m3":
        kept = x
    else:  # scales are powers of two then, whatever the others
        kept = dataclasses.replace(way, scale="ue8m0").round(g.x, ACTIVATION_TILE, g.saved_format)
    dy, dy_by_token = way.gradient(g.dy, ACTIVATION_TILE), way.gradient(g.dy, TOKEN_TILE)
    return {"fprop": x @ w.T, "dgrad": dy @ w, "wgrad": dy_by_token.T @ way.round(kept, TOKEN_TILE)}


def exact_products(g: Gemm) -> dict[str, Tensor]:
    """The same of what was not rounded."""
    return {"fprop": g.x @ g.w.T, "dgrad": g.dy @ g.w, "wgrad": g.dy.T @ g.x}


def captured(model: Transformer, tokens: Tensor, targets: Tensor) -> list[Gemm]:
    """Every product that precision "fp8" rounds, in one step of a native model: its matrices by hooks. The experts', of
    which a module hides what lies between, are computed again, one expert after the other."""
    seen: dict[str, tuple[Any, ...]] = {}
    grads: dict[str, Tensor] = {}
    names = {id(module): name.rsplit(".", 1)[0] for name, (module, _) in fp8_weights(model).items()}

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        name = names[id(module)]
        seen[name] = tuple(t.detach() for t in inputs)
        output.register_hook(lambda grad: grads.__setitem__(name, grad.detach()))

    modules = {names[id(m)]: m for m in model.modules() if id(m) in names}
    hooks = [module.register_forward_hook(look) for module in modules.values()]
    model.losses(tokens, targets).total.backward()
    model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return [gemm for name, module in modules.items() for gemm in _gemms(name, module, seen[name], grads[name])]


@torch.no_grad()
def _gemms(name: str, module: nn.Module, inputs: tuple[Any, ...], grad: Tensor) -> Iterator[Gemm]:
    block, _, linear = name.partition(".attn.") if ".attn." in name else name.partition(".ffn")
    block, linear = _block(block), linear.strip(".").replace("shared_experts", "shared")
    if isinstance(module, Linear):
        x, dy = (t.float().flatten(0, -2) for t in (inputs[0], grad))
        yield Gemm(block=block, linear=linear, x=x, w=module.weight.detach(), dy=dy, saved_format=module.saved_format)
        return
    assert isinstance(module, Experts)
    rows, indices, weights, _ = inputs
    for j, (w1, w2, w3) in enumerate(zip(module.w1, module.w2, module.w3, strict=True)):
        token, choice = (indices == j).nonzero(as_tuple=True)
        if not len(token):
            continue
        x, dy = rows[token].float(), grad[token].float() * weights[token, choice, None]
        gate, up = x @ w1.T, x @ w3.T
        dh = dy @ w2
        yield Gemm(block=block, linear="experts.w2", x=F.silu(gate) * up, w=w2.detach(), dy=dy)
        dgate = torch.ops.aten.silu_backward(dh * up, gate)
        yield Gemm(block=block, linear="experts.w1", x=x, w=w1.detach(), dy=dgate)
        yield Gemm(block=block, linear="experts.w3", x=x, w=w3.detach(), dy=dh * F.silu(gate))


def _block(path: str) -> str:
    """layers.2 is block 2, mtp.0.block MTP 1."""
    number = int(path.split(".")[1])
    return f"MTP {number + 1}" if path.startswith("mtp") else f"block {number}"


def _shape(quick: bool) -> ModelConfig:
    return QUICK if quick else dataclasses.replace(_fp8_config().model, precision="native")


def _fp8_config() -> RunConfig:
    return RunConfig.from_file(Path(__file__).parents[2] / "configs" / "fp8.toml")


def trained(config: ModelConfig, steps: int, setting: Setting, batch_size: int = 4) -> Trainer:
    """A Trainer after a few steps on the default corpus."""
    torch.manual_seed(0)
    run = RunConfig(model=config, train=TrainConfig(steps=max(2, steps), batch_size=batch_size))
    corpus = load_corpus(run.data, run.seq_len, config.vocab_size, CORPUS)
    with torch.device(setting.device):
        model = Transformer(config, compute_dtype=setting.dtype)
    trainer = Trainer(model, corpus, run, setting.device)
    for _ in range(steps):
        trainer.step()
    trainer.loader.close()
    return trainer


@dataclass
class _Sum:
    """A ratio of sums."""

    part: float = 0.0
    whole: float = 0.0

    def add(self, part: Tensor, whole: Tensor) -> None:
        self.part += part.double().item()
        self.whole += whole.double().item()

    @property
    def value(self) -> float:
        return self.part / self.whole if self.whole else 0.0


def _measure(setting: Setting) -> Iterator[Figure]:
    quick = setting.quick
    trainer = trained(_shape(quick), QUICK_STEPS if quick else STEPS, setting)
    model = trainer.model
    model.compute_dtype = torch.float32
    tokens, targets = trainer.corpus.batch(trainer.sequences, QUICK_ROWS if quick else ROWS, trainer.config.seq_len, 0)
    gemms = captured(model, tokens.to(setting.device), targets.to(setting.device))
    yield from figures(gemms)


@torch.no_grad()
def figures(gemms: Iterable[Gemm]) -> Iterator[Figure]:
    """What a step's products lose."""
    errors: dict[tuple[str, str, str, str], _Sum] = defaultdict(_Sum)
    flushed: dict[tuple[str, str, str], _Sum] = defaultdict(_Sum)
    clamped = {operand: 0 for operand in OPERANDS}
    for g in gemms:
        exact = exact_products(g)
        for name, way in WAYS.items():
            for product, y in rounded_products(g, way).items():
                sums = errors[name, g.block, g.linear, product]
                sums.add((y - exact[product]).square().sum(), exact[product].square().sum())
        for operand, (t, tile, amax_min) in _operands(g).items():
            for name in ("tiles", "one scale"):
                r = WAYS[name].round(t, tile, "e4m3", amax_min)
                flushed[name, g.linear, operand].add(((r == 0) & (t != 0)).sum(), (t != 0).sum())
            clamped[operand] += _clamped(t, tile, amax_min)
    yield from _error_figures({key: math.sqrt(s.value) for key, s in errors.items()})
    for (name, linear, operand), s in flushed.items():
        case = {"linear": linear, "operand": operand, "scales": name}
        yield Figure(question=NAME, case=case, metric="underflow", unit="", measured=s.value, better="lower")
    for operand, count in clamped.items():
        yield Figure(
            question=NAME,
            case={"operand": operand},
            metric="clamped",
            unit="values",
            measured=count,
            predicted=0,
            exact=True,
            note="a tile's scale is made of its largest value",
        )


def _operands(g: Gemm) -> dict[str, tuple[Tensor, Tile, float]]:
    return {
        "input": (g.x, ACTIVATION_TILE, AMAX_MIN),
        "weight": (g.w, WEIGHT_TILE, AMAX_MIN),
        "gradient": (g.dy, ACTIVATION_TILE, SMALLEST_AMAX),
        "gradient by token": (g.dy, TOKEN_TILE, SMALLEST_AMAX),
    }


def _clamped(t: Tensor, tile: Tile, amax_min: float) -> int:
    """How many values lie beyond the largest code."""
    scales = tile_scales(t, tile, "ue8m0", "e4m3", amax_min)
    spread_out = scales.repeat_interleave(tile[0], 0)[: t.shape[0]].repeat_interleave(tile[1], 1)[:, : t.shape[1]]
    return int((t.abs() > spread_out * E4M3.max).sum())


def _error_figures(errors: dict[tuple[str, str, str, str], float]) -> Iterator[Figure]:
    expected = product_error(E4M3, E4M3)
    ratios: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for (name, block, linear, product), error in errors.items():
        if name == "tiles":
            yield Figure(
                question=NAME,
                case={"block": block, "linear": linear, "product": product},
                metric="error",
                unit="",
                measured=error,
                predicted=expected,
                better="lower",
            )
        elif errors["tiles", block, linear, product]:
            where = linear if name == "one scale" else "all"
            ratios[name, where, product].append(error / errors["tiles", block, linear, product])
    e5m2 = product_error(E4M3, E5M2) / expected
    metrics: dict[str, tuple[str, Callable[[str], float | None], Literal["higher", "lower"] | None]] = {
        "one scale": ("gain_of_tiles", lambda product: None, "higher"),
        "e5m2 gradients": ("error_with_e5m2_gradients", lambda product: 1.0 if product == "fprop" else e5m2, None),
        "fp32 scales": ("error_with_fp32_scales", lambda product: 1.0, None),
    }
    for (name, linear, product), values in ratios.items():
        metric, predicted, better = metrics[name]
        yield Figure(
            question=NAME,
            case={"linear": linear, "product": product},
            metric=metric,
            unit="x",
            predicted=predicted(product),
            better=better,
            note="over the error with a power-of-two scale a tile; quartiles over "
            + ("blocks" if name == "one scale" else "blocks and Linears"),
            **spread(values),
        )


def cases(setting: Setting) -> list[Case]:
    steps = QUICK_STEPS if setting.quick else STEPS
    seconds = 3.0 if setting.quick else 70.0
    return [Case(key=f"steps={steps}", seconds=seconds, run=lambda: _measure(setting))]


def finding(figures: list[Figure]) -> str:
    errors = [f for f in pick(figures, "error") if f.measured is not None]
    if not errors:
        return "Nothing was measured yet."
    parts = [f"{product} {_middle(pick(errors, 'error', product=product)):.1%}" for product in _products(errors)]
    worst = max(errors, key=lambda f: f.measured or 0.0)
    text = (
        f"FP8 products are off by {', '.join(parts)} of their size (medians; {product_error(E4M3, E4M3):.1%} is what "
        f"rounding makes of sums whose terms have either sign), at most {worst.measured:.1%}, in "
        f"{worst.case['product']} of {worst.case['linear']} in {worst.case['block']}"
    )
    gains = [f for f in pick(figures, "gain_of_tiles") if f.measured is not None]
    if gains:
        best = max(gains, key=lambda f: f.measured or 0.0)
        most = best.measured or 0.0
        text += f"; with one scale a tensor the errors would be {_middle(gains):.2f} times as large"
        if most > 1.01:
            text += f", at most {most:.2f} times, in {best.case['product']} of {best.case['linear']}"
    return text + "."


def _middle(figures: list[Figure]) -> float:
    return spread([f.measured or 0.0 for f in figures])["measured"]


def _products(figures: list[Figure]) -> list[str]:
    return [product for product in PRODUCTS if pick(figures, "error", product=product)]


def plots(figures: list[Figure]) -> list[Plot]:
    drawn: list[Plot] = []
    errors = pick(figures, "error")
    if errors:
        groups = {product: pick(errors, "error", product=product) for product in PRODUCTS}
        labels, series = _points(groups, lambda f: f"{f.case['block']} {f.case['linear']}")
        expected = product_error(E4M3, E4M3)
        series.append(Series(label="rounding alone", x=[0, max(1, len(labels) - 1)], y=[expected] * 2, dashed=True))
        caption = "Of the result, against the FP32 product of what was not rounded; experts of a layer together."
        title = "Relative error of FP8 products"
        drawn.append(Plot(title=title, x="", y="relative error", series=series, labels=labels, caption=caption))
    flushed = pick(figures, "underflow")
    if flushed:
        groups = {
            f"{operand}, {scales}": pick(flushed, "underflow", scales=scales, operand=operand)
            for scales in ("tiles", "one scale")
            for operand in OPERANDS[:3]
        }
        labels, series = _points(groups, lambda f: str(f.case["linear"]))
        caption = "Of those that were not zero before; all blocks together."
        title = "Values that become zero"
        drawn.append(Plot(title=title, x="", y="share of the values", series=series, labels=labels, caption=caption))
    return [plot for plot in drawn if plot.labels]


def _points(groups: dict[str, list[Figure]], label: Callable[[Figure], str]) -> tuple[list[str], list[Series]]:
    """The labels that there are, and each group's points over them."""
    labels = list(dict.fromkeys(label(f) for found in groups.values() for f in found))
    return labels, [
        Series(
            label=name, x=[labels.index(label(f)) for f in found], y=[f.measured or 0.0 for f in found], kind="points"
        )
        for name, found in groups.items()
        if found
    ]


QUESTION = Question(
    name=NAME,
    title="Which products lose how much?",
    cases=cases,
    finding=finding,
    plots=plots,
    about=(
        "The shape of configs/fp8.toml (quick: a smaller one) is trained natively for a few steps on real text. Of one "
        "more step the inputs, weights and output gradients of all Linears that FP8 training rounds are caught, and "
        "each product is made twice in FP32: of them, and of them rounded to E4M3 as DeepSeek-V3 does. Simulated: "
        "sums are FP32's. Simplified: the input of w2 is kept itself, not its two factors."
    ),
)
