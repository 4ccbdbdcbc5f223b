"""Serving: memory of a GPU of a deployment, the time of its step, and what drafts gain.

A step reads the weights that its tokens meet, reads the cache of its sequences, computes, and exchanges rows of
experts:

    memory     (weights read + cache read) / memory bandwidth
    compute    FLOPs in the weights' dtype / its peak + the other FLOPs / their peak
    links      bytes sent / the link's bandwidth, each link for itself

It takes as long as the slowest of these when all overlap, which two micro-batches are for, and their sum when nothing
does. Both are lower bounds: no kernel reaches a peak, and launches, norms and sampling are left out.

Tensor parallelism divides what belongs to attention's heads, and the vocabulary, within a group of GPUs that share
their sequences. MLA has one latent for all heads, so every GPU of a group holds and reads the cache of the whole
group. Each makes the latents of its own tokens, gathers those of the others over the fast link, and scatters sums.
Expert parallelism gives each GPU some routed experts; redundant ones are copies. The rest is whole on every GPU.

    decode     each sequence brings one token; MLA is absorbed; two micro-batches read the weights twice
    prefill    a prompt passes at once, half of the square of queries and keys; the head reads the last token
    drafts     1 + p + p^2 + ... + p^d tokens a step; d drafts, each a block and the head, and a step that verifies them

Worked example, DeepSeek-V3 on 320 H800, two micro-batches of 30 sequences a GPU, context 4096: weights of 8.6 GB,
with a cache of 4 * 60 sequences 77.7 GB. A step reads 16.9 GB of weights and 69.1 GB of cache in 25.7 ms, and sends
0.66 GB to other nodes, 16.6 ms at 40 GB/s. Memory binds, 1.55 times.

Left out: activations, buffers of exchanges, the runtime, and in prefill the write of the cache.

Source: DeepSeek-V3 report, sections 3.4 and 5.4.3; INS, section 2.3.2; Leviathan et al., arXiv 2211.17192 (drafts).
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from dsmini.accounting.kv_cache import CacheDtype
from dsmini.accounting.tensors import WeightDtype, divisors, key_width, largest, smallest, total
from dsmini.accounting.traffic import expected_experts
from dsmini.config import ModelConfig
from dsmini.planner.exchange import exchange
from dsmini.planner.figure import Sheet
from dsmini.planner.hardware import Hardware
from dsmini.planner.model import context_products, keys_met, mean_keys
from dsmini.reading import listed

Stage = Literal["decode", "prefill"]
STAGES: tuple[Stage, ...] = ("decode", "prefill")
SIZES = ("gpus", "tensor", "redundant")
"""Sizes of a deployment."""
RESOURCES = {
    "memory_time": "memory traffic",
    "compute_time": "compute",
    "slow_link_time": "links between nodes",
    "fast_link_time": "links within a node",
}
"""Times that overlap in a step, with the words of a verdict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """GPUs that serve one copy of a model."""

    stage: Stage
    gpus: int
    """GPUs that divide the routed experts: all of the deployment."""
    tensor: int
    """GPUs that divide attention's heads and share their sequences."""
    redundant: int
    """Copies of experts beyond one of each; in V3's decoding also places of shared experts."""
    micro_batches: int
    """Parts of a step's batch, of which one communicates while another computes."""
    shared_remote: bool = False
    """Shared experts are reached like routed ones, instead of being on every GPU."""
    two_hop: bool = False
    """A token is sent to each chosen node once, and within it to each chosen GPU once; else once for each expert."""
    weight_dtype: WeightDtype
    cache_dtype: CacheDtype


