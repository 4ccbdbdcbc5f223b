"""Every implementation of every operation, FP8 products and held codes among them, against its reference."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dsmini import Transformer, ops
from dsmini.functional import experts as functional_experts
from dsmini.functional.attention import trained_attention, trained_attention_gradients
from dsmini.functional.experts import prefer_loop
from dsmini.measure.costs import COSTS, cost_of
from dsmini.measure.counting import count
from dsmini.nn.attention import cached_attention, causal_attention
from dsmini.nn.compressed_attention import sink_attention
from dsmini.nn.dsa import topk_attention
from dsmini.nn.fp8 import fp8_experts, hold_all_fp8, quantized_experts, quantized_linear
from dsmini.nn.hyper_connections import read_streams, sinkhorn, stream_mixes, write_streams
from dsmini.nn.layers import linear, rms_norm
from dsmini.nn.moe import experts
from dsmini.nn.transformer import linear_cross_entropy
from dsmini.numerics import WEIGHT_TILE, QuantizedTensor, fp8_matmul, fp8_swiglu_matmul, quantize
from tests.functional.conftest import BACKENDS, SIZES, Unserved, forced, held, moved
from tests.helpers.commands import ROOT
from tests.helpers.configs import refusal
from tests.helpers.fp8 import varied
from tests.helpers.models import decoded
from tests.helpers.operations import DTYPES, Case, assert_agrees, cases, exact, expert_case, mask_of, routed, run, tied
from tests.helpers.tolerances import BF16_UNIT, E4M3_UNIT, FP32_MODEL, FP32_UNIT, moved_codes, relative_error, rounding
from tests.helpers.watching import Operations, saved_for_backward

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@EVERY_DTYPE
@pytest.mark.parametrize("n", [*SIZES, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_reference_in_fp64(
    request: pytest.FixtureRequest, n: int, dtype: torch.dtype, backend: str
) -> None:
    """Some versions take another way where no gradient is wanted, and few tokens another one than one."""
    if backend != "triton":  # on a GPU that wants a setting of cuBLAS
        request.getfixturevalue("poisoned_memory")
    for case in cases(n, dtype):
        want = exact(case)
        with forced(backend) as device:
            moved_case = case._replace(arguments=moved(case.arguments, device))
            got = run(moved_case, case.operation)
            with torch.no_grad():
                got_without = case.operation(*moved_case.arguments)
        assert_agrees(case, [*got, got_without], [*want, want[0]])


def test_gradients_of_attention_survive_a_masked_key_with_a_huge_logit() -> None:
    """Query 1 alone has the large logit with key 2, which comes after it."""
    q, k, v, grad = (torch.randn(1, 1, 3, 4) for _ in range(4))
    q[..., 1, 0], k[..., 2, 0] = 1e3, 1e3
    q[..., 2, 0] = 0
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    want = torch.autograd.grad(causal_attention.reference(*leaves, 0.5), leaves, grad)
    y, lse = trained_attention.reference(q, k, v, 0.5, None)
    got = trained_attention_gradients.reference(grad, q, k, v, y, lse, 0.5, None)
    assert all(relative_error(a, b) <= rounding(FP32_UNIT, terms=8, chained=4) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("k", [0, 3])
def test_a_query_that_chose_no_key_has_nan_and_no_other_has(backend: str, k: int) -> None:
    operands = [torch.randn(size) for size in ((2, 5, 3, 7), (2, 5, 3, 4), (2, 9, 14), (3, 7, 10), (3, 10, 5))]
    chosen = torch.randint(0, 9, (2, 5, k)).sort(-1).values + torch.arange(k)
    chosen[1, 2] = -1
    with ops.use(backend):
        y = topk_attention(*operands, 0.3, chosen.clamp(max=8).where(chosen < 9, -1))
    assert y[1, 2].isnan().all() and bool(y.isnan().any(-1).sum() == (1 if k else 10))


@pytest.mark.parametrize("version", ["plain", "static"])
def test_every_version_of_experts_heeds_the_limit_of_swiglu(version: str) -> None:
    case = expert_case(63, torch.float32)
    case = case._replace(arguments=(*case.arguments, 0.5))
    alone, want = case._replace(terms=36, chained=1), exact(case)  # 24 units
    with_codes = held(alone)
    assert_agrees(case, run(case, getattr(experts, version)), want)
    with torch.no_grad():
        assert_agrees(alone, [getattr(experts, version)(*case.arguments)], want[:1])
        for run_held in (quantized_experts.reference, quantized_experts.plain):
            assert_agrees(with_codes, [run_held(*with_codes.arguments)], exact(with_codes)[:1])
    assert relative_error(want[0], exact(case._replace(arguments=case.arguments[:6]))[0]) > 0.01
    with forced("cpu"), torch.no_grad(), pytest.raises(ValueError, match="a limit of SwiGLU"):
        experts(*case.arguments)


@pytest.mark.parametrize("n", [5, 130])
def test_cost_counts_operands_once_and_products(n: int) -> None:
    """Every tensor of a call is read once, codes as codes, its result written once. FLOPs are as torch counts."""
    from torch.utils.flop_counter import FlopCounterMode

    of_kernels = [case for case in cases(n, torch.float32) if case.operation.name in COSTS]
    of_streams = {read_streams, write_streams, sinkhorn}
    of_attention = {causal_attention, cached_attention}
    assert {case.operation for case in of_kernels} == {linear, experts, *of_attention, *of_streams}
    rows, sink = (torch.randn(3, n, 2, 8), torch.randn(3, n + 2, 8)), torch.zeros(2)
    of_kernels += [Case(sink_attention, (*rows, mask_of(n, n + 2, b), sink, 0.3), terms=n + 2) for b in (1, 3)]
    with_codes = [held(case) for case in of_kernels if case.operation in (linear, experts)]
    for case in of_kernels + with_codes:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            y = case.operation.reference(*case.arguments)
        cost = cost_of(ops.Call(case.operation.name, case.arguments, {}, y))
        read, seen = [sum(t.nbytes for t in ops.tensors_of(a)) for a in case.arguments], 1.0
        if case.operation is causal_attention:
            of = [[0] * n] if case.arguments[4] is None else case.arguments[4][:1].tolist()
            seen = sum(of[0][i] == of[0][j] for i in range(n) for j in range(i + 1)) / n**2
        for mask in (a for a in case.arguments if isinstance(a, Tensor) and a.dtype == torch.bool):
            seen = 1 - mask.double().mean().item()
        if case.operation in (experts, quantized_experts):  # those that no token chose are not read
            chosen, there = len(case.arguments[1].unique()), case.arguments[3].shape[0]
            read[3:] = [n * chosen // there for n in read[3:]]
        assert cost.flops == round(counter.get_total_flops() * seen) and cost.written == y.nbytes
        assert cost.read == sum(read)


@pytest.mark.parametrize(
    ("device", "dtype", "loops"),
    [
        *(("cpu", torch.float32, True), ("cpu", torch.bfloat16, True), ("meta", torch.float32, False)),
        *(("cuda", torch.float32, True), ("cuda", torch.bfloat16, False)),
    ],
)
def test_one_token_loops_over_its_experts(device: str, dtype: torch.dtype, loops: bool) -> None:
    """Where no grouped product serves, as on a GPU in FP32: else all 256 experts of V3 would run one by one."""
    with FakeTensorMode():
        x, indices = (torch.empty(1, n, dtype=of, device=device) for n, of in ((16, dtype), (8, torch.int64)))
        assert prefer_loop(x, indices, 256) == loops
        assert not prefer_loop(x, indices, 15)


# --- FP8 products, FP8 experts and products with held codes

K, O = 200, 63  # noqa: E741
"""A whole tile and a ragged one, and less than one."""


def unit_of(dtype: torch.dtype) -> float:
    return FP32_UNIT if dtype == torch.float32 else BF16_UNIT


class Layer(NamedTuple):
    """A function of floating-point tensors, what it is called with, and the relative error that it may have."""

    name: str
    run: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    tolerance: float


def layers(n: int, dtype: torch.dtype) -> list[Layer]:
    """Return every way through FP8 at n tokens."""
    single = rounding(unit_of(dtype), chained=2) + rounding(FP32_UNIT, terms=max(n, K))
    x, w = varied(n, K, dtype=dtype), varied(O, K, seed=1)
    gate, up = varied(n, K, dtype=dtype, seed=2), varied(n, K, dtype=dtype, seed=3)
    tied_codes = (torch.randint(-31, 32, (n, K)) | 1).index_fill(1, torch.tensor([0, 128]), 448).to(dtype)
    held = quantize(w, WEIGHT_TILE, "fp32")
    found = [
        Layer("x and w", fp8_matmul, (x, w), single),
        Layer("x that lies between two codes", fp8_matmul, (tied_codes, w), single),
        Layer("quantized x", lambda x, w: fp8_matmul(quantize(x), w), (x, w), single),
        Layer("quantized w", lambda x: fp8_matmul(x, held), (x,), single),
        Layer("x kept in e5m6", lambda x, w: fp8_matmul(x, w, saved_format="e5m6"), (x, w), single),
        Layer("swiglu", fp8_swiglu_matmul, (gate, up, w), single),
        Layer("clamped swiglu", lambda *t: fp8_swiglu_matmul(*t, limit=0.5), (gate, up, w), single),
        Layer("held codes", lambda x: quantized_linear(x, held), (x,), single),
    ]
    for kind, routing in routings(n).items():
        found += [layer._replace(name=f"{layer.name}, {kind}") for layer in expert_layers(n, dtype, routing)]
    return found


def routings(n: int) -> dict[str, tuple[Tensor, Tensor]]:
    few = {"few of many": routed(n, 3, 40)} if n == 1 else {}  # which are asked in turn without gradients
    return few | {
        "some experts empty": routed(n, 2, 6, empty=(0, 3, 5)),
        "one expert": routed(n, 1, 6, empty=(0, 1, 3, 4, 5)),
        "tied scores": tied(n, 2),
    }


def stacked(m: int = 200, f: int = 136, e: int = 6) -> list[Tensor]:
    return [torch.randn(e, *size).mul(size[1] ** -0.5) for size in ((f, m), (m, f), (f, m))]


def expert_layers(n: int, dtype: torch.dtype, routing: tuple[Tensor, Tensor]) -> list[Layer]:
    indices, weights = routing
    matrices, x = stacked(e=40 if int(indices.max()) > 5 else 6), torch.randn(n, 200).to(dtype)
    held = [quantize(w, WEIGHT_TILE, "fp32") for w in matrices]
    mixed = [held[0], matrices[1].to(dtype), held[2]]
    sums = rounding(unit_of(dtype), chained=8) + rounding(FP32_UNIT, terms=max(n, 200), chained=8)
    # FP32 sums of another order move a code of the next product here and there: of hidden, of its gradient, and again
    moved = 3 * moved_codes(rounding(FP32_UNIT, terms=200))

    def native(x: Tensor, weights: Tensor) -> Tensor:
        return quantized_experts(x, indices, weights, *held)

    def some_held(x: Tensor, weights: Tensor) -> Tensor:
        return quantized_experts(x, indices, weights, *mixed)

    def fp8(x: Tensor, weights: Tensor, *w: Tensor) -> Tensor:
        return fp8_experts(quantize(x), indices, weights, *w)

    def fp8_held(x: Tensor, weights: Tensor) -> Tensor:
        return fp8_experts(quantize(x), indices, weights, *held)

    return [
        Layer("experts with held codes", native, (x, weights), sums),
        Layer("experts with some held codes", some_held, (x, weights), sums),
        Layer("FP8 experts", fp8, (x, weights, *matrices), sums + moved),
        Layer("FP8 experts with held codes", fp8_held, (x, weights), sums + moved),
    ]


def result(layer: Layer) -> list[Tensor]:
    """Return the result, and the gradient of a fixed random projection for every leaf."""
    leaves = [t.detach().requires_grad_() for t in layer.leaves]
    y = layer.run(*leaves)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    grads = torch.autograd.grad((y * direction).sum(), leaves)
    assert all(g.dtype == t.dtype for g, t in zip(grads, leaves, strict=True))
    return [y.detach(), *grads]


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("n", SIZES)
@EVERY_DTYPE
def test_layers_equal_reference(dtype: torch.dtype, n: int, backend: str) -> None:
    for layer in layers(n, dtype):
        with ops.use("reference"):
            want = result(layer)
        with forced(backend):
            got = result(layer)
            with torch.no_grad():  # some versions take another way there
                got_without = layer.run(*layer.leaves)
        for part, (a, b) in enumerate(zip(got, want, strict=True)):
            # a routing weight's gradient is the product of y and the direction: one number, which may be near zero
            cancels = part == 2 and "experts" in layer.name
            error = relative_error(a, b) * (b.norm() / max(b.norm(), want[0].norm())).item() ** cancels
            assert error <= layer.tolerance, f"{layer.name}, part {part}: {error:.1e} > {layer.tolerance:.1e}"
        assert relative_error(got_without, want[0]) <= layer.tolerance, layer.name


# --- on CPUs without BF16 units, rows of BF16 numbers are multiplied in FP32

UNITS = "dsmini.machine.multiplies_bf16"
"""Where dsmini asks whether this CPU has units for products of BF16 numbers."""
EITHER = pytest.mark.parametrize("units", [True, False])


def watched(call: Callable[[], Any]) -> tuple[Any, set[torch.dtype]]:
    """Return a result of plain PyTorch, and the dtypes in which matrices are multiplied."""
    with ops.use("eager"), Operations() as seen:
        result = call()
    products = ("bmm", "baddbmm", "mm", "_grouped_mm")
    return result, {each.dtype for each in seen.results if each.operation in products}


def products() -> list[Case]:
    without = (rms_norm, read_streams, write_streams, stream_mixes)  # all of them FP32
    return [case for case in cases(200, torch.bfloat16) if case.operation not in without]


def plain(case: Case) -> Case:
    """Return the case with the values of codes, rounded as they are multiplied."""
    values = {i: q.dequantize(torch.bfloat16) for i, q in enumerate(case.arguments) if isinstance(q, QuantizedTensor)}
    return case.changed(values)


@EITHER
def test_products_are_in_bf16_only_where_a_cpu_has_units_for_it(monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    monkeypatch.setattr(UNITS, lambda: units)
    every = [case for case in products() if case.operation is not linear_cross_entropy]
    with_codes = [held(case) for case in every if case.operation in (linear, experts)]
    for case in (*every, *with_codes):
        with torch.no_grad():
            got, dtypes = watched(lambda case=case: case.operation(*case.arguments))
        assert dtypes <= {torch.bfloat16 if units else torch.float32}, case.operation.name
        assert dtypes or case.operation is causal_attention, "torch's flash attention is one operation"
        assert relative_error(got, exact(plain(case))[0]) < (4 if units else 1) * BF16_UNIT, case.operation.name


@EITHER
def test_training_multiplies_bf16_only_where_a_cpu_has_units(monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    monkeypatch.setattr(UNITS, lambda: units)
    for case in products():
        (y, *grads), dtypes = watched(lambda case=case: run(case, case.operation))
        assert (torch.bfloat16 in dtypes) == units, case.operation.name
        want, *wanted = exact(case)
        assert relative_error(y, want) < (4 if units else 1) * BF16_UNIT
        for grad, exactly, place in zip(grads, wanted, case.floats, strict=True):
            assert grad.dtype == case.arguments[place].dtype
            assert relative_error(grad, exactly) < (12 if units else 3) * BF16_UNIT, case.operation.name


def test_few_rows_save_less_than_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UNITS, lambda: False)
    x, weight = torch.randn(2, 24).bfloat16(), torch.randn(30, 24)
    with torch.no_grad():
        assert watched(lambda: linear(x, weight))[1] == {torch.bfloat16}


def test_operands_are_kept_as_they_came_and_autocast_multiplies_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UNITS, lambda: False)
    x, frozen = torch.randn(40, 24).bfloat16().requires_grad_(), torch.randn(30, 24).bfloat16()
    for weight, kept in ((frozen.float().requires_grad_(), [x.shape, frozen.shape]), (frozen, [frozen.shape])):
        with ops.use("eager"), saved_for_backward() as saved:
            y = linear(x, weight)
        assert [t.shape for t in saved if t.dtype == torch.bfloat16] == kept and len(saved) == len(kept)
    with torch.autocast("cpu", torch.bfloat16):
        (grad,), dtypes = watched(lambda: torch.autograd.grad(y, x, torch.ones_like(y)))
        assert dtypes == {torch.float32}, "backward is as forward was"
        assert relative_error(grad, frozen.double().sum(0).expand(40, 24)) < 2 * BF16_UNIT
        assert watched(lambda: linear(x, frozen))[1] == {torch.bfloat16}


# --- the seam around whole models: the reference backend runs equations alone, and a kernel can replace any operation

Build = Callable[..., Transformer]
PRECISION = pytest.mark.parametrize("precision", ["native", "fp8"])
NEAR = {"native": rounding(FP32_UNIT, terms=40, chained=40), "fp8": E4M3_UNIT}
"""In FP8, sums of another order move a code to its neighbour here and there."""


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("an eager version ran")


def step(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Return the loss and the gradients."""
    loss = model.losses(tokens[:, :-1], tokens[:, 1:]).total
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


