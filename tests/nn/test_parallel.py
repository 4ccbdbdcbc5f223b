"""DDP and FSDP2 on two processes: gradients equal those of one process with both their batches.

This file is also the program that the processes run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from dsmini import Transformer
from dsmini.nn import Losses
from tests.conftest import SMALL, randomise
from tests.helpers.tolerances import FP32_MODEL, relative_error

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
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


def errors(recipe: str, rank: int) -> dict[str, float]:
    """Return the relative errors of the gradients, the loss, and for FSDP the logits of decoding."""
    tokens, targets = batch()
    alone, model = make_model(), make_model()
    want = alone.losses(tokens, targets, balance_alpha=0.1)
    want.total.backward()
    run = RECIPES[recipe](model)
    rows = slice(2 * rank, 2 * rank + 2)
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


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    out = {recipe: errors(recipe, rank) for recipe in RECIPES}
    if rank == 0:
        print(json.dumps(out), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may end a process with an error where the other rank has gone first


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    store = tmp_path_factory.mktemp("parallel") / "store"
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    options: Any = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = [[sys.executable, __file__, str(rank), str(store)] for rank in range(RANKS)]
    started = [subprocess.Popen(command, **options) for command in commands]
    try:
        outputs = [process.communicate() for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), outputs[0][1][-3000:] + outputs[1][1][-3000:]
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_parallel_gradients_equal_those_of_one_process(recipe: str, outcomes: dict[str, dict[str, float]]) -> None:
    """The average over processes adds one rounding to the hundreds that FP32_MODEL counts for the whole model."""
    found = outcomes[recipe]
    assert len(found) > 40
    assert {name: error for name, error in found.items() if not error <= FP32_MODEL} == {}


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
