"""V4's attention against its equations, token by token, and its cache against one pass."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsmini import ModelConfig, Transformer, quantize
from dsmini.config.model import SLACK
from dsmini.nn import CompressedAttention, Context, compressed_attention, dsa_layers
from dsmini.nn.cache import Rows
from dsmini.nn.codec import index_entry_row, key_row
from dsmini.nn.compressed_attention import rotated
from dsmini.nn.dsa import hadamard
from dsmini.numerics.fp4 import round_fp4
from tests.conftest import SMALL, randomise
from tests.helpers.configs import V4, refusal
from tests.helpers.models import same_weights, set_stage, tokens_of
from tests.helpers.tolerances import BF16_UNIT, E4M3_UNIT, FP32_MODEL, ROPE_TABLE, relative_error, rounding
from tests.helpers.watching import Operations, saved_for_backward, storage_bytes
from tests.reference_model import rms_norm
from tests.reference_v4 import entries, turn

KINDS = {"window": 0, "csa": 4, "hca": 8}
CHUNKS = 1e-5
"""Between one pass and chunks of it in FP32."""


def config_of(changes: dict[str, Any]) -> Any:
    return ModelConfig(**{**SMALL, **V4, **changes})


def layer_of(kind: str, **changes: Any) -> tuple[Any, Any]:
    m = KINDS[kind]
    c = config_of({"n_layers": 1, "compress_ratios": (m,), "norm_eps": 1e-5, **changes})
    layer = randomise(CompressedAttention(c, compress_ratio=m)).double()
    return layer, c


def model_of(stage: Any = None, **changes: Any) -> Transformer:
    return set_stage(randomise(Transformer(config_of({"max_seq_len": 256, **changes}))), stage)


# CSA's equations, for one document


def by_the_report(layer: Any, c: Any, x: Tensor, stage: str) -> tuple[Tensor, Tensor]:
    """Return the KL divergence of a document [s, m], and the share of attention to chosen entries.

    All heads' weights of an entry are added before they are normalised. No Hadamard transform is needed.
    """
    indexer, t = layer.indexer, torch.arange(len(x))
    turned = functools.partial(turn, positions=t, theta=c.compress_rope_theta, width=c.qk_rope_head_dim)
    latent = rms_norm(x @ layer.wq_a.weight.T, layer.q_norm, c.norm_eps)
    heads = (latent @ layer.wq_b.weight.T).unflatten(-1, (c.n_heads, -1))
    q = turned(F.rms_norm(heads, heads.shape[-1:], eps=c.norm_eps))
    made, keys = (entries(of.compressor, x, 4, c) for of in (layer, indexer))
    values = torch.cat((turned(rms_norm(x @ layer.wkv.weight.T, layer.kv_norm, c.norm_eps)), made))
    near = (t <= t[:, None]) & (t > t[:, None] - layer.window_size)
    visible = 4 * torch.arange(len(made)) + 3 <= t[:, None]
    # equations 13 to 16
    q_index = turned((latent @ indexer.wq_b.weight.T).unflatten(-1, (c.index_n_heads, -1)))
    weights = x @ indexer.weights_proj.weight.T * (c.index_head_dim * c.index_n_heads) ** -0.5
    scores = torch.einsum("sh,sht->st", weights, torch.einsum("shd,td->sht", q_index, keys).clamp(min=0))
    order = scores.masked_fill(~visible, -torch.inf).sort(descending=True, stable=True).indices[:, : c.index_topk]
    best = visible & torch.zeros_like(visible).scatter(1, order, True)

    def attention(chosen: Tensor) -> Tensor:
        """Return each head's weights of all values. They share the softmax with the sink."""
        logits = torch.einsum("shd,td->sht", q, values) * c.head_dim**-0.5
        logits = logits.masked_fill(~torch.cat((near, chosen), 1)[:, None], -torch.inf)
        return torch.cat((logits, layer.attn_sink[:, None].expand(len(x), -1, 1)), -1).softmax(-1)[..., :-1]

    chosen = visible if stage == "warmup" else best
    target, every = (attention(keys)[..., len(x) :].sum(1).detach() for keys in (chosen, visible))
    some = visible.any(1)
    target = target[some] / target[some].sum(1, keepdim=True)
    log_i = scores[some].masked_fill(~chosen[some], -torch.inf).log_softmax(1)
    kl = (torch.xlogy(target, target) - (target * log_i).nan_to_num(0)).sum()
    mass = (every * best)[some].sum(1) / every[some].sum(1)
    return kl / len(x), (mass.sum() + (~some).sum()) / len(x)


