"""The placement of experts, and of redundant copies of the busiest, on GPUs: the load balancer of DeepSeek.

Some experts receive more tokens than others, and all GPUs wait for the one with the most. DeepSeek's load balancer
gives the busiest experts more than one copy, and spreads the copies over the GPUs. It has two policies.

Hierarchical, if the nodes divide the expert groups. A token goes to few groups, so a group stays whole on one node:
1. Pack groups into nodes, the same number in each.
2. In each node, give one more copy to the expert with the largest load per copy, until all places are taken.
3. In each node, pack the copies into GPUs, the same number in each.

Global, otherwise: steps 2 and 3 alone, with all experts and all GPUs in one node.

To pack is to take the heaviest item first, and put it into the lightest pack that has room.

Source: github.com/deepseek-ai/EPLB and the DeepSeek-V3 report, sections 3.4.1 and 3.4.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Real


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Copies of the experts of each layer over GPUs. Of n GPUs with R places, g holds g * R/n to (g+1) * R/n - 1."""

    experts: Int[np.ndarray, "layers replicas"]
    """Expert at each place."""
    replicas: Int[np.ndarray, "layers e most"]
    """Places of each expert, ascending, then -1 up to the largest number of copies."""
    counts: Int[np.ndarray, "layers e"]
    """Number of copies of each expert."""


