"""Attention of many queries in C++ agrees with its reference: values, gradients, hidden keys, where it serves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ops
from dsmini.nn.attention import cached_attention, causal_attention
from dsmini_kernels import Unserved, cpu
from dsmini_kernels.cpu import panels
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, relative_error, rounding
from tests.kernels.conftest import assert_threads_change_no_bit

pytestmark = pytest.mark.usefixtures("library", "serves_all")
SHAPES = ((2, 2, 131, 33, 17), (1, 3, 70, 48, 32), (1, 1, 500, 20, 64), (3, 2, 1, 5, 1), (1, 2, 97, 192, 128))
"""Sequences, heads, tokens, and widths of keys and values: whole blocks and rests of both, one token, V3's widths."""
SCALE = 0.3


def draw(b: int, h: int, s: int, width: int) -> Tensor:
    """Return heads as layers have them: those of a token side by side."""
    return torch.randn(b, s, h, width).transpose(1, 2)


def limit(terms: int) -> float:
    """Return the error of two chained products with exponentials between them, or of a gradient's four."""
    return rounding(FP32_UNIT, terms=terms, chained=4)


def exact(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        y = causal_attention.reference(*leaves, SCALE, documents)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


def assert_each_agrees(got: Tensor, want: Tensor, most: float) -> None:
    """Compare each row by itself next to the largest: a wrong small row would not show in the norm of all."""
    assert got.shape == want.shape
    errors = (got.double() - want).norm(dim=-1)
    assert errors.max() <= most * want.norm(dim=-1).max(), (errors.argmax(), errors.max())


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_agrees(isa: str, shape: tuple[int, ...], documents: bool) -> None:
    b, h, s, d, width = shape
    q, k, v, grad = (draw(b, h, s, n) for n in (d, d, width, width))
    of = torch.randint(0, 3, (b, s)).sort(1).values if documents else None
    want = exact(q, k, v, of, grad)
    y, lse = cpu.trained_attention(q, k, v, SCALE, of)
    got = [y, *cpu.trained_attention_gradients(grad, q, k, v, y, lse, SCALE, of)]
    assert torch.equal(cpu.causal_attention(q, k, v, SCALE, of), y)
    plain, plain_gradients = (ops.find(f"trained_attention{name}").reference for name in ("", "_gradients"))
    references = plain(q, k, v, SCALE, of)
    assert relative_error(lse, references[1]) < limit(d)
    references = [references[0], *plain_gradients(grad, q, k, v, *references, SCALE, of)]
    for a, reference, exactly in zip(got, references, want, strict=True):
        assert_each_agrees(a, exactly, limit(d + s)), assert_each_agrees(reference, exactly, limit(d + s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batches", [0, 1, 2])
def test_queries_after_keys_agree(isa: str, dtype: torch.dtype, batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads of queries share one of keys; a mask is of all sequences, or of each; or there is none."""
    monkeypatch.setattr(panels, "has_bf16_units", lambda: False)
    q, k, v = draw(2, 4, 70, 33).to(dtype), draw(2, 2, 210, 33).to(dtype), draw(2, 2, 210, 17).to(dtype)
    mask = torch.rand(batches, 70, 210) < 0.5 if batches else None
    if mask is not None:
        mask[:, :30, 100:] = True  # blocks of keys that no query of a panel sees
    got, want = (
        cpu.cached_attention(q, k, v, SCALE, mask),
        cached_attention.reference(*(t.double() for t in (q, k, v)), SCALE, mask),
    )
    assert got.dtype == dtype
    assert_each_agrees(got, want, limit(210) + (dtype == torch.bfloat16) * rounding(BF16_UNIT))


def test_what_is_not_a_number_stays_where_it_is_seen(isa: str) -> None:
    """A query that sees NaN, an infinite logit or no key has NaN; the others do not notice."""
    q, k, v = (draw(1, 1, 80, 16) for _ in range(3))
    k[0, 0, 50, 3], k[0, 0, 20, 2] = torch.nan, -torch.inf
    got, want = (f(q, k, v, SCALE) for f in (cpu.causal_attention, causal_attention.reference))
    assert torch.equal(got.isnan(), want.isnan()) and not got[0, 0, :20].isnan().any() and got[0, 0, 50:].isnan().all()
    blind = torch.zeros(1, 80, 80, dtype=torch.bool)
    blind[0, 7] = True
    got, want = (f(q, v, q, SCALE, blind) for f in (cpu.cached_attention, cached_attention.reference))
    assert got[0, 0, 7].isnan().all() and torch.equal(got.isnan(), want.isnan())
    far = 1e4 * q  # logits far apart, whose exponentials would overflow
    assert (
        relative_error(
            cpu.causal_attention(far, q, v, SCALE),
            causal_attention.reference(far.double(), q.double(), v.double(), SCALE),
        )
        < 1e-3
    )


def test_large_logits_choose_one_key_forward_and_backward(isa: str) -> None:
    """Logits of 1e10 are far apart, and rounding them moves each by hundreds: the largest must still have weight 1."""
    q, k, v, grad = (draw(1, 2, 150, n) for n in (32, 32, 16, 16))
    # sums of products of integers are exact, so that the largest logit is the same one; few are equal
    q, k = (64 * q).round() * 2.0**20, (64 * k).round()
    want_y, _, _, want_dv = exact(q, k, v, None, grad)
    y, lse = cpu.trained_attention(q, k, v, SCALE, None)
    dq, dk, dv = cpu.trained_attention_gradients(grad, q, k, v, y, lse, SCALE, None)
    mask = torch.ones(1, 150, 150, dtype=torch.bool).triu(1)
    for got in (y, cpu.causal_attention(q, k, v, SCALE), cpu.cached_attention(q, k, v, SCALE, mask)):
        assert_each_agrees(got, want_y, limit(16))
    assert_each_agrees(dv, want_dv, limit(150))
    # one weight is 1, so both are zero up to the rounding of a product of a value and a gradient
    most = limit(16) * v.norm(dim=-1).max() * grad.norm(dim=-1).max() * SCALE
    assert dq.norm(dim=-1).max() <= most * k.norm(dim=-1).max()
    assert dk.norm(dim=-1).max() <= most * 150 * q.norm(dim=-1).max()


@pytest.fixture
def leaves(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return q, k and v that are trained, by kernels although there are few."""
    monkeypatch.setattr("dsmini.functional.attention.KERNEL_FROM", 0)
    return [draw(2, 3, 150, n).requires_grad_() for n in (24, 24, 16)]


def trained_by(*call: Any) -> str:
    with torch.enable_grad():
        return type(causal_attention(*call, SCALE).grad_fn).__name__


def test_training_reaches_the_kernel_and_its_threads_change_no_bit(leaves: list[Tensor]) -> None:
    grad = torch.randn(2, 3, 150, 16)

    def run() -> list[Tensor]:
        with torch.enable_grad():
            y = causal_attention(*leaves, SCALE)
        return [y.detach().contiguous(), *(t.contiguous() for t in torch.autograd.grad(y, leaves, grad))]

    assert "TrainedAttention" in trained_by(*leaves)
    got = assert_threads_change_no_bit(run)
    with ops.use("eager"):
        want = run()
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < limit(150)
    with torch.enable_grad(), pytest.raises(ValueError, match="second derivatives"):
        torch.autograd.grad(causal_attention(*leaves, SCALE), leaves, grad, create_graph=True)


def test_training_takes_the_kernel_only_where_it_serves(leaves: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = leaves
    with monkeypatch.context() as patch:
        patch.setattr("dsmini.functional.attention.KERNEL_FROM", 1 << 30)
        assert "TrainedAttention" not in trained_by(q, k, v), "little work"
    assert "TrainedAttention" not in trained_by(q, k, v.detach()), "a frozen operand"
    for units in (True, False):
        monkeypatch.setattr("dsmini.machine.multiplies_bf16", lambda units=units: units)
        rounded = [t.detach().bfloat16().requires_grad_() for t in leaves]
        assert ("TrainedAttention" in trained_by(*rounded)) is not units, "BF16 where torch multiplies it"
    with ops.use("eager"):
        assert "TrainedAttention" not in trained_by(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert "TrainedAttention" not in trained_by(q, k, v)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert "TrainedAttention" not in trained_by(q, k, v), "a head is one thread's"


def test_calls_that_torch_serves_better_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q = draw(1, 2, 40, 16)
    with pytest.raises(Unserved):
        cpu.causal_attention(q.double(), q.double(), q.double(), SCALE)
    monkeypatch.setattr(panels, "has_bf16_units", lambda: True)
    with pytest.raises(Unserved):
        cpu.causal_attention(*[q.bfloat16()] * 3, SCALE)
    monkeypatch.setattr(panels, "LEAST", 1 << 20)
    with pytest.raises(Unserved):
        cpu.causal_attention(q, q, q, SCALE)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 1, 3, 2), (2, 3, 0, 1), (3, 1, 0, 2)])
def test_gradients_go_to_inputs_of_any_layout(leaves: list[Tensor], order: tuple[int, ...]) -> None:
    """Also gradients with stride 0, several at once, and under another default dtype."""
    back = [order.index(i) for i in range(4)]
    odd = [t.detach().permute(order).contiguous().permute(back).requires_grad_() for t in leaves]
    grads = torch.randn(2, 1, 1, 1, 16).expand(2, 2, 3, 150, 16)
    want = [exact(*leaves, None, grad)[1:] for grad in grads]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.enable_grad():
            y = causal_attention(*odd, SCALE)
        got = [torch.autograd.grad(y, odd, grad, retain_graph=True) for grad in grads]
        together = torch.autograd.grad(y, odd, grads, is_grads_batched=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for i in range(2):
        for a, b, c in zip(got[i], want[i], together, strict=True):
            assert relative_error(a, b) < limit(150) and relative_error(c[i], b) < limit(150)


def test_compiled_training_has_no_kernel_and_no_break(leaves: list[Tensor]) -> None:
    compiled = torch.compile(lambda *heads: causal_attention(*heads, SCALE), backend="eager", fullgraph=True)
    with torch.enable_grad():
        assert relative_error(compiled(*leaves), causal_attention(*leaves, SCALE)) < limit(150)
