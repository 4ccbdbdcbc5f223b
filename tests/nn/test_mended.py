from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsmini import Transformer, ops
from dsmini.nn import dsa
from dsmini.nn.mla import check_sequences
from dsmini.numerics import fp8_matmul, quantize
from tests.helpers.tolerances import relative_error
from tests.nn.test_dsa import dense_twin, model_of, tokens_of

Model = Callable[..., Transformer]


def test_prompt_up_to_k_keys_takes_the_form_of_mla() -> None:
    model, tokens = model_of(index_topk=24), tokens_of(2, 24)
    dense = dense_twin(model)
    caches = [each.new_cache(2) for each in (model, dense)]
    for part in tokens.split((20, 3, 1), 1):
        sparse, want = (each(part, cache) for each, cache in zip((model, dense), caches, strict=True))
        assert torch.equal(sparse, want)


def test_loss_of_indexers_is_computed_only_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of().train(), tokens_of(2, 20)
    for layer in dsa.dsa_layers(model):
        layer.stage = "sparse"
    taken: list[Any] = []
    real = dsa.indexer_fit
    monkeypatch.setattr(dsa, "indexer_fit", lambda *args: taken.append(1) or real(*args))
    model(tokens)
    assert not taken
    model.losses(tokens[:, :-1], tokens[:, 1:])
    assert len(taken) == len(dsa.dsa_layers(model))


@pytest.mark.parametrize("backend", ["reference", "eager", None])
def test_odd_latent_decodes_one_token(small_model: Model, backend: str | None) -> None:
    model = small_model(kv_lora_rank=31).eval()
    tokens = torch.randint(0, 61, (1, 6))
    with ops.use(backend):
        want, cache = model(tokens)[:, -1], model.new_cache(1)
        model(tokens[:, :5], cache)
        torch.testing.assert_close(model(tokens[:, 5:], cache)[:, 0], want, rtol=1e-4, atol=1e-5)


def test_mtp_sees_no_other_document(small_model: Model) -> None:
    """The document of a position is that of its hidden state, not of the token that is embedded next to it."""
    model = small_model(n_mtp_layers=2)
    tokens = torch.randint(0, 61, (1, 16))
    changed = tokens.clone()
    changed[:, :7] = torch.randint(0, 61, (1, 7))
    documents = (torch.arange(16)[None] >= 7).long()
    hidden = [model.hidden(t, documents=documents) for t in (tokens, changed)]
    one, two = (model.mtp(t, h, model.embedded, documents)[0] for t, h in zip((tokens, changed), hidden, strict=True))
    for a, b in zip(one, two, strict=True):
        assert relative_error(a[:, 7:], b[:, 7:]) < 1e-5 < relative_error(a[:, 6:7], b[:, 6:7])


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 5, 24)])
def test_attention_wants_sequences(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"attention got .*; want \[b, s, m\], sequences of hidden states"):
        check_sequences(torch.zeros(shape))


def test_layers_show_their_sizes(small_model: Model) -> None:
    model = small_model()
    assert "Gate(24, 3 of 8 experts, 2 of 4 groups, sigmoid)" in repr(model)
    assert "Experts(24, 12, 8 experts)" in repr(model) and "Embedding(61, 24)" in repr(model)


def test_operands_of_fp8_products_say_which_tiles_they_want() -> None:
    x = quantize(torch.randn(4, 256))
    with pytest.raises(ValueError, match=r"w is quantized .* quantize\(w, tile=\(128, 128\)\)"):
        fp8_matmul(x, x)
    with pytest.raises(ValueError, match=r"x is quantized .* quantize\(x, tile=\(1, 128\)\)"):
        fp8_matmul(quantize(torch.randn(4, 256), tile=(128, 128)), x)
