"""Layers that take the keys which another layer chose, and the two objectives of the indexer that chose them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import DSA, ModelConfig, Transformer
from dsmini.inference.fused import Decoder
from dsmini.nn import Context, dsa, dsa_layers
from tests.conftest import SMALL, randomise
from tests.helpers.configs import GLM, refusal
from tests.helpers.models import decoded, set_stage, tokens_of
from tests.helpers.tolerances import FP32_MODEL, FP64_UNIT, relative_error, rounding

SHARING: dict[str, Any] = SMALL | GLM | {"n_mtp_layers": 1, "indexer_types": ("full", "shared", "shared", "full")}
STAGES = pytest.mark.parametrize("stage", ["warmup", "sparse"])
S = 24


def model_of(stage: Any = None, **changes: Any) -> Transformer:
    return set_stage(randomise(Transformer(ModelConfig(**SHARING | changes))), stage)


def test_a_shared_layer_has_no_indexer_and_stores_no_key_of_one() -> None:
    model = model_of()
    assert [layer.attn.indexer is None for layer in model.layers] == [False, True, True, False]
    assert len(dsa_layers(model)) == 3  # MTP's block has one of its own
    assert [store.index is None for store in model.new_cache(1, 8).stores] == [False, True, True, False]


def test_shared_layers_read_the_keys_that_their_source_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one pass, and with a cache in chunks: a layer that chose for itself would not."""
    model, tokens, read = model_of(), tokens_of(2, S), []
    real = dsa.topk_mask
    monkeypatch.setattr(dsa, "topk_mask", lambda indices, t: (read.append(indices), real(indices, t))[1])
    want = model(tokens)
    first, second, third, last = read
    assert first is second is third or all(torch.equal(first, other) for other in (second, third))
    assert not torch.equal(first, last)
    assert relative_error(decoded(model, tokens, (3, 7, 1, 1, 12), S), want) <= FP32_MODEL


def test_another_sequence_in_between_changes_no_choice() -> None:
    """Choices belong to a call, not to the layers."""
    model, tokens, others = model_of(), tokens_of(2, S), tokens_of(2, S)
    caches = [model.new_cache(2, S) for _ in range(2)]
    parts: list[Tensor] = []
    for part, other in zip(tokens.split(6, 1), others.split(6, 1), strict=True):
        parts.append(model(part, caches[0]))
        model(other, caches[1])
    assert torch.equal(torch.cat(parts, 1), decoded(model, tokens, 6, S))


def test_a_shared_layer_without_its_source_is_refused() -> None:
    layer = DSA(ModelConfig(**SHARING), layer=2)
    said = refusal(layer, torch.randn(1, S, SMALL["dim"]))
    assert said == (
        "a shared layer takes the keys that layer 0 chose, and this call has none; run that layer before it, with the "
        "same Context"
    )


def test_the_fused_decoder_leaves_shared_layers_to_their_modules() -> None:
    decoder = Decoder(model_of().eval())
    assert decoder.why in (
        "layers.1: attn takes the keys that layer 0 chose",
        "no kernels of decoding steps run here, or in this dtype",
    )
    assert decoder.blocks[1] is decoder.blocks[2] is None


def agreement_by_hand(model: Transformer, tokens: Tensor, stage: str, served: bool) -> Tensor:
    """Return the sum over indexers of KL(mean of the layers' attention || softmax of the scores), mean over queries."""
    p: list[Tensor] = []
    chosen: list[Tensor] = []
    index: list[Any] = []
    head_sum, real = dsa.head_sum, DSA.choose
    seen = torch.ones(S, S, dtype=torch.bool).tril()[None]

    def choose(layer: DSA, context: Context, inputs: Any) -> Any:
        choice = real(layer, context, inputs)
        assert choice.topk_indices is not None
        columns = torch.zeros(2, S, S + 1).scatter(2, choice.topk_indices % (S + 1), 1.0)[..., :S].bool()
        chosen.append(columns if stage == "sparse" else seen.expand(2, S, S))
        if layer.indexer is not None:
            x, latent = inputs
            index.append(layer.indexer(x.detach(), latent.detach(), context.cos_sin(layer.rope)))
        return choice._replace(index=index[-1])  # every layer compares, so that each one's attention is seen

    def seen_sum(logits: Tensor, mask: Tensor, *more: Any) -> Tensor:
        p.append(logits.masked_fill(~chosen[-1][:, None], -torch.inf).softmax(-1).mean(1))
        return head_sum(logits, mask, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DSA, "choose", choose)
        patch.setattr(dsa, "head_sum", seen_sum)
        patch.setattr(dsa, "indexer_agreement", dsa.indexer_agreement.reference)
        model.states(tokens, train_indexers=True)
    every = p[:: len(p) // len(model.layers)]  # one of each layer; the sparse stage sums twice
    total = torch.zeros((), dtype=torch.float64)
    for i, layers in enumerate(((0, 1, 2), (3,))):
        q, k, weights = index[i]
        scores = torch.einsum("bsh,bhst->bst", weights, torch.einsum("bshd,btd->bhst", q, k).clamp(min=0))
        log_q = scores.masked_fill(~chosen[layers[0]], -torch.inf).log_softmax(-1)
        target = torch.stack([every[j] for j in (layers if served else layers[:1])]).mean(0).detach()
        total = total + (torch.xlogy(target, target) - target * log_q.masked_fill(~chosen[layers[0]], 0.0)).sum() / (
            2 * S
        )
    return total


@pytest.mark.parametrize("target", ["own", "served"])
@STAGES
def test_the_sum_of_divergences_has_the_gradient_of_that_to_the_mean(stage: Any, target: str) -> None:
    """The second definition is written out here. The two values differ by a constant where layers share."""
    model = model_of(stage, indexer_target=target, n_mtp_layers=0).double()
    tokens = tokens_of(2, S)
    index = {name: p for name, p in model.named_parameters() if ".indexer." in name}
    losses = model.losses(tokens, tokens)
    by_hand = agreement_by_hand(model, tokens, stage, target == "served")
    got, want = (torch.autograd.grad(loss, [*index.values()]) for loss in (sum(x.kl for x in losses.indexers), by_hand))
    assert len(losses.indexers) == 2
    assert all(
        relative_error(a, b) <= rounding(FP64_UNIT, terms=S * 64, chained=16) for a, b in zip(got, want, strict=True)
    )
    kl = float(sum(x.kl.detach() for x in losses.indexers))
    assert (
        (kl > float(by_hand.detach()) + 1e-6)
        if target == "served"
        else kl == pytest.approx(float(by_hand.detach()), rel=1e-6)
    )


@STAGES
def test_a_source_learns_from_the_layers_that_it_serves(stage: Any) -> None:
    """Another attention in a served layer changes what the indexer learns; with the own objective it does not."""
    moved: dict[str, float] = {}
    for target in ("own", "served"):
        model = model_of(stage, indexer_target=target, n_mtp_layers=0)
        tokens, weight = tokens_of(2, S), model.layers[0].attn.indexer.wq_b.weight
        learnt = []
        for scale in (1.0, 3.0):
            with torch.no_grad():
                model.layers[2].attn.wq_b.weight.mul_(scale)
            (grad,) = torch.autograd.grad(model.losses(tokens, tokens).indexers[0].kl, weight)
            learnt.append(grad)
        moved[target] = relative_error(learnt[1], learnt[0])
    assert moved["own"] == 0.0 < 1e-2 < moved["served"]
