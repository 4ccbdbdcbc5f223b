"""DSA against the report's equations, MLA where nothing is left out, and the two ways to read the picks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import MLA, ModelConfig, Transformer, ops
from dsmini.functional import sparse_attention
from dsmini.functional.cached_attention import cached_attention
from dsmini.functional.sparse_attention import picked_attention, unpicked
from dsmini.nn import DSA, Cache, dsa
from dsmini.nn.layer_cache import LayerCache
from tests.conftest import SMALL, randomise
from tests.helpers import configs
from tests.helpers.tolerances import BF16_UNIT, FP32_MODEL, ROPE_TABLE, relative_error
from tests.nn.test_indexer import INDEX, scores_by_the_report
from tests.nn.test_mla import CASES, SIZES, rms_norm, rotate, temperature

SPARSE: dict[str, Any] = SMALL | configs.DSA
TOLERANCE = 8 * ROPE_TABLE


def model_of(**changes: Any) -> Transformer:
    return randomise(Transformer(ModelConfig(**SPARSE | changes)))


def dense_twin(model: Transformer) -> Transformer:
    """Return MLA with the same weights."""
    changes = {"attention": "mla", "index_n_heads": None, "index_head_dim": None, "index_topk": None}
    twin = Transformer(model.config, **changes)
    twin.load_state_dict({name: t for name, t in model.state_dict().items() if ".indexer." not in name})
    return twin


def tokens_of(b: int, s: int) -> Tensor:
    return torch.randint(0, SMALL["vocab_size"], (b, s))


# the equations


def by_the_report(w: dict[str, Tensor], x: Tensor, c: dict[str, Any]) -> Tensor:
    """Equations 1 and 2, a position at a time."""
    h, nope, rope, v_dim = c["n_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    compressed = c["q_lora_rank"] is not None
    latent = rms_norm(x @ w["wq_a.weight"].T, w["q_norm.weight"]) if compressed else x
    q = latent @ w["wq_b.weight" if compressed else "wq.weight"].T
    index = {name.removeprefix("indexer."): t for name, t in w.items() if name.startswith("indexer.")}
    scores = scores_by_the_report(index, x, latent, c).detach()
    c_kv, k_rope = (x @ w["wkv_a.weight"].T).split((c["kv_lora_rank"], rope), -1)
    kv, k_rope = rms_norm(c_kv, w["kv_norm.weight"]) @ w["wkv_b.weight"].T, rotate(k_rope, c)
    scale = (nope + rope) ** -0.5 * temperature(c.get("mscale_all_dim", 1.0), c) ** 2
    out = torch.zeros(*x.shape[:2], h * v_dim, dtype=x.dtype)
    for i in range(h):
        q_nope, q_rope = q[..., i * (nope + rope) :][..., : nope + rope].split((nope, rope), -1)
        k_nope, v = kv[..., i * (nope + v_dim) :][..., : nope + v_dim].split((nope, v_dim), -1)
        head_q, head_k = torch.cat((q_nope, rotate(q_rope, c)), -1), torch.cat((k_nope, k_rope), -1)
        for row in range(x.shape[0]):
            for t in range(x.shape[1]):
                picks = scores[row, t, : t + 1].sort(descending=True, stable=True).indices[: c["index_topk"]]
                weights = (scale * (head_k[row, picks] @ head_q[row, t])).softmax(0)
                out[row, t, i * v_dim : (i + 1) * v_dim] = weights @ v[row, picks]
    return out @ w["wo.weight"].T


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_dsa_follows_the_report(case: str, interleave: bool) -> None:
    c: dict[str, Any] = SIZES | INDEX | CASES[case] | {"indexer_rope_interleave": interleave}
    layer = randomise(DSA(**c)).double()
    x = torch.randn(2, 23, c["dim"], dtype=torch.float64, requires_grad=True)
    got, want = layer(x), by_the_report(dict(layer.named_parameters()), x, c)
    assert relative_error(got, want) <= TOLERANCE

    direction = torch.randn_like(got)
    main = [x, *(p for name, p in layer.named_parameters() if "indexer" not in name)]
    grads = [torch.autograd.grad((y * direction).sum(), main, retain_graph=True) for y in (got, want)]
    assert all(relative_error(a, b) <= TOLERANCE for a, b in zip(*grads, strict=True))
    learnt = torch.autograd.grad((got * direction).sum(), [*layer.indexer.parameters()], allow_unused=True)
    assert learnt == (None,) * len(learnt)  # picks are constants


def test_a_block_of_queries_reads_no_later_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    c: dict[str, Any] = SIZES | INDEX
    layer, x = randomise(DSA(**c)).double(), torch.randn(2, 23, c["dim"], dtype=torch.float64)
    read: list[int] = []

    def attention(q: Tensor, k: Tensor, *others: Any) -> Tensor:
        read.append(k.shape[2])
        return cached_attention(q, k, *others)

    monkeypatch.setattr(dsa, "BLOCK", 8)
    monkeypatch.setattr(dsa, "cached_attention", attention)
    assert relative_error(layer(x), by_the_report(dict(layer.named_parameters()), x, c)) <= TOLERANCE
    assert read == [8, 16, 23]


def test_gradients_are_finite_differences() -> None:
    """A step of 1e-6 moves no pick."""
    layer = randomise(DSA(**SIZES | INDEX | {"index_topk": 3})).double()
    x = torch.randn(1, 6, 23, dtype=torch.float64, requires_grad=True)
    with ops.use("reference"):
        assert torch.autograd.gradcheck(layer, x, eps=1e-6, atol=1e-5)


def test_documents_are_not_crossed() -> None:
    layer = randomise(DSA(**SIZES | INDEX))
    x = torch.randn(1, 30, 23)
    documents = torch.tensor([[0] * 13 + [1] * 17])
    got = layer(x, documents=documents)
    alone = layer(x[:, 13:], layer.rope.table(torch.arange(13, 30)))
    assert relative_error(got[:, 13:], alone) < FP32_MODEL
    assert relative_error(layer(x)[:, 13:], alone) > 1e-2


def test_a_sliding_window_leaves_the_rest_to_pick_from() -> None:
    layer = randomise(DSA(**SIZES | INDEX | {"index_topk": 4}))
    x = torch.randn(1, 30, 23)
    layer.mask = lambda q, k: q - k >= 6
    chosen = picks_of(layer, x)[0]
    for t, row in enumerate(chosen):
        assert set(row[row >= 0].tolist()) <= set(range(t - 5, t + 1)) and (row >= 0).sum() == min(4, t + 1)


def picks_of(layer: DSA, x: Tensor) -> Tensor:
    table = layer.rope.table(torch.arange(x.shape[1]))
    latent = x if layer.wq_a is None else layer.q_norm(layer.wq_a(x))  # pyright: ignore[reportOptionalCall]
    return layer.picks(x, latent, table)


# MLA where nothing is left out


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"original_seq_len": 16}], ids=str)
def test_up_to_k_keys_the_model_is_v3_to_the_bit(changes: dict[str, Any]) -> None:
    model, tokens = model_of(**changes), tokens_of(2, 20)
    dense = dense_twin(model)
    assert torch.equal(model(tokens[:, :8]), dense(tokens[:, :8]))
    for form in ("expanded", "absorbed"):
        caches = [each.new_cache(2, form=form) for each in (model, dense)]
        for part in tokens[:, :8].split((3, 4, 1), 1):
            sparse, want = (each(part, cache) for each, cache in zip((model, dense), caches, strict=True))
            assert torch.equal(sparse, want)
    assert relative_error(model(tokens), dense(tokens)) > 1e-2
    whole = model_of(**changes, index_topk=20)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(whole(tokens), dense(tokens))


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_picking_every_key_equals_v3(form: Any) -> None:
    """A row of a batch that is longer than k does not change the shorter one."""
    model, tokens = model_of(n_mtp_layers=0), tokens_of(2, 20)
    cache, lengths = model.new_cache(2, form=form), torch.tensor([20, 7])
    got = model(tokens, cache, lengths)
    assert relative_error(got[1, :7], dense_twin(model)(tokens[1:, :7])[0]) < FP32_MODEL


# a mask and a gather


@pytest.mark.parametrize(("b", "s", "t", "k"), [(1, 1, 1, 1), (2, 1, 63, 5), (2, 63, 130, 9), (1, 3, 130, 130)])
def test_mask_and_gather_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch, b: int, s: int, t: int, k: int) -> None:
    h, n, r, c, v = 3, 5, 4, 9, 7
    sizes = ((b, s, h, n), (b, s, h, r), (b, t, c + r), (h, n, c), (h, c, v))
    operands: Any = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    picks = torch.rand(b, s, t).topk(k).indices
    picks[..., 1:] = picks[..., 1:].masked_fill(torch.rand(b, s, k - 1) < 0.3, -1)
    results = []
    for backend, nbytes in (("reference", 1 << 20), ("eager", 1 << 20), ("eager", 1)):
        monkeypatch.setattr(sparse_attention, "BLOCK_BYTES", nbytes)
        with ops.use(backend):
            y = picked_attention(*operands, 0.4, picks)
        results.append([y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), operands)])
    for other in results[1:]:
        assert all(relative_error(a, want) <= 1e-13 for a, want in zip(other, results[0], strict=True))
    shuffled = picks[..., torch.randperm(k)]
    with ops.use("eager"):
        y = picked_attention(*operands, 0.4, shuffled)
    assert relative_error(y, results[0][0]) <= 1e-13


def test_mask_of_picks_hides_all_others() -> None:
    mask = unpicked(torch.tensor([[[2, -1, 0], [-1, -1, 3]]]), 5)
    assert mask.int().tolist() == [[[0, 1, 0, 1, 1], [1, 1, 1, 0, 1]]]


# caches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "fp8"])
@pytest.mark.parametrize("fp8", [False, True])
def test_forms_and_chunks_agree_for_every_cache(dtype: Any, fp8: bool) -> None:
    """All read what was rounded, keys of the indexer too. One sum in many is rounded to another BF16 number."""
    model, tokens = model_of(n_mtp_layers=0, indexer_fp8=fp8), tokens_of(2, 24)
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
    model = model_of(n_mtp_layers=0, index_head_dim=128)
    cache = model.new_cache(1, 24, "fp8")
    model(tokens_of(1, 20), cache)
    index = cache.stores[0].index
    assert index is not None and index.data.shape[2] == 132
    scales = index.data[0, :20, 128:].clone().view(torch.float32)
    assert torch.equal(scales.log2(), scales.log2().round())


def test_truncation_and_selection_keep_the_keys_in_place() -> None:
    model, tokens = model_of(n_mtp_layers=0), tokens_of(3, 20)
    cache = model.new_cache(3, 32)
    model(tokens, cache)
    cache.truncate(torch.tensor([20, 11, 15]))
    cache.select([2, 0])
    more = tokens_of(2, 5)
    got = model(more, cache)
    for i, (row, kept) in enumerate(((2, 15), (0, 20))):
        whole = torch.cat((tokens[row, :kept], more[i]))[None]
        assert relative_error(got[i], model(whole)[0, -5:]) < FP32_MODEL


# what others got wrong


def test_rows_in_a_cache_answer_as_alone() -> None:
    model, tokens = model_of(n_mtp_layers=0), tokens_of(3, 20)
    assert cached_error(model, tokens, [alone(model, tokens, row) for row in (1, 2)]) < FP32_MODEL


def alone(model: Transformer, tokens: Tensor, row: int) -> Tensor:
    """Return the last logits of a row whose first part is as long as FIRST says, and its second as REST."""
    parts = (tokens[row, : FIRST[row]], tokens[row, 7 : 7 + REST[row]], tokens[row, :1])
    return model(torch.cat(parts)[None])[0, -1]


FIRST, REST = (3, 7, 5), (0, 13, 9)


def cached_error(model: Transformer, tokens: Tensor, want: list[Tensor]) -> float:
    """Return the error of two rows that began with no more than k keys, next to one that is then dropped."""
    cache = model.new_cache(3, 32)
    model(tokens[:, :7], cache, torch.tensor(FIRST))
    cache.select([1, 2])
    model(tokens[1:, 7:], cache, torch.tensor(REST[1:]))
    got = model(tokens[1:, :1], cache)
    return max(relative_error(got[i, 0], row) for i, row in enumerate(want))


def keys_of_short_contexts_skipped(self: DSA, x: Tensor, table: Any, documents: Any, past: Any) -> Tensor:
    if past is not None and int(past.window.lengths.max()) <= self.indexer.topk:
        return MLA.forward(self, x, table, documents, past)
    return FORWARD(self, x, table, documents, past)


def nothing_hidden(mask: Any, queries: Tensor, t: int) -> Tensor:
    return torch.zeros(*queries.shape, t, dtype=torch.bool)


def first_keys_selected(self: LayerCache, index: Tensor) -> None:
    self.data = self.data[index]
    if self.index is not None:
        self.index.data = self.index.data[: len(index)]


FORWARD = DSA.forward
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "keys of short contexts are not stored": (DSA, "forward", keys_of_short_contexts_skipped),
    "later keys and padding are picked": (dsa, "hidden_keys", nothing_hidden),
    "keys stay where their row is gone": (LayerCache, "select", first_keys_selected),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_known_bugs_of_others_are_seen(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    model, tokens = model_of(n_mtp_layers=0), tokens_of(3, 20)
    want = [alone(model, tokens, row) for row in (1, 2)]
    monkeypatch.setattr(*MUTANTS[mutant])
    assert cached_error(model, tokens, want) > 1e-2
