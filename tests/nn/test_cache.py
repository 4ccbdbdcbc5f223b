"""The cache: what it holds, and that a model with it answers as without, however the tokens arrive."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmini import MLA, Linear, ModelConfig, Transformer, ops
from dsmini.nn import Cache
from dsmini.nn.cache import Past
from tests.conftest import SMALL, randomise
from tests.helpers.configs import DSA
from tests.helpers.tolerances import BF16_CACHE, E4M3_CACHE, FP32_MODEL, relative_error

Model = Callable[..., Transformer]
FORMS = ("auto", "expanded", "absorbed")


def tokens_of(b: int, s: int) -> Tensor:
    return torch.randint(0, SMALL["vocab_size"], (b, s))


# what a cache holds


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
@pytest.mark.parametrize("b", [1, 3])
def test_token_takes_only_the_latent_and_the_rotary_key(
    small_model: Model, dtype: torch.dtype, size: int, b: int
) -> None:
    cache = small_model().new_cache(b, 17, dtype)
    assert cache.nbytes_per_token == (10 + 4) * size * 2  # kv_lora_rank + qk_rope_head_dim, two layers
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for store in cache.stores for t in [store.data]
    }
    assert sum(held.values()) == cache.nbytes == b * 17 * (10 + 4) * size * 2


def test_v3_takes_656_bytes_a_layer_in_fp8_and_1152_in_bf16() -> None:
    config = ModelConfig.from_file("configs/deepseek-v3.toml")
    fp8, bf16 = (Cache(config, 1, 8, dtype, torch.device("meta")) for dtype in ("fp8", torch.bfloat16))
    assert fp8.nbytes_per_token == 656 * 61
    assert bf16.nbytes_per_token == 70272
    mha = 2 * 128 * 128 * 2 * 61
    assert round(1 - bf16.nbytes_per_token / mha, 4) == 0.9824


def test_ragged_rank_has_a_scale_for_its_last_tile(small_model: Model) -> None:
    assert small_model(kv_lora_rank=130).new_cache(1, 4, "fp8").nbytes_per_token == (130 + 2 * 4 + 4 * 2) * 2


def test_bytes_of_mtp_are_counted_apart(small_model: Model) -> None:
    model = small_model()
    without, with_mtp = (model.new_cache(2, 9, torch.float32, mtp=mtp) for mtp in (False, True))
    assert without.nbytes == with_mtp.nbytes and without.mtp_nbytes == 0
    assert with_mtp.mtp_nbytes == 2 * 2 * 9 * 14 * 4


@pytest.mark.parametrize(
    ("attention", "numbers"), [({"attention": "mha"}, 3 * 11), ({"attention": "gqa", "n_kv_heads": 1}, 11)]
)
def test_baselines_store_keys_and_values_of_each_head(
    small_model: Model, attention: dict[str, Any], numbers: int
) -> None:
    assert small_model(**attention).new_cache(1, 5, torch.float32).nbytes_per_token == numbers * 4 * 2


# the same answers


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"original_seq_len": 16, "mscale": 0.7, "mscale_all_dim": 1.2},
        {"attention": "mha"},
        {"attention": "gqa", "n_kv_heads": 1},
        {"attention": "gqa", "n_heads": 4, "n_kv_heads": 2},
        {"attention": "mqa"},
        {"qk_norm": True},
        {"mtp_input": "pre_norm"},
        DSA | {"q_lora_rank": None, "original_seq_len": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("cuts", [(20,), (7, 8, 9, 16, 20), (1, 2, 3, 20), (19, 20)], ids=str)
def test_chunks_answer_as_the_whole_sequence(
    small_model: Model, changes: dict[str, Any], form: Any, cuts: tuple[int, ...]
) -> None:
    if form == "absorbed" and {"attention", "qk_norm"} & changes.keys() and "index_topk" not in changes:
        return
    model, tokens = small_model(**changes), tokens_of(3, 20)
    want = model.run(tokens, mtp=True)
    cache = model.new_cache(3, 20, mtp=True, form=form)
    outs = [model.run(tokens[:, a:b], cache, mtp=True) for a, b in zip((0, *cuts), cuts, strict=False)]
    assert relative_error(torch.cat([out.logits for out in outs], 1), want.logits) < FP32_MODEL
    assert relative_error(torch.cat([out.hidden for out in outs], 1), want.hidden) < FP32_MODEL
    for k in range(2):
        got = torch.cat([out.mtp_logits[k] for out in outs], 1)
        assert got[:, : k + 1].isnan().all()
        assert relative_error(got[:, k + 1 :], want.mtp_logits[k]) < FP32_MODEL
    assert cache.lengths.tolist() == [20] * 3


@pytest.mark.parametrize("changes", [{}, DSA], ids=["mla", "dsa"])
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=20)
@given(data=st.data())
def test_rows_of_unequal_length_answer_as_alone(form: Any, changes: dict[str, Any], data: st.DataObject) -> None:
    b = data.draw(st.integers(1, 3))
    model = randomise(Transformer(ModelConfig(**SMALL | changes)))
    tokens = tokens_of(b, 24)
    want = model.run(tokens, mtp=True)
    cache = model.new_cache(b, 24, mtp=True, form=form)
    at = torch.zeros(b, dtype=torch.int64)
    for _ in range(data.draw(st.integers(1, 4))):
        new = torch.tensor([data.draw(st.integers(0, min(8, 24 - int(n)))) for n in at])
        if not int(new.max()):
            continue
        given_tokens = tokens_of(b, int(new.max()))  # what is padded holds any token
        for i in range(b):
            given_tokens[i, : new[i]] = tokens[i, at[i] : at[i] + new[i]]
        out = model.run(given_tokens, cache, mtp=True, lengths=new)
        for i in range(b):
            n, start = int(new[i]), int(at[i])
            if not n:
                continue
            assert relative_error(out.logits[i, :n], want.logits[i, start : start + n]) < FP32_MODEL
            for k in (1, 2):
                early = max(0, k - start)
                if n > early:
                    theirs = want.mtp_logits[k - 1][i, start + early - k : start + n - k]
                    assert relative_error(out.mtp_logits[k - 1][i, early:n], theirs) < FP32_MODEL
        at += new
        assert cache.lengths.tolist() == at.tolist()


def test_truncate_forgets_and_select_keeps_rows_in_order(small_model: Model) -> None:
    model, tokens = small_model(), tokens_of(3, 12)
    cache = model.new_cache(3, 16)
    model(tokens, cache)
    cache.truncate(torch.tensor([12, 5, 9]))
    cache.select([2, 0, 2])
    assert cache.lengths.tolist() == [9, 12, 9]
    more = tokens_of(3, 3)
    got = model(more, cache)
    for i, (row, kept) in enumerate(((2, 9), (0, 12), (2, 9))):
        whole = torch.cat((tokens[row, :kept], more[i]))[None]
        assert relative_error(got[i], model(whole)[0, -3:]) < FP32_MODEL


def test_selected_rows_keep_their_mtp_cache(small_model: Model) -> None:
    model, tokens = small_model(), tokens_of(3, 12)
    cache = model.new_cache(3, 16, mtp=True)
    model.run(tokens, cache, mtp=True, lengths=torch.tensor([12, 5, 9]))
    cache.select([2, 0])
    more = tokens_of(2, 3)
    got = model.run(more, cache, mtp=True)
    for i, (row, kept) in enumerate(((2, 9), (0, 12))):
        want = model.run(torch.cat((tokens[row, :kept], more[i]))[None], mtp=True)
        for k in range(2):
            assert relative_error(got.mtp_logits[k][i], want.mtp_logits[k][0, -3:]) < FP32_MODEL


@pytest.mark.parametrize("dtype", [torch.bfloat16, "fp8"])
@pytest.mark.parametrize("form", FORMS)
def test_low_precision_cache_agrees_in_all_forms_and_chunks(small_model: Model, dtype: Any, form: Any) -> None:
    """All read what was rounded, a prompt's own tokens too. A kernel's sums may be rounded to another BF16 number."""
    model, tokens = small_model(n_mtp_layers=0), tokens_of(2, 20)
    with ops.use("eager"):
        want = model(tokens, model.new_cache(2, 20, dtype, form="expanded"))
        cache = model.new_cache(2, 20, dtype, form=form)
        got = torch.cat([model(part, cache) for part in tokens.split((7, 6, 1, 6), 1)], 1)
    assert relative_error(got, want) < FP32_MODEL


def test_a_model_made_in_inference_mode_decodes(small_config: Callable[..., ModelConfig]) -> None:
    with torch.inference_mode():
        model = Transformer(small_config())
        cache = model.new_cache(1, form="absorbed")
        for _ in range(2):
            model(tokens_of(1, 2), cache)


def test_cached_call_makes_no_gradients(small_model: Model) -> None:
    model = small_model()
    cache = model.new_cache(1, mtp=True)
    out = model.run(tokens_of(1, 4), cache, mtp=True)
    assert not any(t.requires_grad for t in (out.logits, out.hidden, *out.mtp_logits))
    assert not model(tokens_of(1, 2), model.new_cache(1)).requires_grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, BF16_CACHE), ("fp8", E4M3_CACHE)])
def test_low_precision_cache_errs_by_its_rounding(small_model: Model, dtype: Any, tolerance: float) -> None:
    """One layer, whose output is linear in what it reads but for the softmax."""
    model, tokens = small_model(n_layers=1, n_dense_layers=1, n_mtp_layers=0), tokens_of(2, 20)
    exact, short = model.new_cache(2, 20), model.new_cache(2, 20, dtype)
    for cache in (exact, short):
        model(tokens[:, :19], cache)
    want, got = (model.hidden(tokens[:, 19:], cache) for cache in (exact, short))
    assert 0 < relative_error(got, want) < tolerance


def test_absorbed_halves_are_prepared_again_after_a_change(small_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, made = small_model(), tokens_of(1, 12), []
    real = MLA.absorbed_halves
    monkeypatch.setattr(MLA, "absorbed_halves", lambda mla, dtype: (made.append(mla), real(mla, dtype))[1])
    cache = model.new_cache(1, 16, form="absorbed")
    for token in tokens.split(1, 1):
        model(token, cache)
    assert made == [block.attn for block in model.layers]
    model.compute_dtype = torch.float64
    model(tokens[:, :1], cache)
    assert made[2:] == made[:2]
    model.compute_dtype, made[:] = None, made[:2]
    with torch.no_grad():
        model.layers[0].attn.wkv_b.weight *= 2
    model(tokens[:, :1], cache)
    assert made[2:] == [block.attn for block in model.layers]  # the first again, the second in its first dtype
    model(tokens[:, :1], cache)
    assert len(made) == 4


# which form


def test_the_form_with_less_work_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by hand: h=4, c=64, nope=32, rope=16, v=32."""
    mla = MLA()
    one = mla.work(1, 100)
    assert one.to_expand == 2 * 100 * 64 * 4 * (32 + 32)
    assert one.expanded == one.to_expand + 2 * 100 * 4 * (32 + 16 + 32)
    assert one.absorbed == 2 * 4 * 64 * (32 + 32) + 2 * 100 * 4 * (64 + 16 + 64)
    assert one.cheaper == "absorbed" and mla.work(100, 100).cheaper == "expanded"
    assert str(one).startswith("absorbed, for 1 queries and 100 keys: expanded 3.3 MFLOP, 3.3 of them to expand")