@PRECISION
def test_reference_backend_trains_and_decodes_by_equations(
    monkeypatch: pytest.MonkeyPatch, small_model: Build, precision: str
) -> None:
    """No tuned version runs, nor a part of one."""
    model, tokens = small_model(precision=precision), torch.randint(0, 61, (2, 20))
    held = hold_all_fp8(copy.deepcopy(model)).eval()
    want, logits, of_codes = step(model, tokens), model(tokens), held(tokens)
    for operation in ops.Operation.declared.values():
        monkeypatch.setattr(operation, "plain", refuse)
    for name in ("grouped_linear", "sort_by_expert", "combine"):
        monkeypatch.setattr(functional_experts, name, refuse)
    monkeypatch.setenv(ops.VARIABLE, "reference")
    got = step(model, tokens)
    assert relative_error(got[0], want[0]) <= NEAR[precision] / 10
    wrong = torch.cat([(a - b).flatten() for a, b in zip(got, want, strict=True)]).norm()
    assert wrong <= NEAR[precision] * torch.cat([b.flatten() for b in want]).norm()
    assert relative_error(model(tokens), logits) <= NEAR[precision]
    assert relative_error(held(tokens), of_codes) <= NEAR[precision]
    for form in ("expanded", "absorbed") if precision == "native" else ():
        assert relative_error(decoded(model, tokens, (9, 1, 10), form=form), logits) <= NEAR[precision]


