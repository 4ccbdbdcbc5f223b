"""Operations in C++ agree with their references, in training too: one list of cases for all, and what is special."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsmini import ModelConfig, Transformer, ops
from dsmini.functional.attention import train_attention, train_sink_attention
from dsmini.functional.experts import train_experts
from dsmini.nn.attention import cached_attention, causal_attention
from dsmini.nn.cache import Rows
from dsmini.nn.codec import Codec, Numbers, index_entry_row, index_row, key_row
from dsmini.nn.compressed_attention import entry_attention, sink_attention
from dsmini.nn.dsa import index_scores, topk_attention, topk_keys
from dsmini.nn.fp8 import quantized_experts, quantized_linear
from dsmini.nn.layers import linear, rms_norm
from dsmini.nn.moe import experts
from dsmini_kernels import Unserved, cpu
from dsmini_kernels.cpu import panels
from tests.conftest import MODELS, SMALL, randomise
from tests.helpers import operations
from tests.helpers.decoding import WEIGHTS
from tests.helpers.operations import DTYPES, Case, assert_agrees, exact, expert_case, normal, run
from tests.helpers.tolerances import BF16_CACHE, BF16_UNIT, FP32_MODEL, FP32_UNIT, moved_codes, relative_error, rounding
from tests.helpers.watching import Operations
from tests.kernels.conftest import BF16, assert_threads_change_no_bit, weight_in

pytestmark = pytest.mark.usefixtures("library", "serves_all")
EVERY_TYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
STREAMS = ("read_streams", "write_streams", "sinkhorn")
TRAINED = {"causal_attention": "trained_attention", "experts": "trained_experts", "rms_norm": "trained_norm"}
TRAINED |= dict(zip(STREAMS, STREAMS, strict=True))
"""Operations that have a kernel in training too. That of rms_norm has none else."""
SCALE = 0.3


def heads(dtype: torch.dtype, b: int, h: int, s: int, width: int) -> Tensor:
    """Return heads as layers have them: those of a token side by side."""
    return normal(b, s, h, width, dtype=dtype).transpose(1, 2)


def causal_case(dtype: torch.dtype, b: int, h: int, s: int, d: int, width: int, documents: bool = False) -> Case:
    of = torch.randint(0, 3, (b, s)).sort(1).values if documents else None
    return Case(causal_attention, (*(heads(dtype, b, h, s, n) for n in (d, d, width)), SCALE, of), terms=d + s)


def topk_case(
    dtype: torch.dtype, b: int, s: int, t: int, h: int, n: int, r: int, c: int, v: int, k: int, spread: bool = False
) -> Case:
    """Return attention to rows of a longer cache. Some indices are none; numbers of a sum may be apart in memory."""
    sizes = ((b, s, h, n), (b, s, h, r), (b, t + 2, c + r))
    q_nope, q_rope, rows = (normal(*size, dtype=dtype) for size in sizes)
    w = normal(h, n, c, dtype=dtype, scale=n**-0.5), normal(h, c, v, dtype=dtype, scale=c**-0.5)
    w_uk, w_uv = (x.permute(1, 2, 0).contiguous().permute(2, 0, 1) if spread else x for x in w)
    chosen = torch.rand(b, s, t).topk(k).indices
    chosen[..., 1:] = chosen[..., 1:].masked_fill(torch.rand(b, s, k - 1) < 0.3, -1)
    arguments = (q_nope, q_rope, rows[:, :t], w_uk, w_uv, (c + r) ** -0.5, chosen)
    return Case(topk_attention, arguments, terms=max(n, r, c, v, k))


def held_case(weights: str, case: Case) -> Case:
    """Return a case of experts whose matrices are held so, which is not trained."""
    held = {i: weight_in(weights, *case.arguments[i].shape) for i in (3, 4, 5)}
    return case.changed(held)._replace(operation=quantized_experts, chained=3)


def cases(n: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases of all backends, and attention to chosen keys."""
    yield from (case for case in operations.cases(n, dtype) if case.operation.name in {*cpu.OPERATIONS, *TRAINED})
    yield topk_case(dtype, 2, 5, n + 40, 8, 16, 8, 37, 9, 20)


def limited(case: Case) -> Case:
    """Return a case of experts with a limit of SwiGLU that many numbers pass, which has a kernel in training alone."""
    return case._replace(arguments=(*case.arguments, 0.5))


