"""Time of one step of a GPU that serves: weights and cache it reads, operations it makes, bytes it sends.

    memory     (weights read + cache read) / memory bandwidth
    compute    FLOPs in the weights' dtype / its peak + the other FLOPs / their peak
    links      bytes sent / the link's bandwidth, each link for itself

The step takes as long as the slowest of these when all overlap, which two micro-batches are for, and their sum when
nothing does. Both are lower bounds: no kernel reaches a peak, and launches, norms and sampling are left out.

A step reads an expert if any token chose it. With e experts, k of them a token, and n tokens, e (1 - (1 - k/e)^n) are
chosen: DeepSeek-V3 with 1, 32 and 256 tokens reads 8, 163 and 256 experts. Every micro-batch reads its weights again.

Worked example, DeepSeek-V3 in FP8 on one GPU of 3.35 TB/s, 256 sequences of 4096 tokens, one micro-batch: weights of
672 GB take 200.7 ms, a BF16 cache of 73.7 GB 22.0 ms. 17.7 TFLOP of FP8 matrices take 8.9 ms, 18.9 TFLOP of attention
and head 19.1 ms. Memory binds, 7.9 times compute. (No GPU holds that much; this is what expert parallelism is for.)
"""

from dataclasses import dataclass

from dsmini.planner.binding import Binding, Demand, Resource, binding
from dsmini.planner.hardware import Hardware
from dsmini.planner.model.sparse_context import is_sparse
from dsmini.planner.model.weights import Part, Weights
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import FLOPS, Bytes, Count, Flops, Seconds, largest, power, total
from dsmini.planner.serving.deployment import Deployment
from dsmini.planner.serving.exchange import ONE, Exchange, exchange, fast_link, slow_link


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Model on hardware in a deployment."""

    model: ModelInputs
    hardware: Hardware
    deployment: Deployment
    weights: Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Blocks that a step runs, followed by the head."""

    layers: Count
    dense: Count
    moe: Count
    ends: Part
    """Norms outside of the blocks, or MTP's projection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """Work of a GPU in one micro-batch."""

    rows: Count
    """Tokens that pass the blocks."""
    logits: Count
    """Tokens that the head is asked for."""
    pairs: Count
    """Multiply-adds of attention over the context in one block."""
    cache: Bytes | None
    """Cache that attention reads in all blocks; None for prompts, whose keys are fresh."""
    up: Part
    """Form in which wkv_b is applied: `latent_up`, or `absorbed`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes(Figures):
    """Times of a step, and what they are computed from."""

    experts_read: Count
    """Experts in each block that a GPU reads, of those that it holds."""
    weights_read: Bytes
    cache_read: Bytes | None
    matrix_flops: Flops
    """Operations in the dtype of the weights."""
    other_flops: Flops
    """Operations of attention over the context, gates and head, in BF16 or FP32."""
    exchange: Exchange
    weights_time: Seconds
    cache_time: Seconds | None
    memory_time: Seconds
    compute_time: Seconds
    slow_time: Seconds | None
    """Time on the link between nodes."""
    fast_time: Seconds | None
    """Time on the link within a node."""
    step: Seconds
    """Slowest of memory, compute and links: everything overlaps."""
    in_turn: Seconds
    """Sum of memory, compute and links: nothing overlaps."""
    binding: Binding


def main_blocks(setting: Setting) -> Blocks:
    """Return all blocks of the model without multi-token prediction."""
    held = setting.weights
    return Blocks(layers=setting.model.n_layers, dense=held.dense_blocks, moe=held.moe_blocks, ends=held.final_norms)


def gpu_weights(setting: Setting, blocks: Blocks, experts: Count, up: Part) -> Bytes:
    """Return the bytes of these blocks and the head on one GPU, with this many routed experts in each MoE block."""
    held, tp = setting.weights, setting.deployment.tensor_parallel
    attention = (held.head_matrices.bytes + up.bytes) / tp + held.latent_down.bytes + held.norms.bytes
    moe = experts * held.expert.bytes + held.gate.bytes
    moe = moe if setting.deployment.shared_remote else moe + held.shared.bytes
    outside = held.vocabulary.bytes / tp + blocks.ends.bytes
    return blocks.layers * attention + blocks.dense * held.dense.bytes + blocks.moe * moe + outside


