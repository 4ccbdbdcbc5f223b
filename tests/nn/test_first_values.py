"""First values follow from a seed, a name and a place, whatever the order, the processes, and a start on meta."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dsmini import MLA, Block, Gate, ModelConfig, Transformer
from dsmini.distributed.world import World
from dsmini.nn.first_values import BLOCK, draw_normal
from dsmini.nn.gate import HashGate
from dsmini.nn.layers import Linear
from tests.conftest import SMALL
from tests.distributed.ranks import run_ranks
from tests.helpers.configs import DSA, V4_MODEL

LONG = (BLOCK // 100 + 20, 300)
"""Three blocks and a part of one."""


def made(seed: int = 7, **changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return Transformer(**SMALL | changes).state_dict()


def drawn(rows: slice = slice(None), seed: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return rows of a tensor that knows which they are."""
    weight = torch.full(LONG, torch.nan, dtype=dtype)[rows].contiguous()
    draw_normal(weight, 1.0, torch.Generator().manual_seed(seed), rows.start or 0)
    return weight


OTHERS: dict[str, dict[str, Any]] = {
    "more layers": {"n_layers": 4, "n_mtp_layers": 0},
    "wider experts": {"moe_inter_dim": 40},
    "other attention": {"attention": "gqa", "n_kv_heads": 1},
    "indexers": DSA,
    "fp8": {"precision": "fp8"},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_models_share_the_values_of_shared_names(changes: dict[str, Any]) -> None:
    ours, theirs = made(), made(**changes)
    alike = [name for name in ours.keys() & theirs.keys() if ours[name].shape == theirs[name].shape]
    assert len(alike) > 15 and all(torch.equal(ours[name], theirs[name]) for name in alike)
    assert not torch.equal(ours["embed.weight"], made(seed=8)["embed.weight"])


def test_no_two_matrices_of_a_model_are_equal() -> None:
    matrices = [t.flatten()[:50] for t in made().values() if t.dim() > 1 and t.any()]
    assert len({tuple(t.tolist()) for t in matrices}) == len(matrices) > 20


@pytest.mark.parametrize("sizes", [{}, {"n_layers": 1, "n_mtp_layers": 0}, V4_MODEL], ids=str)
def test_a_model_takes_one_number_of_the_generator(sizes: dict[str, Any]) -> None:
    torch.manual_seed(3)
    want = torch.randint(2**63 - 1, ()), torch.rand(4)
    torch.manual_seed(3)
    model = Transformer(**SMALL | sizes)
    assert torch.equal(torch.rand(4), want[1])
    model.reset_parameters(torch.Generator().manual_seed(3))
    torch.manual_seed(3)
    assert torch.equal(model.embed.weight, Transformer(**SMALL | sizes).embed.weight)


MODELS: dict[str, dict[str, Any]] = {
    "mla": {"embed_norm": True, "original_seq_len": 8},
    "without q_lora": {"q_lora_rank": None, "qk_norm": True},
    "gqa": {"attention": "gqa", "n_kv_heads": 1, "qk_norm": True},
    "fp8": {"precision": "fp8"},
    "dsa": DSA,
}


@pytest.mark.parametrize("sizes", [*MODELS.values(), V4_MODEL], ids=[*MODELS, "v4"])
def test_a_model_on_meta_is_reset_to_what_a_constructor_draws(sizes: dict[str, Any]) -> None:
    want = made(**sizes)
    with torch.device("meta"):
        model = Transformer(**SMALL | sizes)
    model.to_empty(device="cpu")
    for tensor in [t for t in model.state_dict().values() if t.is_floating_point()]:
        tensor.fill_(torch.nan)
    torch.manual_seed(7)
    model.reset_parameters()
    got = model.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype == want[name].dtype and torch.equal(tensor, want[name]), name
        if name.endswith("bias"):
            assert (tensor == 0).all(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        elif "compressed" not in sizes.values() and not name.endswith(("wo.weight", "w2", "w2.weight")):
            assert 0.5 < tensor.std() / model.config.init_std < 1.5, name


def test_a_layer_alone_follows_the_generator() -> None:
    layers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        layers.append(MLA(ModelConfig(**SMALL)).state_dict())
    assert all(torch.equal(layers[0][name], layers[1][name]) for name in layers[0])
    assert not torch.equal(layers[0]["wkv_a.weight"], layers[2]["wkv_a.weight"])


def test_without_memory_nothing_is_drawn() -> None:
    before = torch.get_rng_state()
    with torch.device("meta"):
        Transformer(**SMALL)
    with FakeTensorMode():
        Transformer(**SMALL)
    assert torch.equal(torch.get_rng_state(), before)


# --- weights that an idea sets


class Scaled(Linear):
    """A layer that starts at a hundredth."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        with torch.no_grad():
            self.weight.mul_(0.01)


class Warm(Gate):
    """A gate with a temperature that the class sets after it drew the weight."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.temperature = nn.Parameter(torch.ones(()))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        if "temperature" in self._parameters:
            nn.init.ones_(self.temperature)


class Adapted(Block):
    """A block with an adapter that starts at zero, layers of its own classes, and weights that it changes."""

    def __init__(self, config: ModelConfig, *args: Any, **more: Any) -> None:
        super().__init__(config, *args, **more)
        self.up = nn.Linear(8, 8)
        nn.init.zeros_(self.up.weight)
        self.attn_norm.weight.data.fill_(0.5)
        attention: Any = self.attn
        attention.wq_a.weight.data.neg_()
        attention.wkv_a.weight.data[3] = 9.0
        attention.wkv_b = Scaled(attention.wkv_b.in_features, attention.wkv_b.out_features)
        if hasattr(self.ffn, "gate"):
            self.ffn.gate = Warm(config)
            self.ffn.gate.temperature.data.fill_(2.0)


def test_what_an_idea_sets_is_kept_and_all_else_is_shared() -> None:
    torch.manual_seed(7)
    idea: Any = Transformer(**SMALL, make_block=Adapted)
    ours, theirs = made(), idea.state_dict()
    changed = {name.split(".", 2)[2] for name in ours if not torch.equal(ours[name], theirs[name])}
    of_block = {"attn_norm.weight", "attn.wq_a.weight", "attn.wkv_a.weight", "attn.wkv_b.weight"}
    assert {name.removeprefix("block.") for name in changed} == of_block
    for block in (*idea.layers, idea.mtp[0].block):
        assert not block.up.weight.any() and block.up.bias.any() and (block.attn_norm.weight == 0.5).all()
        assert (block.attn.wkv_a.weight[3] == 9).all()
        assert not hasattr(block.ffn, "gate") or block.ffn.gate.temperature == 2
    name = "layers.1.attn.wkv_b.weight"
    assert torch.equal(theirs[name], ours[name] * 0.01), "drawn by its name, and then scaled by its class"


class Tabled(Block):
    """A block whose tokens all go to the last experts."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        if isinstance(gate := getattr(self.ffn, "gate", None), HashGate):
            gate.tid2eid.fill_(len(gate.weight) - 1)


def test_a_table_that_an_idea_sets_is_kept() -> None:
    torch.manual_seed(7)
    model: Any = Transformer(**SMALL | V4_MODEL, make_block=Tabled)
    gate, want = model.layers[0].ffn.gate, made(**V4_MODEL)
    assert (gate.tid2eid == len(gate.weight) - 1).all()
    assert torch.equal(gate.weight, want["layers.0.ffn.gate.weight"])


def test_changes_after_the_constructor_are_kept() -> None:
    class Zeroed(Transformer):
        def __init__(self, **sizes: Any) -> None:
            super().__init__(**sizes)
            self.head.weight.data.zero_()

    assert not Zeroed(**SMALL).head.weight.any()


class Nested(Block):
    """A block with a model inside."""

    def __init__(self, config: ModelConfig, *args: Any, **more: Any) -> None:
        super().__init__(config, *args, **more)
        self.inner = Transformer(**SMALL)


def test_a_model_inside_a_block_keeps_its_own_values() -> None:
    torch.manual_seed(7)
    model: Any = Transformer(**SMALL, make_block=Nested)
    first, second = (model.layers[i].inner.embed.weight for i in (0, 1))
    assert not torch.equal(first, second) and torch.equal(model.embed.weight, made()["embed.weight"])


# --- places in a tensor


@pytest.mark.parametrize("rows", [(0, 1), (0, 218), (218, 219), (219, 437), (400, 500), (674, 675), (10, 10)], ids=str)
def test_rows_are_those_of_the_whole(rows: tuple[int, int]) -> None:
    whole, part = drawn(), drawn(slice(*rows))
    assert torch.equal(part, whole[slice(*rows)])


def test_blocks_are_normal_and_differ() -> None:
    blocks = drawn().flatten()[: 3 * BLOCK].view(3, BLOCK)
    assert blocks.std(1).allclose(torch.ones(3), atol=0.01) and blocks.mean(1).abs().max() < 0.02
    assert blocks.corrcoef().fill_diagonal_(0).abs().max() < 0.02


def test_another_dtype_has_the_rounded_values() -> None:
    assert torch.equal(drawn(dtype=torch.bfloat16), drawn().bfloat16())
    assert torch.equal(drawn(dtype=torch.float64), drawn().double())


def test_under_inference_mode_the_values_are_the_same() -> None:
    with torch.inference_mode():
        inferring = drawn()
    assert torch.equal(inferring, drawn())


def divided(world: World) -> list[bool]:
    """Return whether divided tensors are drawn as the whole is: by uneven rows, by columns, alike."""
    mesh, found = init_device_mesh("cpu", (world.size,)), list[bool]()
    for placement in (Shard(0), Shard(1), Replicate()):
        weight: Any = distribute_tensor(torch.full(LONG, torch.nan), mesh, [placement])
        draw_normal(weight, 1.0, torch.Generator().manual_seed(7))
        found.append(torch.equal(weight.full_tensor(), drawn()))
    few: Any = distribute_tensor(torch.full((1, 8), torch.nan), mesh, [Shard(0)])  # one rank has none
    draw_normal(few, 1.0, torch.Generator().manual_seed(7))
    return [*found, torch.equal(few.full_tensor()[0], drawn().flatten()[:8])]


def test_divided_tensors_are_drawn_as_the_whole() -> None:
    assert run_ranks(2, divided) == [[True] * 4] * 2


# --- a model on meta gives shapes without memory

SLOW = {"fp8": pytest.mark.slow}  # torch loads its decompositions


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in MODELS])
def test_meta_model_gives_the_shapes_of_its_outputs(name: str) -> None:
    model, tokens = Transformer(**SMALL | MODELS[name]), torch.zeros(2, 13, dtype=torch.int64)
    want = model.run(tokens, mtp=True)
    model, tokens = model.to("meta"), tokens.to("meta")
    got = model.run(tokens, mtp=True)
    assert got.logits.is_meta and got.logits.shape == want.logits.shape
    assert [r.indices.shape for r in got.routing] == [r.indices.shape for r in want.routing]
    model.losses(tokens, tokens).total.backward()
    learnt = [p for name, p in model.named_parameters() if ".indexer." not in name]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in learnt)


def test_whole_model_resets_modules_of_other_classes() -> None:
    model = Transformer(**SMALL)
    model.layers[0].attn.wo = nn.Linear(15, 24, bias=False)  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(torch.nan)
    model.reset_parameters(torch.Generator().manual_seed(3))
    assert all(tensor.isfinite().all() for tensor in model.parameters())
    again = Transformer(**SMALL)
    again.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(model.embed.weight, again.embed.weight)
