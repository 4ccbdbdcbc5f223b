"""The cross-document mask: a document in a packed sequence is treated as if it stood alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsmini import MLA, Attention, Transformer
from dsmini.functional.attention import explicit_attention, flash_attention
from dsmini.nn.attention import context_of
from tests.helpers.tolerances import FP32_UNIT, ROPE_TABLE, relative_error, rounding

SIZES: dict[str, Any] = {"dim": 24, "n_heads": 3, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
Model = Callable[..., Transformer]


@pytest.mark.parametrize("kind", ["mla", "mha"])
@pytest.mark.parametrize("borders", [[5], [1, 2, 30], [36]])
def test_each_document_attends_as_if_alone(randomise: Any, kind: str, borders: list[int]) -> None:
    """RoPE knows differences of positions only, so a document's place in the sequence does not matter."""
    layer = randomise(MLA(**SIZES) if kind == "mla" else Attention(**SIZES)).double()
    x = torch.randn(2, 37, 24, dtype=torch.float64)
    documents = torch.zeros(2, 37, dtype=torch.int64)
    for border in borders:
        documents[:, border:] += 1
    packed = layer(x, dataclasses.replace(context_of(x, layer.rope), documents=documents))
    alone = torch.cat([layer(part) for part in x.tensor_split(borders, 1)], 1)
    assert relative_error(packed, alone) <= 8 * ROPE_TABLE
    assert relative_error(layer(x), alone) > 1e-3


@pytest.mark.parametrize("s", [37, 130])
def test_both_ways_of_attention_mask_alike_row_by_row(s: int) -> None:
    q, k, v = (torch.randn(2, 3, s, d, requires_grad=True) for d in (12, 12, 7))
    documents = torch.stack([torch.arange(s) // 11, torch.arange(s) // 29])
    direction = torch.randn(2, 3, s, 7)

    def run(attend: Any) -> list[torch.Tensor]:
        y = attend(q, k, v, 0.4, documents)
        return [y, *torch.autograd.grad((y * direction).sum(), [q, k, v])]

    explicit, sdpa = run(explicit_attention), run(flash_attention)
    for a, b in zip(sdpa, explicit, strict=True):
        assert (a - b).norm() <= rounding(FP32_UNIT, terms=s, chained=4) * max(b.norm(), explicit[0].norm())


def test_nothing_passes_from_one_document_to_another(small_model: Model) -> None:
    """Gradients of a document's losses do not reach another document's tokens, multi-token prediction included: its
    block at the last positions of a document joins the next one's embedding, but looks at no earlier position."""
    model = small_model(n_mtp_layers=1, embed_norm=True)
    tokens = torch.randint(0, 61, (1, 21))
    documents = (torch.arange(20) >= 9).long()[None]
    changed = tokens.clone()
    changed[0, :5] = (tokens[0, :5] + 1) % 61
    targets = torch.full((1, 20), -100)
    targets[0, 12:] = tokens[0, 13:]

    def losses(x: torch.Tensor, within: torch.Tensor | None) -> tuple[float, float]:
        got = model.losses(x[:, :-1], targets, documents=within)
        return got.main.item(), got.mtp.item()

    # other rows next to it in an expert's product may round a document's own differently
    assert losses(tokens, documents) == pytest.approx(losses(changed, documents), rel=1e-6)
    for before, after in zip(losses(tokens, None), losses(changed, None), strict=True):
        assert before != pytest.approx(after, rel=1e-4)