def deployment_rules(d: Deployment, c: ModelConfig, hardware: Hardware) -> Iterator[tuple[bool, Callable[[], str]]]:
    """Yield what a deployment must meet, and the sentence for one that does not."""
    slots, node, title = c.n_routed_experts + d.redundant, hardware.gpus_per_node, hardware.title
    of, use = f"{d.stage}_tensor={d.tensor}", listed([str(n) for n in divisors(c.n_heads, hardware.node)])
    yield d.gpus % d.tensor == 0, lambda: f"{of} does not divide {d.stage}_gpus={d.gpus}; use a divisor of it"
    yield d.tensor <= node, lambda: f"{of} is more than the GPUs of a node; use one of {use}"
    yield c.n_heads % d.tensor == 0, lambda: f"{of} does not divide n_heads={c.n_heads}; use one of {use}"
    yield (
        slots % d.gpus == 0,
        lambda: (
            f"{slots} experts, redundant ones included, do not divide by {d.gpus} GPUs; "
            f"add {-slots % d.gpus} redundant ones"
        ),
    )
    one_node = hardware.networked or d.gpus <= node
    yield one_node, lambda: f"{title} has no slow link, want one for several nodes; plan one node"
    linked = hardware.linked or d.gpus == 1
    yield linked, lambda: f"{title} has no fast link, want one for several GPUs in a node; plan one GPU"
    absorbed = not (c.is_mla and c.qk_norm and d.stage == "decode")
    yield absorbed, lambda: "qk_norm=True has no absorbed form, which decoding is planned in; use qk_norm=False"


class Work(NamedTuple):
    """Work of a GPU in one micro-batch."""

    layers: Any
    """Blocks that it runs, and those of them that are dense and have experts."""
    dense: Any
    moe: Any
    end_bytes: Any
    """Weights that go with these blocks and the head; and multiply-adds of a token with them."""
    end_products: Any = 0
    rows: Any = 0
    """Tokens that pass the blocks."""
    logits: Any = 0
    """Tokens that the head is asked for."""
    pairs: Any = 0
    """Multiply-adds of attention over the context in one block, all tokens."""
    cache: Any = 0
    """Cache that attention reads; 0 for prompts, whose keys are fresh."""
    absorbed: bool = False
    """wkv_b is applied as two halves in the compute dtype."""


def deployment_figures(s: Sheet, c: ModelConfig, d: Deployment, source: str) -> Sheet:
    """Name the sizes and the memory of a deployment; return its part of the sheet.

    Args:
        s: sheet with weights, cache, hardware and as inputs sequences, context and prompt.
    """
    t = s.each(f"{d.stage}_{{}}")
    t.put("tensor_parallel", d.tensor, source)
    t.put("expert_parallel", d.gpus, source)
    t.put("redundant_experts", d.redundant, source)
    t.put("micro_batches", d.micro_batches, source)
    t.data_parallel = t.expert_parallel / t.tensor_parallel
    t.gpu_experts = (c.n_routed_experts + t.redundant_experts) / t.expert_parallel
    t.gpu_weights = (
        _weights(s, t, d, _main(s, c), t.gpu_experts, s.latent_up_bytes) + s.vocabulary_bytes / t.tensor_parallel
    )
    group = t.tensor_parallel if c.is_mla else t.tensor_parallel / smallest(t.tensor_parallel, c.kv_heads)
    t.sequence_cache = s.kv_cache * group
    mine = t.micro_batches * (s.sequences if d.stage == "decode" else 1)
    if d.stage == "decode":
        s.decode_sequences = mine
    tokens = s.context if d.stage == "decode" else s.prompt
    t.gpu_cache = mine * (tokens * t.sequence_cache)
    t.gpu_memory = t.gpu_weights + t.gpu_cache
    t.memory_share = t.gpu_memory / s.gpu_memory
    left = largest(s.gpu_memory - t.gpu_weights, 0)
    t.sequences_that_fit = np.floor(left / (tokens * t.sequence_cache))
    t.longest_context = np.floor(left / (mine * t.sequence_cache))
    return t


def _main(s: Sheet, c: ModelConfig) -> Work:
    """Return all blocks of the model without multi-token prediction."""
    return Work(layers=c.n_layers, dense=s.dense_layers, moe=s.moe_layers, end_bytes=s.final_norms_bytes)


