"""Every implementation of every operation against its reference: values and gradients."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsmini import ops
from dsmini.functional.attention import trained_attention, trained_attention_gradients
from dsmini.functional.experts import prefer_loop
from dsmini.measure.costs import COSTS, cost_of
from dsmini.nn.attention import cached_attention, causal_attention
from dsmini.nn.dsa import topk_attention
from dsmini.nn.fp8 import quantized_experts
from dsmini.nn.hyper_connections import read_streams, sinkhorn, write_streams
from dsmini.nn.layers import linear
from dsmini.nn.moe import experts
from tests.functional.conftest import BACKENDS, SIZES, forced, held, moved
from tests.helpers.operations import DTYPES, assert_agrees, cases, exact, expert_case, run
from tests.helpers.tolerances import FP32_UNIT, relative_error, rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
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
    with_codes = [held(case) for case in of_kernels if case.operation in (linear, experts)]
    for case in of_kernels + with_codes:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            y = case.operation.reference(*case.arguments)
        cost = cost_of(ops.Call(case.operation.name, case.arguments, {}, y))
        read, seen = [sum(t.nbytes for t in ops.tensors_of(a)) for a in case.arguments], 1.0
        if case.operation is causal_attention:
            of = [[0] * n] if case.arguments[4] is None else case.arguments[4][:1].tolist()
            seen = sum(of[0][i] == of[0][j] for i in range(n) for j in range(i + 1)) / n**2
        if case.operation is cached_attention and case.arguments[4] is not None:
            seen = 1 - case.arguments[4].double().mean().item()
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
