"""DSA against the report's equations, MLA where nothing is left out, and the two ways to read the picks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import MLA, ModelConfig, Transformer, ops
from dsmini.functional import sparse_attention
from dsmini.nn import DSA, Cache, attention, dsa
from dsmini.nn.attention import cached_attention, context_of
from dsmini.nn.cache import LayerCache
from dsmini.nn.dsa import topk_attention, topk_mask
from tests import reference_model as reference
from tests.conftest import SMALL, randomise
from tests.helpers import configs
from tests.helpers.tolerances import BF16_UNIT, FP32_MODEL, ROPE_TABLE, assert_agree, relative_error
from tests.nn.test_indexer import INDEX
from tests.nn.test_mla import CASES, SIZES

SPARSE: dict[str, Any] = SMALL | configs.DSA
TOLERANCE = 8 * ROPE_TABLE


def model_of(**changes: Any) -> Transformer:
    return randomise(Transformer(ModelConfig(**SPARSE | {"n_mtp_layers": 0} | changes)))


def dense_twin(model: Transformer) -> Transformer:
    """Return MLA with the same weights."""
    changes = {"attention": "mla", "index_n_heads": None, "index_head_dim": None, "index_topk": None}
    twin = Transformer(model.config, **changes)
    twin.load_state_dict({name: t for name, t in model.state_dict().items() if ".indexer." not in name})
    return twin


def tokens_of(b: int, s: int) -> Tensor:
    return torch.randint(0, SMALL["vocab_size"], (b, s))


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_dsa_follows_the_report(case: str, interleave: bool) -> None:
    c = ModelConfig(**SIZES | INDEX | CASES[case], indexer_rope_interleave=interleave)
    layer = randomise(DSA(c)).double()
    x = torch.randn(2, 23, c.dim, dtype=torch.float64, requires_grad=True)
    got = layer(x)
    learnt = torch.autograd.grad(got.sum(), [*layer.indexer.parameters()], allow_unused=True, retain_graph=True)
    assert learnt == (None,) * len(learnt)  # picks are constants
    main = [x, *(p for name, p in layer.named_parameters() if "indexer" not in name)]
    assert_agree(got, reference.attention(layer, x, c), main, TOLERANCE)


def test_a_block_of_queries_reads_no_later_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    c = ModelConfig(**SIZES | INDEX)
    layer, x = randomise(DSA(c)).double(), torch.randn(2, 23, c.dim, dtype=torch.float64)
    read: list[int] = []

    def attention(q: Tensor, k: Tensor, *others: Any) -> Tensor:
        read.append(k.shape[2])
        return cached_attention(q, k, *others)

    monkeypatch.setattr(dsa, "BLOCK", 8)
    monkeypatch.setattr(dsa, "cached_attention", attention)
    assert relative_error(layer(x), reference.attention(layer, x, c)) <= TOLERANCE
    assert read == [8, 16, 23]


def test_a_sliding_window_leaves_the_rest_to_pick_from() -> None:
    layer = randomise(DSA(**SIZES | INDEX | {"index_topk": 4}))
    x = torch.randn(1, 30, 23)
    layer.mask = lambda q, k: q - k >= 6
    latent = layer.q_norm(layer.wq_a(x))  # pyright: ignore[reportOptionalCall]
    for t, row in enumerate(layer.select_topk(x, latent, context_of(x, layer.rope))[0]):
        assert set(row[row >= 0].tolist()) <= set(range(t - 5, t + 1)) and (row >= 0).sum() == min(4, t + 1)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"original_seq_len": 16}], ids=str)
def test_up_to_k_keys_the_model_is_v3_to_the_bit(changes: dict[str, Any]) -> None:
    model, tokens = model_of(n_mtp_layers=2, **changes), tokens_of(2, 20)
    dense = dense_twin(model)
    assert torch.equal(model(tokens[:, :8]), dense(tokens[:, :8]))
    for form in ("expanded", "absorbed"):
        caches = [each.new_cache(2, form=form) for each in (model, dense)]
        for part in tokens[:, :8].split((3, 4, 1), 1):
            sparse, want = (each(part, cache) for each, cache in zip((model, dense), caches, strict=True))
            assert torch.equal(sparse, want)
    assert relative_error(model(tokens), dense(tokens)) > 1e-2
    whole = model_of(n_mtp_layers=2, **changes, index_topk=20)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(whole(tokens), dense(tokens))


@pytest.mark.parametrize(("b", "s", "t", "k"), [(1, 1, 1, 1), (2, 1, 63, 5), (2, 63, 130, 9), (1, 3, 130, 130)])
def test_mask_and_gather_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch, b: int, s: int, t: int, k: int) -> None:
    h, n, r, c, v = 3, 5, 4, 9, 7
    sizes = ((b, s, h, n), (b, s, h, r), (b, t, c + r), (h, n, c), (h, c, v))
    operands: Any = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    picks = torch.rand(b, s, t).topk(k).indices
    picks[..., 1:] = picks[..., 1:].masked_fill(torch.rand(b, s, k - 1) < 0.3, -1)
    with ops.use("reference"):
        want = topk_attention(*operands, 0.4, picks)
    for nbytes, order in ((1 << 20, torch.arange(k)), (1, torch.arange(k)), (1, torch.randperm(k))):
        monkeypatch.setattr(sparse_attention, "BLOCK_BYTES", nbytes)
        with ops.use("eager"):
            got = topk_attention(*operands, 0.4, picks[..., order])
        direction = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
        grads = [torch.autograd.grad((y * direction).sum(), operands, retain_graph=True) for y in (got, want)]
        assert all(relative_error(a, b) <= 1e-13 for a, b in [(got, want), *zip(*grads, strict=True)])


def test_mask_of_picks_hides_all_others() -> None:
    mask = topk_mask(torch.tensor([[[2, -1, 0], [-1, -1, 3]]]), 5)
    assert mask.int().tolist() == [[[0, 1, 0, 1, 1], [1, 1, 1, 0, 1]]]


# caches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "fp8"])
@pytest.mark.parametrize("fp8", [False, True])
def test_forms_and_chunks_agree_for_every_cache(dtype: Any, fp8: bool) -> None:
    """All read what was rounded, keys of the indexer too. One sum in many is rounded to another BF16 number."""
    model, tokens = model_of(indexer_fp8=fp8), tokens_of(2, 24)
    with ops.use("eager"):
        want = model(tokens, model.new_cache(2, 24, dtype, form="expanded"))
        for form in ("expanded", "absorbed"):
            cache = model.new_cache(2, 24, dtype, form=form)
            got = torch.cat([model(part, cache) for part in tokens.split((5, 6, 1, 1, 11), 1)], 1)
            assert relative_error(got, want) < (FP32_MODEL if dtype == torch.float32 else BF16_UNIT / 4)


def test_rows_of_the_cache_take_788_bytes_in_fp8_and_1408_in_bf16() -> None:
    config, meta = configs.released("deepseek-v3", **configs.V32), torch.device("meta")
    fp8, bf16 = (Cache(config, 1, 8, dtype, meta, mtp=True) for dtype in ("fp8", torch.bfloat16))
    assert fp8.nbytes_per_token == 48_068 and bf16.nbytes_per_token == 61 * 1408
    assert fp8.mtp_nbytes == 8 * 788


def test_cached_keys_in_fp8_have_power_of_two_scales() -> None:
    model = model_of(index_head_dim=128)
    cache = model.new_cache(1, 24, "fp8")
    model(tokens_of(1, 20), cache)
    index = cache.stores[0].index
    assert index is not None and index.data.shape[2] == 132
    scales = index.data[0, :20, 128:].clone().view(torch.float32)
    assert torch.equal(scales.log2(), scales.log2().round())


# what others got wrong


def cached_and_alone(model: Transformer, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, mutant: Any = None) -> float:
    """Return the error of two rows that began with up to k keys next to a third, compared with each row alone."""
    first, rest = (3, 7, 5), (0, 13, 9)
    rows = [torch.cat((tokens[i, : first[i]], tokens[i, 7 : 7 + rest[i]], tokens[i, :1])) for i in (1, 2)]
    want = [model(row[None])[0, -1] for row in rows]
    if mutant:
        monkeypatch.setattr(*mutant)
    cache = model.new_cache(3, 32)
    model(tokens[:, :7], cache, torch.tensor(first))
    cache.select([1, 2])
    model(tokens[1:, 7:], cache, torch.tensor(rest[1:]))
    got = model(tokens[1:, :1], cache)
    return max(relative_error(got[i, 0], row) for i, row in enumerate(want))


def keys_of_short_contexts_skipped(self: DSA, x: Tensor, context: Any) -> Tensor:
    if context.cache is not None and int(context.cache.at.lengths.max()) <= self.indexer.topk:
        return MLA.forward(self, x, context)
    return FORWARD(self, x, context)


def first_keys_selected(self: LayerCache, index: Tensor) -> None:
    self.data = self.data[index]
    if self.index is not None:
        self.index.data = self.index.data[: len(index)]


def nothing_masked(mask: Any, queries: Tensor, t: int) -> Tensor:
    return torch.zeros(*queries.shape, t).bool()


FORWARD = DSA.forward
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "keys of short contexts are not stored": (DSA, "forward", keys_of_short_contexts_skipped),
    "later keys and padding are chosen": (attention, "attention_mask", nothing_masked),
    "keys stay where their row is gone": (LayerCache, "select", first_keys_selected),
}


def test_rows_in_a_cache_answer_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cached_and_alone(model_of(), tokens_of(3, 20), monkeypatch) < FP32_MODEL


@pytest.mark.parametrize("mutant", MUTANTS)
def test_known_bugs_of_others_are_seen(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    assert cached_and_alone(model_of(), tokens_of(3, 20), monkeypatch, MUTANTS[mutant]) > 1e-2


def test_prompt_up_to_k_keys_takes_the_form_of_mla() -> None:
    model, tokens = model_of(index_topk=24), tokens_of(2, 24)
    dense = dense_twin(model)
    caches = [each.new_cache(2) for each in (model, dense)]
    for part in tokens.split((20, 3, 1), 1):
        sparse, want = (each(part, cache) for each, cache in zip((model, dense), caches, strict=True))
        assert torch.equal(sparse, want)
