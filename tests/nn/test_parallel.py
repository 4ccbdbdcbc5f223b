"""DDP and FSDP2 on two processes: gradients equal those of one process with both their batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from dsmini import Transformer
from dsmini.distributed.world import World
from dsmini.nn import Losses
from tests.conftest import SMALL, randomise
from tests.distributed.ranks import run_ranks
from tests.helpers.tolerances import FP32_MODEL, relative_error

pytestmark = pytest.mark.slow
RANKS = 2


def batch() -> tuple[Tensor, Tensor]:
    """Return tokens and targets [4, 12], of which a process gets half the rows; the same number count in each half."""
    ids = torch.randint(0, SMALL["vocab_size"], (2 * RANKS, 13), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def make_model() -> Transformer:
    torch.manual_seed(0)
    return randomise(Transformer(**SMALL))


def shard(model: Transformer, *more: nn.Module) -> None:
    """Shard the modules in `more`, then each block, then the rest."""
    for block in (*more, *model.layers, *model.mtp):
        fully_shard(block)
    fully_shard(model)


def fsdp(model: Transformer) -> Callable[..., Losses]:
    shard(model)
    return model


def fsdp_method(model: Transformer) -> Callable[..., Losses]:
    shard(model)
    register_fsdp_forward_method(model, "losses")
    return lambda tokens, targets, **options: model.losses(tokens, targets, **options)


def fsdp_of_each(model: Transformer) -> Callable[..., Losses]:
    """Head, embedding and wkv_b are sharded on their own: nobody but their forward sees the weight."""
    shard(model, model.head, model.embed, *(block.attn.wkv_b for block in model.layers))
    return model


RECIPES: dict[str, Callable[[Transformer], Callable[..., Losses]]] = {
    "ddp": DistributedDataParallel,
    "fsdp": fsdp,
    "fsdp, losses": fsdp_method,
    "fsdp of each": fsdp_of_each,
}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()}


def errors(world: World, recipe: str) -> dict[str, float]:
    """Return the relative errors of the gradients, the loss, and for FSDP the logits of decoding."""
    tokens, targets = batch()
    alone, model = make_model(), make_model()
    want = alone.losses(tokens, targets, balance_alpha=0.1)
    want.total.backward()
    run = RECIPES[recipe](model)
    rows = slice(2 * world.rank, 2 * world.rank + 2)
    loss = run(tokens[rows], targets=targets[rows], balance_alpha=0.1).total
    loss.backward()
    got, expected = gradients(model), gradients(alone)
    out = {name: relative_error(got[name], expected[name]) for name in expected}
    dist.all_reduce(loss := loss.detach().clone())
    out["loss"] = relative_error(loss / RANKS, want.total)
    if recipe != "ddp":
        cache = model.new_cache(2)
        logits = torch.cat([model(part, cache) for part in tokens[rows].split((7, 1, 4), 1)], 1)
        out["decoding"] = relative_error(logits, alone(tokens[rows]))
    return out


@pytest.mark.parametrize("recipe", RECIPES)
def test_parallel_gradients_equal_those_of_one_process(recipe: str) -> None:
    """The average over processes adds one rounding to the hundreds that FP32_MODEL counts for the whole model."""
    for found in run_ranks(RANKS, errors, recipe):
        assert len(found) > 40
        assert {name: error for name, error in found.items() if not error <= FP32_MODEL} == {}


def drawn_on_meta(world: World) -> float:
    """Return the relative error of the logits of a model that was sharded before its weights were drawn.

    The weights are those that one process draws.
    """
    streams: dict[str, Any] = {"hc_mult": 2}
    with torch.device("meta"):
        model = Transformer(**SMALL, **streams)
    shard(model)
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    model.reset_parameters()
    torch.manual_seed(5)
    alone = Transformer(**SMALL, **streams)
    assert all(torch.equal(whole(t), alone.state_dict()[name]) for name, t in model.state_dict().items())
    return relative_error(model(batch()[0]), alone(batch()[0]))


def test_a_model_with_streams_is_drawn_after_it_was_sharded() -> None:
    assert max(run_ranks(RANKS, drawn_on_meta)) <= FP32_MODEL