@pytest.mark.parametrize("s", [3, 30])
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_indexer_learns_the_joint_softmax_of_all_heads(monkeypatch: pytest.MonkeyPatch, stage: Any, s: int) -> None:
    """The target has window and sink in each head's softmax; the loss moves the indexer alone."""
    monkeypatch.setattr(compressed_attention, "BLOCK", 16)
    layer, c = layer_of("csa")
    x = torch.randn(2, s, c.dim, dtype=torch.float64, requires_grad=True)
    _, got = layer(x, Context(positions=torch.arange(s)[None], stage=stage))
    kls, masses = zip(*(by_the_report(layer, c, row, stage) for row in x), strict=True)
    kl, indexer = sum(kls) / 2, [*layer.indexer.parameters()]
    assert relative_error(got.kl, kl) < 8 * ROPE_TABLE and abs(got.mass - sum(masses) / 2) < 1e-5
    if s > 3:
        grads = [torch.autograd.grad(loss, indexer, retain_graph=True) for loss in (got.kl, kl)]
        assert all(relative_error(a, b) < 16 * ROPE_TABLE for a, b in zip(*grads, strict=True))
        got.kl.backward()
        assert x.grad is None and [p.grad for p in layer.parameters()].count(None) == len([*layer.parameters()]) - 6


def test_the_loss_of_an_indexer_saves_what_grows_with_the_length_alone() -> None:
    """Not the scores of all pairs."""
    layer, c = layer_of("csa")

    def added(s: int) -> int:
        x, positions = torch.randn(1, s, c.dim, dtype=torch.float64), torch.arange(s)[None]
        nbytes = []
        for stage in ("sparse", None):
            with saved_for_backward() as saved:
                layer(x, Context(positions=positions, stage=stage))
            nbytes.append(sum(storage_bytes(saved)))
        return nbytes[0] - nbytes[1]

    assert added(1024) < 5 * added(256)


def test_indexer_of_entries_runs_alone() -> None:
    c = config_of({})
    indexer, x = compressed_attention.EntryIndexer(c), torch.randn(2, 11, c.dim)
    rope = CompressedAttention(c, compress_ratio=4).rope
    cos_sin = rope.cos_sin(torch.arange(11)[None])
    q, keys, weights = indexer(x, torch.randn(2, 11, c.q_lora_rank), cos_sin)
    assert q.shape[:2] == weights.shape[:2] == (2, 11) and keys.shape[:2] == (2, 2)
    blocks = compressed_attention.blocks_of(Context(positions=torch.arange(11)[None]), 4, None)
    assert torch.equal(keys, indexer.keys(x, rope.cos_sin(torch.tensor([[0, 4]])), blocks))


def test_losses_train_every_parameter_and_warm_up_reads_all_entries() -> None:
    tokens = tokens_of(2, 61)
    for stage in ("warmup", "sparse"):
        model = model_of(stage)
        losses = model.losses(tokens[:, :-1], tokens[:, 1:])
        losses.total.backward()
        assert len(losses.indexers) == len(dsa_layers(model)) == 1 and losses.indexers[0].kl > 0
        assert losses.total > losses.main + 0.3 * losses.mtp + losses.indexers[0].kl
        assert model.mtp[0].block.attn.m == 0, "blocks of multi-token prediction have the window alone"
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    everything = same_weights(model, index_topk=1000)
    set_stage(model, "warmup")
    assert relative_error(model(tokens), everything(tokens)) < FP32_MODEL
    assert relative_error(model.eval()(tokens), everything(tokens)) > 1e-2


def test_packed_documents_answer_and_learn_as_alone() -> None:
    """In FP32, with lengths around blocks and window, and with multi-token prediction after them."""
    model, lengths = model_of("sparse"), [9, 1, 3, 4, 8, 40, 7]
    tokens = tokens_of(2, sum(lengths))
    documents = torch.repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    packed = model.states(tokens, documents=documents, train_indexers=True)
    alone = [model.states(part, train_indexers=True) for part in tokens.split(lengths, 1)]
    for got, want in zip(packed.normed.split(lengths, 1), alone, strict=True):
        assert relative_error(got, want.normed) < 1e-5
    for name in ("kl", "mass"):
        parts = [getattr(one.indexers[0], name) * n for one, n in zip(alone, lengths, strict=True)]
        assert relative_error(getattr(packed.indexers[0], name), torch.stack(parts).sum() / sum(lengths)) < 1e-5
    joined = model.states(tokens, train_indexers=True)
    assert relative_error(joined.normed, packed.normed) > 1e-2


# the cache


@pytest.fixture(scope="module")
def long_model() -> tuple[Transformer, Tensor, Any]:
    torch.manual_seed(3)
    model, tokens = model_of(n_layers=4, compress_ratios=(0, 4, 8, 7), index_topk=3).eval(), tokens_of(2, 200)
    return model, tokens, model.run(tokens, mtp=True)