def test_a_prefix_is_not_expanded_again_where_that_is_more_work(
    small_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expanded = small_model(), []
    wkv_b, real = [block.attn.wkv_b for block in model.layers], Linear.forward

    def forward(linear: Linear, x: Tensor) -> Tensor:
        expanded.extend([x.shape[1]] if linear in wkv_b else [])
        return real(linear, x)

    monkeypatch.setattr(Linear, "forward", forward)
    cache = model.new_cache(1, 32)
    model(tokens_of(1, 20), cache)
    assert expanded == [20, 20]
    model(tokens_of(1, 2), cache)
    assert expanded == [20, 20]


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_a_form_can_be_forced(small_model: Model, form: Any) -> None:
    model = small_model()
    mla = model.layers[0].attn
    for s in (1, 20):
        cache = model.new_cache(1, 32, form=form)
        assert mla.form_for(s, Past(store=cache.stores[0], window=cache.window(s), form=form)) == form


# what is refused


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("truncate", 2.7, r"truncate to 2.7.*: torch.float32; want whole numbers"),
        ("truncate", torch.tensor([1.0, 2.0]), r"truncate to \[1.0, 2.0\]: torch.float32; want whole numbers"),
        ("truncate", True, "truncate to True: torch.bool; want whole numbers"),
        ("select", [0.9], r"select \[0.89.*\]: torch.float32; want whole numbers"),
        ("select", [], r"select \[\]: torch.float32; want whole numbers"),
    ],
)
def test_fractions_are_no_lengths_and_no_rows(small_model: Model, method: str, given: Any, message: str) -> None:
    cache = small_model().new_cache(2)
    unchecked = inspect.unwrap(getattr(Cache, method))  # without the type checks of these tests
    with pytest.raises(ValueError, match=message):
        unchecked(cache, given)
    with pytest.raises(ValueError, match="want whole numbers"):
        cache.window(2, torch.tensor([1.5, 1.0]))