def place_experts(
    loads: Real[np.ndarray, "layers e"],
    n_replicas: int,
    n_groups: int,
    n_nodes: int,
    n_gpus: int,
    *,
    spread: bool = False,
) -> Placement:
    """Place experts and redundant copies so that the loads of the GPUs are as equal as the published heuristic gets.

    Args:
        loads: tokens that each expert received. All ranks' tokens must be in it, not those of one rank.
        n_replicas: places of a layer, all GPUs together.
        n_nodes: where it does not divide n_groups, the policy is global, and nodes do not count.
        spread: exchange copies afterwards so that fewer GPUs have two copies of one expert, which are worth one. No
            exchange raises the largest load of a node. Off: as published.

    Raises: ValueError for sizes that do not divide, and for loads that are negative or not finite.
    """
    weights = _checked(loads, n_replicas, n_groups, n_nodes, n_gpus)
    if n_groups % n_nodes:  # the global policy
        n_groups = n_nodes = 1
    layers = [_place_layer(w, n_replicas // n_nodes, n_groups, n_nodes, n_gpus // n_nodes, spread) for w in weights]
    return _placement(np.array(layers).reshape(len(weights), n_replicas), weights.shape[1])


def count_duplicates(placement: Placement, n_gpus: int) -> Int[np.ndarray, " layers"]:
    """Count, for each layer, the copies that share their GPU with another copy of the same expert.

    Such a copy takes memory and no load off its GPU. The published heuristic makes some.
    """
    per_gpu = placement.experts.reshape(len(placement.experts), n_gpus, -1)
    return np.array([sum(len(g) - len(set(g)) for g in layer) for layer in per_gpu.tolist()], dtype=np.int64)


def _place_layer(loads: np.ndarray, n_places: int, n_groups: int, n_nodes: int, n_gpus: int, spread: bool) -> list[int]:
    """Return the expert at each place of a layer. Places and GPUs are those of one node."""
    groups = np.arange(len(loads)).reshape(n_groups, -1)
    placed: list[int] = []
    for node in _pack(loads[groups].sum(1), n_nodes):
        experts = groups[node].flatten()
        copies, counts = _replicate(loads[experts], n_places)
        share = loads[experts] / counts
        gpus = [[copies[i] for i in gpu] for gpu in _pack(share[copies], n_gpus)]
        if spread:
            _spread(gpus, share.tolist())
        placed += [int(experts[copy]) for gpu in gpus for copy in gpu]
    return placed


def _pack(weights: np.ndarray, n_packs: int) -> list[list[int]]:
    """Return the items of each pack, in the order of packing. Single items stay in their order."""
    room = len(weights) // n_packs
    if room == 1:
        return [[i] for i in range(n_packs)]
    packs: list[list[int]] = [[] for _ in range(n_packs)]
    sums = [0.0] * n_packs
    for item in np.argsort(-weights, kind="stable").tolist():
        lightest = min((p for p in range(n_packs) if len(packs[p]) < room), key=lambda p: sums[p])
        packs[lightest].append(item)
        sums[lightest] += float(weights[item])
    return packs


def _replicate(loads: np.ndarray, n_places: int) -> tuple[list[int], np.ndarray]:
    """Return the expert of each copy, one of every expert first, and the number of copies of each expert."""
    copies, counts = list(range(len(loads))), np.ones(len(loads), dtype=np.int64)
    for _ in range(n_places - len(loads)):
        copies.append(int(np.argmax(loads / counts)))
        counts[copies[-1]] += 1
    return copies, counts


def _spread(gpus: list[list[int]], share: Sequence[float]) -> None:
    """Exchange second copies of an expert on one GPU for copies of others, in place, within the largest load.

    Of all exchanges that remove such a copy, the one that leaves its two GPUs lightest is made first.
    """
    limit = max(sum(share[x] for x in gpu) for gpu in gpus)
    while True:
        sums = [sum(share[x] for x in gpu) for gpu in gpus]
        found: list[tuple[float, int, int, int, int]] = []
        for a, gpu in enumerate(gpus):
            for i in (i for i, x in enumerate(gpu) if x in gpu[:i]):
                for b, other in enumerate(gpus):
                    for j in (j for j, y in enumerate(other) if gpu[i] not in other and y not in gpu):
                        moved = share[gpu[i]] - share[other[j]]
                        found.append((max(sums[a] - moved, sums[b] + moved), a, i, b, j))
        largest, a, i, b, j = min(found, default=(math.inf, 0, 0, 0, 0))
        if largest > limit:
            return
        gpus[a][i], gpus[b][j] = gpus[b][j], gpus[a][i]


def _placement(experts: np.ndarray, n_experts: int) -> Placement:
    counts = np.array([np.bincount(row, minlength=n_experts) for row in experts]).reshape(-1, n_experts)
    replicas = np.full((len(experts), n_experts, counts.max(initial=0)), -1)
    for layer, row in enumerate(experts):
        for expert in range(n_experts):
            replicas[layer, expert, : counts[layer, expert]] = np.flatnonzero(row == expert)
    return Placement(experts=experts, replicas=replicas, counts=counts)


def _checked(loads: np.ndarray, n_replicas: int, n_groups: int, n_nodes: int, n_gpus: int) -> np.ndarray:
    """Return the loads as float64. Raises: ValueError for loads and sizes that allow no placement."""
    for name, value in (("n_groups", n_groups), ("n_nodes", n_nodes), ("n_gpus", n_gpus)):
        if value < 1:
            raise ValueError(f"{name}={value} is not positive; use 1 or more")
    weights = np.asarray(loads, dtype=np.float64)
    if weights.ndim != 2 or not weights.size:
        raise ValueError(f"loads of shape {list(weights.shape)} are not [layers, experts]; give one row for each layer")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("loads hold a negative or non-finite number; give the number of tokens of each expert")
    n_experts = weights.shape[1]
    if n_experts % n_groups:
        raise ValueError(f"n_groups={n_groups} does not divide {n_experts} experts; use the groups of the model's gate")
    if n_gpus % n_nodes:
        raise ValueError(f"n_nodes={n_nodes} does not divide n_gpus={n_gpus}; use nodes with equally many GPUs")
    fits = -(-max(n_experts, n_replicas) // n_gpus) * n_gpus
    if n_replicas < n_experts or n_replicas % n_gpus:
        raise ValueError(
            f"n_replicas={n_replicas} for {n_experts} experts on {n_gpus} GPUs is too few or not a multiple of the "
            f"GPUs; use {fits}, which is {fits - n_experts} redundant"
        )
    most = n_experts * (n_gpus if n_groups % n_nodes else n_gpus // n_nodes)
    if n_replicas > most:
        raise ValueError(f"n_replicas={n_replicas} is more than every expert on every GPU that may have it; use {most}")
    return weights


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuBalance:
    """Loads of all GPUs in each layer, with one copy of each expert in order, and as placed.

    A load is in units of the layer's mean over its GPUs. Each copy of an expert is taken to receive an equal share.
    """

    loads_before: Float[np.ndarray, "layers gpus"]
    loads_after: Float[np.ndarray, "layers gpus"]
    duplicates: Int[np.ndarray, " layers"]
    """Copies on a GPU that has another copy of the same expert."""

    @property
    def before(self) -> Float[np.ndarray, " layers"]:
        """Largest load over the mean, without balance. 1 is perfect; the time of a step grows with it."""
        return self.loads_before.max(1)

    @property
    def after(self) -> Float[np.ndarray, " layers"]:
        """Largest load over the mean, as placed."""
        return self.loads_after.max(1)


def balance(loads: Real[np.ndarray, "layers e"], placement: Placement, n_gpus: int) -> GpuBalance:
    """Return the loads of the GPUs before and after a placement.

    The loads may be others than those that the placement was made from, such as those of later steps. Before, where
    the GPUs do not divide the experts, the first GPUs have one expert more.
    """
    weights = np.asarray(loads, dtype=np.float64)
    if weights.shape != placement.counts.shape or n_gpus < 1 or placement.experts.shape[1] % n_gpus:
        raise ValueError(
            f"loads {list(weights.shape)} and n_gpus={n_gpus} do not fit a placement of {list(placement.counts.shape)} "
            f"experts at {placement.experts.shape[1]} places; give the sizes that it was made with"
        )
    before = np.stack([part.sum(1) for part in np.array_split(weights, n_gpus, axis=1)], axis=1)
    shares = np.take_along_axis(weights / placement.counts, placement.experts, axis=1)
    after = shares.reshape(len(weights), n_gpus, -1).sum(2)
    return GpuBalance(
        loads_before=_over_mean(before),
        loads_after=_over_mean(after),
        duplicates=count_duplicates(placement, n_gpus),
    )


def _over_mean(loads: np.ndarray) -> np.ndarray:
    """Return loads over their mean in each layer; a layer without any load counts as balanced."""
    mean = loads.mean(1, keepdims=True)
    return np.divide(loads, mean, out=np.ones_like(loads), where=mean > 0)
