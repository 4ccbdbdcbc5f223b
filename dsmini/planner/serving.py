"""Serving: memory of a GPU of a deployment, the time of its step, and what drafts gain.

A step reads the weights that its tokens use, reads the cache of its sequences, computes, and exchanges rows of
experts:

    memory     (weights read + cache read) / (memory bandwidth * memory_efficiency)
    compute    (FLOPs in the weights' dtype / its peak + the other FLOPs / their peak) / serving_efficiency
    links      imbalance * bytes sent / (the link's rate * link_efficiency), each link for itself

It takes at least as long as the slowest of these: all overlap, which two micro-batches are for, and launches, norms and
sampling are left out. With memory_efficiency and serving_efficiency of 1, as they are unless you choose, no step is
faster; real ones take longer.

Tensor parallelism divides what belongs to attention's heads, the vocabulary, and the feed-forwards of a model without
experts, within a group of GPUs that share their sequences. MLA has one latent for all heads, so every GPU of a group
holds and reads the cache of the whole group. Each makes the latents of its own tokens, gathers those of the others over
the fast link, and scatters sums. Expert parallelism gives each GPU some routed experts; redundant ones are copies. The
rest is whole on every GPU.

    decode     each sequence brings one token; MLA is absorbed; two micro-batches read the weights twice
    prefill    a prompt passes at once, half of the square of queries and keys; the head reads the last token
    first      as prefill, in one micro-batch, with one prompt for all GPUs that share heads: the first token soonest
    drafts     1 + p + p^2 + ... + p^d tokens a step; d drafts, each a block and the head, and a step that verifies them

Where multi-token prediction drafts, decoding holds the weights of its blocks and their cache too.

Worked example, DeepSeek-V3 on 320 H800, two micro-batches of 30 sequences a GPU, context 4096: weights of 9.0 GB,
with a cache of 4 * 60 sequences 79.2 GB. A step reads 16.9 GB of weights and 69.1 GB of cache in 25.7 ms, and sends
0.66 GB to other nodes, 16.6 ms at 40 GB/s. Memory binds, 1.55 times.

Left out: activations, buffers of exchanges, the runtime, and in prefill the write of the cache.

Source: DeepSeek-V3 report, sections 3.4 and 5.4.3; INS, section 2.3.2; Leviathan et al., arXiv 2211.17192 (drafts).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import floor, gcd
from typing import TYPE_CHECKING, Literal

from dsmini.accounting.flops import context_products, twice_the_keys
from dsmini.accounting.memory import fixed_layer_bytes, row_width, rows_read
from dsmini.accounting.tensors import SIZES, TensorUse, divisors, main_tensors, mtp_tensors
from dsmini.config import ModelConfig
from dsmini.config.fields import require
from dsmini.planner.exchange import Exchange, Links
from dsmini.planner.figure import Figure, counted, figure
from dsmini.planner.hardware import Hardware
from dsmini.planner.layout import gpus_in_node
from dsmini.planner.model import (
    EXPERTS,
    SHARED,
    CompressedCacheFigures,
    ModelFigures,
    WeightFigures,
    cache_figures,
)
from dsmini.planner.request import DTYPES, Assumptions, Inputs, Model, PlanRequest, presets
from dsmini.planner.search import gpu_counts, usual_precision
from dsmini.reading import listed
from dsmini.report.units import human, plural

if TYPE_CHECKING:
    from dsmini.planner.model import CacheFigures

StageName = Literal["decode", "prefill"]
STAGES: tuple[StageName, ...] = ("decode", "prefill")
RESOURCES = {
    "memory_time": "memory traffic",
    "compute_time": "compute",
    "slow_link_time": "links between nodes",
    "fast_link_time": "links within a node",
}
"""Times that overlap in a step, with the words of a verdict."""
CONTEXT, SEQUENCES = 4096, 32
"""Tokens of a decoding sequence, and the most sequences of a GPU in a micro-batch, where the user leaves them open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """GPUs that serve one copy of a model."""

    stage: StageName
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
    how: str = ""
    """Reason why it was chosen."""


