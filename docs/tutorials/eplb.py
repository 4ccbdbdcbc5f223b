"""Place experts and redundant copies on GPUs by their loads, and measure their balance: DeepSeek's EPLB.

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

import numpy as np
from jaxtyping import Float, Int, Real

from dsmini.config.fields import require


def place_experts(
    loads: Real[np.ndarray, "layers e"], n_replicas: int, n_groups: int, n_nodes: int, n_gpus: int
) -> Int[np.ndarray, "layers replicas"]:
    """Place experts and redundant copies so that the loads of the GPUs are as equal as the published heuristic gets.

    Return the expert at each place. With n GPUs and R places, GPU g has places g * R/n to (g+1) * R/n - 1.

    Args:
        loads: tokens that each expert received. All ranks' tokens must be in it, not those of one rank.
        n_replicas: places of a layer, all GPUs together.
        n_nodes: where it does not divide n_groups, the policy is global, and nodes do not count.

    Raises: ValueError for sizes that do not divide, and for loads that are negative or not finite.
    """
    weights = np.asarray(loads, dtype=np.float64)
    table = weights.ndim == 2 and weights.size > 0
    require(table, f"loads of shape {list(weights.shape)} are not [layers, experts]; give one row for each layer")
    good = bool((np.isfinite(weights) & (weights >= 0)).all())
    require(good, "loads hold a negative or non-finite number; give the number of tokens of each expert")
    e = weights.shape[1]
    require(e % n_groups == 0, f"n_groups={n_groups} does not divide {e} experts; use the groups of the model's gate")
    whole = n_gpus % n_nodes == 0
    require(whole, f"n_nodes={n_nodes} does not divide n_gpus={n_gpus}; use nodes with equally many GPUs")
    fits = -(-max(e, n_replicas) // n_gpus) * n_gpus
    require(
        n_replicas >= e and n_replicas % n_gpus == 0,
        f"n_replicas={n_replicas} for {e} experts on {n_gpus} GPUs is too few or not a multiple of the GPUs; use "
        f"{fits}, which is {fits - e} redundant",
    )
    if n_groups % n_nodes:  # the global policy
        n_groups = n_nodes = 1
    most = e * (n_gpus // n_nodes)
    too_many = f"n_replicas={n_replicas} is more than every expert on every GPU that may have it; use {most}"
    require(n_replicas <= most, too_many)
    return np.array([_place_layer(w, n_replicas // n_nodes, n_groups, n_nodes, n_gpus // n_nodes) for w in weights])


def _place_layer(loads: np.ndarray, n_places: int, n_groups: int, n_nodes: int, n_gpus: int) -> list[int]:
    """Return the expert at each place of a layer. Places and GPUs are those of one node."""
    groups = np.arange(len(loads)).reshape(n_groups, -1)
    placed: list[int] = []
    for node in _pack(loads[groups].sum(1), n_nodes):
        experts = groups[node].flatten()
        copies, counts = list(range(len(experts))), np.ones(len(experts), dtype=np.int64)
        while len(copies) < n_places:
            copies.append(int(np.argmax(loads[experts] / counts)))
            counts[copies[-1]] += 1
        for gpu in _pack((loads[experts] / counts)[copies], n_gpus):
            placed += [int(experts[copies[i]]) for i in gpu]
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


def copies_of(experts: Int[np.ndarray, "layers replicas"], n_experts: int) -> Int[np.ndarray, "layers e"]:
    """Return the number of copies of each expert in a placement."""
    return np.array([np.bincount(row, minlength=n_experts) for row in experts])


def balance(
    loads: Real[np.ndarray, "layers e"], experts: Int[np.ndarray, "layers replicas"], n_gpus: int
) -> Float[np.ndarray, " layers"]:
    """Return the largest load of a GPU over the mean in each layer. 1 is perfect; the time of a step grows with it.

    Each copy of an expert is taken to receive an equal share. Without copies, and with experts in the order of their
    numbers, `experts` is np.arange(e) in each layer. The loads may be others than those that the placement was made
    from, such as those of later steps.
    """
    weights = np.asarray(loads, dtype=np.float64)
    shares = np.take_along_axis(weights / copies_of(experts, weights.shape[1]), experts, axis=1)
    of_gpus = shares.reshape(len(weights), n_gpus, -1).sum(2)
    mean = of_gpus.mean(1)
    # a layer without any load counts as balanced
    return np.divide(of_gpus.max(1), mean, out=np.ones_like(mean), where=mean > 0)