def test_call_that_does_not_fit_raises_and_changes_nothing(small_model: Model) -> None:
    model, tokens = small_model(), tokens_of(2, 20)
    cache = model.new_cache(2, 16, torch.float32)
    model(tokens[:, :10], cache)
    before = [store.data.clone() for store in cache.stores]
    for message, call in (
        (
            r"holds 16 tokens a sequence, and this call would make 17; .*larger max_seq_len",
            lambda: model(tokens[:, :7], cache),
        ),
        (r"1 rows of tokens for a cache of 2", lambda: model(tokens[:1, :2], cache)),
        (r"lengths=\[3, 1\] for 2 sequences of 2", lambda: model(tokens[:, :2], cache, torch.tensor([3, 1]))),
        (r"lengths=\[1\] for 2 sequences", lambda: cache.window(2, torch.tensor([1]))),
        (r"truncate to \[11, 11\], but the lengths are \[10, 10\]", lambda: cache.truncate(11)),
        (r"truncate to \[-1, 3\]", lambda: cache.truncate(torch.tensor([-1, 3]))),
        (r"truncate to \[1\]; want one length for all 2", lambda: cache.truncate(torch.tensor([1]))),
        (r"select \[2\] of 2 sequences", lambda: cache.select([2])),
        (r"select \[True, False\]: torch.bool; want whole", lambda: cache.select([True, False])),
        (r"mtp=True needs a cache for multi-token", lambda: model.run(tokens[:, :1], cache, mtp=True)),
        (r"made by a model of another config", lambda: small_model(n_heads=2)(tokens[:, :1], cache)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert cache.lengths.tolist() == [10, 10]
    assert all(torch.equal(store.data, old) for store, old in zip(cache.stores, before, strict=True))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"max_seq_len": 33}, "33 tokens a sequence is longer than the model's max_seq_len=32"),
        ({}, {"batch_size": 0}, "0 sequences of 32 tokens; want 1 or more"),
        ({}, {"dtype": torch.int8}, "dtype torch.int8; want"),
        ({"attention": "mha"}, {"dtype": "fp8"}, "the layout of MLA's latent, not of attention='mha'"),
        ({"attention": "mha"}, {"form": "absorbed"}, "form='absorbed' is MLA's"),
        ({"qk_norm": True}, {"form": "absorbed"}, "form='absorbed' is MLA's without qk_norm"),
        ({"n_mtp_layers": 0}, {"mtp": True}, "no multi-token prediction blocks"),
    ],
)
def test_impossible_cache_raises(
    small_model: Model, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**changes).new_cache(**options)


def test_mtp_cache_that_lags_or_goes_back_raises(small_model: Model) -> None:
    model, tokens = small_model(), tokens_of(1, 8)
    cache = model.new_cache(1, 32, mtp=True)
    model.run(tokens, cache, mtp=True)
    with pytest.raises(ValueError, match=r"has taken in \[8\] tokens and cannot go back to \[5\]"):
        cache.truncate(5)
    model(tokens, cache)
    with pytest.raises(ValueError, match=r"has taken in \[8\] tokens of \[16\]; use mtp=True in every call"):
        model.run(tokens, cache, mtp=True)
    cache.truncate(0)
    model.run(tokens, cache, mtp=True)