@pytest.mark.parametrize(("size", "length"), [(1, 50), (3, 100), (64, 200), (129, 200)])
def test_chunks_answer_as_one_pass(long_model: Any, size: int, length: int) -> None:
    model, tokens, _ = long_model
    tokens = tokens[:, :length]
    want = model.run(tokens, mtp=True)
    cache = model.new_cache(2, mtp=True)
    outs = [model.run(part, cache, mtp=True) for part in tokens.split(size, 1)]
    assert relative_error(torch.cat([out.logits for out in outs], 1), want.logits) < CHUNKS
    for k, mtp_logits in enumerate(want.mtp_logits):
        got = torch.cat([out.mtp_logits[k] for out in outs], 1)
        assert relative_error(got[:, k + 1 :], mtp_logits) < CHUNKS


@pytest.mark.parametrize("lengths", [None, [1, 3]])
def test_a_cache_shorter_than_a_block_answers_as_one_pass(long_model: Any, lengths: list[int] | None) -> None:
    """It has room for no entry."""
    model, tokens, want = long_model
    cache, new = model.new_cache(2, 6), None if lengths is None else torch.tensor(lengths)
    model(tokens[:, :3], cache, lengths=new)
    rows, at = torch.arange(2), cache.lengths
    for k in range(3):
        got = model(tokens[rows, at + k, None], cache)[:, 0]
        assert relative_error(got, want.logits[rows, at + k]) < CHUNKS


def test_rows_of_unequal_length_taken_back_and_selected(long_model: Any) -> None:
    """Rows stop within blocks, wait, lose rejected tokens that completed blocks, begin again, and change places."""
    model, tokens, want = long_model
    cache, rows = model.new_cache(3), [0, 1, 0]

    def feed(*new: int) -> None:
        at, part = cache.lengths.tolist(), torch.zeros(3, max(new), dtype=torch.int64)
        for i, n in enumerate(new):
            part[i, :n] = tokens[rows[i], at[i] : at[i] + n]
        got = model(part, cache, lengths=torch.tensor(new))
        for i, n in enumerate(new):
            assert not n or relative_error(got[i, :n], want.logits[rows[i], at[i] : at[i] + n]) < CHUNKS, (i, at, new)

    feed(5, 0, 70)
    feed(1, 1, 1)
    feed(0, 33, 2)
    feed(40, 40, 40)
    model(tokens_of(3, 30), cache)  # guesses, all rejected
    cache.truncate(cache.lengths - 30)
    feed(2, 9, 4)
    feed(50, 40, 40)
    cache.truncate(cache.lengths - torch.tensor([3, 0, SLACK]))
    feed(1, 4, 20)
    cache.select([2, 1, 1])
    rows = [0, 1, 1]
    feed(3, 8, 1)
    cache.truncate(cache.lengths * torch.tensor([1, 0, 1]))
    feed(1, 50, 0)
    feed(4, 3, 4)


def test_padding_is_in_no_entry(long_model: Any) -> None:
    """Padding beyond the end of the cache too, whose blocks would have the places of the first ones."""
    model, tokens, want = long_model
    cache = model.new_cache(2, 40)
    model(tokens[:, :37], cache, lengths=torch.tensor([37, 9]))
    model(torch.cat((tokens[:1, 37:57], tokens[1:, 9:29])), cache, lengths=torch.tensor([2, 20]))
    got = model(torch.stack((tokens[0, 39:40], tokens[1, 29:30])), cache)
    assert relative_error(got[:, 0], torch.stack((want.logits[0, 39], want.logits[1, 29]))) < CHUNKS


def test_a_call_that_did_not_end_leaves_no_wrong_answer(long_model: Any) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    model, tokens, want = long_model
    cache = model.new_cache(2)
    model(tokens[:, :100], cache)
    hook = model.layers[-1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(tokens[:, 100:190], cache)
    hook.remove()
    assert cache.lengths.tolist() == [100] * 2
    said = refusal(model, tokens[:, 100:101], cache)
    assert "overwritten by a call for [190, 190] that did not end; truncate to 0" in said
    cache.truncate(0)
    assert relative_error(model(tokens[:, :50], cache), want.logits[:, :50]) < CHUNKS


def test_taking_back_more_than_the_slack_is_refused(long_model: Any) -> None:
    model, tokens, want = long_model
    cache = model.new_cache(2)
    model(tokens[:, :100], cache)
    cache.truncate(100 - SLACK)
    assert f"and the cache can take back {SLACK}; truncate to 0" in refusal(cache.truncate, 99 - SLACK)
    assert cache.lengths.tolist() == [100 - SLACK] * 2
    cache.truncate(0)
    assert relative_error(model(tokens[:, :50], cache), want.logits[:, :50]) < CHUNKS
    cache.truncate(50 - SLACK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "fp8"])
