"""Memory of one GPU of a deployment: its share of the weights, the cache of its sequences, and what else fits.

Tensor parallelism divides the cache of MHA and GQA by key-value heads. MLA has one latent for all heads, so every GPU
of a group holds the cache of the whole group: a price of tensor parallelism that data parallelism does not pay.

Worked example, DeepSeek-V3 in decode on 320 GPUs: one expert of 58 blocks is 2.6 GB, a quarter of attention's heads
2.6 GB, latents 0.9 GB, dense feed-forwards 1.2 GB, a quarter of embedding and head 0.9 GB, gates 0.4 GB: 8.6 GB.
A group of 4 has 4 * 64 sequences of 4096 tokens: 73.7 GB of cache on each GPU. Of the 64 sequences of a GPU 61 fit into
80 GB, or all of them with 3966 tokens each.

Left out: activations, buffers of exchanges, the runtime, fragments, and wkv_b's two halves in BF16 next to its FP8.

Source: DeepSeek-V3 report, section 3.4.
"""

from dataclasses import dataclass

from dsmini.planner.model.kv_cache import CachePlan, longest_context, memory_left, read_share, sequences_that_fit
from dsmini.planner.model.matrices import kv_heads
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.quantity import Bytes, Count, Tokens, smallest
from dsmini.planner.serving.step import Setting, gpu_weights, main_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingMemory(Figures):
    """Bytes that one GPU holds, and what fits."""

    data_parallel: Count
    """Groups of GPUs that have sequences of their own."""
    experts: Count
    """Experts in each MoE block that a GPU holds."""
    weights: Bytes
    cache: Bytes
    used: Bytes
    share: Count
    """Share of the GPU's memory that is used; above 1 it does not fit."""
    sequences: Count
    """Sequences of this length that a GPU can have with its group's; as many in all micro-batches."""
    context: Tokens
    """Longest context that the GPU's sequences can have."""


def serving_memory(setting: Setting, cache: CachePlan, sequences: Count, context: Tokens) -> ServingMemory:
    """Return the memory of a GPU that has this many sequences of its own in all micro-batches."""
    stage, source = setting.deployment.stage, "V3, section 3.4"
    experts = setting.deployment.gpu_experts(setting.model)
    held = gpu_weights(setting, main_blocks(setting), experts, setting.weights.latent_up)
    embedding = setting.weights.vocabulary.bytes / setting.deployment.tensor_parallel
    weights = (held + embedding).named(f"{stage}_gpu_weights", "Weights that a GPU holds", source)
    per_token = cache.per_token * cache_copies(setting)
    stored = (sequences * (context * per_token)).named(f"{stage}_gpu_cache", "Cache that a GPU holds", source)
    used = (weights + stored).named(f"{stage}_gpu_memory", "Weights and cache that a GPU holds", source)
    left = memory_left(setting.hardware.memory, weights)
    return ServingMemory(
        data_parallel=setting.deployment.data_parallel(),
        experts=experts,
        weights=weights,
        cache=stored,
        used=used,
        share=(used / setting.hardware.memory).named(f"{stage}_memory_share", "Share of memory used", source),
        sequences=sequences_that_fit(left, context, per_token).named(
            f"{stage}_sequences_that_fit", "Sequences that fit", source
        ),
        context=longest_context(left, sequences, per_token).named(
            f"{stage}_longest_context", "Longest context that fits", source
        ),
    )


def cache_copies(setting: Setting) -> Count:
    """Return how much cache a GPU holds and reads for each sequence of its own, 1 without tensor parallelism."""
    tp = setting.deployment.tensor_parallel
    if setting.model.config.is_mla:
        return tp
    return tp / smallest(tp, kv_heads(setting.model))


def cache_of(setting: Setting, cache: CachePlan, sequences: Count, context: Tokens) -> Bytes:
    """Return the bytes that attention reads on a GPU for this many sequences of its own."""
    whole, share = context * (cache.per_token * cache_copies(setting)), read_share(setting.model, cache, context)
    return sequences * (whole if share is None else whole * share)
