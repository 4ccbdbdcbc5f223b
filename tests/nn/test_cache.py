"""The cache: what it holds, and that a model with it answers as without, however the tokens arrive."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dsmini import MLA, ModelConfig, Transformer, ops
from dsmini.nn import Cache, Context
from dsmini.nn.mla import attention_work
from tests.helpers.configs import DSA, GLM, V4, V4_MODEL, V32, refusal, released
from tests.helpers.models import decoded, tokens_of
from tests.helpers.tolerances import BF16_CACHE, BF16_UNIT, E4M3_CACHE, FP32_MODEL, relative_error
from tests.helpers.watching import Operations
from tests.nn.test_engram import CONFIGS as ENGRAMS

Model = Callable[..., Transformer]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


# what a cache holds


def test_v3_and_its_indexer_take_the_published_bytes_of_a_layer() -> None:
    """The second is V3.2: an indexer's key is 128 codes and a scale, or 128 numbers."""
    for changes, in_fp8, in_bf16 in (({}, 656, 1152), (V32, 788, 1408)):
        with torch.device("meta"):
            model = Transformer(released("deepseek-v3", **changes))
        fp8, bf16 = (model.new_cache(1, 8, dtype, mtp=True) for dtype in ("fp8", torch.bfloat16))
        assert (fp8.nbytes_per_token, bf16.nbytes_per_token) == (61 * in_fp8, 61 * in_bf16)
        assert fp8.mtp_nbytes == 8 * in_fp8


# the same answers


MODELS: dict[str, dict[str, Any]] = {
    "mla": {},
    "no query compression": {"q_lora_rank": None},
    "yarn": {"original_seq_len": 16, "mscale": 0.7, "mscale_all_dim": 1.2},
    "pre_norm": {"mtp_input": "pre_norm", "n_mtp_layers": 3},
    "dsa": DSA | {"q_lora_rank": None, "original_seq_len": 16},
    "glm": GLM,
    "gqa of one": {"attention": "gqa", "n_kv_heads": 1},
    "gqa": {"attention": "gqa", "n_heads": 4, "n_kv_heads": 2},
    "qk_norm": {"qk_norm": True},
    "odd latent": {"kv_lora_rank": 31},
    "streams": {"hc_mult": 3, "n_hash_layers": 2, "n_dense_layers": 0, "score_func": "sqrtsoftplus"},
    "V4": V4_MODEL,
}
FORMED = [
    *((name, "auto") for name in MODELS),
    *((name, "absorbed") for name in [*MODELS][:6]),
    *(("mla", "expanded"), ("dsa", "expanded"), ("glm", "expanded")),
    *(slow(name, "expanded") for name in MODELS if name not in ("mla", "dsa", "glm", "V4")),  # V4 has one form
]
MODELS |= {f"engram, {name}": changes for name, changes in ENGRAMS.items()}
FORMED += [(f"engram, {name}", "auto") for name in ENGRAMS]
CUTS = ((20,), (7, 8, 9, 16, 20), (1, 2, 3, 20), (19, 20))


