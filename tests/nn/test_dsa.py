"""DSA against the report's equations, MLA where nothing is left out, and the two ways to read the chosen keys."""

from typing import Any

import pytest
import torch

from dsmini import ModelConfig, Transformer, ops
from dsmini.functional import sparse_attention
from dsmini.nn import DSA, dsa
from dsmini.nn.dsa import topk_attention
from tests import reference_model as reference
from tests.conftest import SMALL, randomise
from tests.helpers import configs
from tests.helpers.models import same_weights, set_stage, tokens_of
from tests.helpers.tolerances import ROPE_TABLE, assert_agree, relative_error
from tests.nn.test_mla import CASES, INDEX, SIZES

SPARSE: dict[str, Any] = SMALL | configs.DSA


def model_of(stage: Any = None, **changes: Any) -> Transformer:
    return set_stage(randomise(Transformer(ModelConfig(**SPARSE | changes))), stage)


def dense_baseline(model: Transformer) -> Transformer:
    """Return MLA with the same weights."""
    changes = {"attention": "mla", "index_n_heads": None, "index_head_dim": None, "index_topk": None}
    dense = Transformer(model.config, **changes)
    dense.load_state_dict({name: t for name, t in model.state_dict().items() if ".indexer." not in name})
    return dense


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_dsa_follows_the_report(monkeypatch: pytest.MonkeyPatch, case: str, interleave: bool) -> None:
    """Queries are scored and attended in three blocks, the last of which is ragged."""
    monkeypatch.setattr(dsa, "BLOCK", 8)
    c = ModelConfig(**SIZES | INDEX | CASES[case], indexer_rope_interleave=interleave)
    layer = randomise(DSA(c)).double()
    x = torch.randn(2, 23, c.dim, dtype=torch.float64, requires_grad=True)
    got = layer(x)
    learnt = torch.autograd.grad(got.sum(), [*layer.indexer.parameters()], allow_unused=True, retain_graph=True)
    assert learnt == (None,) * len(learnt)  # the choice is a constant
    main = [x, *(p for name, p in layer.named_parameters() if "indexer" not in name)]
    assert_agree(got, reference.attention(layer, x, c), main, 8 * ROPE_TABLE)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"original_seq_len": 16}], ids=str)
def test_up_to_k_keys_the_model_is_v3_to_the_bit(changes: dict[str, Any]) -> None:
    """A prompt takes MLA's form too."""
    model, tokens = model_of(**changes), tokens_of(2, 20)
    dense = dense_baseline(model)
    assert torch.equal(model(tokens[:, :8]), dense(tokens[:, :8]))
    for form, sizes in (("auto", 8), ("auto", (3, 4, 1)), ("expanded", (3, 4, 1)), ("absorbed", (3, 4, 1))):
        caches = [each.new_cache(2, 8, form=form) for each in (model, dense)]
        for part in tokens[:, :8].split(sizes, 1):
            sparse, want = (each(part, cache) for each, cache in zip((model, dense), caches, strict=True))
            assert torch.equal(sparse, want)
    assert relative_error(model(tokens), dense(tokens)) > 1e-2
    assert torch.equal(same_weights(model, index_topk=20)(tokens), dense(tokens))


@pytest.mark.parametrize(("b", "s", "t", "k"), [(1, 1, 1, 1), (2, 1, 63, 5), (2, 63, 130, 9), (1, 3, 130, 130)])
def test_mask_and_gather_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch, b: int, s: int, t: int, k: int) -> None:
    h, n, r, c, v = 3, 5, 4, 9, 7
    sizes = ((b, s, h, n), (b, s, h, r), (b, t, c + r), (h, n, c), (h, c, v))
    operands: Any = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    chosen = torch.rand(b, s, t).topk(k).indices
    chosen[..., 1:] = chosen[..., 1:].masked_fill(torch.rand(b, s, k - 1) < 0.3, -1)
    for nbytes, order in ((1 << 20, torch.arange(k)), (1, torch.arange(k)), (1, torch.randperm(k))):
        want = topk_attention.reference(*operands, 0.4, chosen)
        monkeypatch.setattr(sparse_attention, "BLOCK_BYTES", nbytes)
        with ops.use("eager"):
            assert_agree(topk_attention(*operands, 0.4, chosen[..., order]), want, operands, 1e-13)


# caches


def test_cached_keys_in_fp8_have_power_of_two_scales() -> None:
    model = model_of(index_head_dim=128)
    cache = model.new_cache(1, 24, "fp8")
    model(tokens_of(1, 20), cache)
    index = cache.stores[0].index
    assert index is not None and index.data.shape[2] == 132
    scales = index.data[0, :20, 128:].clone().view(torch.float32)
    assert torch.equal(scales.log2(), scales.log2().round())