def stand_in(monkeypatch: pytest.MonkeyPatch, names: set[str]) -> list[str]:
    """Let a backend for this device have a kernel for each of these operations; return what ran, in order."""
    kernels: Any = ModuleType("stand-in")
    ran: list[str] = []
    kernels.OPERATIONS, kernels.Unserved, kernels.why_not = tuple(names), Unserved, lambda _: None
    for name, operation in ops.Operation.declared.items():

        def kernel(*args: Any, run: Any = operation.plain, name: str = name, **options: Any) -> Any:
            ran.append(name)
            with ops.use("eager"):
                return run(*args, **options)

        setattr(kernels, name, kernel)
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    monkeypatch.setattr(ops, "_operations", lambda name: kernels.OPERATIONS if name == "cpu" else None)
    monkeypatch.setattr(ops, "_load", lambda name: kernels if name == "cpu" else "not here")
    return ran


@pytest.mark.parametrize(
    ("precision", "held", "served"),
    [
        ("native", False, {"experts", "linear"}),
        ("native", True, {"quantized_experts", "quantized_linear"}),
        ("fp8", False, {"fp8_experts"}),
    ],
)
@torch.no_grad()
def test_kernels_serve_inference_and_are_counted_by_cost(
    monkeypatch: pytest.MonkeyPatch, small_model: Build, precision: str, held: bool, served: set[str]
) -> None:
    model, tokens = small_model(precision=precision, n_mtp_layers=0), torch.randint(0, 61, (2, 20))
    model = hold_all_fp8(model).eval() if held else model.eval()
    with ops.use("eager"):  # which kernels would serve depends on the CPU
        want = model(tokens)
    ran = stand_in(monkeypatch, served)
    assert torch.equal(model(tokens), want)
    assert set(ran) == served
    ran.clear()
    if not served <= COSTS.keys():
        assert "has no cost, so it cannot be counted" in refusal(count, lambda: model(tokens))
        return
    counted = count(lambda: model(tokens))
    # kernels alone are counted under their names, each by the cost of its operation
    assert sorted(op.name for op in counted.operations if op.name in served) == sorted(ran)
    assert all(op.flops and op.read and op.written for op in counted.operations if op.name in served)