@pytest.mark.parametrize(("name", "form"), FORMED)
def test_chunks_answer_as_the_whole_sequence(small_model: Model, name: str, form: Any) -> None:
    model, tokens = small_model(**MODELS[name]), tokens_of(3, 20)
    want = model.run(tokens, mtp=True)
    for cuts in CUTS:
        cache = model.new_cache(3, 20, mtp=True, form=form)
        outs = [model.run(tokens[:, a:b], cache, mtp=True) for a, b in zip((0, *cuts), cuts, strict=False)]
        assert relative_error(torch.cat([out.logits for out in outs], 1), want.logits) < FP32_MODEL, cuts
        assert relative_error(torch.cat([out.hidden for out in outs], 1), want.hidden) < FP32_MODEL, cuts
        for k in range(len(want.mtp_logits)):
            got = torch.cat([out.mtp_logits[k] for out in outs], 1)
            assert got[:, : k + 1].isnan().all()
            assert relative_error(got[:, k + 1 :], want.mtp_logits[k]) < FP32_MODEL, cuts
        assert cache.lengths.tolist() == [20] * 3
        assert not any(t.requires_grad for out in outs for t in (out.logits, out.hidden, *out.mtp_logits))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("mla", "auto"), ("mla", "absorbed"), ("dsa", "auto"), ("glm", "auto")),
        *(slow("mla", "expanded"), slow("dsa", "expanded"), slow("dsa", "absorbed")),
        *(slow("streams", "auto"), slow("V4", "auto")),
        *((f"engram, {name}", "auto") for name in ENGRAMS if "convolution" in name or "order" in name),
        *(slow(f"engram, {name}", "auto") for name in ENGRAMS if "convolution" not in name and "order" not in name),
    ],
)
def test_rows_of_unequal_length_answer_as_alone(small_model: Model, name: str, form: Any) -> None:
    """Rows grow by different numbers of tokens, and are dropped, doubled and reordered on the way."""
    model, tokens = small_model(**MODELS[name]), tokens_of(3, 24)
    want = model.run(tokens, mtp=True)

    @settings(max_examples=25, phases=[Phase.generate])  # to shrink an example takes minutes
    @given(st.data(), st.integers(1, 3))
    def check(data: st.DataObject, b: int) -> None:
        cache, rows = model.new_cache(b, 24, mtp=True, form=form), [*range(b)]
        for _ in range(data.draw(st.integers(1, 4))):
            at = cache.lengths.tolist()
            new = [data.draw(st.integers(0, min(8, 24 - n))) for n in at]
            if not max(new):
                continue
            given_tokens = tokens_of(len(rows), max(new))  # what is padded holds any token
            for i, row in enumerate(rows):
                given_tokens[i, : new[i]] = tokens[row, at[i] : at[i] + new[i]]
            out = model.run(given_tokens, cache, mtp=True, lengths=torch.tensor(new))
            assert cache.lengths.tolist() == [a + n for a, n in zip(at, new, strict=True)]
            for i, row in enumerate(rows):
                start, end = at[i], at[i] + new[i]
                for k, theirs in enumerate([want.logits, *want.mtp_logits]):
                    mine = [out.logits, *out.mtp_logits][k][i, max(0, k - start) : new[i]]
                    if len(mine):
                        assert relative_error(mine, theirs[row, max(start - k, 0) : end - k]) < FP32_MODEL
            kept = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=3))
            cache.select(kept)
            rows = [rows[i] for i in kept]

    check()


# of V4, rings of two sizes, and the entries of the one layer that has some
@pytest.mark.parametrize(("name", "waits"), [("mla", 1), ("dsa", 1), ("v4", 3)])
def test_rows_of_unequal_length_are_placed_once_for_all_layers(small_model: Model, name: str, waits: int) -> None:
    model = small_model(**{"mla": {}, "dsa": DSA, "v4": V4_MODEL}[name]).eval()
    cache, tokens = model.new_cache(2, 32), tokens_of(2, 20)
    with ops.use("eager"):
        model(tokens, cache, torch.tensor([20, 17]))
        with Operations() as seen:
            model(tokens[:, :1], cache)
    # its result has a shape that depends on numbers: there the host waits for a GPU
    assert sum(result.operation == "nonzero" for result in seen.results) == waits


@pytest.mark.parametrize("changes", [{}, DSA, GLM, *ENGRAMS.values()], ids=["mla", "dsa", "glm", *ENGRAMS])
def test_truncate_forgets_the_last_tokens_of_each_row(small_model: Model, changes: dict[str, Any]) -> None:
    model, tokens, more = small_model(**changes), tokens_of(3, 12), tokens_of(3, 3)
    cache = model.new_cache(3, 16)
    model(tokens, cache)
    cache.truncate(torch.tensor([12, 5, 9]))
    got = model(more, cache)
    for i, kept in enumerate((12, 5, 9)):
        whole = torch.cat((tokens[i, :kept], more[i]))[None]
        assert relative_error(got[i], model(whole)[0, -3:]) < FP32_MODEL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "fp8"])
