"""Every implementation of every operation against its reference: values and gradients."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dsmini import ops
from dsmini.functional.attention import trained_attention, trained_attention_gradients
from dsmini.functional.cross_entropy import rows_at_a_time
from dsmini.measure.costs import COSTS, cost_of
from dsmini.nn.attention import cached_attention, causal_attention
from dsmini.nn.dsa import topk_attention
from dsmini.nn.fp8 import quantized_experts
from dsmini.nn.layers import linear, rms_norm
from dsmini.nn.mla import absorbed_attention
from dsmini.nn.moe import experts
from dsmini.nn.transformer import IGNORE, linear_cross_entropy
from dsmini.numerics import WEIGHT_TILE, quantize
from tests.functional.conftest import BACKENDS, SIZES, forced, moved, routed, tied
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, relative_error, rounding

DTYPES = (torch.float32, torch.bfloat16)


Routing = tuple[Tensor, Tensor]


class Case(NamedTuple):
    operation: ops.Operation[Any, Tensor]
    arguments: tuple[Any, ...]
    terms: int
    """Terms of the longest sum, which FP32 adds."""
    chained: int = 4
    """Results that are rounded to the operands' dtype, one after the other."""


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def mask_of(s: int, t: int, batch: int) -> Tensor:
    """Hide a later key from each query, and some of the middle from the first row."""
    mask = torch.arange(t) > torch.arange(t - s, t)[:, None]
    mask = mask.expand(batch, s, t).clone()
    mask[0, :, t // 3 : t // 2] = True
    return mask


def expert_case(
    n: int, dtype: torch.dtype, m: int = 24, f: int = 16, e: int = 6, k: int = 2, routing: Routing | None = None
) -> Case:
    torch.manual_seed(n)  # the gradient of a routing weight is one product, whose terms may cancel
    indices, weights = routing or routed(n, k, e, empty=(0, 3))
    w1, w3 = normal(e, f, m, dtype=torch.float32, scale=m**-0.5), normal(e, f, m, dtype=torch.float32, scale=m**-0.5)
    w2 = normal(e, m, f, dtype=torch.float32, scale=f**-0.5)
    return Case(experts, (normal(n, m, dtype=dtype), indices, weights, w1, w2, w3), terms=m, chained=8)


def cases(n: int, dtype: torch.dtype) -> Iterator[Case]:
    """Every operation at n tokens, odd widths and a batch of two where there is one."""

    def x(*shape: int, scale: float = 1.0) -> Tensor:
        return normal(*shape, dtype=dtype, scale=scale)

    yield Case(linear, (x(2, n, 23), normal(31, 23, dtype=torch.float32)), terms=23)
    yield Case(rms_norm, (x(2, n, 23), torch.rand(23) + 0.5, 1e-6), terms=23)
    documents = (torch.arange(n) // 20).expand(2, n)
    for given in (None, documents):
        heads = (x(2, 3, n, 12), x(2, 3, n, 12), x(2, 3, n, 7))
        yield Case(causal_attention, (*heads, 0.3, given), terms=n)
    t = n + 40
    for s in {1, n}:
        for mask in (None, mask_of(s, t, 2)):
            yield Case(cached_attention, (x(2, 6, s, 8), x(2, 3, t, 8), x(2, 3, t, 5), 0.3, mask), terms=t)
            latent = (x(2, s, 3, 7), x(2, s, 3, 4), x(2, t, 14), x(3, 7, 10, scale=0.4), x(3, 10, 5, scale=0.4))
            yield Case(absorbed_attention, (*latent, 0.3, mask), terms=t, chained=6)
    yield expert_case(n, dtype)
    yield expert_case(n, dtype, m=23, f=11)
    yield expert_case(n, dtype, routing=routed(n, 1, 6, empty=(0, 1, 2, 3, 5)))  # all tokens to one expert
    yield expert_case(n, dtype, routing=tied(n, 2))
    yield expert_case(n, dtype, e=40, k=3)  # of one token, without gradients: fewer than half are asked, in turn
    targets = torch.randint(0, 61, (n,)).masked_fill(torch.rand(n) < 0.3, IGNORE)
    yield Case(linear_cross_entropy, (x(n, 24), normal(61, 24, dtype=torch.float32), targets), terms=max(n, 61))


def run(case: Case, implementation: Callable[..., Tensor]) -> list[Tensor]:
    """Return the result, and the gradient of a fixed random projection for every floating-point operand."""
    floats = [a for a in case.arguments if isinstance(a, Tensor) and a.is_floating_point()]
    leaves = [t.detach().requires_grad_() for t in floats]
    replaced = iter(leaves)
    arguments = [next(replaced) if isinstance(a, Tensor) and a.is_floating_point() else a for a in case.arguments]
    y = implementation(*arguments)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * direction).sum(), leaves)]