def check_deployment(d: Deployment, c: ModelConfig, h: Hardware) -> None:
    """Raise ValueError for a deployment that does not divide the model, or that the hardware has no links for."""
    node, title, of = h.gpus_per_node, h.title, f"{d.stage}_tensor={d.tensor}"
    in_node = gpus_in_node(d.gpus, node)
    use = f"use one of {listed([str(n) for n in divisors(c.n_heads, h.node) if node % n == 0])}"
    require(d.gpus % d.tensor == 0, f"{of} does not divide {d.stage}_gpus={d.gpus}; use a divisor of it")
    require(d.tensor <= node, f"{of} is more than the GPUs of a node; {use}")
    require(c.n_heads % d.tensor == 0, f"{of} does not divide n_heads={c.n_heads}; {use}")
    whole = d.gpus <= node or 2 * in_node > node
    takes = f"{d.stage}_gpus={d.gpus} takes {in_node} of the {node} GPUs of a node"
    require(whole, f"{takes}; use a multiple of {node}")
    require(in_node % d.tensor == 0, f"{takes}, which {of} does not divide; use a multiple of {node}")
    experts = c.n_routed_experts + d.redundant
    many, fix = f"{d.stage}_redundant={d.redundant} makes {experts} experts", d.redundant + -experts % d.gpus
    require(experts % d.gpus == 0, f"{many}, which {d.stage}_gpus={d.gpus} do not divide; use {fix}")
    require(h.networked or d.gpus <= node, f"{title} has no slow link, want one for several nodes; plan one node")
    require(h.linked or d.gpus == 1, f"{title} has no fast link, want one for several GPUs in a node; plan one GPU")
    expanded = c.is_mla and c.qk_norm and d.stage == "decode"
    require(not expanded, "qk_norm=True has no absorbed form, which decoding is planned in; use qk_norm=False")


class Work:
    """Requests that are served, and the model in its dtypes. Raises: ValueError for a cache that it cannot have."""

    def __init__(self, m: ModelFigures, inputs: Inputs) -> None:
        r = inputs.request
        assert r.weight_dtype is not None
        self.m: ModelFigures = m
        self.weights: WeightFigures = WeightFigures(m, r.weight_dtype)
        self.cache: CacheFigures = cache_figures(m.config, r.cache_dtype)
        # of the products: FP4 weights are multiplied as FP8, which holds each of them exactly
        self.dtype = "fp8" if r.weight_dtype == "fp4" else r.weight_dtype
        self.context: Figure = inputs.of("context", "token")
        self.prompt: Figure = inputs.of("prompt", "token")
        self.sequences: Figure = inputs.of("sequences")
        self.drafted: bool = bool(m.config.n_mtp_layers and r.drafts)