@pytest.mark.parametrize(
    "changes", [{}, DSA, DSA | {"indexer_fp8": True}, GLM], ids=["mla", "dsa", "dsa in fp8", "glm"]
)
def test_cache_of_any_dtype_agrees_in_all_forms_and_chunks(
    small_model: Model, monkeypatch: pytest.MonkeyPatch, dtype: Any, changes: Any
) -> None:
    """All read what was rounded, a prompt's own tokens and an indexer's keys too. A kernel's sums may be rounded to
    another BF16 number, as one of an indexer's in many is. Keys are chosen for a few queries at a time."""
    monkeypatch.setattr("dsmini.nn.dsa.BLOCK", 4)
    model, tokens = small_model(n_mtp_layers=0, **changes), tokens_of(2, 24)
    near = FP32_MODEL if dtype == torch.float32 or not changes else BF16_UNIT / 4
    with ops.use("eager"):
        want = model(tokens, model.new_cache(2, 24, dtype, form="expanded"))
        for form, sizes in (("absorbed", 24), *((form, (5, 6, 1, 1, 11)) for form in ("auto", "expanded", "absorbed"))):
            got = decoded(model, tokens, sizes, 24, dtype, form=form)
            assert relative_error(got, want) < near


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, BF16_CACHE), ("fp8", E4M3_CACHE)])
def test_low_precision_cache_errs_by_its_rounding(small_model: Model, dtype: Any, tolerance: float) -> None:
    """One layer, whose output is linear in what it reads but for the softmax."""
    model, tokens = small_model(n_layers=1, n_dense_layers=1, n_mtp_layers=0), tokens_of(2, 20)
    exact, short = model.new_cache(2, 20), model.new_cache(2, 20, dtype)
    for cache in (exact, short):
        model(tokens[:, :19], cache)
    want, got = (model.states(tokens[:, 19:], cache).normed for cache in (exact, short))
    assert 0 < relative_error(got, want) < tolerance


def test_a_model_made_in_inference_mode_decodes(small_config: Callable[..., ModelConfig]) -> None:
    with torch.inference_mode():
        model = Transformer(small_config())
        cache = model.new_cache(1, form="absorbed")
        for _ in range(2):
            model(tokens_of(1, 2), cache)


@torch.no_grad()
def test_absorbed_decoding_sees_a_changed_weight_and_dtype(small_model: Model) -> None:
    """What is made of a weight is kept in the cache between calls."""
    model, tokens = small_model(), tokens_of(1, 12)
    cache, weight = model.new_cache(1, 16, form="absorbed"), model.layers[0].attn.wkv_b.weight
    changes: list[Callable[[], object]] = [lambda: None, lambda: weight.mul_(2), lambda: weight.data.mul_(2)]
    for change in (*changes, lambda: setattr(model, "compute_dtype", torch.float64)):
        change()
        cache.truncate(0)
        got = torch.cat([model(token, cache) for token in tokens.split(1, 1)], 1)
        assert relative_error(got, model(tokens)) < FP32_MODEL


def test_absorbed_decoding_after_a_prompt_without_gradients_has_all_gradients() -> None:
    mla = MLA(dim=64, n_heads=2)
    x, grads = torch.randn(1, 6, 64), []
    for prompt in (torch.no_grad, torch.enable_grad):
        store = mla.new_cache(1, 64, torch.float32, torch.device("cpu"))
        cache = Cache(ModelConfig(), [store], 1, 64, torch.device("cpu"), form="absorbed")
        for part, context in ((x[:, :5], prompt), (x[:, 5:], torch.enable_grad)):
            at = cache.place(part.shape[1])
            with context():
                y = mla(part, Context(positions=at.positions, cache=cache.views(at)[0]))
            cache.lengths = at.lengths
        grads += torch.autograd.grad(y.sum(), mla.wkv_b.weight)
    assert grads[0].norm() > 0.5 * grads[1].norm() > 0