def _weights(s: Sheet, t: Sheet, d: Deployment, blocks: Work, experts: Any, up: Any) -> Any:
    """Return the bytes of these blocks and the head on one GPU, with this many routed experts in each MoE block."""
    attention = (s.head_matrices_bytes + up) / t.tensor_parallel + s.latent_down_bytes + s.block_norms_bytes
    moe = experts * s.expert_bytes + s.gate_bytes + (0 if d.shared_remote else s.shared_experts_bytes)
    outside = s.vocabulary_bytes / t.tensor_parallel + blocks.end_bytes
    return blocks.layers * attention + blocks.dense * s.dense_ffn_bytes + blocks.moe * moe + outside


def serving_figures(s: Sheet, c: ModelConfig, hardware: Hardware, decode: Deployment, prefill: Deployment) -> None:
    """Name the time of decoding, of prompts, and of drafts where the sheet has some; deployments are there already."""
    d, p = s.each("decode_{}"), s.each("prefill_{}")
    _exchange(s, d, c, decode)
    _step(s, d, d, c, hardware, decode, _decode_work(s, c, d, _main(s, c)))
    s.decode_time_per_token = d.step_time
    s.decode_tokens_per_second = 1 / d.step_time
    s.decode_gpu_tokens_per_second = s.decode_sequences / d.step_time
    pairs = mean_keys(c, s.prompt) * (c.n_heads * (key_width(c) + c.v_head_dim))
    if c.attention == "dsa":
        pairs = pairs + s.prompt / 2 * _scores(c)
    _exchange(s, p, c, prefill)
    _step(s, p, p, c, hardware, prefill, _main(s, c)._replace(rows=s.prompt, logits=1, pairs=s.prompt * pairs))
    s.prefill_time_to_first_token = p.step_time
    s.prefill_gpu_tokens_per_second = p.micro_batches * s.prompt / p.step_time
    if s.get("gpu_price") is not None:
        s.decode_cost = s.gpu_price / s.decode_gpu_tokens_per_second
        s.prefill_cost = s.gpu_price / s.prefill_gpu_tokens_per_second
    if s.get("drafts") is not None:
        _drafts(s, c, hardware, decode)


def _drafts(s: Sheet, c: ModelConfig, hardware: Hardware, d: Deployment) -> None:
    """Name what drafts gain. A draft runs its block over one token of each sequence; rejecting takes no time."""
    decode, verify, draft = s.each("decode_{}"), s.each("verify_{}"), s.each("draft_{}")
    _step(s, verify, decode, c, hardware, d, _decode_work(s, c, decode, _main(s, c), s.drafts + 1))
    moe = 1 if c.n_dense_layers <= c.n_layers else 0
    block = Work(
        layers=1, dense=1 - moe, moe=moe, end_bytes=s.mtp_projection_bytes, end_products=s.mtp_projection_layer
    )
    _step(s, draft, decode, c, hardware, d, _decode_work(s, c, decode, block))
    s.tokens_per_step = accepted_tokens(s.acceptance, s.drafts)
    s.speculative_step = verify.step_time + s.drafts * draft.step_time
    s.speculation_gain = s.tokens_per_step * (decode.step_time / s.speculative_step)
    s.speculative_tokens_per_second = s.tokens_per_step / s.speculative_step


def accepted_tokens(acceptance: Any, drafts: Any) -> Any:
    """Return the expected number of tokens that a step gives, the model's own one included."""
    return (1 - acceptance ** (drafts + 1)) / (1 - acceptance)


def _decode_work(s: Sheet, c: ModelConfig, decode: Sheet, blocks: Work, positions: Any = 1) -> Work:
    """Return the work of a micro-batch whose sequences each bring this many tokens: 1, or drafts to verify.

    The tokens of a sequence share one read of its cache.
    """
    rows, met = s.sequences * positions, keys_met(c, s.context)
    pairs = met * context_products(c)
    row = decode.sequence_cache if blocks.layers is c.n_layers else decode.sequence_cache / c.n_layers * blocks.layers
    if c.attention == "dsa":  # an indexer's keys are read whole, and of attention's rows those that it picked
        pairs = pairs + s.context * _scores(c)
        row = row * ((s.index_row + (s.cache_row - s.index_row) * met / s.context) / s.cache_row)
    cache = s.sequences * (s.context * row)
    return blocks._replace(rows=rows, logits=rows, pairs=rows * pairs, cache=cache, absorbed=c.is_mla)


