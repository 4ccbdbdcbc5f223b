"""The chunked cross-entropy is torch's own, and no [n, vocab] tensor is made or kept."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmini import Transformer
from dsmini.nn import linear_cross_entropy
from dsmini.nn.transformer import IGNORE
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, assert_agree, relative_error, rounding
from tests.helpers.watching import Operations, saved_for_backward

N, M, VOCAB = 23, 15, 1000
Model = Callable[..., Transformer]


def problem(dtype: torch.dtype = torch.float32, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, a weight and targets, some of them ignored, the last id among them."""
    targets = torch.randint(0, VOCAB, (n,))
    targets[[0, 7, 8, n - 1]] = IGNORE
    targets[5] = VOCAB - 1
    hidden, weight = torch.randn(n, M, dtype=dtype), torch.randn(VOCAB, M, dtype=dtype) / M**0.5
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def torchs_own(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum")


def products(seen: Operations) -> int:
    return sum(result.operation == "mm" for result in seen.results)


@pytest.fixture(params=[0, 7, N, 1000])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of rows of logits that exist at a time: one where less than a row fits."""
    monkeypatch.setattr("dsmini.functional.cross_entropy.CHUNK", request.param * VOCAB)
    return max(1, request.param)


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradients_are_those_of_torchs_cross_entropy(dtype: torch.dtype) -> None:
    hidden, weight, targets = problem(dtype)
    got, want = linear_cross_entropy(hidden, weight, targets), torchs_own(hidden, weight, targets)
    assert got.dtype == dtype
    tolerance = 1e-13 if dtype == torch.float64 else rounding(FP32_UNIT, terms=VOCAB)
    assert_agree(got, want, [hidden, weight], tolerance)


def test_bf16_weights_sum_the_gradients_of_chunks_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmini.functional.cross_entropy.CHUNK", VOCAB)  # one row at a time
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1024, 8, generator=draw).bfloat16()
    weight = torch.randn(VOCAB, 8, generator=draw).bfloat16().requires_grad_()
    targets = torch.randint(VOCAB, (1024,), generator=draw)
    (got,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)
    exact = weight.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(torchs_own(hidden.double(), exact, targets), exact)
    assert got.dtype == torch.bfloat16 and relative_error(got, want) <= rounding(BF16_UNIT)


def test_ignored_targets_count_nothing(small_model: Model) -> None:
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE))
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert loss == 0 and not any(g.any() for g in grads)
    tokens = torch.randint(0, 61, (2, 9))
    losses = small_model().losses(tokens, torch.full_like(tokens, IGNORE))
    assert losses.main == losses.mtp == 0


def test_loss_of_a_single_target_is_its_own(small_model: Model) -> None:
    model, tokens = small_model(n_mtp_layers=0), torch.randint(0, 61, (2, 9))
    targets = torch.full_like(tokens, IGNORE)
    targets[1, 3] = 7
    want = F.cross_entropy(model(tokens)[1, 3], targets[1, 3])
    torch.testing.assert_close(model.losses(tokens, targets).main, want)


def test_no_more_than_a_chunk_of_logits_exists(
    small_model: Model, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = problem(n=130)
    with Operations() as seen:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), [hidden, weight])
    assert seen.largest == max(min(130, chunk_rows) * VOCAB, VOCAB * M)
    model, (tokens, labels) = small_model(vocab_size=VOCAB), torch.randint(0, VOCAB, (2, 4, 25)).unbind()
    for head in (model.head, nn.Sequential(model.head)):  # a wrapper, too
        model.head = head
        monkeypatch.setattr("dsmini.nn.transformer.CHUNK", chunk_rows * VOCAB)
        with Operations() as seen:
            model.losses(tokens, labels).total.backward()
        assert seen.largest == max(VOCAB * 24, min(100, chunk_rows) * VOCAB)


def test_nothing_of_logits_is_kept_for_backward() -> None:
    with saved_for_backward() as saved:
        linear_cross_entropy(*problem(n=130))
    assert sorted(t.numel() for t in saved) == [130 * M, VOCAB * M]


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradient_of_what_is_frozen_is_not_made(frozen: str, chunk_rows: int) -> None:
    hidden, weight, targets = problem()
    want = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), [hidden, weight])
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    with Operations() as seen:
        loss = linear_cross_entropy(hidden, weight, targets)
    assert products(seen) == 2 * -(-N // chunk_rows)
    other = weight if frozen == "hidden" else hidden
    assert torch.equal(torch.autograd.grad(loss, other)[0], want[frozen == "hidden"])
