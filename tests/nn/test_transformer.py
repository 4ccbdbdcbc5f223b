"""The whole model: causality, its losses, dtypes, errors, and that two models or two runs leave each other alone."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmini import MLA, MTP, Attention, Block, Experts, FeedForward, Gate, ModelConfig, MoE, RMSNorm, Transformer, ops
from dsmini.nn import Embedding, Losses
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, FP64_UNIT, MOVED, UNMOVED, relative_error, rounding

B, S, VOCAB = 2, 17, 61
Model = Callable[..., Transformer]
YARN: dict[str, Any] = {"original_seq_len": 8, "rope_factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.3}


def batch() -> tuple[Tensor, Tensor]:
    stream = torch.randint(0, VOCAB, (B, S + 1))
    return stream[:, :-1], stream[:, 1:]


def gradients(model: Transformer, total: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


@pytest.mark.parametrize("t", [0, 5, S - 1])
@pytest.mark.parametrize("changes", [{}, YARN, {"attention": "gqa", "n_kv_heads": 1}], ids=["mla", "yarn", "gqa"])
def test_a_changed_token_moves_nothing_before_it(small_model: Model, changes: dict[str, Any], t: int) -> None:
    model = small_model(**changes).double()
    tokens, _ = batch()
    changed = tokens.clone()
    changed[0, t] = (changed[0, t] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    assert relative_error(after[:, :t], before[:, :t]) < UNMOVED
    assert relative_error(after[1], before[1]) < UNMOVED
    assert all(relative_error(after[0, i], before[0, i]) > MOVED for i in range(t, S))


def test_run_and_forward_give_the_same_logits(small_model: Model) -> None:
    model = small_model()
    tokens, _ = batch()
    out = model.run(tokens)
    assert torch.equal(out.logits, model(tokens))
    assert torch.equal(out.logits, model.head(out.hidden))
    assert out.mtp_logits == [] and len(out.routing) == 1


@pytest.mark.parametrize("layer", [0, 1])
def test_block_adds_attention_then_feed_forward_of_normed_input(small_model: Model, layer: int) -> None:
    block = small_model().layers[layer]
    x = torch.randn(B, S, 24)
    y, routing = block(x)
    between = x + block.attn(block.attn_norm(x))
    fed = block.ffn(block.ffn_norm(between))
    assert torch.equal(y, between + (fed if routing is None else fed[0]))
    assert (routing is None) == (layer == 0)


def test_total_is_main_and_the_weighted_others(small_model: Model) -> None:
    model = small_model()
    tokens, targets = batch()
    losses = model.losses(tokens, targets, mtp_weight=0.7, balance_alpha=0.3)
    assert losses.mtp > 1 and losses.balance > 1
    want = losses.main + 0.7 * losses.mtp + 0.3 * losses.balance
    assert relative_error(losses.total, want) <= rounding(FP32_UNIT, terms=3)
    main = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert relative_error(losses.main, main) <= rounding(FP32_UNIT, terms=VOCAB)
    assert torch.equal(model.losses(tokens, targets, mtp_weight=0.0, balance_alpha=0.0).total, losses.main)


def test_losses_without_experts_and_without_mtp_are_the_main_one(small_model: Model) -> None:
    losses = small_model(n_dense_layers=2, n_mtp_layers=0).losses(*batch())
    assert losses.routing == [] and losses.balance == losses.mtp == 0
    assert torch.equal(losses.total, losses.main)


def test_mean_gradient_of_two_halves_is_that_of_the_whole(small_model: Model) -> None:
    model = small_model().double()
    tokens, targets = batch()

    def of(rows: slice) -> dict[str, Tensor]:
        return gradients(model, model.losses(tokens[rows], targets[rows], balance_alpha=0.5).total)

    whole, first, second = of(slice(0, 2)), of(slice(0, 1)), of(slice(1, 2))
    for name, want in whole.items():
        assert relative_error((first[name] + second[name]) / 2, want) < UNMOVED, name


def bytes_saved(run: Callable[[], Losses]) -> tuple[Losses, int]:
    """Return the losses, and the bytes that autograd saves for their backward."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor.detach()  # a graph that is held from within itself is never freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(), sum(sizes)


