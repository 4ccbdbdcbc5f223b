"""Multi-token prediction: what each depth sees, and what it is scored on."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from dsmini import Transformer
from dsmini.nn.transformer import IGNORE
from tests.helpers.tolerances import FP64_UNIT, MOVED, UNMOVED, relative_error, rounding

B, S, VOCAB = 2, 13, 61
Model = Callable[..., Transformer]


@pytest.mark.parametrize("t", [0, 1, 2, 6, S - 1])
def test_position_i_of_depth_k_sees_tokens_up_to_i_plus_k(small_model: Model, t: int) -> None:
    model = small_model().double()
    tokens = torch.stack([torch.randperm(VOCAB)[:S] for _ in range(B)])  # no token twice in a row
    changed = tokens.clone()
    changed[0, t] = (changed[0, t] + 1) % VOCAB
    before, after = (model.run(x, mtp=True).mtp_logits for x in (tokens, changed))
    assert [logits.shape for logits in before] == [(B, S - 1, VOCAB), (B, S - 2, VOCAB)]
    for k, (a, b) in enumerate(zip(after, before, strict=True), 1):
        first = max(t - k, 0)
        assert relative_error(a[:, :first], b[:, :first]) < UNMOVED
        assert relative_error(a[1], b[1]) < UNMOVED
        for i in range(first, S - k):
            assert relative_error(a[0, i], b[0, i]) > MOVED, f"depth {k} at position {i} is blind to token {t}"


@pytest.mark.parametrize("ignored", [0, 4])
def test_mtp_loss_divides_by_the_count_of_the_main_loss(small_model: Model, ignored: int) -> None:
    """Report, equation 24: depth k is scored on token i + k + 1 at s - k positions, and divided by all s."""
    model = small_model().double()
    stream = torch.randint(0, VOCAB, (B, S + 1))
    tokens, targets = stream[:, :-1], stream[:, 1:].clone()
    targets.view(-1)[:ignored] = IGNORE
    want = 0.0
    for k, logits in enumerate(model.run(tokens, mtp=True).mtp_logits, 1):
        for i in range(S - k):
            want += F.cross_entropy(logits[:, i], targets[:, i + k], ignore_index=IGNORE, reduction="sum").item()
    got = model.losses(tokens, targets).mtp.item()
    assert got == pytest.approx(want / 2 / (B * S - ignored), rel=rounding(FP64_UNIT, terms=B * S * VOCAB))


def test_sequence_too_short_for_mtp_depth_raises(small_model: Model) -> None:
    model = small_model()
    assert len(model.run(torch.zeros(1, 3, dtype=torch.int64), mtp=True).mtp_logits) == 2
    with pytest.raises(ValueError, match="a sequence of 2 tokens is too short for MTP depth 2; want 3"):
        model.run(torch.zeros(1, 2, dtype=torch.int64), mtp=True)