class Deployed:
    """Sizes and memory of a deployment."""

    def __init__(self, w: Work, d: Deployment, h: Hardware) -> None:
        self.w: Work = w
        self.d: Deployment = d
        self.stage = f"{d.stage}_"
        self.memory: Figure = h.memory
        c = w.m.config
        in_node = gpus_in_node(d.gpus, h.gpus_per_node)
        one_hop = 0 if d.two_hop else c.n_activated_experts + c.n_shared_experts * d.shared_remote
        self.exchange: Exchange = Exchange(c, d.gpus, in_node, w.dtype, one_hop, self.stage)
        names = {"tensor": "GPUs that divide attention's heads", "micro_batches": "Micro-batches of a step"}
        self.tensor: Figure
        self.micro_batches: Figure
        self.tensor, self.micro_batches = (
            Figure(f"{self.stage}{name}", getattr(d, name), "", title, d.how) for name, title in names.items()
        )
        self.tokens: Figure = w.context if d.stage == "decode" else w.prompt
        self.drafted: bool = w.drafted and d.stage == "decode"
        """Multi-token prediction drafts here."""

    @figure()
    def gpu_experts(self) -> float:
        """Experts in each block that a GPU holds, with copies. Source: V3, section 3.4."""
        return (self.w.m.config.n_routed_experts + self.d.redundant) / self.exchange.expert_parallel

    @figure("B")
    def gpu_weights(self) -> float:
        """Weights that a GPU holds. Source: V3, section 3.4."""
        w = self.w.weights
        divided = w.head_matrices_bytes + w.latent_up_bytes + 2 * w.vocabulary_bytes
        main = divided / self.tensor + self.w.m.moe_layers * self.gpu_experts * w.expert_bytes + self.whole_weights
        if self.drafted:
            return main + self.draft_weights
        return main

    @counted("B")
    def draft_weights(self) -> float:
        """Weights of multi-token prediction on a GPU, divided as those of the model, where it drafts."""
        amounts = (
            use.times * use.bytes(self.w.weights.dtype) * self.held_share(use)
            for use in mtp_tensors(self.w.m.config)
            if use.owned
        )
        return sum(amounts) if self.drafted else 0

    def held_share(self, use: TensorUse) -> float:
        """Return the part that a GPU holds of a tensor; of a stack how many matrices."""
        if use.kind == EXPERTS:
            return self.gpu_experts
        if use.kind == SHARED:
            return 0 if self.d.shared_remote else 1
        return 1 if use.split in self.w.weights.whole else 1 / self.tensor

    @figure("B")
    def whole_weights(self) -> float:
        """Weights that each GPU holds whole. Source: V3, section 3.4."""
        w = self.w.weights
        return w.whole_bytes if self.d.shared_remote else w.whole_bytes + w.shared_experts_bytes

    @figure()
    def cache_share(self) -> float:
        """Sequences whose cache a GPU holds for each of its own. Source: V3, section 3.4."""
        c = self.w.m.config
        return self.tensor / min(self.tensor, c.kv_heads) if c.is_baseline else self.tensor

    @counted("B/token")
    def draft_cache(self) -> int:
        """Cache of a token in the layers of multi-token prediction, where it drafts."""
        c, drafted = self.w.m.config, self.drafted and self.w.m.config.compress_ratios is None
        return int(c.n_mtp_layers * self.w.cache.cache_row) if drafted else 0

    @counted("B")
    def draft_window(self) -> int:
        """Cache of a sequence's window in the layers of multi-token prediction, where V4 drafts."""
        c, row = self.w.m.config, int(self.w.cache.attention_row)
        drafted = self.drafted and c.compress_ratios is not None
        return c.n_mtp_layers * fixed_layer_bytes(c, 0, row) if drafted else 0

    @figure("B/token")
    def sequence_cache(self) -> float:
        """Cache of a sequence on a GPU, a token. Source: V3, section 3.4."""
        if self.drafted:
            return (self.w.cache.kv_cache + self.draft_cache) * self.cache_share
        return self.w.cache.kv_cache * self.cache_share

    @figure()
    def sequences(self) -> float:
        """Sequences of a GPU, a step."""
        return self.micro_batches * self.w.sequences if self.d.stage == "decode" else self.micro_batches

    @figure("B")
    def sequence_window(self) -> float:
        """Cache of a sequence on a GPU that its length does not change, in V4. Source: V4, section 2.3."""
        cache = self.w.cache
        if not isinstance(cache, CompressedCacheFigures):
            return 0
        return (cache.window_cache + self.draft_window) * self.tensor

    @figure("B")
    def gpu_cache(self) -> float:
        """Cache that a GPU holds. Source: V3, section 3.4."""
        return self.sequences * (self.tokens * self.sequence_cache + self.sequence_window)

    @figure("B")
    def gpu_memory(self) -> float:
        """Weights and cache that a GPU holds. Source: V3, section 3.4."""
        return self.gpu_weights + self.gpu_cache

    @figure()
    def sequences_that_fit(self) -> float:
        """Sequences of this length that fit. Source: V3, section 3.4."""
        of_one = self.tokens * self.sequence_cache + self.sequence_window
        return floor(max(self.memory - self.gpu_weights, 0) / of_one)

    @figure("token")
    def longest_context(self) -> float | None:
        """Longest context of these sequences. Source: V3, section 3.4."""
        left = max(self.memory - self.gpu_weights - self.sequences * self.sequence_window, 0)
        longest = self.w.m.config.max_seq_len
        if not self.sequence_cache:  # the window alone, however long a sequence is
            return None
        return min(longest, floor(left / (self.sequences * self.sequence_cache)))

    @property
    def misfit(self) -> str:
        """Sentence about a GPU that does not hold weights and cache, with what would; "" if it does."""
        d, fit = self.d, int(self.sequences_that_fit / self.micro_batches)
        if self.gpu_memory <= self.memory:
            return ""
        fix = f"use more {d.stage}_gpus, or hardware with more memory"
        if d.stage == "decode" and fit:
            fix = f"use sequences={fit}"
        elif self.longest_context:
            fix = f"use {'context' if d.stage == 'decode' else 'prompt'}={self.longest_context:.0f}"
        takes = f"weights and cache take {human(self.gpu_memory, 'B')} of {human(self.memory, 'B')}"
        return f"{d.stage} on {plural(d.gpus, 'GPU')} does not fit: {takes}; {fix}"


