"""Serving: memory of a GPU of a deployment, the time of its step, and what drafts gain.

A step reads the weights that its tokens use, reads the cache of its sequences, computes, and exchanges rows of
experts:

    memory     (weights read + cache read) / memory bandwidth
    compute    FLOPs in the weights' dtype / its peak + the other FLOPs / their peak
    links      bytes sent / the link's bandwidth, each link for itself

It takes as long as the slowest of these, which is a lower bound: all overlap, which two micro-batches are for, no
kernel reaches a peak, and launches, norms and sampling are left out.

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
from typing import Any, Literal

import numpy as np

from dsmini.accounting.flops import context_products, twice_the_keys
from dsmini.accounting.tensors import SIZES, TensorUse, divisors, largest, main_tensors, smallest, total
from dsmini.accounting.traffic import expected_experts
from dsmini.config import ModelConfig
from dsmini.planner.exchange import exchange
from dsmini.planner.figure import Sheet
from dsmini.planner.hardware import Hardware
from dsmini.reading import listed

Stage = Literal["decode", "prefill"]
STAGES: tuple[Stage, ...] = ("decode", "prefill")
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


def deployment_rules(d: Deployment, c: ModelConfig, hardware: Hardware) -> Iterator[tuple[bool, Callable[[], str]]]:
    """Yield what a deployment must meet, and the sentence for one that does not."""
    node, title = hardware.gpus_per_node, hardware.title
    of, use = f"{d.stage}_tensor={d.tensor}", listed([str(n) for n in divisors(c.n_heads, hardware.node)])
    yield d.gpus % d.tensor == 0, lambda: f"{of} does not divide {d.stage}_gpus={d.gpus}; use a divisor of it"
    yield d.tensor <= node, lambda: f"{of} is more than the GPUs of a node; use one of {use}"
    yield c.n_heads % d.tensor == 0, lambda: f"{of} does not divide n_heads={c.n_heads}; use one of {use}"
    one_node = hardware.networked or d.gpus <= node
    yield one_node, lambda: f"{title} has no slow link, want one for several nodes; plan one node"
    linked = hardware.linked or d.gpus == 1
    yield linked, lambda: f"{title} has no fast link, want one for several GPUs in a node; plan one GPU"
    absorbed = not (c.is_mla and c.qk_norm and d.stage == "decode")
    yield absorbed, lambda: "qk_norm=True has no absorbed form, which decoding is planned in; use qk_norm=False"


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
    t.gpu_experts = (c.n_routed_experts + t.redundant_experts) / t.expert_parallel
    t.gpu_weights = _weights(s, t, d, t.gpu_experts, s.latent_up_bytes) + s.vocabulary_bytes / t.tensor_parallel
    group = t.tensor_parallel if c.is_mla else t.tensor_parallel / smallest(t.tensor_parallel, c.kv_heads)
    t.sequence_cache = s.kv_cache * group
    mine, tokens = t.micro_batches, s.prompt
    if d.stage == "decode":
        s.decode_sequences = t.micro_batches * s.sequences
        mine, tokens = s.decode_sequences, s.context
    t.gpu_cache = mine * (tokens * t.sequence_cache)
    t.gpu_memory = t.gpu_weights + t.gpu_cache
    left = largest(s.gpu_memory - t.gpu_weights, 0)
    t.sequences_that_fit = np.floor(left / (tokens * t.sequence_cache))
    t.longest_context = np.floor(left / (mine * t.sequence_cache))
    return t


def _weights(s: Sheet, t: Sheet, d: Deployment, experts: Any, up: Any) -> Any:
    """Return the bytes of all blocks and the head on one GPU, with this many routed experts in each MoE block."""
    divided = (s.head_matrices_bytes + up + s.vocabulary_bytes) / t.tensor_parallel
    shared = 0 if d.shared_remote else s.shared_experts_bytes
    return divided + s.moe_layers * (experts * s.expert_bytes) + shared + s.whole_bytes


def serving_figures(
    s: Sheet, c: ModelConfig, hardware: Hardware, dtype: str, decode: Deployment, prefill: Deployment
) -> None:
    """Name the time of decoding, of prompts, and of drafts where the sheet has some; deployments are there already.

    Args:
        dtype: of the weights.
    """
    d, p = s.each("decode_{}"), s.each("prefill_{}")
    for t, deployment in ((d, decode), (p, prefill)):
        if deployment.gpus > 1:
            visits = c.n_activated_experts + (c.n_shared_experts if deployment.shared_remote else 0)
            exchange(s, t, c, t.expert_parallel, dtype, one_hop=None if deployment.two_hop else visits)
    _decode(s, d, c, hardware, dtype, decode)
    s.decode_time_per_token = d.step_time
    s.decode_tokens_per_second = 1 / d.step_time
    s.decode_gpu_tokens_per_second = s.decode_sequences / d.step_time
    pairs = total(twice_the_keys(use.most_keys, s.prompt) / 2 * use.per_pair for use in _over_context(c))
    _step(s, p, p, c, hardware, dtype, prefill, rows=s.prompt, logits=1, pairs=s.prompt * pairs, cache=0)
    s.prefill_time_to_first_token = p.step_time
    s.prefill_gpu_tokens_per_second = p.micro_batches * s.prompt / p.step_time
    if s.get("gpu_price") is not None:
        s.decode_cost = s.gpu_price / s.decode_gpu_tokens_per_second
        s.prefill_cost = s.gpu_price / s.prefill_gpu_tokens_per_second
    if s.get("drafts") is not None:  # a draft is one more block, and reads the head; rejecting takes no time
        verify = s.each("verify_{}")
        _decode(s, verify, c, hardware, dtype, decode, s.drafts + 1)
        head = d.micro_batches * (s.vocabulary_bytes / d.tensor_parallel) / s.memory_bandwidth
        s.draft_time = d.step_time / c.n_layers + head
        s.tokens_per_step = accepted_tokens(s.acceptance, s.drafts)
        s.speculative_step = verify.step_time + s.drafts * s.draft_time
        s.speculation_gain = s.tokens_per_step * (d.step_time / s.speculative_step)


def accepted_tokens(acceptance: Any, drafts: Any) -> Any:
    """Return the expected number of tokens that a step gives, the model's own one included."""
    return (1 - acceptance ** (drafts + 1)) / (1 - acceptance)