def large_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield sizes around the blocks of the kernels: whole ones and rests, V3's widths, one token."""
    for documents in (False, True):
        for shape in (
            (2, 2, 131, 33, 17),
            (1, 3, 70, 48, 32),
            (1, 1, 500, 20, 64),
            (3, 2, 1, 5, 1),
            (1, 2, 97, 192, 128),
        ):
            yield causal_case(dtype, *shape, documents=documents)
    for batches in (0, 1, 2):
        mask = torch.rand(batches, 70, 210) < 0.5 if batches else None
        if mask is not None:
            mask[:, :30, 100:] = True  # blocks of keys that no query of a panel sees
        q, k, v = (heads(dtype, 2, *size) for size in ((4, 70, 33), (2, 210, 33), (2, 210, 17)))
        yield Case(cached_attention, (q, k, v, SCALE, mask), terms=210, chained=4 if dtype == torch.float32 else 1)
    chained = 3 if dtype == torch.float32 else 9  # in BF16 hidden numbers are kept, and rounded twice more
    sizes = ((1, 33, 7, 4, 2), (40, 130, 63, 8, 3), (300, 64, 65, 5, 2), (130, 257, 31, 40, 4), (7, 1, 1, 2, 1))
    for n, *rest in (*sizes, (500, 100, 40, 2, 1)):
        case = expert_case(n, dtype, *rest)._replace(terms=max(n, *rest[:2]), chained=chained)
        yield from (case, *(held_case(weights, case) for weights in WEIGHTS))
    for shape in ((3,), (63,), (5, 64), (2, 3, 37), (1, 96), (2, 1100, 19), (1100, 4, 8)):
        x = (torch.randn(shape) * torch.rand(*shape[:-1], 1).exp2()).to(dtype)  # rows of unlike sizes
        yield Case(
            rms_norm, (x, torch.rand(shape[-1]) + 0.5, 0.1), terms=max(x.numel() // shape[-1], shape[-1]), chained=1
        )
    yield topk_case(dtype, 1, 1, 1, 1, 1, 2, 3, 4, 1)
    yield topk_case(dtype, 2, 3, 300, 16, 64, 32, 256, 64, 130)
    yield topk_case(dtype, 1, 2, 70, 130, 9, 4, 32, 5, 33)  # more heads than a panel has
    yield topk_case(dtype, 2, 1, 90, 2, 4, 5, 64, 5, 63)  # rows of an odd width


class Kernels(list[str]):
    """The names of the kernels that ran."""

    def kernel_ran(self, call: ops.Call) -> None:
        self.append(call.name)


def results(case: Case) -> list[Tensor]:
    """Return the result of an operation that has a kernel for it, and in training the result and the gradients."""
    alone = [] if case.operation is rms_norm else [case.operation(*case.arguments)]
    trained = run(case, case.operation) if case.operation.name in TRAINED else []
    return [t.contiguous() for t in (*alone, *trained)]


def exact_results(case: Case) -> list[Tensor]:
    """Return the same by the reference in FP64."""
    y, *gradients = exact(case)
    alone = [] if case.operation is rms_norm else [y]
    return [*alone, y, *gradients] if case.operation.name in TRAINED else alone


OWN = {
    "experts": dict.fromkeys((0, 1, -3, -2, -1), (4, 0)),
    "quantized_experts": {0: (4, 0)},
    "topk_attention": {0: (1, 1)},
}
"""Parts whose rows are compared next to their own size, not the largest's: the tokens of a result, the gradients of an
expert with few tokens, or none. A part has the tolerances that a row may take, and the last dimension of its rows."""


# all cases


@EVERY_TYPE
@pytest.mark.parametrize("n", [63, 130, 0], ids=["63", "130", "large"])
def test_values_and_gradients_agree(isa: str, n: int, dtype: torch.dtype) -> None:
    for case in cases(n, dtype) if n else large_cases(dtype):
        name, trained, kernels = case.operation.name, case.operation.name in TRAINED, Kernels()
        with ops.use("cpu"), ops.counting(kernels):
            got = results(case)
        in_training = [TRAINED[name], f"{TRAINED[name]}_gradients"] if trained else []
        assert kernels == [name] * (case.operation is not rms_norm) + in_training, "each call has a kernel"
        want = exact_results(case)
        assert_agrees(case, got, want, rows=True)
        for i, (times, leading) in OWN.get(name, {}).items():
            for a, b in zip(got[i].flatten(0, leading), want[i].flatten(0, leading), strict=True):
                # a row of one number is a sum whose terms may cancel
                assert a.numel() == 1 or relative_error(a, b) <= times * case.tolerance, (name, i)
        if case.operation is causal_attention:
            assert torch.equal(got[0], got[1]), "in inference and in training"
        if case.operation is rms_norm:  # the weight's gradient is FP32, whatever x is
            assert relative_error(got[2], want[2]) <= rounding(FP32_UNIT, terms=case.terms, chained=case.chained)


@EVERY_TYPE
@pytest.mark.parametrize("size", [(2, 70, 3, 33, 210), (1, 5, 2, 8, 3), (2, 130, 4, 64, 200)])
@pytest.mark.parametrize("batches", [1, 2])
def test_attention_with_a_sink_is_trained(isa: str, dtype: torch.dtype, size: tuple[int, ...], batches: int) -> None:
    """All heads share keys and values. The first query sees none, and its result is 0."""
    b, s, h, d, t = size
    mask = torch.rand(min(b, batches), s, t) < 0.5
    mask[:, 0] = True
    operands = (normal(b, s, h, d, dtype=dtype), normal(b, t, d, dtype=dtype), mask, normal(h), SCALE)
    case = Case(sink_attention, operands, terms=d + t)
    kernels, want = Kernels(), exact(case)
    with ops.use("cpu"), ops.counting(kernels):
        got = run(case, sink_attention)
    assert kernels == ["trained_attention", "trained_attention_gradients"]
    assert not got[0][:, 0].any() and not got[1][:, 0].any()
    assert_agrees(case, got, want)
    with ops.use("reference"):
        assert_agrees(case, run(case, train_sink_attention), want)
    if b * h > 2:  # else three threads take torch's operations
        assert_threads_change_no_bit(lambda: [part.contiguous() for part in run(case, sink_attention)])


@EVERY_TYPE
def test_experts_with_a_limit_are_trained(isa: str, dtype: torch.dtype) -> None:
    """A result is FP32. BF16 decides which numbers within half a step of the limit have a gradient.

    w1 x and w3 x are normal, so that 0.4 * 2 * 0.5 of a unit of them are there. An error is the root of such a share.
    """
    flipped = 0.0 if dtype == torch.float32 else rounding((0.4 * BF16_UNIT) ** 0.5)
    small, large = (
        [limited(c) for c in some if c.operation is experts] for some in (cases(63, dtype), large_cases(dtype))
    )
    for case in small + large:
        kernels, want = Kernels(), exact(case)
        with ops.use("cpu"), ops.counting(kernels):
            got = run(case, experts)
        assert kernels == ["trained_experts", "trained_experts_gradients"]
        assert got[0].dtype == torch.float32
        with ops.use("reference"):
            plain = run(case, train_experts)
        for results_ in (got, plain):
            for a, b in zip(results_, want, strict=True):
                assert relative_error(a, b) <= case.tolerance + flipped
    for case in small:
        assert_threads_change_no_bit(lambda case=case: [t.contiguous() for t in run(case, experts)])


@EVERY_TYPE
def test_plain_versions_of_training_agree(dtype: torch.dtype) -> None:
    """They run where there is a kernel, which does not serve the call."""
    plain: dict[Any, Any] = {causal_attention: train_attention, experts: train_experts}
    for case in cases(63, dtype):
        if case.operation in plain:
            with ops.use("reference"):
                got = run(case, plain[case.operation])
            assert_agrees(case, got, exact(case))


@EVERY_TYPE
def test_threads_change_no_bit(isa: str, dtype: torch.dtype) -> None:
    # one head, sums whose numbers are apart, and few rows: torch's products depend on threads there
    apart = (
        (2, 21, 300, 8, 16, 8, 64, 16, 50),
        (1, 129, 300, 1, 128, 8, 37, 64, 50),
        (1, 2, 300, 2, 64, 8, 130, 37, 50),
    )
    more = [topk_case(dtype, *shape, spread=spread) for shape in apart for spread in (False, True)]
    for weights in WEIGHTS:  # rows of some are converted, in memory of the thread
        more.append(Case(quantized_linear, (normal(150, 96, dtype=dtype), weight_in(weights, 370, 96)), terms=96))
        more.append(held_case(weights, expert_case(150, dtype, 96, 70)))
    norm = Case(rms_norm, (normal(1100, 37, dtype=dtype), torch.rand(37), 0.1), terms=37)
    for case in (*cases(130, dtype), *more, norm):
        assert_threads_change_no_bit(lambda case=case: results(case))


@EVERY_TYPE
def test_operands_of_any_layout_agree(isa: str, dtype: torch.dtype) -> None:
    for case in cases(63, dtype):
        places = case.floats
        want, together = exact_results(case), results(case)
        for apart in (
            lambda t: t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1]),
            lambda t: t.transpose(0, t.dim() // 2).contiguous().transpose(0, t.dim() // 2),
            lambda t: F.pad(t, (7, 3))[..., 7:-3],
            lambda t: torch.stack((t, t), -1)[..., 0],
        ):
            got = results(case.changed({i: apart(case.arguments[i]) for i in places}))
            assert_agrees(case, got, want)
            if case.operation is rms_norm:
                assert all(map(torch.equal, got, together)), "no bit of a norm depends on strides"