class ServedStep:
    """Times of a step of a deployment, and what they are computed from.

    Raises: ValueError for hardware without units for the weights' dtype.
    """

    def __init__(self, of: Deployed, h: Hardware, a: Assumptions, drafts: int = 0, first: bool = False) -> None:
        """Take the sizes.

        Args:
            drafts: tokens of each decoding sequence to verify besides the last one. They share a read of its cache.
            first: of prefill, one micro-batch in which GPUs that share heads divide one prompt among them.
        """
        self.of: Deployed = of
        self.w: Work = of.w
        self.d: Deployment = of.d
        self.h: Hardware = h
        self.a: Assumptions = a
        self.links: Links = Links(h, a)
        self.exchange: Exchange = of.exchange
        self.positions: int = 1 + drafts
        self.stage: str = "verify_" if drafts else "first_" if first else of.stage
        self.first: bool = first
        one = Figure("first_micro_batches", 1, "", "Micro-batches before a first token", "a prompt is not divided")
        self.micro_batches: Figure = one if first else of.micro_batches
        self.decode: bool = of.d.stage == "decode"
        self.absorbed: bool = self.decode and self.w.m.config.is_mla
        h.peak(self.w.dtype)  # raises

    @figure()
    def rows(self) -> float:
        """Tokens of a GPU in a micro-batch."""
        if self.first:
            return self.w.prompt / self.of.tensor
        if not self.decode:
            return self.w.prompt
        return self.w.sequences * self.positions if self.positions > 1 else self.w.sequences

    @figure()
    def experts_read(self) -> float:
        """Experts in each block that a GPU reads in a micro-batch. Source: even routing."""
        c = self.w.m.config
        missed = (1 - c.n_activated_experts / c.n_routed_experts) ** (self.rows * self.exchange.expert_parallel)
        return self.of.gpu_experts * (1 - missed)

    @figure("B")
    def weights_read(self) -> float:
        """Weights that a GPU reads in a step. Source: every chosen matrix once."""
        w, of = self.w.weights, self.of
        up = w.absorbed_bytes if self.absorbed else w.latent_up_bytes
        divided = w.head_matrices_bytes + up + w.vocabulary_bytes
        experts = self.w.m.moe_layers * self.experts_read * w.expert_bytes
        whole = of.whole_weights - w.table_bytes if w.table_bytes else of.whole_weights
        return self.micro_batches * (divided / of.tensor + experts + whole)

    @counted("B")
    def sequence_read(self) -> float:
        """Cache of a sequence that a step reads: of an indexer's keys all, of others those that are chosen."""
        return self.of.cache_share * rows_read(self.w.m.config, int(self.w.context), self.w.cache.dtype)

    @figure("B")
    def cache_read(self) -> float:
        """Cache that a GPU reads in a step. Source: every row of its sequences once."""
        return self.of.sequences * self.sequence_read if self.decode else 0

    @figure("s")
    def memory_time(self) -> float:
        """Time of a step in memory traffic. Source: amount over rate."""
        return (self.weights_read + self.cache_read) / (self.h.memory_bandwidth * self.a.memory_efficiency)

    @counted()
    def pair_products(self) -> float:
        """Multiply-adds of a token with its context, all layers. Source: accounting's context_products."""
        c, prompt = self.w.m.config, int(self.w.prompt)
        over = [use for use in main_tensors(c) if use.per_pair]
        if self.decode:
            return sum(use.times * context_products(c, use, int(self.w.context), absorbed=True) for use in over)
        halves = (use.times * twice_the_keys(use.most_keys, prompt, ratio=use.ratio) / 2 * use.per_pair for use in over)
        return float(sum(halves))

    @figure("FLOP")
    def matrix_flops(self) -> float:
        """Operations of a GPU in a step in the weights' dtype; the fullest has more of experts than the mean."""
        w, m = self.w.weights, self.w.m
        matrices = w.matrix_products if self.absorbed else w.matrix_products + w.latent_up_products
        fuller = (self.a.imbalance - 1) * m.moe_layers * m.config.n_activated_experts * m.expert_parameters
        return 2 * self.micro_batches * self.rows * (matrices + fuller)

    @figure("FLOP")
    def other_flops(self) -> float:
        """Operations of a GPU in a step on attention, gates and head. Source: 2 a multiply-add."""
        w, c = self.w.weights, self.w.m.config
        plain = w.other_products + w.latent_up_products if self.absorbed else w.other_products
        logits = self.rows if self.decode else self.rows / self.w.prompt
        products = self.rows * (plain + self.pair_products) + logits * c.vocab_size * c.dim
        return 2 * self.micro_batches * products

    @figure("s")
    def compute_time(self) -> float:
        """Time of a step in matrix products. Source: amount over rate."""
        other = self.h.peak("float32" if self.w.dtype == "float32" else "bfloat16")
        return (self.matrix_flops / self.h.peak(self.w.dtype) + self.other_flops / other) / self.a.serving_efficiency

    @figure("token")
    def routed_rows(self) -> float:
        """Tokens of the fullest GPU that pass a MoE layer, all layers of a step. Source: V3, section 3.4."""
        return self.a.imbalance * self.micro_batches * self.rows * self.w.m.moe_layers

    @figure("B")
    def slow_bytes(self) -> float:
        """Bytes to other nodes, a step. Source: V3, section 3.4."""
        return self.routed_rows * self.exchange.slow_row_bytes

    @figure("B")
    def fast_bytes(self) -> float:
        """Bytes that a GPU sends in its node in a step. Source: V3, section 3.4."""
        if self.d.tensor == 1:
            return self.routed_rows * self.exchange.fast_row_bytes
        rows = self.micro_batches * self.rows
        gathered = rows * self.w.m.config.n_layers * self.gathered_row * (self.of.tensor - 1)
        return self.routed_rows * self.exchange.fast_row_bytes + gathered

    @counted("B")
    def gathered_row(self) -> int:
        """Latents and sums of a token that GPUs with the same sequences exchange, a layer. Source: V3, section 3.4."""
        c, shared = self.w.m.config, 0 if self.w.m.moe_layers else 2  # in and out of a feed-forward
        queries = c.dim if c.is_baseline or c.q_lora_rank is None else c.q_lora_rank
        return SIZES[self.w.dtype] * (queries + (0 if c.is_baseline else row_width(c)) + (1 + shared) * c.dim)

    @figure("s")
    def slow_link_time(self) -> float:
        """Time of a step between nodes. Source: amount over rate."""
        return self.slow_bytes / self.links.slow_rate if self.slow_bytes else 0

    @figure("s")
    def fast_link_time(self) -> float:
        """Time of a step within a node. Source: amount over rate."""
        return self.fast_bytes / self.links.fast_rate if self.fast_bytes else 0

    @figure("s")
    def step_time(self) -> float:
        """Time of a step whose parts all overlap. Source: the slowest part: at least this."""
        return max(self.memory_time, self.compute_time, self.slow_link_time, self.fast_link_time)

    @property
    def waits(self) -> dict[str, float]:
        """Seconds of the parts of a step by their words."""
        return {words: time for name, words in RESOURCES.items() if (time := getattr(self, name))}


