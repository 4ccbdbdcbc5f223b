"""All-to-all of experts: rows of a token that cross links in a MoE layer, their bytes and their time.

    dispatch    the token's row to the GPUs of its k experts: FP8 with scales, else as the results
    combine     the results back, added up on the way: BF16, or FP32 where all products are

In two hops (training, prefill) a row crosses the slow link once for each other node that has a chosen expert, and
inside the node the fast link takes it to each GPU with one. In one hop (V3's decoding) every chosen expert gets a row
of its own. The links work at the same time, so the slower one counts.

To see what another network gives, change the links of a hardware file (machines.toml), or --vary slow_link=100e9; for
another topology, `copies` is the one place that says how many rows cross which link.

Worked example, DeepSeek-V3's training, 64 GPUs in 8 nodes, k = 8: chosen freely a token's experts are on 5.29 nodes;
with 4 of 8 groups allowed it reaches 3.97, 3.47 of them remote. A row is 7392 bytes in FP8 and 14,336 in BF16: 75 KB
a token, layer and pass over InfiniBand, which take 1.9 us at 40 GB/s. Of eight separate rows seven are remote: 152
KB.

Estimates: all experts are equally likely; latency is left out.

Source: DeepSeek-V3 report, sections 2.1.2, 3.2.2 and 3.4; INS, section 2.3.2.
"""

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmini.accounting.tensors import BLOCK, SIZES, ceiling, largest
from dsmini.config import ModelConfig
from dsmini.planner.figure import Sheet, call
from dsmini.planner.hardware import Hardware

TOKENS = 8192
"""Random tokens that are routed where groups are limited."""


@functools.cache
def places_hit(experts: int, chosen: int, groups: int, limited: int, best: int, places: float) -> float:
    """Return the mean number of equal places that hold a token's experts, all experts being equally likely.

    Free choices miss a place that has `here` experts with (1 - here / e) (1 - here / (e - 1)) ... of k factors. A limit
    on groups has no such formula, because groups are chosen by their best experts: there it is the mean over tokens
    with random scores that are routed by the gate's rule, within half a percent.

    8 of 256 experts on 8 places hit 5.29. Limited to 4 of 8 groups by the best two they hit 3.97, and on 4 places 3.12.
    """
    if limited == groups or places >= experts:
        every = max(experts, places)  # a place has an expert or more: redundant ones fill it
        missed = math.prod(max(0.0, 1 - every / places / (every - i)) for i in range(chosen))
        return places * (1 - missed)
    there = np.sort(_routed(experts, chosen, groups, limited, best) * places // experts, axis=1)
    return float(1 + (np.diff(there, axis=1) > 0).sum(axis=1).mean())


@functools.cache
def _routed(experts: int, chosen: int, groups: int, limited: int, best: int) -> npt.NDArray[np.int64]:
    """Return the experts of tokens with random scores: the best of the groups with the largest sum of best scores."""
    logits = np.random.default_rng(0).standard_normal((TOKENS, groups, experts // groups), dtype=np.float32)
    scores = 1 / (1 + np.exp(-logits))
    of_group = np.partition(scores, -best, axis=2)[:, :, -best:].sum(axis=2)
    least = np.partition(of_group, -limited, axis=1)[:, -limited, None]
    allowed = np.where((of_group >= least)[:, :, None], scores, -np.inf).reshape(TOKENS, experts)
    return np.argpartition(allowed, -chosen, axis=1)[:, -chosen:]


def exchange(s: Sheet, t: Sheet, c: ModelConfig, gpus: Any, dtype: str, one_hop: Any = None) -> None:
    """Name the bytes of a token in a MoE layer that cross the slow and the fast link, both ways.

    Args:
        s: sheet with the hardware's numbers.
        t: sheet for the figures, the same one or a stage's.
        gpus: GPUs that share the experts.
        dtype: of rows on their way to the experts, in FP8 codes with a scale for each tile.
        one_hop: experts of a token, each of which gets a row of its own, with shared ones that are reached like routed
            ones; None: two hops.
    """
    t.expert_nodes = largest(1.0, gpus / s.gpus_per_node)
    if one_hop is None:
        best = 2 if c.topk_method == "noaux_tc" else 1
        how = (c.n_routed_experts, c.n_activated_experts, c.n_expert_groups, c.n_limited_groups, best)
        t.nodes_reached = call("places_hit", places_hit, *how, t.expert_nodes)
        t.gpus_reached = call("places_hit", places_hit, *how, gpus)
        t.slow_copies = t.nodes_reached * (1 - 1 / t.expert_nodes)
        t.fast_copies = t.gpus_reached * (1 - 1 / np.minimum(gpus, s.gpus_per_node))
    else:
        t.slow_copies = one_hop * (1 - 1 / t.expert_nodes)
        t.fast_copies = one_hop * (1 / t.expert_nodes - 1 / gpus)
    sizes = {"float32": 4 * c.dim, "bfloat16": 2 * c.dim, "fp8": c.dim + 4 * ceiling(c.dim, BLOCK)}
    t.dispatch_row, t.combine_row = sizes[dtype], SIZES[dtype] * c.dim
    t.slow_row_bytes = t.slow_copies * (t.dispatch_row + t.combine_row)
    t.fast_row_bytes = t.fast_copies * (t.dispatch_row + t.combine_row)


def training_exchange(s: Sheet, c: ModelConfig, hardware: Hardware, dtype: str) -> None:
    """Name the traffic of a token among the GPUs that share experts in training, and its times.

    Args:
        dtype: of rows on their way to the experts.
    """
    exchange(s, s, c, s.expert, dtype)
    s.slow_row_seconds = s.slow_row_bytes / s.slow_link if hardware.networked else 0.0
    s.fast_row_seconds = s.fast_row_bytes / s.fast_link
    s.dispatch_seconds = np.maximum(s.slow_row_seconds, s.fast_row_seconds)
