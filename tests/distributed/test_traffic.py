"""Bytes that the expert exchange sends: counted, and worked out from the routing."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from dsmini import ModelConfig, Transformer
from dsmini.config.run import ParallelConfig
from dsmini.distributed.expert_parallel import moe_layers
from dsmini.distributed.mesh import Mesh
from dsmini.distributed.world import World
from tests.conftest import SMALL
from tests.distributed.ranks import run_ranks

TOKENS, E, K = 1500, 8, 2
MODEL: dict[str, Any] = SMALL | {
    **{"dim": 128, "inter_dim": 128, "moe_inter_dim": 128, "n_routed_experts": E, "n_activated_experts": K},
    **{"n_expert_groups": 2, "n_limited_groups": 2, "n_mtp_layers": 0, "precision": "fp8"},
}


def exchange(world: World) -> tuple[Counter[str], int]:
    """Run a MoE layer forward and backward on evenly drawn tokens; return what was sent, and the pairs elsewhere."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**MODEL))
    ranks = Mesh(ParallelConfig(ep=world.size), torch.device("cpu"))
    ranks.divide(model)
    (moe,) = moe_layers(model)
    torch.nn.init.orthogonal_(moe.gate.weight)  # independent scores: all experts are equally likely
    torch.manual_seed(1 + world.rank)
    x = torch.randn(TOKENS, 128, requires_grad=True)
    y, routing = moe(x)
    y.sum().backward()
    return ranks.traffic, int((routing.indices // (E // world.size) != world.rank).sum())


ROW = {"dispatch": 128 + 4, "combine": 4 * 128, "dispatch_gradients": 4 * 128, "combine_gradients": 4 * 128}
"""Bytes of a row: E4M3 codes with one scale, else FP32."""


@pytest.mark.slow
def test_exchange_sends_one_row_a_token_expert_pair() -> None:
    every = run_ranks(4, exchange)
    remote = [pairs for _, pairs in every]
    for sent, pairs in every:
        for what in ("dispatch", "combine_gradients"):  # leave with the token
            assert sent[what] == pairs * ROW[what]
    for what in ("combine", "dispatch_gradients"):  # come back to it, so they leave from all others
        assert sum(sent[what] for sent, _ in every) == sum(remote) * ROW[what]
    predicted = TOKENS * K * (1 - 1 / 4)
    for pairs in remote:
        assert pairs == pytest.approx(predicted, abs=4 * math.sqrt(predicted / 4))