def test_gradient_of_quantized_input_keeps_kernels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes have no gradient: the tensor that they stand for is asked."""
    x, (indices, weights) = torch.randn(5, 24, requires_grad=True), routed(5, 2, 4)
    held = [quantize(torch.randn(4, *size), WEIGHT_TILE, "fp32") for size in ((12, 24), (24, 12), (12, 24))]
    ran = stand_in(monkeypatch, {"fp8_experts"})
    y = fp8_experts(quantize(x), indices, weights, *held)
    assert not ran
    assert torch.autograd.grad(y.sum(), x)[0].norm() > 0
    fp8_experts(quantize(x.detach()), indices, weights, *held)
    assert ran == ["fp8_experts"]


# --- the model without its fast versions, in a process of its own, and as the first call of a process

ALONE = (
    "dim=64, n_layers=2, n_heads=2, inter_dim=96, moe_inter_dim=32, n_routed_experts=8, vocab_size=97, max_seq_len=64"
)
WITH_ALL = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
SCRIPT = f"""
import importlib.util, sys, torch, dsmini
assert importlib.util.find_spec("dsmini.functional") is None
results = []
for more in (
    dict(attention="mla"),
    dict(attention="gqa", n_kv_heads=1),
    dict(attention="dsa", index_n_heads=2, index_head_dim=32, index_topk=16),
    dict(precision="fp8"),
):
    torch.manual_seed(0)
    model = dsmini.Transformer({ALONE}, **more)
    tokens = torch.randint(0, 97, (2, 49))
    losses = model.losses(tokens[:, :-1], tokens[:, 1:])
    losses.total.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    results += [losses.total.detach(), grads.norm(), dsmini.generate(model, tokens[:, :20], 8).tokens]
