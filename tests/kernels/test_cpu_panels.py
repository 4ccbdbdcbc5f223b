"""Products of many rows in C++ agree with their references, on every instruction set."""

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.autograd import forward_ad

from dsmini import ops
from dsmini.functional.experts import experts, quantized_experts
from dsmini.functional.linear import linear
from dsmini.numerics import WEIGHT_TILE, quantize
from dsmini_kernels import Unserved, cpu
from dsmini_kernels.cpu import build, panels, steps
from tests.helpers.decoding import WEIGHTS
from tests.helpers.expert_calls import SHAPES, a_call, dense, exact, tolerance, weight_in
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, relative_error, rounding


@pytest.fixture(autouse=True)
def _serves_all(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Iterator[None]:
    """Serve calls of any size, without gradients, and fill outputs with NaN before a kernel writes them."""
    monkeypatch.setattr(panels, "LEAST", 0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_agree(every_isa: str, shape: tuple[int, ...], weights: str, dtype: torch.dtype) -> None:
    call = a_call(*shape, dtype, weights)  # pyright: ignore[reportArgumentType]
    got, want = cpu.experts(*call), exact(*call)
    assert got.dtype == dtype and got.shape == want.shape
    assert relative_error(got, want) < tolerance(dtype, max(shape[1:3]))
    for token in range(shape[0]):  # each row by itself: a wrong small row would not show in the norm of all
        assert relative_error(got[token], want[token]) < 4 * tolerance(dtype, max(shape[1:3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_linear_of_many_rows_agrees(every_isa: str, weights: str, dtype: torch.dtype) -> None:
    for n, o, i in ((33, 1, 1), (16, 40, 31), (97, 130, 63), (200, 33, 257), (600, 50, 128)):
        x, w = torch.randn(2, n, i)[1].to(dtype), weight_in(weights, o, i)
        got, want = cpu.quantized_linear(x.view(1, n, i), w), x.double() @ dense(w).T
        assert got.shape == (1, n, o) and got.dtype == dtype
        assert relative_error(got[0], want) < rounding(FP32_UNIT, terms=i) + (dtype == torch.bfloat16) * rounding(
            BF16_UNIT
        )


def test_matrices_of_different_types_agree(every_isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = list(a_call(40, 130, 63, 5, 2, dtype, "float32"))
        for place, weights in ((4, "fp8"), (5, "bfloat16")):
            call[place] = weight_in(weights, *call[place].shape)
        assert relative_error(cpu.experts(*call), exact(*call)) < tolerance(dtype, 130)


def test_more_tokens_than_memory_take_turns(every_isa: str) -> None:
    """Beyond the memory of hidden numbers and of panels, tokens are computed in turns."""
    call = a_call(2000, 8, 4096, 3, 2, torch.float32, "float32")
    assert relative_error(cpu.experts(*call), exact(*call)) < tolerance(torch.float32, 4096)
    x, w = torch.randn(700, 9000), weight_in("bfloat16", 5, 9000)
    assert relative_error(cpu.quantized_linear(x, w), x.double() @ w.double().T) < rounding(FP32_UNIT, terms=9000)


def test_threads_change_no_bit(every_isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, weights in ((torch.bfloat16, "bfloat16"), (torch.float32, "fp8")):
        call, results = a_call(150, 96, 70, 6, 2, dtype, weights), []
        held = [weight_in(kind, 370, 96) for kind in WEIGHTS]  # rows of some are converted, in memory of the thread
        for threads in (1, 2, 3):
            for module in (panels, steps):
                monkeypatch.setattr(module, "n_threads", lambda n=threads: n)
            results.append((cpu.experts(*call), *(cpu.quantized_linear(call[0], w) for w in held)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_stays_with_its_token(every_isa: str, bad: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = a_call(60, 40, 20, 4, 2, dtype, "bfloat16")
        call[0][17, 3] = bad
        rows = cpu.experts(*call).isfinite().all(-1)
        assert rows.sum() == 59 and not rows[17]
        rows = cpu.quantized_linear(call[0], weight_in("bfloat16", 9, 40)).isfinite().all(-1)
        assert rows.sum() == 59 and not rows[17]


def test_a_row_ends_where_it_ends(every_isa: str) -> None:
    """With an odd width the numbers after a row's last are the next row's."""
    for dtype in (torch.float32, torch.bfloat16):
        call = list(a_call(60, 41, 21, 4, 2, dtype, str(dtype).removeprefix("torch.")))
        call[4][:, 9], call[5][:, 9] = math.nan, math.inf
        x, w = call[0], call[4][0]
        assert cpu.quantized_linear(x, w).isfinite().all(0).tolist() == [i != 9 for i in range(21)]
        call[4][:, 9] = 0
        assert cpu.experts(*call).isfinite().all(0).tolist() == [i != 9 for i in range(41)]


def test_nan_of_a_weight_stays_where_it_is(every_isa: str) -> None:
    """Also in rows that are converted to BF16, and NaN of any sign and payload."""
    w = torch.randn(20, 40)
    w.view(torch.int32)[7, 3], w.view(torch.int32)[9, 5] = 0x7FFFFFFF, -1
    for dtype in (torch.float32, torch.bfloat16):
        bad = cpu.quantized_linear(torch.ones(40, 40, dtype=dtype), w).isnan().all(0)
        assert bad.nonzero().flatten().tolist() == [7, 9]


def test_every_code_is_decoded_for_many_rows(every_isa: str) -> None:
    w = quantize(torch.randn(256, 40), WEIGHT_TILE)
    w.codes.view(torch.uint8)[:, 3] = torch.arange(256).to(torch.uint8)
    x = torch.zeros(32, 40)
    x[:, 3] = 1
    for dtype in (torch.float32, torch.bfloat16):
        want = w.dequantize(dtype)[:, 3]
        assert torch.equal(cpu.quantized_linear(x.to(dtype), w)[5].nan_to_num(7e7), want.nan_to_num(7e7))


def test_experts_of_a_model_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("experts", "quantized_experts"):
        kernel = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, n=name, k=kernel: called.append(n) or k(*args))
    ops._load.cache_clear()
    with ops.use("cpu"):
        for weights, op in (("bfloat16", experts), ("fp8", quantized_experts)):
            call = a_call(50, 40, 20, 4, 2, torch.bfloat16, weights)
            assert relative_error(op(*call), exact(*call)) < tolerance(torch.bfloat16, 40)
    assert called == ["experts", "quantized_experts"]


def test_what_is_not_served_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x, chosen, weights, counts, w1, w2, w3 = a_call(20, 40, 20, 4, 2, torch.float32, "float32")
    for call, reason in (
        ((x, chosen, weights, counts, w1, torch._neg_view(w2), w3), "sign"),
        ((x, chosen, weights, counts, w1[:, :1].expand(w1.shape), w2, w3), "strides"),
        ((x.half(), chosen, weights, counts, w1, w2, w3), "x of torch.float16"),
        ((x, chosen, weights.double(), counts, w1, w2, w3), "weights of torch.float64"),
        ((x, chosen, weights, counts, w1.mT.contiguous().mT, w2, w3), "strides"),
    ):
        with pytest.raises(Unserved, match=reason):
            cpu.experts(*call)
    monkeypatch.setattr(panels, "LEAST", 1 << 20)
    with pytest.raises(Unserved, match=r"^$"):
        cpu.experts(x, chosen, weights, counts, w1, w2, w3)
    monkeypatch.setattr(panels, "LEAST", 0)
    with torch.enable_grad(), pytest.raises(Unserved, match="gradient"):
        cpu.experts(x, chosen, weights, counts, w1.requires_grad_(), w2, w3)


def test_tangents_of_forward_mode_are_not_lost() -> None:
    x, w = torch.randn(20, 300), torch.randn(300, 300)
    with forward_ad.dual_level(), torch.no_grad():
        tangent = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, x), w)).tangent
    assert tangent is not None and relative_error(tangent, x @ w.T) < rounding(FP32_UNIT, terms=300)


def test_weights_that_are_not_their_memory_run_in_torch() -> None:
    x, w = torch.randn(20, 300), torch.randn(300, 300)
    for odd in (torch._neg_view(w), w[:1].expand(300, 300)):
        assert relative_error(linear(x, odd), x @ odd.T) < rounding(FP32_UNIT, terms=300)
    assert not linear(torch.randn(20, 0), torch.randn(5, 0).bfloat16()).any()


def test_more_threads_than_a_team_has_are_fewer() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(300)
        x, w = torch.randn(40, 300), torch.randn(300, 300)
        assert relative_error(linear(x, w), x @ w.T) < rounding(FP32_UNIT, terms=300)
    finally:
        torch.set_num_threads(threads)


def test_a_child_after_a_fork_multiplies_many_rows() -> None:
    """Torch's threads, which the parent borrows, are lost in a fork."""
    code = """
import os, torch
from dsmini_kernels import cpu
torch.set_num_threads(2)
x, weight = torch.randn(64, 700), torch.randn(300, 700)
want = cpu.linear(x, weight)
child = os.fork()
same = all(torch.equal(cpu.linear(x, weight), want) for _ in range(20))
if child == 0:
    os._exit(not same)
print(same, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "True 0\n", done.stderr


def test_wrong_calls_are_refused_before_memory_is_touched() -> None:
    x, y, chosen, weights = torch.randn(3, 8), torch.empty(3, 8), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    matrices = [steps.matrix(torch.randn(2, *shape)) for shape in ((5, 8), (8, 5), (5, 8))]

    def raw(sizes: tuple[int, ...] = (3, 8, 5, 2, 2, 0), less: int = 0, w1: tuple[int, ...] = matrices[0]) -> int:
        spans = [number for t in (x, y, chosen, weights) for number in (steps.span(t)[0], steps.span(t)[1] - less)]
        call = (1, *sizes, *spans, *w1, *matrices[1], *matrices[2])
        return build.library().experts(build.EXPERTS.pack(*call), build.EXPERTS.size)

    assert raw() == 0
    assert raw(less=1) != 0
    beyond = ((4, 8, 5, 2, 2, 0), (3, 9, 5, 2, 2, 0), (3, 8, 6, 2, 2, 0), (3, 8, 5, 3, 2, 0), (3, 8, 5, 2, 3, 0))
    senseless = (
        (-1, 8, 5, 2, 2, 0),
        (3, 0, 5, 2, 2, 0),
        (3, 8, 5, 2, 0, 0),
        (2**62, 8, 5, 2, 2, 0),
        (3, 8, 5, 2, 2, 2),
    )
    for sizes in beyond + senseless:
        assert raw(sizes) != 0
    assert raw(w1=(*matrices[0][:2], 3, *matrices[0][3:])) != 0, "a type that there is not"
    assert raw(w1=(*matrices[0][:2], 2, *matrices[0][3:])) != 0, "codes without scales"
    for index in (-1, 2):
        chosen[1, 1] = index
        assert raw() != 0
