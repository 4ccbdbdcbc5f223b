"""Choice of the deployments that a user leaves open: how many GPUs decode and read prompts together.

A model with DeepSeek-V3's sizes takes the deployments of its report if they fit, else the fewest GPUs whose memory
holds weights and cache: with experts 1, 2, 4, 8 ... GPUs that divide them, and if none hold it, GPUs that also share
attention; without experts GPUs of a node that divide its matrices. Redundant experts make the experts divide.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dsmini.accounting.kv_cache import CacheDtype
from dsmini.accounting.memory import WeightDtype
from dsmini.planner.hardware import Hardware
from dsmini.planner.model.references import is_v3
from dsmini.planner.quantities.display import rounded, shown
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.serving.decoding import decode_plan
from dsmini.planner.serving.deployment import Deployment, ServingWorkload, deployment, v3_decode, v3_prefill
from dsmini.planner.serving.memory import ServingMemory
from dsmini.planner.serving.prefill import prefill_plan
from dsmini.report.units import plural

Stage = Literal["decode", "prefill"]
NODES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenDeployment:
    """A deployment, and how it was chosen, in words."""

    deployment: Deployment
    how: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """All that a deployment is chosen for."""

    m: ModelInputs
    hardware: Hardware
    workload: ServingWorkload
    weight_dtype: WeightDtype
    cache_dtype: CacheDtype


def choose_deployment(
    serving: Serving, stage: Stage, gpus: int | None, tensor: int | None, redundant: int | None
) -> ChosenDeployment:
    """Return the deployment with the given numbers, and what is best for the others.

    Raises: ValueError for a deployment that does not divide the model or that the hardware has no links or units for.
    """
    linked = serving.hardware.slow_link is not None and serving.hardware.fast_link is not None
    if is_v3(serving.m) and linked and gpus is None and tensor is None and redundant is None:
        published = v3_decode() if stage == "decode" else v3_prefill()
        published = in_dtypes(published, serving.weight_dtype, serving.cache_dtype)
        if _fits(serving, stage, published):
            return ChosenDeployment(deployment=published, how="as DeepSeek-V3 is served")
    if gpus is not None:
        return ChosenDeployment(deployment=_made(serving, stage, gpus, tensor or 1, redundant), how="as chosen")
    counts = list(_counts(serving, tensor))
    if not counts:
        raise ValueError(_cannot_share(serving, stage, tensor))
    slots = serving.m.config.n_routed_experts + (redundant or 0)
    divide = [(count, shared) for count, shared in counts if redundant is None or slots % count == 0]
    tried: list[Deployment] = []
    for count, shared in divide:
        tried.append(_made(serving, stage, count, shared, redundant))
        if _fits(serving, stage, tried[-1]):
            return ChosenDeployment(deployment=tried[-1], how="the fewest GPUs that hold weights and cache")
    if not tried or divide != counts:
        raise ValueError(
            f"{stage}_redundant={redundant} makes {slots} experts of a layer, which no number of GPUs that holds the "
            f"model divides; leave it out, or name {stage}_gpus too"
        )
    memory = [_memory(serving, stage, made) for made in tried]
    best = max(range(len(tried)), key=lambda i: (memory[i].sequences.value, -memory[i].share.value))
    return ChosenDeployment(deployment=tried[best], how="what has memory for most sequences, since none fits")


def _cannot_share(serving: Serving, stage: Stage, tensor: int | None) -> str:
    """Return why this many GPUs cannot share the heads, and how many can."""
    hardware, heads = serving.hardware, serving.m.config.n_heads
    node = round(hardware.gpus_per_node.value) if hardware.fast_link is not None else 1
    why = f"does not divide n_heads={heads}" if tensor and heads % tensor else f"has no node of {node} GPUs to be in"
    possible = ", ".join(str(n) for n in range(1, node + 1) if any(_counts(serving, n)))
    return f"{stage}_tensor={tensor} {why}; use {possible}"


def in_dtypes(made: Deployment, weight_dtype: WeightDtype, cache_dtype: CacheDtype) -> Deployment:
    """Return a deployment in other dtypes; tokens go to experts in that of the weights."""
    return deployment(
        made.stage,
        tensor_parallel=round(made.tensor_parallel.value),
        expert_parallel=round(made.expert_parallel.value),
        redundant_experts=round(made.redundant_experts.value),
        micro_batches=round(made.micro_batches.value),
        imbalance=made.imbalance.value,
        shared_remote=made.shared_remote,
        two_hop=made.two_hop,
        weight_dtype=weight_dtype,
        cache_dtype=cache_dtype,
        source=made.expert_parallel.source,
    )


def _made(serving: Serving, stage: Stage, gpus: int, tensor: int, redundant: int | None) -> Deployment:
    return deployment(
        stage,
        tensor_parallel=tensor,
        expert_parallel=gpus,
        redundant_experts=-serving.m.config.n_routed_experts % gpus if redundant is None else redundant,
        micro_batches=1 if gpus == 1 else 2,
        two_hop=stage == "prefill",
        weight_dtype=serving.weight_dtype,
        cache_dtype=serving.cache_dtype,
    )


def _counts(serving: Serving, tensor: int | None) -> Iterator[tuple[int, int]]:
    """Yield numbers of GPUs to try, and how many of them share heads."""
    hardware, config = serving.hardware, serving.m.config
    node, moe = round(hardware.gpus_per_node.value), config.n_dense_layers < config.n_layers
    most = node if hardware.fast_link is not None else 1
    if moe and most > 1 and hardware.slow_link is not None:
        most = max(node, config.n_routed_experts)
    few = [2**i for i in range(node.bit_length()) if 2**i < node] + [node]
    for width in [tensor] if tensor else few if moe else [None]:
        for count in (*few[:-1], *(node * nodes for nodes in NODES)):
            shared = width or count
            divides = count % shared == 0 and shared <= node and config.n_heads % shared == 0
            if count <= most and divides:
                yield count, shared


def misfit(serving: Serving, stage: Stage, made: Deployment) -> str:
    """Return one sentence for a deployment that does not hold weights and cache, with what would; "" if it does."""
    memory, tensor = _memory(serving, stage, made), round(made.tensor_parallel.value)
    if memory.share.value <= 1:
        return ""
    gpus, fixes = round(made.expert_parallel.value), list[str]()
    if stage == "decode" and (fit := int(memory.sequences.value / made.micro_batches.value)):
        fixes.append(f"use sequences={fit}")
    elif memory.context.value >= 1:
        fixes.append(f"use {'context' if stage == 'decode' else 'prompt'}={memory.context.value:.0f}")
    for count, shared in _counts(serving, None if tensor == 1 else tensor):
        if count > gpus and _fits(serving, stage, _made(serving, stage, count, shared, None)):
            fixes.append(f"use {stage}_gpus={count}" + (f" and {stage}_tensor={shared}" if shared != tensor else ""))
            break
    return (
        f"{stage} on {plural(gpus, 'GPU')} does not fit: weights and cache take {shown(memory.used)} of "
        f"{rounded(serving.hardware.memory)}; {' or '.join(fixes) or 'use hardware with more memory'}"
    )


def _fits(serving: Serving, stage: Stage, made: Deployment) -> bool:
    return _memory(serving, stage, made).share.value <= 1


def _memory(serving: Serving, stage: Stage, made: Deployment) -> ServingMemory:
    plan = decode_plan if stage == "decode" else prefill_plan
    return plan(serving.m, serving.hardware, serving.workload, made).memory