def _scores(c: Any) -> Any:
    """Return the multiply-adds of an indexer's query with one key, all heads."""
    return c.index_n_heads * c.index_head_dim


def _exchange(s: Sheet, t: Sheet, c: ModelConfig, d: Deployment) -> None:
    """Name the rows of experts of a deployment on more than one GPU."""
    if d.gpus > 1:
        chosen = None if d.two_hop else c.n_activated_experts + (c.n_shared_experts if d.shared_remote else 0)
        both = exchange(s, t, c, t.expert_parallel, d.weight_dtype, one_hop=chosen)
        t.slow_row_bytes = t.slow_copies * both
        t.fast_row_bytes = t.fast_copies * both


def _step(s: Sheet, t: Sheet, of: Sheet, c: ModelConfig, hardware: Hardware, d: Deployment, work: Work) -> None:
    """Name the times of a step, and what they are computed from.

    Args:
        t: sheet for the step's figures.
        of: sheet with the deployment's sizes and rows of experts: decode's for drafts too.

    Raises: ValueError for hardware without units for the weights' dtype.
    """
    parts = of.micro_batches
    t.rows = work.rows
    share = expected_experts(c, t.rows * of.expert_parallel) / c.n_routed_experts
    t.experts_read = of.gpu_experts * share
    up = s.absorbed_bytes if work.absorbed else s.latent_up_bytes
    t.weights_read = parts * _weights(s, of, d, work, t.experts_read, up)
    t.weights_time = t.weights_read / s.memory_bandwidth
    if work.cache:
        t.cache_read = parts * work.cache
        t.cache_time = t.cache_read / s.memory_bandwidth
    t.memory_time = t.weights_time + t.or_zero("cache_time")
    _flops(s, t, c, work, parts)
    other = "float32" if d.weight_dtype == "float32" else "bfloat16"
    t.compute_time = t.matrix_flops / hardware.peak(s, d.weight_dtype) + t.other_flops / hardware.peak(s, other)
    sent = parts * t.rows * work.moe
    if d.gpus > hardware.value("gpus_per_node"):
        t.slow_bytes = sent * of.slow_row_bytes
        t.slow_link_time = t.slow_bytes / s.slow_link
    fast = [sent * of.fast_row_bytes] if d.gpus > 1 else []
    if d.tensor > 1:
        gathered = c.dim if not c.is_mla or c.q_lora_rank is None else c.q_lora_rank
        gathered = gathered + (c.kv_lora_rank + c.qk_rope_head_dim if c.is_mla else 0)
        fast.append(parts * t.rows * work.layers * (2 * (gathered + c.dim)) * (of.tensor_parallel - 1))
    if fast:
        t.fast_bytes = total(fast)
        t.fast_link_time = t.fast_bytes / s.fast_link
    times = list(demands(t).values())
    first, second, *_ = sorted(times, key=float, reverse=True)
    t.step_time = functools.reduce(largest, times)
    t.step_in_turn = total(times)
    t.binding_ratio = first / second


def demands(t: Sheet) -> dict[str, Any]:
    """Return the times of a step that overlap, by the words of what they wait for."""
    return {words: t.get(name) for name, words in RESOURCES.items() if t.get(name) is not None}


def _flops(s: Sheet, t: Sheet, c: ModelConfig, work: Work, parts: Any) -> None:
    """Name the operations of a GPU in a step: in the weights' dtype, and in the compute dtype."""
    experts = c.n_activated_experts * s.or_zero("expert_parameters") + s.or_zero("shared_parameters")
    attention = s.head_matrices_products + s.latent_down_products
    others = work.moe * s.or_zero("gate_parameters") + work.end_products + work.layers * s.block_norms_products
    if work.absorbed:
        others = others + work.layers * s.latent_up_products
    else:
        attention = attention + s.latent_up_products
    matrices = work.layers * attention + work.dense * s.or_zero("dense_parameters") + work.moe * experts
    over = work.layers * work.pairs + work.logits * s.vocabulary_parameters
    t.matrix_flops = 2 * parts * (t.rows * matrices)
    t.other_flops = 2 * parts * (t.rows * others + over)