def step_times(setting: Setting, blocks: Blocks, work: StepWork, stage: str) -> StepTimes:
    """Return the times of a step.

    Args:
        stage: prefix of the figures' names.

    Raises: ValueError for hardware without units for the weights' dtype, or without a link that is needed.
    """
    hardware, parts = setting.hardware, setting.deployment.micro_batches
    chosen = _chosen(setting, work.rows, stage)
    read = parts * gpu_weights(setting, blocks, chosen, work.up)
    read = read.named(f"{stage}_weights_read", "Weights that a GPU reads in a step", "every chosen matrix once")
    cache = work.cache and (parts * work.cache).named(
        f"{stage}_cache_read", "Cache that a GPU reads in a step", "every row of its sequences once"
    )
    matrix, other = _flops(setting, blocks, work, stage)
    sent = exchange(
        setting.model,
        hardware,
        setting.deployment,
        stage=stage,
        layers=blocks.layers,
        moe_blocks=blocks.moe,
        rows=work.rows,
    )

    def named(seconds: Seconds, name: str, title: str) -> Seconds:
        return seconds.named(f"{stage}_{name}", title, "amount over rate: a lower bound")

    weights_time = named(read / hardware.memory_bandwidth, "weights_time", "Time to read the weights of a step")
    cache_time = cache and named(cache / hardware.memory_bandwidth, "cache_time", "Time to read the cache of a step")
    memory = total([weights_time, *([cache_time] if cache_time else [])])
    compute = matrix / hardware.peak(setting.deployment.weight_dtype) + other / hardware.peak(_compute(setting))
    memory_time = named(memory, "memory_time", "Time of a step in memory traffic")
    compute_time = named(compute, "compute_time", "Time of a step in matrix products")
    slow = sent.slow and named(sent.slow / slow_link(hardware), "slow_link_time", "Time of a step between nodes")
    fast = sent.fast and named(sent.fast / fast_link(hardware), "fast_link_time", "Time of a step within a node")
    demands = _demands(memory_time, compute_time, slow, fast)
    return StepTimes(
        experts_read=chosen,
        weights_read=read,
        cache_read=cache,
        matrix_flops=matrix,
        other_flops=other,
        exchange=sent,
        weights_time=weights_time,
        cache_time=cache_time,
        memory_time=memory_time,
        compute_time=compute_time,
        slow_time=slow,
        fast_time=fast,
        step=named(largest(*(d.time for d in demands)), "step_time", "Time of a step whose parts all overlap"),
        in_turn=named(
            total(d.time for d in demands), "step_in_turn", "Time of a step whose parts run one after the other"
        ),
        binding=binding(demands, f"{stage}_"),
    )


def _demands(memory: Seconds, compute: Seconds, slow: Seconds | None, fast: Seconds | None) -> list[Demand]:
    resources = (Resource.MEMORY, Resource.COMPUTE, Resource.LINKS_BETWEEN, Resource.LINKS_WITHIN)
    times = zip(resources, (memory, compute, slow, fast), strict=True)
    return [Demand(resource=resource, time=time) for resource, time in times if time is not None]


def _chosen(setting: Setting, rows: Count, stage: str) -> Count:
    """Return the expected number of its experts in a block that a GPU reads: those that any token chose."""
    model, deployment = setting.model, setting.deployment
    missed = power(ONE - model.n_activated_experts / model.n_routed_experts, rows * deployment.expert_parallel)
    return (deployment.gpu_experts(model) * (ONE - missed)).named(
        f"{stage}_experts_read", "Experts in each block that a GPU reads in a micro-batch", "even routing"
    )


def _flops(setting: Setting, blocks: Blocks, work: StepWork, stage: str) -> tuple[Flops, Flops]:
    """Return the operations of a GPU in a step: in the weights' dtype, and in the compute dtype."""
    model, held, deployment = setting.model, setting.weights, setting.deployment
    experts = model.n_activated_experts * deployment.imbalance * held.expert.products + held.shared.products
    attention = held.head_matrices.products + held.latent_down.products
    absorbed = work.up is held.absorbed
    attention = attention if absorbed else attention + work.up.products
    matrices = blocks.layers * attention + blocks.dense * held.dense.products + blocks.moe * experts
    others = blocks.moe * held.gate.products + blocks.ends.products
    others = others + blocks.layers * work.up.products if absorbed else others
    others = others + blocks.layers * held.norms.products if is_sparse(model) else others
    over = blocks.layers * work.pairs + work.logits * held.vocabulary.products
    twice = FLOPS(2) * deployment.micro_batches
    return (
        (twice * (work.rows * matrices)).named(
            f"{stage}_matrix_flops", "Operations of a GPU in a step in the weights' dtype", "2 a multiply-add"
        ),
        (twice * (work.rows * others + over)).named(
            f"{stage}_other_flops", "Operations of a GPU in a step on attention, gates and head", "2 a multiply-add"
        ),
    )


def _compute(setting: Setting) -> str:
    """Return the dtype of products that are never FP8."""
    return "float32" if setting.deployment.weight_dtype == "float32" else "bfloat16"