class Served:
    """Times of decoding, of prompts, and of drafts where there are some, of deployments."""

    def __init__(
        self, m: ModelFigures, h: Hardware, a: Assumptions, inputs: Inputs, found: Mapping[StageName, Deployment]
    ) -> None:
        w = Work(m, inputs)
        self.w: Work = w
        self.h: Hardware = h
        self.inputs: Inputs = inputs
        self.decode: Deployed
        self.prefill: Deployed
        self.decode, self.prefill = (Deployed(w, found[stage], h) for stage in STAGES)
        self.decode_step: ServedStep = ServedStep(self.decode, h, a)
        self.prefill_step: ServedStep = ServedStep(self.prefill, h, a)
        self.first_step: ServedStep = ServedStep(self.prefill, h, a, first=True)
        self.drafts: Drafts | None = Drafts(w, h, a, inputs, self.decode_step) if w.drafted else None

    @property
    def waits(self) -> dict[str, dict[str, float]]:
        """Seconds of the parts of a step by their words, of decode and prefill."""
        return {"decode": self.decode_step.waits, "prefill": self.prefill_step.waits}

    @property
    def misfit(self) -> dict[str, str]:
        """Sentences about deployments that do not hold weights and cache, by stage."""
        return {d.d.stage: d.misfit for d in (self.decode, self.prefill) if d.misfit}

    @figure("s/token")
    def decode_time_per_token(self) -> float:
        """Least time of an output token. Source: INS, section 2.3.2."""
        return self.decode_step.step_time

    @figure("token/s")
    def decode_tokens_per_second(self) -> float:
        """Most tokens/s of a sequence. Source: INS, section 2.3.2."""
        return 1 / self.decode_step.step_time

    @figure("token/s")
    def decode_gpu_tokens_per_second(self) -> float:
        """Most tokens/s of a GPU. Source: INS, section 2.3.2."""
        return self.decode.sequences / self.decode_step.step_time

    @figure("s")
    def prefill_time_to_first_token(self) -> float:
        """Least time to the first token. Source: V3, section 3.4.1."""
        return self.first_step.step_time

    @figure("token/s")
    def prefill_gpu_tokens_per_second(self) -> float:
        """Most prompt tokens/s of a GPU. Source: V3, section 3.4.1."""
        return self.prefill.micro_batches * self.w.prompt / self.prefill_step.step_time

    @figure("$/token")
    def decode_cost(self) -> float | None:
        """Least rent of an output token."""
        return self.h.price / self.decode_gpu_tokens_per_second if self.h.price is not None else None

    @figure("$/token")
    def prefill_cost(self) -> float | None:
        """Least rent of a prompt token."""
        return self.h.price / self.prefill_gpu_tokens_per_second if self.h.price is not None else None