def test_a_cache_next_to_a_mask_or_documents_is_refused() -> None:
    made = Transformer(n_layers=2, n_mtp_layers=0).new_cache(1)
    cache = made.views(made.place(5))[0]
    for more in ({"mask": torch.ones(1, 5, 5, dtype=torch.bool)}, {"documents": torch.zeros(1, 5, dtype=torch.int64)}):
        with pytest.raises(ValueError, match="a cache, and a mask or documents"):
            Context(positions=torch.arange(5)[None], cache=cache, **more)


# which form


def test_the_form_with_less_work_is_taken() -> None:
    """Counted by hand: h=4, c=64, nope=32, rope=16, v=32."""
    mla = MLA()
    one = attention_work(mla, 1, 100)
    assert one.expanded == 2 * 100 * 64 * 4 * (32 + 32) + 2 * 100 * 4 * (32 + 16 + 32)
    assert one.absorbed == 2 * 4 * 64 * (32 + 32) + 2 * 100 * 4 * (64 + 16 + 64)
    assert one.cheaper == "absorbed" and attention_work(mla, 100, 100).cheaper == "expanded"


def test_a_form_is_chosen_by_work_unless_it_is_forced(small_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = small_model(), tokens_of(2, 9)
    ran: list[str] = []
    for form in ("absorbed", "expanded"):
        real = getattr(MLA, form)
        monkeypatch.setattr(MLA, form, lambda *args, f=form, r=real: (ran.append(f), r(*args))[1])
    for form, want in (
        ("auto", ["expanded", "absorbed"]),
        ("absorbed", ["absorbed"] * 2),
        ("expanded", ["expanded"] * 2),
    ):
        ran.clear()
        cache: Any = model.new_cache(2, 16, form=form)  # pyright: ignore[reportArgumentType]
        for part in tokens.split((8, 1), 1):
            model(part, cache)
        assert ran[::2] == want  # of the first of two layers


# what is refused


def test_call_that_does_not_fit_raises_and_changes_nothing(small_model: Model) -> None:
    model, tokens = small_model(), tokens_of(2, 20)
    cache = model.new_cache(2, 16, torch.float32)
    model(tokens[:, :10], cache)
    before = [store.data.clone() for store in cache.stores]
    unchecked: Any = inspect.unwrap  # a function without the type checks of these tests
    place, one = unchecked(Cache.place_tokens), torch.tensor([1])
    for words, call, *arguments in (
        ("holds 16 tokens a sequence, and this call would make 17; make it with", model, tokens[:, :7], cache),
        ("tokens have 1 rows, the cache 2; use new_cache(batch_size=1)", model, tokens[:1, :2], cache),
        ("lengths=[3, 1] for 2 sequences of 2", model, tokens[:, :2], cache, torch.tensor([3, 1])),
        ("lengths=[1] for 2 sequences", place, cache, cache.config, tokens[:, :2], one),
        ("lengths are of rows in a cache; give one, or leave them out", model, tokens[:1], None, one),
        ("lengths are of rows in a cache; give one, or leave them out", model.run, tokens[:1], None, False, one),
        ("truncate to 11, but the lengths are [10, 10]; want 0 to as many for each row", cache.truncate, 11),
        ("truncate to [-1, 3]", cache.truncate, torch.tensor([-1, 3])),
        ("truncate to [1, 2, 3], but the lengths are [10, 10]; want 0 to", cache.truncate, torch.tensor([1, 2, 3])),
        ("one for each row of [10, 10]", unchecked(Cache.truncate), cache, torch.tensor([True, False])),
        ("truncate to None; want a whole number", unchecked(Cache.truncate), cache, None),
        *(
            (f"select {rows}; want numbers of rows from 0 to 1 in a list", unchecked(Cache.select), cache, rows)
            for rows in ([-1], [2], [[0], [0]], [[0], [0, 1]], [0.0], [], 0, None, [True], torch.tensor([[0]]))
        ),
        ("lengths=[1.5, 2.0] for 2 sequences", cache.place, 2, torch.tensor([1.5, 2.0])),
        ("mtp=True needs a cache for multi-token", model.run, tokens[:, :1], cache, True),
        ("of a model of another config; make one by", small_model(n_heads=2), tokens[:, :1], cache),
    ):
        assert words in refusal(call, *arguments)
    assert cache.lengths.tolist() == [10, 10]
    assert all(torch.equal(store.data, old) for store, old in zip(cache.stores, before, strict=True))


@pytest.mark.parametrize("parts", [{}, DSA, V4], ids=["mla", "dsa", "v4"])
@torch.no_grad()
def test_a_row_that_begins_again_forgets_a_nan(small_model: Model, parts: dict[str, Any]) -> None:
    """0 times NaN is NaN: a row's old numbers have an effect although no token sees them."""
    model, tokens = small_model(**parts), tokens_of(2, 9)
    cache = model.new_cache(2, 32)
    want = decoded(model, tokens, (4, 1, 4))
    model(tokens, cache)
    for stored in cache.rows:
        stored.data[1] = torch.nan
    cache.truncate(torch.tensor([9, 0]))
    got = [model(part, cache, torch.tensor([0, part.shape[1]])) for part in tokens.split((4, 1, 4), 1)]
    assert relative_error(torch.cat(got, 1)[1], want[1]) < FP32_MODEL


@pytest.mark.parametrize("parts", [{}, DSA, V4], ids=["mla", "dsa", "v4"])
def test_bytes_that_each_further_token_adds_and_fixed_ones(small_model: Model, parts: dict[str, Any]) -> None:
    """V4's window is as long as the context, where that is shorter."""
    model = small_model(**parts, max_seq_len=256)
    caches = [model.new_cache(2, n) for n in (8, 128, 256)]
    (added,) = {cache.nbytes_per_token for cache in caches}
    assert caches[2].nbytes - caches[1].nbytes == 2 * 128 * added
    for cache, n in zip(caches[1:], (128, 256), strict=True):
        assert cache.nbytes == 2 * (cache.fixed_nbytes + n * added)
    assert (caches[1].fixed_nbytes > 0) == bool(parts is V4) and caches[0].fixed_nbytes <= caches[1].fixed_nbytes
    assert all(stored.data.shape[1] <= 8 for stored in caches[0].rows)


def test_impossible_cache_raises(small_model: Model) -> None:
    for changes, options, words in (
        ({}, {"max_seq_len": 33}, "33 tokens a sequence is longer than the model's max_seq_len=32"),
        ({}, {"batch_size": 0}, "a cache of 0 sequences of 32 tokens; want 1 or more of both"),
        ({}, {"max_seq_len": 0}, "a cache of 1 sequences of 0 tokens; want 1 or more of both"),
        ({}, {"dtype": torch.int64}, "dtype=torch.int64 holds no rows of a cache; use torch.float32,"),
        ({"attention": "mha"}, {"dtype": "fp8"}, "the layout of MLA's latent, not of keys and values of heads"),
        ({"attention": "mha"}, {"form": "absorbed"}, "form='absorbed' is MLA's"),
        ({"qk_norm": True}, {"form": "absorbed"}, "form='absorbed' is MLA's without qk_norm"),
        (V4, {"form": "expanded"}, "form='expanded' chooses between the two of MLA; V4's attention has one"),
        ({"n_mtp_layers": 0}, {"mtp": True}, "no multi-token prediction blocks"),
    ):
        assert words in refusal(small_model(**changes).new_cache, **options)


def test_mtp_cache_that_lags_or_goes_back_raises(small_model: Model) -> None:
    model, tokens = small_model(), tokens_of(1, 8)
    cache = model.new_cache(1, 32, mtp=True)
    model.run(tokens, cache, mtp=True)
    assert "has taken in [8] tokens and cannot go back to [5]" in refusal(cache.truncate, 5)
    model(tokens, cache)
    assert "has taken in [8] tokens of [16]; use mtp=True in every call" in refusal(model.run, tokens, cache, True)
    cache.truncate(0)
    model.run(tokens, cache, mtp=True)