def exact(case: Case) -> list[Tensor]:
    """Run the reference on the same numbers in FP64."""
    floats = [a for a in case.arguments if isinstance(a, Tensor) and a.is_floating_point()]
    rounds = case.operation in (linear, experts, linear_cross_entropy) and floats[0].dtype == torch.bfloat16

    def wide(a: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(map(wide, a))
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        return a.bfloat16().double() if rounds else a.double()  # products round weights to the operands' dtype

    return run(case._replace(arguments=tuple(map(wide, case.arguments))), case.operation.reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [*SIZES, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_reference_in_fp64(n: int, dtype: torch.dtype, backend: str) -> None:
    """Some versions take another way where no gradient is wanted, and few tokens another one than one."""
    for case in cases(n, dtype):
        want = exact(case)
        with forced(backend) as device:
            arguments = moved(case.arguments, device)
            got = run(case._replace(arguments=arguments), case.operation)
            with torch.no_grad():
                got_without = case.operation(*arguments)
        unit = FP32_UNIT if dtype == torch.float32 else BF16_UNIT
        tolerance = rounding(unit, chained=case.chained) + rounding(FP32_UNIT, terms=case.terms, chained=case.chained)
        for part, (a, b) in enumerate(zip([*got, got_without], [*want, want[0]], strict=True)):
            scale = max(b.norm().item(), 1e-3 * want[0].norm().item()) or 1.0  # all targets ignored
            error = (a.cpu().double() - b).norm().item() / scale
            assert error <= tolerance, f"{case.operation.name}, part {part}: {error:.1e} > {tolerance:.1e}"


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


def test_logits_of_a_chunk_fill_a_gpus_products_and_a_cpus_cache() -> None:
    """With V3's vocabulary: 4,096 rows make the weight's gradient twice on a GPU, 128 times on a CPU."""
    for device, products in (("meta", 2), ("cpu", 128)):
        weight = torch.empty(129_280, 1, device=device)
        assert -(-4096 // rows_at_a_time(weight)) == products


@pytest.mark.parametrize("version", ["reference", "plain", "static"])
def test_swiglu_limit_clamps_gate_and_up_in_every_version_of_experts(version: str) -> None:
    case = expert_case(63, torch.float32)
    x, indices, weights, *matrices = case.arguments
    got = run(case._replace(arguments=(*case.arguments, 0.5)), getattr(experts, version))

    def clamped(x: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        every = []
        for i in range(len(w1)):
            gate, up = (x @ w1[i].T).clamp(max=0.5), (x @ w3[i].T).clamp(-0.5, 0.5)
            every.append(gate * gate.sigmoid() * up @ w2[i].T)
        each = torch.stack(every, 1)[torch.arange(len(x))[:, None], indices]
        return (weights[..., None] * each).sum(1)

    want = run(Case(experts, (x, weights, *matrices), terms=0), clamped)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= rounding(FP32_UNIT, terms=24, chained=8)
    with torch.no_grad():
        assert relative_error(getattr(experts, version)(*case.arguments, 0.5), want[0]) <= 24 * FP32_UNIT
        held = [quantize(w, WEIGHT_TILE) for w in matrices]
        rounded = [q.dequantize() for q in held]
        y = getattr(quantized_experts, version if version != "static" else "plain")(x, indices, weights, *held, 0.5)
        assert relative_error(y, clamped(x, weights, *rounded)) <= 24 * FP32_UNIT
    with forced("cpu"), pytest.raises(ValueError, match="a limit of SwiGLU"):
        experts(*(t.detach() for t in case.arguments), 0.5)


@pytest.mark.parametrize("n", [5, 130])
def test_cost_counts_operands_once_and_products(n: int) -> None:
    """Every tensor of a call is read once, its result written once, FLOPs are those of torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    of_kernels = [case for case in cases(n, torch.float32) if case.operation.name in COSTS]
    assert {case.operation for case in of_kernels} == {linear, experts, causal_attention, cached_attention}
    for case in of_kernels:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            y = case.operation.reference(*case.arguments)
        cost = cost_of(ops.Call(case.operation.name, case.arguments, {}, y))
        unread, seen = 0, 1.0
        if case.operation is causal_attention:
            of = [[0] * n] if case.arguments[4] is None else case.arguments[4][:1].tolist()
            seen = sum(of[0][i] == of[0][j] for i in range(n) for j in range(i + 1)) / n**2
        if case.operation is cached_attention and case.arguments[4] is not None:
            seen = 1 - case.arguments[4].double().mean().item()
        if case.operation is experts:  # those that no token chose are not read
            indices, matrices = case.arguments[1], case.arguments[3:]
            unread = (len(matrices[0]) - len(indices.unique())) * sum(w[0].nbytes for w in matrices)
        assert cost.flops == round(counter.get_total_flops() * seen) and cost.written == y.nbytes
        assert cost.read == sum(t.nbytes for t in case.arguments if isinstance(t, Tensor)) - unread