class Drafts:
    """Gain of tokens that multi-token prediction drafts. A draft is one more block, and reads the head."""

    def __init__(self, w: Work, h: Hardware, a: Assumptions, inputs: Inputs, plain: ServedStep) -> None:
        self.w: Work = w
        self.h: Hardware = h
        self.a: Assumptions = a
        self.plain: ServedStep = plain
        self.drafts: Figure = inputs.of("drafts")
        self.acceptance: Figure = inputs.of("acceptance")
        self.step: ServedStep = ServedStep(plain.of, h, a, drafts=inputs.request.drafts)

    @figure("s")
    def draft_time(self) -> float:
        """Time of a draft: a block and the head. Source: V3, section 5.4.3."""
        of, bandwidth = self.plain.of, self.h.memory_bandwidth * self.a.memory_efficiency
        head = of.micro_batches * self.w.weights.vocabulary_bytes / of.tensor
        return self.plain.step_time / self.w.m.config.n_layers + head / bandwidth

    @figure()
    def tokens_per_step(self) -> float:
        """Tokens of a step, before overhead. Source: V3, section 5.4.3."""
        return (1 - self.acceptance ** (self.drafts + 1)) / (1 - self.acceptance)

    @figure("s")
    def speculative_step(self) -> float:
        """Time of all drafts and of the step that verifies them. Source: V3, section 5.4.3."""
        return self.step.step_time + self.drafts * self.draft_time

    @figure()
    def speculation_gain(self) -> float:
        """Speedup by drafts. Source: V3, section 5.4.3."""
        return self.tokens_per_step * self.plain.step_time / self.speculative_step


# --- what a user leaves open