def _decode(
    s: Sheet, t: Sheet, c: ModelConfig, hardware: Hardware, dtype: str, d: Deployment, positions: Any = 1
) -> None:
    """Name the times of a step in which each sequence brings this many tokens: 1, or drafts to verify.

    The tokens of a sequence share one read of its cache.
    """
    of, rows = s.each("decode_{}"), s.sequences * positions
    pairs = total(context_products(c, use, s.context, absorbed=True) for use in _over_context(c))
    row = of.sequence_cache
    if c.attention == "dsa":  # an indexer's keys are read whole, and of attention's rows those that it picked
        met = smallest(s.context, c.index_topk)
        row = row * ((s.index_row + (s.cache_row - s.index_row) * met / s.context) / s.cache_row)
    cache = s.sequences * (s.context * row)
    _step(s, t, of, c, hardware, dtype, d, rows=rows, logits=rows, pairs=rows * pairs, cache=cache)


def _over_context(c: ModelConfig) -> list[TensorUse]:
    """Return the products of a block that grow with the context: of attention, and of an indexer."""
    return [use for use in main_tensors(c) if use.place == "block" and not use.shape]


def _step(
    s: Sheet,
    t: Sheet,
    of: Sheet,
    c: ModelConfig,
    hardware: Hardware,
    dtype: str,
    d: Deployment,
    *,
    rows: Any,
    logits: Any,
    pairs: Any,
    cache: Any,
) -> None:
    """Name the times of a step, and what they are computed from.

    Args:
        t: sheet for the step's figures.
        of: sheet with the deployment's sizes and rows of experts: decode's for drafts too.
        rows, logits: tokens of a micro-batch that pass the blocks, and those that the head is asked for.
        pairs: multiply-adds of attention over the context in one block, all tokens.
        cache: bytes of cache that attention reads; 0 for prompts, whose keys are fresh.

    Raises: ValueError for hardware without units for the weights' dtype.
    """
    parts, absorbed = of.micro_batches, d.stage == "decode" and c.is_mla
    t.rows = rows
    t.experts_read = of.gpu_experts * (expected_experts(c, t.rows * of.expert_parallel) / c.n_routed_experts)
    weights = _weights(s, of, d, t.experts_read, s.absorbed_bytes if absorbed else s.latent_up_bytes)
    t.weights_read = parts * weights
    read = t.weights_read
    if d.stage == "decode":
        t.cache_read = parts * cache
        read = read + t.cache_read
    t.memory_time = read / s.memory_bandwidth
    matrices, others = s.matrix_products, s.other_products
    if absorbed:
        others = others + s.latent_up_products
    else:
        matrices = matrices + s.latent_up_products
    t.matrix_flops = 2 * parts * (t.rows * matrices)
    over = c.n_layers * pairs + logits * s.vocabulary_parameters
    t.other_flops = 2 * parts * (t.rows * others + over)
    other = "float32" if dtype == "float32" else "bfloat16"
    t.compute_time = t.matrix_flops / hardware.peak(s, dtype) + t.other_flops / hardware.peak(s, other)
    sent = parts * t.rows * s.moe_layers
    if d.gpus > hardware.gpus_per_node:
        t.slow_bytes = sent * of.slow_row_bytes
        t.slow_link_time = t.slow_bytes / s.slow_link
    fast = sent * of.fast_row_bytes if d.gpus > 1 else 0
    if d.tensor > 1:
        gathered = c.dim if not c.is_mla or c.q_lora_rank is None else c.q_lora_rank
        gathered = gathered + (c.kv_lora_rank + c.qk_rope_head_dim if c.is_mla else 0)
        fast = fast + parts * t.rows * c.n_layers * (SIZES[dtype] * (gathered + c.dim)) * (of.tensor_parallel - 1)
    if d.gpus > 1:
        t.fast_bytes = fast
        t.fast_link_time = t.fast_bytes / s.fast_link
    t.step_time = functools.reduce(largest, demands(t).values())


def demands(t: Sheet) -> dict[str, Any]:
    """Return the times of a step that overlap, by the words of what they wait for."""
    return {words: t.get(name) for name, words in RESOURCES.items() if t.get(name) is not None}
