"""Every implementation of every operation, FP8 products and held codes among them, against its reference."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dsmini import ops
from dsmini.functional.attention import trained_attention, trained_attention_gradients
from dsmini.functional.experts import prefer_loop
from dsmini.measure.costs import COSTS, cost_of
from dsmini.nn.attention import cached_attention, causal_attention
from dsmini.nn.compressed_attention import sink_attention
from dsmini.nn.dsa import topk_attention
from dsmini.nn.fp8 import fp8_experts, quantized_experts, quantized_linear
from dsmini.nn.hyper_connections import read_streams, sinkhorn, write_streams
from dsmini.nn.layers import linear
from dsmini.nn.moe import experts
from dsmini.numerics import WEIGHT_TILE, Accumulator, fp8_matmul, fp8_swiglu_matmul, quantize
from tests.functional.conftest import BACKENDS, SIZES, forced, held, moved
from tests.helpers.fp8 import varied
from tests.helpers.operations import DTYPES, Case, assert_agrees, cases, exact, expert_case, mask_of, routed, run, tied
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, moved_codes, relative_error, rounding

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
    held, short = quantize(w, WEIGHT_TILE, "fp32"), Accumulator(bits=10, promote_every=None)
    found = [
        Layer("x and w", fp8_matmul, (x, w), single),
        Layer("x that lies between two codes", fp8_matmul, (tied_codes, w), single),
        Layer("quantized x", lambda x, w: fp8_matmul(quantize(x), w), (x, w), single),
        Layer("quantized w", lambda x: fp8_matmul(x, held), (x,), single),
        Layer("x kept in e5m6", lambda x, w: fp8_matmul(x, w, saved_format="e5m6"), (x, w), single),
        Layer("swiglu", fp8_swiglu_matmul, (gate, up, w), single),
        Layer("clamped swiglu", lambda *t: fp8_swiglu_matmul(*t, limit=0.5), (gate, up, w), single),
        Layer("emulated accumulator", lambda x, w: fp8_matmul(x, w, accumulator=short), (x, w), single),
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