def choose_serving(
    inputs: Inputs, model: Model, m: ModelFigures, h: Hardware, a: Assumptions, published: bool
) -> Served:
    """Return both deployments, with as many sequences as fit where the user leaves them open.

    Args:
        published: the model has DeepSeek-V3's sizes, or is varied from it.

    Raises: ValueError for what the model or the hardware cannot have.
    """
    r, longest = inputs.request, m.config.max_seq_len
    for name in ("context", "prompt"):
        tokens = getattr(r, name) or 1
        require(tokens <= longest, f"{name}={tokens} is longer than the model's max_seq_len={longest}; shorten it")
    context = r.context or min(CONTEXT, longest)
    precision = usual_precision(model, h)  # however training multiplies
    is_v4 = precision == "fp8" and m.config.attention == "compressed"
    dtype = "fp4" if is_v4 else DTYPES[precision]
    inputs = inputs.filled("chosen", context=context, prompt=context, weight_dtype=dtype, cache_dtype="bfloat16")
    least = Work(m, inputs.filled("chosen", sequences=1))
    found: dict[StageName, Deployment] = {}
    for stage in STAGES:
        found[stage] = _deployment(inputs.request, stage, least, h, published)
    fit = int(Deployed(least, found["decode"], h).sequences_that_fit / found["decode"].micro_batches)
    inputs = inputs.filled("chosen", sequences=max(1, min(SEQUENCES, fit)))
    for stage, d in found.items():
        inputs = inputs.filled(d.how, **{f"{stage}_gpus": d.gpus, f"{stage}_tensor": d.tensor})
        inputs.sources.setdefault(stage, d.how)
    return Served(m, h, a, inputs, found)


def _deployment(r: PlanRequest, stage: StageName, w: Work, h: Hardware, published: bool) -> Deployment:
    """Return a deployment: the given numbers, and what is best for the others.

    Raises: ValueError for a deployment that does not divide the model or that the hardware has no links or units for.
    """
    gpus, tensor, redundant = (getattr(r, f"{stage}_{name}") for name in ("gpus", "tensor", "redundant"))
    preset, experts = presets()["deepseek-v3"][stage], w.m.config.n_routed_experts

    def made(gpus: int, tensor: int, how: str) -> Deployment:
        own = published and (gpus, tensor) == (preset["gpus"], preset["tensor"])
        if own and redundant in (None, preset["redundant"]) and (experts + preset["redundant"]) % gpus == 0:
            return Deployment(stage=stage, how=how, **preset)
        spare = -experts % gpus if redundant is None else redundant
        sizes = {"gpus": gpus, "tensor": tensor, "redundant": spare, "micro_batches": 1 if gpus == 1 else 2}
        return Deployment(stage=stage, **sizes, two_hop=stage == "prefill", how=how)

    if gpus is None:
        tried = [made(*each) for each in _tried(stage, tensor, w.m.config, h, published)]
    else:
        shared = 1 if w.m.moe_layers else gcd(gpus_in_node(gpus, h.gpus_per_node), w.m.config.n_heads)
        tried = [made(gpus, tensor or shared, "as chosen")]
    for d in tried or [made(tensor or 1, tensor or 1, "")]:
        check_deployment(d, w.m.config, h)
        h.peak(w.dtype)
        if Deployed(w, d, h).gpu_memory <= h.memory:
            return d
    return tried[-1] if gpus is not None else replace(tried[-1], how="the most GPUs that can share it")


def _tried(
    stage: StageName, tensor: int | None, c: ModelConfig, h: Hardware, published: bool
) -> Iterator[tuple[int, int, str]]:
    """Yield GPUs to try, how many of them share heads, and how they are chosen: with experts one, else all."""
    preset, node = presets()["deepseek-v3"][stage], h.gpus_per_node
    if published and h.networked and tensor is None:
        yield preset["gpus"], preset["tensor"], "as DeepSeek-V3 is served"
    moe = c.n_dense_layers < c.n_layers
    most = max(node, c.n_routed_experts) if moe and h.networked else h.node
    for count in gpu_counts(node):
        shared = tensor or (1 if moe else count)
        if count <= most and count % shared == 0 and shared <= node and c.n_heads % shared == 0:
            yield count, shared, "the fewest GPUs that hold weights and cache"