def test_recomputation_changes_memory_and_not_one_bit(small_model: Model) -> None:
    model = small_model()
    tokens, targets = batch()
    kept, many = bytes_saved(lambda: model.losses(tokens, targets))
    again, few = bytes_saved(lambda: model.losses(tokens, targets, recompute=True))
    assert few < many / 4
    assert all(torch.equal(a, b) for a, b in zip(kept[:4], again[:4], strict=True))
    assert all(torch.equal(a.counts, b.counts) for a, b in zip(kept.routing, again.routing, strict=True))
    a, b = gradients(model, kept.total), gradients(model, again.total)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 50.0},
        YARN,
        {"score_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
        {"route_scale": 0.5, "n_limited_groups": 4},
        {"norm_eps": 0.1},
        {"mtp_input": "pre_norm"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_second_model_does_not_change_the_first(small_model: Model, small_config: Any, changes: dict[str, Any]) -> None:
    first = small_model()
    tokens, targets = batch()
    alone = first.run(tokens, mtp=True)

    second = Transformer(small_config(**changes))
    second.load_state_dict(first.state_dict(), strict=second.config.topk_method == "noaux_tc")
    second.losses(tokens, targets).total.backward()
    other = second.run(tokens, mtp=True)
    again = first.run(tokens, mtp=True)
    assert torch.equal(again.logits, alone.logits)
    assert all(torch.equal(a, b) for a, b in zip(again.mtp_logits, alone.mtp_logits, strict=True))
    assert all(relative_error(a, b) > 1e-4 for a, b in zip(other.mtp_logits, alone.mtp_logits, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_and_gates_stay_fp32_to_the_bit_under_a_cast(small_model: Model, dtype: torch.dtype) -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(dtype)
    for name, tensor in model.state_dict().items():
        if "norm" in name or "gate" in name:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name]), name
        else:
            assert tensor.dtype == dtype, name
    assert {n.split("ffn.")[-1] for n in before if "gate" in n} == {"gate.weight", "gate.bias"}
    losses = model.losses(*batch())
    assert losses.total.dtype == torch.float32 and losses.total.isfinite()
    assert model(batch()[0]).dtype == dtype


def test_compute_dtype_changes_activations_not_parameters(small_model: Model, small_config: Any) -> None:
    model = small_model(n_dense_layers=4)
    short = Transformer(small_config(n_dense_layers=4), compute_dtype=torch.bfloat16)
    short.load_state_dict(model.state_dict())
    seen: list[torch.dtype] = []
    for block in short.layers:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output[0].dtype))
    tokens, targets = batch()
    losses = short.losses(tokens, targets)
    assert seen == [torch.bfloat16, torch.bfloat16]
    grads = gradients(short, losses.total)
    assert all(p.dtype == grads[n].dtype == torch.float32 for n, p in short.named_parameters())
    # some ten roundings to BF16 in each of a model's three blocks in a row
    assert relative_error(short(tokens), model(tokens)) <= rounding(BF16_UNIT, chained=30)
    want = gradients(model, model.losses(tokens, targets).total)
    assert all(relative_error(grads[n], want[n]) <= 2 * rounding(BF16_UNIT, chained=30) for n in want)


def test_float64_agrees_with_float32(small_model: Model) -> None:
    model = small_model()
    tokens, targets = batch()
    single, losses = model(tokens), model.losses(tokens, targets)
    model.double()
    assert model(tokens).dtype == model.losses(tokens, targets).total.dtype == torch.float64
    tolerance = rounding(FP32_UNIT, terms=40, chained=30)
    assert FP64_UNIT < relative_error(single, model(tokens)) <= tolerance
    assert relative_error(losses.total, model.losses(tokens, targets).total) <= tolerance


@pytest.mark.parametrize("token", [VOCAB, -1, 10**6])
def test_token_outside_the_vocabulary_raises(small_model: Model, token: int) -> None:
    tokens, targets = batch()
    tokens = tokens.clone()
    tokens[1, 3] = token
    for call in (small_model(), lambda x: small_model().losses(x, targets)):
        with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary; want 0 to 60"):
            call(tokens)


def test_sequence_longer_than_max_seq_len_raises(small_model: Model) -> None:
    model = small_model()
    assert model(torch.zeros(1, 32, dtype=torch.int64)).shape == (1, 32, VOCAB)
    with pytest.raises(ValueError, match=r"sequence of 33 tokens is longer than max_seq_len=32; shorten it"):
        model(torch.zeros(1, 33, dtype=torch.int64))


def test_model_is_made_on_meta_and_filled_later(small_model: Model, small_config: Any) -> None:
    model = small_model(**YARN)
    with torch.device("meta"):
        empty = Transformer(small_config(**YARN))
    assert {t.device.type for t in empty.state_dict().values()} == {"meta"}
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    tokens, _ = batch()
    assert torch.equal(empty(tokens), model(tokens))


