"""Experts and keys of a generation are imposed in training: gates and indexers choose the same, and learn."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer, generate, load_pretrained
from dsmini.nn import dsa_layers
from tests.conftest import SMALL
from tests.helpers.configs import DSA, GLM, V4, V4_MODEL, refusal
from tests.helpers.models import set_stage

CASES: dict[str, dict[str, Any]] = {"v3": {}, "recomputed": {}, "v4": V4_MODEL}
PROMPTS = [[5, 9, 11, 3, 2], [7, 1]]


def model_of(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL | changes))
    for name, p in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model


def disturbed(model: Transformer) -> Transformer:
    """Change the gates so much that they would choose others."""
    for gate in model.gates():
        with torch.no_grad():
            gate.weight.copy_(gate.weight.flip(0))
    return model


def recorded(model: Transformer, **options: Any) -> tuple[Tensor, list[Tensor]]:
    out = generate(model, PROMPTS, 9, routing=True, **options)
    assert out.routing is not None
    return out.tokens, out.routing


@pytest.mark.parametrize("case", CASES)
def test_gates_choose_what_the_generation_chose(case: str) -> None:
    model = model_of(**CASES[case])
    tokens, routing = recorded(model.eval())
    read = tokens[:, :-1]
    assert all(layer.shape == (*read.shape, model.config.n_activated_experts) for layer in routing)
    # the second row is shorter: nothing was read after it
    assert all(
        (layer[1, 10:] == -1).all() and (layer[0] >= 0).all() and (layer[1, :10] >= 0).all() for layer in routing
    )
    plain = [r.indices.view_as(layer) for r, layer in zip(model.run(read).routing, routing, strict=True)]
    assert all(torch.equal(a[layer >= 0], layer[layer >= 0]) for a, layer in zip(plain, routing, strict=True))
    disturbed(model)
    losses = model.losses(read, tokens[:, 1:], routing=routing, recompute=case == "recomputed")
    for got, layer in zip(losses.routing, routing, strict=False):
        indices = got.indices.view_as(layer)
        assert torch.equal(indices[layer >= 0], layer[layer >= 0]) and (indices >= 0).all()
        assert int(got.counts.sum()) == indices.numel()
    losses.total.backward()
    for gate in model.gates():
        assert gate.weight.grad is not None and gate.weight.grad.norm() > 0, "the gate learns"


def test_weights_are_computed_again_from_the_gates_own_scores() -> None:
    model = model_of(n_mtp_layers=0).eval()
    tokens, routing = recorded(model)
    free = model.losses(tokens[:, :-1], tokens[:, 1:])
    imposed = model.losses(tokens[:, :-1], tokens[:, 1:], routing=routing)
    assert torch.equal(free.total, imposed.total), "where gates would choose the same, nothing changes"
    disturbed(model)
    layer = model.losses(tokens[:, :-1], tokens[:, 1:], routing=routing).routing[0]
    weights = layer.scores.gather(1, layer.indices)
    torch.testing.assert_close(layer.weights, 2.5 * weights / weights.sum(-1, keepdim=True))


def test_guesses_that_are_rejected_leave_no_trace() -> None:
    model = model_of().eval()
    tokens, routing = recorded(model, speculative=True)
    alone, plain = recorded(model)
    assert torch.equal(tokens, alone)
    for a, b in zip(routing, plain, strict=True):
        assert torch.equal(a, b)


def test_a_replay_reaches_no_other_model_and_no_later_call() -> None:
    """As that of a teacher, whose gates and indexers choose for themselves."""
    student, teacher = (model_of(**GLM | {"n_mtp_layers": 0}).eval() for _ in range(2))
    disturbed(teacher)
    out = generate(student, PROMPTS, 12, routing=True)
    x, y = out.tokens[:, :-1], out.tokens[:, 1:]
    before = [model.losses(x, y) for model in (student, teacher)]
    imposed = [layer.where(layer < 0, (layer + 1) % 8) for layer in out.routing or ()]
    assert not torch.equal(student.losses(x, y, routing=imposed, keys=out.keys).main, before[0].main)
    for model, want in zip((teacher, student), reversed(before), strict=True):
        assert torch.equal(model.losses(x, y).main, want.main)


def test_a_replay_of_another_shape_is_refused() -> None:
    model = model_of().eval()
    tokens, routing = recorded(model)
    for wrong, said in (
        ([layer[:, 1:] for layer in routing], "want 1 of (2, 13, 3)"),
        ([], "routing has 0 layers"),
        ([*routing, *routing], "routing has 2 layers"),
        ([layer + 8 for layer in routing], "of another model"),
    ):
        with pytest.raises(ValueError, match="routing") as error:
            model.losses(tokens[:, :-1], tokens[:, 1:], routing=wrong)
        assert said in str(error.value)
    states = model.states(tokens[:, :-1])
    with pytest.raises(ValueError, match="leave out one"):
        model.losses(tokens[:, :-1], tokens[:, 1:], routing=routing, states=states)
    assert generate(model, PROMPTS, 2).routing is None


# keys that indexers chose

INDEXED: dict[str, dict[str, Any]] = {
    "dsa": DSA | {"n_layers": 3},
    "glm": GLM,
    "v4": V4 | {"n_layers": 4, "compress_ratios": (4, 0, 8, 4), "index_topk": 2},
}


def chosen_by(model: Transformer, tokens: Tensor, **options: Any) -> list[Tensor]:
    """Return the keys that each indexer chooses in one pass over whole rows."""
    chosen: list[Any] = []
    model.states(tokens, chosen=chosen, **options)
    return chosen


def sets_of(keys: Tensor) -> Tensor:
    return keys.sort(-1).values


def keys_recorded(case: str, **options: Any) -> tuple[Transformer, Tensor, list[Tensor]]:
    model = model_of(**INDEXED[case]).eval()
    out = generate(model, [list(range(5, 17)), [7, 1, 44]], 15, routing=True, **options)
    assert out.keys is not None
    return model, out.tokens, out.keys


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("case", INDEXED)
def test_indexers_choose_what_the_generation_chose(case: str, speculative: bool) -> None:
    model, tokens, keys = keys_recorded(case, speculative=speculative)
    read = tokens[:, :-1]
    plain = chosen_by(model, read)
    assert len(keys) == len(plain) == sum(map(model.config.has_indexer, range(model.config.n_layers)))
    for layer, free in zip(keys, plain, strict=True):
        known = (layer >= 0).any(-1)
        assert known[0].sum() > 8 and not known[1, 17:].any(), "nothing was read after the second row"
        assert torch.equal(sets_of(layer)[known], sets_of(free)[known]), "a cache changes no choice in FP32"
    for layer in dsa_layers(model):
        with torch.no_grad():
            layer.indexer.weights_proj.weight.neg_()
    changed = chosen_by(model, read)
    imposed = chosen_by(model, read, keys=keys)
    for layer, free, got in zip(keys, changed, imposed, strict=True):
        known = (layer >= 0).any(-1)
        assert not torch.equal(sets_of(free)[known], sets_of(layer)[known])
        assert torch.equal(got[known], layer[known])
    assert torch.equal(imposed[0][1, 17:], changed[0][1, 17:]), "where nothing is recorded the indexer chooses"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", INDEXED)
def test_indexers_learn_from_the_keys_that_are_imposed(case: str, recompute: bool) -> None:
    """The loss compares scores and attention among them, and the main model attends to them."""
    model, tokens, keys = keys_recorded(case)
    set_stage(model, "sparse").train()
    free = model.losses(tokens[:, :-1], tokens[:, 1:], recompute=recompute)
    same = model.losses(tokens[:, :-1], tokens[:, 1:], keys=keys, recompute=recompute)
    torch.testing.assert_close(same.total, free.total)
    first = torch.arange(keys[0].shape[2])
    other = [first.where((layer >= 0).all(-1, keepdim=True), -1) for layer in keys]
    moved = model.losses(tokens[:, :-1], tokens[:, 1:], keys=other, recompute=recompute)
    assert (moved.main - free.main).abs() > 1e-6 and (moved.indexers[0].kl - free.indexers[0].kl).abs() > 1e-6
    moved.total.backward()
    for layer in dsa_layers(model):
        assert all(p.grad is not None and p.grad.norm() > 0 for p in layer.indexer.parameters())


@pytest.mark.parametrize("case", INDEXED)
def test_a_replay_of_other_keys_is_refused(case: str) -> None:
    model, tokens, keys = keys_recorded(case)
    x, y = tokens[:, :-1], tokens[:, 1:]
    of = f"of {tuple(keys[0].shape)}, the keys of each token in each layer with an indexer"
    assert of in refusal(model.losses, x, y, keys=[layer[:, 1:] for layer in keys])
    assert f"keys has 0 layers of (); want {len(keys)} {of}" in refusal(model.losses, x, y, keys=[])
    later = [layer.where(layer != 2, 20) for layer in keys]
    assert "keys names keys up to 2" in refusal(model.losses, x, y, keys=later)
    assert "one twice" in refusal(model.losses, x, y, keys=[torch.zeros_like(layer) for layer in keys])
    assert "keys has torch.float32; want int64" in refusal(model.losses, x, y, keys=[layer.float() for layer in keys])
    assert "leave out one" in refusal(model.losses, x, y, keys=keys, states=model.states(x))
    dense = model_of().eval()
    assert "want 0 of" in refusal(dense.losses, x, y, keys=keys)


def test_without_replay_some_keys_of_the_toy_differ_in_bf16() -> None:
    """docs/training.md has the share. With replay none differs."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_file("configs/toy-glm.toml"), compute_dtype=torch.bfloat16).eval()
    out = generate(model, [list(b"def "), list(b"import ")], 128, routing=True, temperature=1.0, seed=0)
    assert out.keys is not None
    read = out.tokens[:, :-1]
    with torch.no_grad():
        free, imposed = chosen_by(model, read), chosen_by(model, read, keys=out.keys)
    differ = total = 0
    for layer, a, b in zip(out.keys, free, imposed, strict=True):
        known = (layer >= 0).any(-1)
        assert torch.equal(b[known], layer[known])
        differ += int((sets_of(a) != sets_of(layer)).any(-1)[known].sum())
        total += int(known.sum())
    print(f"{differ / total:.1%} of the tokens' sets, each of {model.config.index_topk} keys")
    assert 0 < differ / total < 1


def test_without_replay_some_tokens_of_the_toy_differ_in_bf16() -> None:
    """docs/training.md has the share. With replay none differs."""
    model = load_pretrained("toy", dtype=torch.bfloat16)
    out = generate(model, [list(b"def "), list(b"import ")], 96, routing=True, temperature=1.0, seed=0)
    assert out.routing is not None
    read, differ, total = out.tokens[:, :-1], torch.zeros(()), 0
    with torch.no_grad():
        free = model.run(read).routing
        imposed = model.states(read, routing=out.routing).routing
    any_layer = torch.zeros(read.shape, dtype=torch.bool)
    for layer, a, b in zip(out.routing, free, imposed, strict=True):
        known = (layer >= 0).all(-1)
        here = (a.indices.view_as(layer).sort(-1).values != layer.sort(-1).values).any(-1) & known
        assert torch.equal(b.indices.view_as(layer)[known], layer[known])
        any_layer |= here
        differ, total = differ + here.sum(), total + int(known.sum())
    print(f"{float(differ) / total:.1%} of choices, {float(any_layer.sum()) / int(known.sum()):.1%} of tokens")
    assert 0 < float(any_layer.sum()) / int(known.sum()) < 0.5