def test_default_dtype_changes_no_bit() -> None:
    for case in cases(63, torch.float32):
        every = []
        try:
            for dtype in (torch.float64, torch.bfloat16, torch.float32):
                torch.set_default_dtype(dtype)
                every.append(results(case))
        finally:
            torch.set_default_dtype(torch.float32)
        for parts in zip(*every, strict=True):
            assert all(t.dtype == parts[2].dtype and torch.equal(t, parts[2]) for t in parts)


BAD = [torch.tensor(bits, dtype=torch.int32).view(torch.float32) for bits in (0x7FFFFFFF, -1, 0x7F800000)]
"""NaN of two signs and payloads, one of which would be zero if it were rounded to BF16 as an integer, and infinity."""


@EVERY_TYPE
def test_a_bad_number_is_seen_where_the_reference_sees_it(isa: str, dtype: torch.dtype) -> None:
    """It is the first or last of a row: with an odd width the numbers after a row's last are the next row's."""
    odd = Case(linear, (normal(60, 41, dtype=dtype), normal(21, 41)), terms=41)
    for case in (*cases(63, dtype), odd, expert_case(60, dtype, 41, 21), causal_case(dtype, 1, 1, 80, 16, 16)):
        attends = case.operation in (causal_attention, cached_attention, topk_attention)
        for i, bad, at in itertools.product(case.floats, BAD, (0, -1)):
            if (attends and i == 2) or (case.operation is rms_norm and bad.isinf()):
                continue  # the reference multiplies a value that is not seen by zero; a norm, infinity by its inverse
            broken = case.arguments[i].clone()
            rows = broken.view(-1, broken.shape[-1])
            rows[len(rows) // 2, at] = bad
            changed = case.changed({i: broken})
            with ops.use("reference"):  # in FP32: where torch has units for BF16, what it sees depends on the CPU
                floats = changed.changed({j: changed.arguments[j].float() for j in case.floats})
                want = case.operation(*floats.arguments)
            assert torch.equal(results(changed)[0].isfinite(), want.isfinite()), (case.operation.name, i, bad, at)


# training


def kernels_in_training(case: Case, frozen: int | None = None) -> list[str]:
    """Return the kernels of a forward and a backward, with all floating-point operands trained, or all but one."""
    kernels = Kernels()
    leaves = {i: case.arguments[i].detach().requires_grad_(i != frozen) for i in case.floats}
    with torch.enable_grad(), ops.counting(kernels):
        case.operation(*case.changed(leaves).arguments).sum().backward()
    return kernels


TRAINED_CASES = {case.operation.name: case for case in [*cases(63, torch.float32)][::-1]}
"""The first case of each operation."""


@pytest.mark.parametrize("name", TRAINED)
def test_training_takes_a_kernel_only_where_it_serves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, kernels = TRAINED_CASES[name], [TRAINED[name], f"{TRAINED[name]}_gradients"]
    assert kernels_in_training(case) == kernels
    with ops.use("eager"):
        assert not kernels_in_training(case)
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels_in_training(case)
    with ops.use("cpu"):  # where no kernel is asked, a forced backend refuses nothing
        assert not kernels_in_training(case.changed({i: case.arguments[i].double() for i in case.floats}))
    with monkeypatch.context() as patch:
        for module in ("attention", "experts", "layers", "streams"):
            patch.setattr(f"dsmini.functional.{module}.KERNEL_FROM", 1 << 30)
        assert not kernels_in_training(case), "little work"
    if name not in ("rms_norm", *STREAMS):  # a head, or two experts, are one thread's work
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
        assert not kernels_in_training(case), "more threads than work"


@pytest.mark.parametrize("name", TRAINED)
def test_second_derivatives_are_refused(name: str) -> None:
    case = TRAINED_CASES[name]
    leaves = {i: case.arguments[i].clone().requires_grad_() for i in case.floats}
    with torch.enable_grad():
        total = case.operation(*case.changed(leaves).arguments).sum()
        with pytest.raises(ValueError, match="second derivatives"):
            torch.autograd.grad(total, [*leaves.values()], create_graph=True)


def test_frozen_and_rounded_operands_are_trained_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, routed = TRAINED_CASES["causal_attention"], TRAINED_CASES["experts"]
    assert not kernels_in_training(attention, frozen=2) and not kernels_in_training(routed, frozen=3)
    w1 = routed.arguments[3]
    for w in (w1.bfloat16(), w1.mT.contiguous().mT):
        assert not kernels_in_training(routed.changed({3: w}))
    rounded = attention.changed({i: attention.arguments[i].bfloat16() for i in attention.floats})
    assert kernels_in_training(rounded)
    monkeypatch.setattr(BF16, lambda: True)
    assert not kernels_in_training(rounded), "torch multiplies it"


def test_backward_uses_the_forwards_backend_and_no_autocast() -> None:
    for name in TRAINED:
        case = TRAINED_CASES[name]
        leaves = {i: case.arguments[i].clone().requires_grad_() for i in case.floats}
        with torch.enable_grad(), ops.use("cpu"):
            total = case.operation(*case.changed(leaves).arguments).sum()
        want, kernels = torch.autograd.grad(total, [*leaves.values()], retain_graph=True), Kernels()
        with torch.autocast("cpu", torch.bfloat16), ops.use("eager"), ops.counting(kernels):
            got = torch.autograd.grad(total, [*leaves.values()])
        assert kernels == [f"{TRAINED[name]}_gradients"]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_of_attention_may_have_no_strides_and_come_at_once() -> None:
    case = TRAINED_CASES["causal_attention"]
    leaves = [t.clone().requires_grad_() for t in case.arguments[:3]]
    grads = torch.randn(2, 1, 1, 1, 7).expand(2, 2, 3, 63, 7)
    with torch.enable_grad():
        y, plain = causal_attention(*leaves, SCALE), causal_attention.reference(*leaves, SCALE)
    together = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        one, want = (torch.autograd.grad(result, leaves, grad, retain_graph=True) for result in (y, plain))
        assert_agrees(case, one, want), assert_agrees(case, [each[i] for each in together], want)


def test_compiled_training_has_no_kernel_and_no_break() -> None:
    case = TRAINED_CASES["causal_attention"]
    compiled = torch.compile(causal_attention.__call__, backend="eager", fullgraph=True)
    assert_agrees(case, run(case, compiled), exact(case))


# attention


def test_large_logits_choose_one_key_forward_and_backward(isa: str) -> None:
    """Logits of 1e10 are far apart, and rounding them moves each by hundreds: the largest must still have weight 1."""
    q, k, v, grad = (heads(torch.float32, 1, 2, 150, n) for n in (32, 32, 16, 16))
    # sums of products of integers are exact, so that the largest logit is the same one; few are equal
    q, k = (64 * q).round() * 2.0**20, (64 * k).round()
    case = Case(causal_attention, (q, k, v, SCALE, None), terms=16)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        want = causal_attention.reference(*leaves, SCALE)
    y, lse = cpu.trained_attention(q, k, v, SCALE, None)
    dq, dk, dv = cpu.trained_attention_gradients(grad, q, k, v, y, lse, SCALE, None)
    mask = torch.ones(1, 150, 150, dtype=torch.bool).triu(1)
    for got in (y, cpu.causal_attention(q, k, v, SCALE), cpu.cached_attention(q, k, v, SCALE, mask)):
        assert_agrees(case, [got], [want], rows=True)
    assert_agrees(case._replace(terms=150), [dv], torch.autograd.grad(want, leaves[2], grad.double()), rows=True)
    # one weight is 1, so both are zero up to the rounding of a product of a value and a gradient
    most = case.tolerance * v.norm(dim=-1).max() * grad.norm(dim=-1).max() * SCALE
    assert dq.norm(dim=-1).max() <= most * k.norm(dim=-1).max()
    assert dk.norm(dim=-1).max() <= most * 150 * q.norm(dim=-1).max()


@EVERY_TYPE
def test_large_logits_choose_one_row(isa: str, dtype: torch.dtype) -> None:
    case = topk_case(dtype, 1, 4, 300, 16, 64, 32, 256, 64, 130)
    case = case.changed({**{i: 1e10 * case.arguments[i] for i in (0, 1)}, 5: SCALE})
    got, want = case.operation(*case.arguments), exact(case)[0]
    assert got.isfinite().all()
    # two logits may tie after the rounding of W_UK q: few rows of heads may differ
    near = (got - want).flatten(0, 1).unflatten(-1, (16, 64)).norm(dim=-1) < 0.05 * want.norm() / (4 * 16) ** 0.5
    assert near.double().mean() > 0.9


@EVERY_TYPE
def test_a_query_that_sees_no_key_has_nan(isa: str, dtype: torch.dtype) -> None:
    q, blind = heads(dtype, 1, 1, 80, 16), torch.zeros(1, 80, 80, dtype=torch.bool)
    blind[0, 7] = True
    y = cpu.cached_attention(q, q, q, SCALE, blind)[0, 0]
    assert y.isnan().all(-1).tolist() == y.isnan().any(-1).tolist() == blind[0, :, 0].tolist()
    case = topk_case(dtype, 1, 2, 30, 2, 8, 4, 32, 8, 5)
    case.arguments[6][:, 1] = -1
    y = cpu.topk_attention(*case.arguments)[0]
    assert y[1].isnan().all() and not y[0].isnan().any()


@EVERY_TYPE
def test_the_order_of_chosen_rows_and_rows_not_chosen_do_not_matter(isa: str, dtype: torch.dtype) -> None:
    *operands, scale, chosen = topk_case(dtype, 1, 3, 200, 5, 16, 8, 64, 16, 70).arguments
    want = cpu.topk_attention(*operands, scale, chosen)
    tolerance = rounding(FP32_UNIT, terms=70) + (dtype == torch.bfloat16) * rounding(BF16_UNIT)
    assert relative_error(cpu.topk_attention(*operands, scale, chosen.flip(-1)), want) < tolerance
    unseen = set(range(200)) - set(chosen[0, 1].tolist())
    operands[2][0, sorted(unseen)] = torch.nan
    got = cpu.topk_attention(*operands, scale, chosen)
    assert torch.equal(got[0, 1], want[0, 1]) and got[0, 0].isnan().all()


@pytest.mark.parametrize("units", [True, False])
def test_heads_are_multiplied_in_bf16_only_where_a_cpu_has_units(monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    monkeypatch.setattr("dsmini_kernels.cpu.topk.has_bf16_units", lambda: units)
    case = topk_case(torch.bfloat16, 1, 2, 130, 3, 8, 6, 37, 9, 20)
    with Operations() as seen:
        assert cpu.topk_attention(*case.arguments).dtype == torch.bfloat16
    products = {result.dtype for result in seen.results if "bmm" in result.operation}
    assert products == {torch.bfloat16 if units else torch.float32}


# the keys that an indexer chooses


def scored(
    b: int, s: int, t: int, h: int, width: int, topk: int, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """Return the arguments of topk_keys. Keys are the first of a longer cache, and some are masked."""
    q, k = normal(b, s, h, width, dtype=dtype), normal(b, t + 3, width, dtype=dtype)[:, :t]
    mask = torch.rand(b, s, t) < 0.3
    mask[..., 0] = False
    return q, k, torch.randn(b, s, h), topk, mask


@EVERY_TYPE
def test_chosen_keys_have_the_largest_scores(isa: str, dtype: torch.dtype) -> None:
    """Sizes that no vector divides, all keys, and less than an item; any thread count."""
    sizes = ((1, 1, 1, 1, 1, 1), (1, 3, 130, 3, 16, 9), (2, 21, 301, 8, 64, 40), (2, 5, 97, 5, 18, 97))
    for shape in (*sizes, (1, 2, 2500, 1, 7, 2048), (2, 40, 300, 4, 32, 50)):
        q, k, weights, topk, mask = call = scored(*shape, dtype)
        (got,) = assert_threads_change_no_bit(lambda call=call: [cpu.topk_keys(*call)])
        with ops.use("reference"):
            scores = index_scores(q.double(), k.double(), weights.double()).masked_fill(mask, -torch.inf)
            # terms of a score cancel, so its error is a share of what they would be together
            size = index_scores(q.double().abs(), k.double().abs(), weights.double().abs())
        assert got.shape == (*shape[:2], topk) and got.dtype == torch.int64
        error = rounding(FP32_UNIT, terms=shape[3] * shape[4]) * size.max()
        for chosen, row in zip(got.flatten(0, 1).tolist(), scores.flatten(0, 1), strict=True):
            places = [p for p in chosen if p >= 0]
            wanted = min(topk, int(row.isfinite().sum()))
            assert len(places) == len(set(places)) == wanted and chosen == sorted(places) + [-1] * (topk - wanted)
            rest = row.index_fill(0, torch.tensor(places), -torch.inf)
            assert row[places].isfinite().all() and row[places].min() >= rest.max() - error


def test_of_equal_scores_the_first_keys_are_chosen(isa: str) -> None:
    q, k, weights, topk, mask = scored(2, 9, 301, 4, 8, 16)
    weights = weights.abs()
    q[..., 0], k[:, :250, 0], k[:, 250:, 0] = -20.0, 1.0, 0.9  # all heads are rectified
    for order in (slice(None), slice(None, None, 2)):
        call = (q[:, order], k, weights[:, order], topk, mask[:, order])
        with ops.use("eager"):
            want = topk_keys(*call)
        assert torch.equal(cpu.topk_keys(*call), want)


def test_a_score_of_nan_is_chosen_and_no_hidden_key_is(isa: str) -> None:
    q, k, weights, topk, mask = scored(1, 4, 200, 3, 16, 5, torch.bfloat16)
    k[0, 7], mask[:, :2, 7], mask[:, 2:, 7] = torch.nan, True, False
    got = cpu.topk_keys(q, k, weights, topk, mask)[0]
    assert [7 in row for row in got.tolist()] == [False, False, True, True]
    assert not cpu.topk_keys(q, k, weights, topk, torch.ones_like(mask)).ge(0).any()


# what is not served


@pytest.mark.memory(1)
def test_more_tokens_than_memory_take_turns(isa: str) -> None:
    """Beyond the memory of hidden numbers and of panels, tokens are computed in turns."""
    linears = Case(quantized_linear, (torch.randn(700, 9000), weight_in("bfloat16", 5, 9000)), terms=9000, chained=1)
    for case in (expert_case(2000, torch.float32, 8, 4096, 3)._replace(terms=4096, chained=3), linears):
        assert_agrees(case, [getattr(cpu, case.operation.name)(*case.arguments)], exact(case)[:1])


def test_weights_that_are_not_their_memory_run_in_torch() -> None:
    x, w = torch.randn(20, 300), torch.randn(300, 300)
    for odd in (torch._neg_view(w), w[:1].expand(300, 300)):
        assert relative_error(linear(x, odd), x @ odd.T) < rounding(FP32_UNIT, terms=300)
    assert not linear(torch.randn(20, 0), torch.randn(5, 0).bfloat16()).any()


def test_what_is_not_served_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    routed, attention = TRAINED_CASES["experts"], TRAINED_CASES["causal_attention"]
    x, _, weights, *_ = routed.arguments
    q, norm_x, main = attention.arguments[0], torch.randn(3, 37), topk_case(torch.float32, 1, 2, 30, 2, 8, 4, 32, 8, 5)
    index = scored(1, 2, 30, 2, 8, 5)
    norm, gradients = Case(cpu.trained_norm, (norm_x, torch.rand(37), 0.1), 37), cpu.trained_norm_gradients
    keys = Case(cpu.topk_keys, index, 8)
    for case, changes, reason in (
        (routed, {0: x.half()}, "tensors in torch.float16"),
        (routed, {2: weights.double()}, "weights of torch.float64"),
        (attention, {i: q.double() for i in range(3)}, "tensors in torch.float64"),
        (norm, {0: norm_x.double()}, "torch.float64"),
        (norm, {1: torch.rand(37).bfloat16()}, "torch.bfloat16"),
        (norm, {0: norm_x[:0]}, r"\[0, 37\]"),
        (norm, {0: norm_x[:, :30]}, r"\[3, 30\]"),
        (Case(gradients, (norm_x.bfloat16(), norm_x, torch.rand(37), torch.ones(3, 1)), 1), {}, "a gradient of"),
        (keys, {2: index[2].bfloat16()}, r"weights of torch\.bfloat16"),
        (main, {2: main.arguments[2].double()}, "tensors in torch"),
    ):
        function = getattr(cpu, getattr(case.operation, "name", case.operation.__name__))
        with pytest.raises(Unserved, match=reason):
            function(*case.changed(changes).arguments)
    for case, place in ((routed, 3), (main, 2)):
        with torch.enable_grad(), pytest.raises(Unserved, match="gradient"):
            getattr(cpu, case.operation.name)(*case.changed({place: case.arguments[place].requires_grad_()}).arguments)
    with torch.enable_grad():  # indices have none, so these are served
        assert torch.equal(cpu.topk_keys(index[0].clone().requires_grad_(), *index[1:]), cpu.topk_keys(*index))
    monkeypatch.setattr(panels, "has_bf16_units", lambda: True)
    with pytest.raises(Unserved):
        cpu.causal_attention(*[q.bfloat16()] * 3, SCALE)
    monkeypatch.setattr(panels, "LEAST", 1 << 30)
    for case in (routed, attention):
        with pytest.raises(Unserved, match=r"^$"):
            getattr(cpu, case.operation.name)(*case.arguments)
    with pytest.raises(RuntimeError, match="size"):
        rms_norm(norm_x.requires_grad_(), torch.rand(32), 0.1)


@pytest.mark.parametrize("place", [30, -2, 1 << 40])
def test_chosen_rows_outside_the_memory_are_refused(place: int) -> None:
    case = topk_case(torch.float32, 1, 2, 30, 2, 8, 4, 32, 8, 5)
    case.arguments[6][0, 1, 2] = place
    with pytest.raises(RuntimeError, match="beyond their memory"):
        cpu.topk_attention(*case.arguments)


# --- V4's attention of few queries, over rows as a cache stores them

V4 = MODELS["v4"]
STORED = ("tensor", "fp32", "bf16", "fp8", "fp4")
ENTRIES = (
    (1, 1, 64, 512, 128, 250, 0),
    (1, 2, 130, 96, 17, 133, 20),  # more heads than a panel has
    (2, 3, 5, 40, 17, 333, 0),
    (2, 3, 5, 64, 131, 90, 90),
    (1, 1, 3, 32, 1, 0, 0),
    (4, 8, 4, 16, 9, 3, 1),
)
"""b, s, heads, width, rows of the window, entries, and how many are chosen, 0 for all."""


def codec_of(kind: str, width: int) -> Codec:
    rotated = width // 8 + 1
    numbers = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if kind in numbers:
        return Numbers(width, numbers[kind])
    return key_row(width - rotated, rotated) if kind == "fp8" else index_entry_row(width)


def entry_case(dtype: torch.dtype, kind: str, shape: tuple[int, ...], scale: float = 1.0) -> Case:
    """Return attention to entries stored in a longer cache. Scores are moderate, whatever the scale of all rows is."""
    b, s, heads, width, near, n, k = shape
    rows: Any = torch.randn(b, n + 3, width) * scale
    if kind == "tensor":
        rows = rows.to(dtype)
    else:
        cache = Rows(b, n + 3, codec_of(kind, width), rows.device)
        cache.data[:] = cache.codec.encode(rows)
        rows = cache
    q, window = torch.randn(b, s, heads, width) / max(scale, 1e-37), torch.randn(b, near, width) * scale
    chosen = torch.rand(b, s, n).topk(k).indices if k else None
    if chosen is not None:
        chosen[torch.rand(chosen.shape) < 0.2] = -1
    masked, hidden = torch.rand(b, s, near) < 0.2, torch.rand(b if k else 1, s, n) < 0.3
    hidden[..., n // 2 : 2 * n // 3] = True  # rows that no query sees
    arguments = (q.to(dtype), window.to(dtype), masked, rows, hidden, chosen, torch.randn(heads), width**-0.5)
    return Case(entry_attention, arguments, terms=width + near + n)


def exact_entries(case: Case) -> Tensor:
    q, near, masked, rows, hidden, chosen, sink, scale = case.arguments
    read = rows if isinstance(rows, Tensor) else rows.read(hidden.shape[2], q.dtype)
    wide = q.double(), near.double(), masked, read.double(), hidden, chosen, sink.double(), scale
    return entry_attention.reference(*wide)


def served(case: Case) -> Tensor:
    with ops.use("cpu"):
        return entry_attention(*case.arguments)


@EVERY_TYPE
@pytest.mark.parametrize("kind", STORED)
def test_attention_to_entries_agrees_and_threads_change_no_bit(isa: str, kind: str, dtype: torch.dtype) -> None:
    for shape in ENTRIES:
        if kind == "fp4" and shape[3] % 32:
            continue
        case = entry_case(dtype, kind, shape)
        (got,) = assert_threads_change_no_bit(lambda case=case: [served(case)], most=4)
        want = exact_entries(case)
        assert got.dtype == dtype and got.shape == want.shape
        for a, b in zip(got.flatten(0, 1), want.flatten(0, 1), strict=True):  # a wrong query would not show in all
            assert relative_error(a, b) <= case.tolerance, shape


@EVERY_TYPE
@pytest.mark.parametrize("kind", STORED)
def test_plain_versions_of_attention_to_entries_agree(kind: str, dtype: torch.dtype) -> None:
    case = entry_case(dtype, kind, (2, 3, 5, 64, 13, 90, 20))
    for backend in ("reference", "eager"):
        with ops.use(backend):
            assert relative_error(entry_attention(*case.arguments), exact_entries(case)) <= case.tolerance


@pytest.mark.parametrize("scale", [1e15, 1e-30, 1e-39])
@pytest.mark.parametrize("kind", ["tensor", "bf16"])
def test_rows_of_any_magnitude_agree(isa: str, kind: str, scale: float) -> None:
    """The smallest are subnormal, whose step is 2^-149."""
    for dtype in (torch.float32, torch.bfloat16) if scale > 1e-30 else (torch.float32,):
        case = entry_case(dtype, kind, ENTRIES[2], scale)
        got, want = served(case).double(), exact_entries(case)
        assert got.isfinite().all()
        assert (got - want).norm() <= case.tolerance * want.norm() + want.numel() ** 0.5 * case.terms * 2.0**-149


@EVERY_TYPE
def test_large_logits_choose_one_row_or_the_sink(isa: str, dtype: torch.dtype) -> None:
    case = entry_case(dtype, "tensor", (1, 2, 6, 64, 20, 90, 0))
    q, near, masked, rows, _, _, sink, _ = case.arguments
    nothing = torch.zeros(1, 2, 90, dtype=torch.bool)
    # products of whole numbers are exact, so that the largest logit is the same one
    q, near, rows = ((4 * t.float()).round().to(dtype) for t in (q, near, rows))
    large = case.changed({0: q * 2.0**40, 1: near, 3: rows, 4: nothing})
    assert relative_error(served(large), exact_entries(large)) <= case.tolerance
    assert not served(case.changed({6: sink + 1e15})).any(), "the sink has no value"
    masks = {2: torch.ones_like(masked), 4: ~nothing}
    assert not served(case.changed(masks)).any(), "a query that sees no row"


@EVERY_TYPE
def test_bad_numbers_reach_the_queries_that_see_them(isa: str, dtype: torch.dtype) -> None:
    for kind in ("tensor", "fp8"):
        case = entry_case(dtype, kind, (1, 3, 5, 64, 20, 90, 30))
        chosen, rows, masked = case.arguments[5], case.arguments[3], case.arguments[2]
        masked.zero_()
        place = int(chosen[0, 1].max())
        chosen[0, 0, chosen[0, 0] == place] = -1
        if kind == "tensor":
            rows[0, place, 3] = torch.nan
        else:
            row = torch.randn(1, 64).index_fill(1, torch.tensor(3), torch.nan)
            rows.data[0, place] = rows.codec.encode(row)[0]
        bad = served(case)[0].isnan()
        assert not bad[0].any() and bad[1].any(-1).all()
        case.arguments[1][0, 7] = torch.inf
        assert not served(case).isfinite().any(-1).all()


def test_entries_that_are_not_served_say_why() -> None:
    case = entry_case(torch.float32, "fp8", (1, 2, 5, 64, 20, 90, 30))
    q, chosen, sink = (case.arguments[i] for i in (0, 5, 6))
    other = Rows(1, 93, index_row(64), q.device)
    wide = entry_case(torch.float32, "tensor", (1, 1, 1, 1056, 3, 3, 0))
    for changed, reason in (
        (case.changed({0: q.bfloat16()}), "bfloat16"),
        (case.changed({6: sink.double()}), "a sink of torch.float64"),
        (case.changed({3: other}), "scales in torch.float32"),
        (case.changed({3: torch.zeros(1, 93, 64, dtype=torch.float16)}), "rows of torch.float16"),
        (wide, "rows of 1056 numbers"),
    ):
        with pytest.raises(Unserved, match=reason):
            cpu.entry_attention(*changed.arguments)
    many = entry_case(torch.float32, "tensor", (1, 40, 1, 8, 40, 3, 0))
    with pytest.raises(Unserved, match=r"^$"):
        cpu.entry_attention(*many.arguments)
    for place in (90, -2, 1 << 40):
        chosen[0, 1, 2] = place
        with pytest.raises(RuntimeError, match="beyond their memory"):
            cpu.entry_attention(*case.arguments)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, "fp8"], ids=str)
def test_a_model_decodes_unequal_and_speculative_rows_by_the_kernel(cache_dtype: Any) -> None:
    c = ModelConfig(**SMALL | V4 | {"n_mtp_layers": 0, "max_seq_len": 64})
    model = randomise(Transformer(c, compute_dtype=torch.float32)).eval()
    prompt, steps = torch.randint(0, 60, (2, 24)), torch.randint(0, 60, (3, 2, 3))
    logits, kernels = list[Tensor](), Kernels()
    for backend in (None, "eager"):
        cache = model.new_cache(2, 64, dtype=cache_dtype)
        with ops.use(backend), ops.counting(kernels):
            model(prompt, cache=cache, lengths=torch.tensor([24, 13]))
            logits.append(torch.cat([model(tokens, cache=cache) for tokens in steps]))
    stored = {torch.float32: FP32_MODEL, torch.bfloat16: BF16_CACHE, "fp8": moved_codes(FP32_MODEL)}
    assert relative_error(*logits) < stored[cache_dtype]
    assert kernels.count("entry_attention") >= 3 * model.config.n_layers