torch.save(results, sys.argv[1])
"""


def test_the_model_trains_and_generates_alone(tmp_path: Path) -> None:
    (tmp_path / "dsmini").mkdir()
    for child in (ROOT / "dsmini").iterdir():
        if child.name not in ("functional", "__pycache__"):
            (tmp_path / "dsmini" / child.name).symlink_to(child)
    (tmp_path / "dsmini_kernels.py").write_text("raise ImportError('there are none')")
    alone = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "alone.pt"], env=alone, cwd=tmp_path, check=True)
    script = SCRIPT.replace("is None", "is not None")
    subprocess.run([sys.executable, "-c", script, tmp_path / "all.pt"], env=WITH_ALL, cwd=ROOT, check=True)
    got, want = torch.load(tmp_path / "alone.pt"), torch.load(tmp_path / "all.pt")
    assert all(relative_error(a, b) <= FP32_MODEL for a, b in zip(got[:9], want[:9], strict=True))
    assert relative_error(got[9], want[9]) <= 1e-3  # in FP8 sums of another order move codes to their neighbours


def test_the_first_call_of_a_process_compiles_in_one_graph() -> None:
    script = (
        f"import torch, dsmini; model = dsmini.Transformer({ALONE}, compute_dtype=torch.bfloat16)\n"
        "torch.compile(model, fullgraph=True, backend='eager')(torch.zeros(1, 32, dtype=torch.int64))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=WITH_ALL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