LAYERS: list[type[nn.Module]] = [Attention, Block, Experts, FeedForward, Gate, MLA, MTP, MoE, Transformer]
by_name = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)


@by_name
def test_layer_is_built_from_a_config_or_from_plain_arguments(layer: Any) -> None:
    arguments = {"dim": 20, "n_heads": 2, "moe_inter_dim": 6, "inter_dim": 14}
    if layer is Attention:
        arguments |= {"attention": "mha"}
    built = [layer(ModelConfig(**arguments)), layer(**arguments), layer(ModelConfig(dim=20), **arguments)]
    shapes = [{name: tensor.shape for name, tensor in module.state_dict().items()} for module in built]
    assert shapes[0] == shapes[1] == shapes[2]
    assert any(20 in shape for shape in shapes[0].values())


@by_name
def test_unknown_argument_is_answered_with_the_nearest(layer: Any) -> None:
    with pytest.raises(ValueError, match="unknown key 'n_head' in the arguments; did you mean 'n_heads'"):
        layer(n_head=2)


def test_layers_run_alone() -> None:
    x = torch.randn(2, 9, 192)
    assert MLA()(x).shape == Attention()(x).shape == FeedForward()(x).shape == RMSNorm(192)(x).shape == x.shape
    assert MoE()(x)[0].shape == Block(layer=0)(x)[0].shape == MTP()(x, x)[0].shape == x.shape
    assert Gate()(x[0]).indices.shape == (9, 4)
    assert Embedding(7, 192)(torch.tensor([[0, 6]])).shape == (1, 2, 192)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind", [MLA, Attention, FeedForward])
def test_input_of_the_wrong_width_is_refused(kind: Any, backend: str | None) -> None:
    forward: Any = inspect.unwrap(kind.forward)  # without the type checks of these tests
    with ops.use(backend), pytest.raises(ValueError, match=r"x is \(1, 4, 32\), want \[\.\.\., 64\]"):
        forward(kind(dim=64), torch.randn(1, 4, 32))


def test_losses_ask_for_a_target_for_each_token(small_model: Model) -> None:
    model, x = small_model(), torch.zeros(2, 9, dtype=torch.int64)
    losses: Any = inspect.unwrap(type(model).losses)  # without the type checks of these tests
    with pytest.raises(ValueError, match=r"targets are \(2, 9\), tokens \(2, 8\); want a target for each token"):
        losses(model, x[:, :-1], x)


def test_routing_bias_is_saved_and_never_optimised(small_model: Model) -> None:
    model = small_model()
    biases = {name for name in model.state_dict() if name.endswith("gate.bias")}
    assert biases == {f"{block}.ffn.gate.bias" for block in ("layers.1", "mtp.0.block", "mtp.1.block")}
    assert not biases & {name for name, _ in model.named_parameters()}
    assert set(model.state_dict()) == biases | {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("n_dense_layers", range(5))
def test_blocks_after_n_dense_layers_have_experts(small_model: Model, n_dense_layers: int) -> None:
    model = small_model(n_dense_layers=n_dense_layers)
    blocks = [*model.layers, *(mtp.block for mtp in model.mtp)]
    assert [isinstance(block.ffn, MoE) for block in blocks] == [i >= n_dense_layers for i in range(4)]
    routing = model.run(batch()[0], mtp=True).routing
    assert len(routing) == len(model.gates()) == 4 - n_dense_layers


def test_two_runs_of_three_steps_end_in_the_same_bits(small_config: Any) -> None:
    def train() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(5)
        model = Transformer(small_config())
        model.reset_parameters(generator)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            tokens, targets = torch.randint(0, VOCAB, (2, B, S), generator=generator).unbind()
            losses = model.losses(tokens, targets)
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
            for gate, routing in zip(model.gates(), losses.routing, strict=True):
                gate.update_bias(routing.counts, 1e-3)
        return model.state_dict()

    first, second = train(), train()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(first[name].any() for name in first if name.endswith("bias"))


def test_reset_parameters_draws_every_matrix_from_the_generator(small_model: Model) -> None:
    one, other = small_model(init_std=0.3), small_model(init_std=0.3)
    for model in (one, other):
        model.reset_parameters(torch.Generator().manual_seed(9))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
        if tensor.dim() > 1:
            assert 0.2 < tensor.std() < 0.4, name
        else:
            assert (tensor == (0 if name.endswith("bias") else 1)).all(), name