@pytest.mark.parametrize("qat", [False, True])
def test_rounded_caches_answer_alike_in_all_chunks(dtype: Any, qat: bool) -> None:
    """A row is rounded before a query reads it, also in the call that stores it."""
    model, tokens = model_of(qat=qat, index_topk=100, n_dense_layers=3).eval(), tokens_of(2, 40)
    outs = []
    for size in (1, 7, 40):
        cache = model.new_cache(2, dtype=dtype)
        outs.append(torch.cat([model(part, cache) for part in tokens.split(size, 1)], 1))
    # a number next to the middle of two values may be rounded to either
    assert all(relative_error(out, outs[-1]) < 1e-3 for out in outs)
    error = relative_error(outs[-1], model(tokens))
    unit = BF16_UNIT if qat or dtype == torch.bfloat16 else E4M3_UNIT
    assert 0 < error < rounding(unit, chained=3 * 4)


def test_cache_takes_the_published_bytes_for_rounded_values() -> None:
    """584 bytes an entry and 68 an indexer's; tests/accounting counts those of whole models."""
    rows, index = torch.randn(2, 5, 512), torch.randn(2, 5, 128)
    fp8, fp4 = (Rows(2, 9, codec, rows.device) for codec in (key_row(448, 64), index_entry_row(128)))
    assert (fp8.data.shape[2], fp4.data.shape[2]) == (584, 68)
    places = torch.arange(5).expand(2, -1)
    for store, given in ((fp8, rows), (fp4, index)):
        store.data[:, :5] = store.codec.encode(given)
        assert torch.equal(store.read(5, torch.float32), store.read_at(places, torch.float32))
    want = torch.cat((quantize(rows[..., :448], (1, 64)).dequantize(), rows[..., 448:].bfloat16().float()), -1)
    assert torch.equal(fp8.read(5, torch.float32), want)
    assert torch.equal(fp4.read(5, torch.float32), round_fp4(index))


# numbers


def test_qat_rounds_entries_and_both_sides_of_the_indexer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding passes gradients on. The Hadamard transform, on both sides, changes no score but for the rounding."""
    sizes: dict[str, Any] = {"head_dim": 128, "qk_rope_head_dim": 16, "index_head_dim": 64, "qat": True}
    layer, _ = layer_of("csa", **sizes)
    layer = layer.float()
    plain: Any = CompressedAttention(config_of({**sizes, "qat": False}), compress_ratio=4)
    plain.load_state_dict(layer.state_dict())
    x, seen = torch.randn(2, 24, SMALL["dim"]), []
    real = compressed_attention.topk_keys
    monkeypatch.setattr(compressed_attention, "topk_keys", lambda *args: (seen.append(args), real(*args))[1])
    context = Context(positions=torch.arange(24)[None], stage="sparse")
    (y, loss), (exact, _) = layer(x, context), plain(x, context)
    (y.sum() + loss.kl).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    assert 1e-3 < relative_error(y, exact) < 0.3
    for rounded, whole in zip(seen[0][:2], seen[1][:2], strict=True):  # queries, then keys
        assert torch.equal(round_fp4(rounded), rounded)
        assert 1e-2 < relative_error(rounded, whole) < 0.2
    latent = plain.q_norm(plain.wq_a(x))
    untransformed = rotated(plain.indexer.wq_b(latent).unflatten(-1, (-1, 64)), context.cos_sin(plain.rope))
    assert relative_error(seen[1][0], hadamard(untransformed)) < 1e-6
    rows = torch.randn(1, 3, 128, requires_grad=True)
    cos_sin, direction = layer.rope.cos_sin(torch.arange(3)[None]), torch.randn(1, 3, 128)
    rounded, whole = layer.key_value(rows, cos_sin), plain.key_value(rows, cos_sin)
    assert torch.equal(rounded[..., :112], quantize(rows.detach()[..., :112], (1, 64)).dequantize())
    grads = [torch.autograd.grad((each * direction).sum(), rows)[0] for each in (rounded, whole)]
    assert torch.equal(*grads)


def test_layer_learns_in_simulated_fp8() -> None:
    sizes: dict[str, Any] = {"dim": 128, "q_lora_rank": 128, "head_dim": 128, "o_lora_rank": 64, "precision": "fp8"}
    model = model_of("sparse", **sizes)
    exact = same_weights(model, precision="native")
    tokens = tokens_of(2, 40)
    losses = model.losses(tokens[:, :-1], tokens[:, 1:])
    losses.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert 0 < relative_error(losses.main, exact.losses(tokens[:, :-1], tokens[:, 1:]).main) < 0.1


def test_no_tensor_of_all_pairs_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed_attention, "BLOCK", 32)
    (layer, c), s = layer_of("csa"), 1024
    x = torch.randn(1, s, c.dim, dtype=torch.float64)
    with torch.no_grad(), Operations() as seen:
        layer(x)
    assert seen.largest < s * s / 4  # all pairs of a token and an entry, for one head
