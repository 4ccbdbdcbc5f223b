"""Bytes that the expert exchange sends: counted, worked out from the routing, and predicted by the planner."""

import math
from typing import Any

import pytest
import torch

from dsmini import ModelConfig, Transformer
from dsmini.config.run import ParallelConfig
from dsmini.distributed.expert_parallel import moe_layers
from dsmini.distributed.mesh import Mesh
from dsmini.distributed.world import World
from dsmini.planner.exchange import Exchange
from tests.conftest import SMALL
from tests.distributed.ranks import run_ranks

TOKENS, E, K = 1500, 8, 2
MODEL: dict[str, Any] = SMALL | {
    **{"dim": 128, "inter_dim": 128, "moe_inter_dim": 128, "n_routed_experts": E, "n_activated_experts": K},
    **{"n_expert_groups": 2, "n_limited_groups": 2, "n_mtp_layers": 0, "precision": "fp8"},
}


def exchange(world: World, nodes: int) -> dict[str, Any]:
    """Run a MoE layer forward and backward on evenly drawn tokens; return what was sent, and what the routing says."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**MODEL))
    ranks = Mesh(ParallelConfig(ep=world.size, nodes=nodes), torch.device("cpu"))
    ranks.divide(model)
    (moe,) = moe_layers(model)
    torch.nn.init.orthogonal_(moe.gate.weight)  # independent scores: all experts are equally likely
    torch.manual_seed(1 + world.rank)
    x = torch.randn(TOKENS, 128, requires_grad=True)
    y, routing = moe(x)
    y.sum().backward()
    on_rank = routing.indices // (E // world.size)
    own_node = world.rank // (world.size // nodes)
    on_node = on_rank // (world.size // nodes)
    reached = torch.zeros(TOKENS, nodes, dtype=torch.bool).scatter(1, on_node, True)
    reached[:, own_node] = False
    return {
        "fast": ranks.traffic,
        "slow": ranks.slow_traffic,
        "remote visits": int((on_rank != world.rank).sum()),
        "remote nodes": int(reached.sum()),
    }


ROW = {"dispatch": 128 + 4, "combine": 4 * 128, "dispatch_gradients": 4 * 128, "combine_gradients": 4 * 128}
"""Bytes of a row: E4M3 codes with one scale, else FP32."""


@pytest.mark.slow
def test_flat_exchange_sends_one_row_a_visit() -> None:
    every = run_ranks(4, exchange, 1)
    remote = [found["remote visits"] for found in every]
    for found, visits in zip(every, remote, strict=True):
        for what in ("dispatch", "combine_gradients"):  # leave with the visit
            assert found["fast"][what] == visits * ROW[what]
    for what in ("combine", "dispatch_gradients"):  # come back to it, so they leave from all others
        assert sum(found["fast"][what] for found in every) == sum(remote) * ROW[what]
    predicted = TOKENS * K * (1 - 1 / 4)
    for visits in remote:
        assert visits == pytest.approx(predicted, abs=4 * math.sqrt(predicted / 4))


@pytest.mark.slow
def test_two_hops_send_a_token_once_to_a_node_as_the_planner_predicts() -> None:
    every = run_ranks(4, exchange, 2)
    predicted = Exchange(ModelConfig(**MODEL), 4, 2, "fp8", ("expert", "expert_in_node"))
    assert predicted.dispatch_row == ROW["dispatch"]
    copies = TOKENS * predicted.slow_copies
    for found in every:
        assert found["slow"]["dispatch"] == found["remote nodes"] * ROW["dispatch"]
        assert found["remote nodes"] == pytest.approx(copies, abs=4 * math.sqrt(copies))
        assert found["slow"]["dispatch"] < found["remote visits"] * ROW["dispatch"]
