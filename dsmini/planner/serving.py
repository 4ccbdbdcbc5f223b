"""Serving: memory of a GPU of a deployment, and the time of its step twice, as a bound and as an estimate.

    ServingMemory    what a GPU of a deployment holds
    Served           how long a step takes, and what it gives: tokens a second of a user and of a GPU, and their price

Bound. No engine is faster with these weights, caches and accepted drafts on these GPUs. Weights are read once, at the
width of their dtype. Caches, feed-forwards and the vocabulary are divided by all GPUs, and read once by one of them. The
tokens that verify drafts cost one reading; all products run at their peaks; a row crosses a link once for each node, in
the weights' dtype both ways; and all of these overlap, so the slowest counts:

    bound_time = max(bound_memory_time, bound_compute_time, bound_slow_time, bound_fast_time)

It assumes that routing is even, and that rows go to experts: weights do not come to rows. The deployment says how many
GPUs divide the matrices of heads.

Estimate. Each kind of operation reaches a share of its peak or of the bandwidth, a layer's kernels wait for each other,
and an exchange waits for all GPUs. The shares and latencies are measured ones, in presets.toml with their sources. In
one micro-batch work and links take turns; in two they overlap, and each reads the weights that its tokens use. With
drafts d a step verifies d + 1 tokens of a sequence, and 1 + p + ... + p^d of them count; each draft takes a block and the
head besides. GPUs without a sequence help with the experts alone.

Tensor parallelism divides heads, the vocabulary and the feed-forwards but routed experts in a group of GPUs that
share their sequences. MLA has one latent for all heads, so every GPU of a group holds and reads the cache of all its
sequences. Expert parallelism gives each GPU some routed experts, with the fewest copies that divide evenly. The rest
is whole on every GPU. A batch may be smaller than the number of groups: then some have no sequence.

Worked example, DeepSeek-V3 in FP8 on 144 H800, 128 sequences a GPU of 4,989 tokens: weights of 17 GB and a cache of 45 GB.
A step reads both in 18.5 ms at the peak, its products take 15.8 ms, and its rows 12.6 ms: memory bounds it.

Source: DeepSeek-V3 report, sections 3.4 and 5.4.3; INS, section 2.3.2; Leviathan et al., arXiv 2211.17192 (drafts).
"""  # noqa: E501

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor
from typing import Literal

from dsmini.accounting.flops import decode_flops_per_token, step_flops
from dsmini.accounting.memory import fixed_layer_bytes, rows_read
from dsmini.accounting.tensors import OVER, SCORES, WeightDtype, blocks, divisors, main_tensors, mtp_tensors
from dsmini.config import ModelConfig
from dsmini.config.fields import require
from dsmini.planner.exchange import Exchange
from dsmini.planner.figure import Figure, counted, figure, kept
from dsmini.planner.hardware import Hardware
from dsmini.planner.layout import gpus_in_node
from dsmini.planner.model import CacheFigures, ModelFigures, WeightFigures
from dsmini.planner.request import Inputs, titles_of
from dsmini.reading import listed
from dsmini.report.units import human, plural

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")
PRODUCTS: dict[str, tuple[str, ...]] = {
    "float32": ("float32",),
    "bfloat16": ("bfloat16",),
    "fp8": ("fp8",),
    "fp4": ("fp4", "fp8"),  # FP8 holds each FP4 weight exactly
    "int8": ("int8",),
    "int4": ("bfloat16",),
}
"""Units that multiply numbers of a dtype, the best first."""
OF_PROMPTS = {
    "batch": "Prompts of all GPUs",
    "time": "Time to the first token, an estimate",
    "least_time": "Least time to the first token",
    "tokens_per_second": "Tokens/s of a prompt, an estimate",
    "most_tokens_per_second": "Most tokens/s of a prompt",
    "sequences_that_fit": "Prompts of this length that fit, of all GPUs",
}
"""Titles in reading prompts, where those of decoding name sequences and output tokens."""
PARTS = ("matrices_time", "experts_time", "attention_time", "latency_time", "links_time", "draft_time")
"""Parts of an estimate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """GPUs that serve one copy of a model, and the batch of a step."""

    phase: Phase
    gpus: int
    """GPUs of the deployment; they divide the routed experts."""
    tensor: int = 1
    """GPUs that divide heads and share their sequences."""
    batch: int = 1
    """Sequences of all GPUs."""
    micro_batches: int = 1
    """Parts of a batch, of which one communicates while another computes."""
    drafts: int = 0
    """Tokens that multi-token prediction drafts for each sequence of a step."""
    redundant: int = 0
    """Copies of experts beyond one of each."""
    label: str = ""
    """Source of a published deployment; "" for one of a search."""

    @property
    def words(self) -> str:
        """Deployment in words."""
        batch, drafts = plural(self.batch, {"decode": "sequence", "prefill": "prompt"}[self.phase]), self.drafts
        parts = [plural(self.gpus, "GPU"), f"tensor {self.tensor}", f"{batch} in all"]
        parts += [f"{self.micro_batches} micro-batches"] if self.micro_batches > 1 else []
        return ", ".join([*parts, plural(drafts, "draft")] if drafts else parts)

    @property
    def figures(self) -> Mapping[str, Figure]:
        """Sizes that formulas name."""
        titles, why = dict(titles_of(Deployment)), self.label or "chosen"
        titles |= OF_PROMPTS if self.phase == "prefill" else {}
        sizes = ("gpus", "tensor", "batch", "micro_batches", "drafts", "redundant")
        return {n: Figure(f"{self.phase}_{n}", getattr(self, n), "", titles[n], why) for n in sizes}


def misfit(d: Deployment, c: ModelConfig, h: Hardware) -> str:
    """Return why a model or the links do not allow a deployment, in one sentence; "" if they do."""
    node, of, gpus = h.gpus_per_node, f"{d.phase}_tensor={d.tensor}", f"{d.phase}_gpus={d.gpus}"
    in_node, experts, moe = gpus_in_node(d.gpus, node), c.n_routed_experts + d.redundant, c.n_dense_layers < c.n_layers
    use = f"use one of {listed([str(n) for n in divisors(c.n_heads, h.node) if node % n == 0])}"
    takes = f"{gpus} takes {in_node} of the {node} GPUs of a node"
    whole = d.gpus <= node or 2 * in_node > node
    expanded = c.is_mla and c.qk_norm and d.phase == "decode"
    rules = (
        (d.gpus % d.tensor == 0, f"{of} does not divide {gpus}; use a divisor of it"),
        (d.tensor <= node, f"{of} is more than the GPUs of a node; {use}"),
        (c.n_heads % d.tensor == 0, f"{of} does not divide n_heads={c.n_heads}; {use}"),
        (whole, f"{takes}; use a multiple of {node}"),
        (in_node % d.tensor == 0, f"{takes}, which {of} does not divide; use a multiple of {node}"),
        (not moe or experts % d.gpus == 0, f"{gpus} do not divide {experts} experts; use fewer"),
        (moe or d.gpus == d.tensor, f"{gpus} share no experts; use {d.phase}_tensor={d.gpus}, or a copy a group"),
        (h.networked or d.gpus <= node, f"{h.title} has no slow link, want one for several nodes; plan one node"),
        (h.linked or d.gpus == 1, f"{h.title} has no fast link, want one for several GPUs in a node; plan one GPU"),
        (not expanded, "qk_norm=True has no absorbed form, which decoding is planned in; use qk_norm=False"),
    )
    return next((sentence for holds, sentence in rules if not holds), "")


class Service:
    """Model in the dtypes that it is served in, and the tokens of its users.

    Raises: ValueError for a cache that the model cannot have, and for hardware without units for a dtype.
    """

    def __init__(self, m: ModelFigures, inputs: Inputs, h: Hardware) -> None:
        r, c = inputs.request, m.config
        assert r.weight_dtype is not None and r.cache_dtype is not None
        self.m: ModelFigures = m
        self.c: ModelConfig = c
        self.h: Hardware = h
        self.a: Inputs = inputs
        self.weights: WeightFigures = WeightFigures(m, r.weight_dtype, main_tensors(c))
        self.cache: CacheFigures = CacheFigures(c, r.cache_dtype)
        self.dtype: WeightDtype = r.weight_dtype
        self.tokens: Mapping[Phase, Figure] = {"decode": inputs["context"], "prefill": inputs["prompt"]}
        narrow: WeightDtype = "fp8" if r.weight_dtype == "fp4" else r.weight_dtype  # all but experts
        plain = "float32" if r.weight_dtype == "float32" else "bfloat16"
        attended = (r.cache_dtype, plain) if r.cache_dtype == "fp8" else (plain,)
        self.expert_peak: Figure = h.rate(*PRODUCTS[r.weight_dtype])
        self.matrix_peak: Figure = h.rate(*PRODUCTS[narrow])
        self.plain_peak: Figure = h.rate(plain)
        self.attention_peak: Figure = h.rate(*attended)
        fp4, fp8 = self.expert_peak.name == "peak_fp4", self.attention_peak.name == "peak_fp8"
        self.expert_share: str = "expert_fp4_compute" if fp4 else "expert_compute"
        self.attention_share: str = "attention_fp8_compute" if fp8 else "attention_compute"
        self.index_peak: Figure = h.rate(*PRODUCTS[r.indexer_dtype or plain], plain)
        self.products: Mapping[Phase, tuple[float, float]] = {phase: self._products(phase) for phase in PHASES}
        """Multiply-adds of a token with its context, all layers: attention's, and an indexer's."""
        self.draft_weights: WeightFigures = WeightFigures(m, r.weight_dtype, mtp_tensors(c))
        """Weights of multi-token prediction."""
        self.rows_read: float = rows_read(c, int(self.tokens["decode"]), self.cache.dtype)

    @kept
    def rows(self, phase: Phase, gpus: int, tensor: int) -> tuple[Exchange, Exchange]:
        """Return the rows of experts on GPUs of which some share sequences: of an estimate, and the least."""
        in_node, stage = gpus_in_node(gpus, self.h.gpus_per_node), f"{phase}_"
        narrow = {"fp4": "fp8", "int8": "fp8", "int4": "bfloat16"}.get(self.dtype, self.dtype)
        # decoding across nodes sends a row for each expert, which takes least time to arrive
        one_hop = self.c.n_activated_experts if phase == "decode" and gpus > self.h.gpus_per_node else 0
        least = Exchange(self.c, gpus, in_node, self.dtype, stage=f"{stage}bound_", narrow=True, sharing=tensor)
        return Exchange(self.c, gpus, in_node, narrow, one_hop, stage, sharing=tensor), least

    def _products(self, phase: Phase) -> tuple[float, float]:
        n = int(self.tokens[phase])
        if phase == "decode":
            of, tokens = decode_flops_per_token(self.c, context=n).by_module, 1
        else:
            of, tokens = step_flops(self.c, batch_size=1, seq_len=n, training=False).by_module, n
        return of.get(OVER, 0) / 2 / tokens, of.get(SCORES, 0) / 2 / tokens


class ServingMemory:
    """Weights and cache of a GPU of a deployment."""

    def __init__(self, s: Service, d: Deployment) -> None:
        self.s: Service = s
        self.d: Deployment = d
        self.stage: str = f"{d.phase}_"
        self.titles: Mapping[str, str] = OF_PROMPTS if d.phase == "prefill" else {}
        self.tokens: Figure = s.tokens[d.phase]

    @figure()
    def gpu_experts(self) -> float:
        """Experts in each block that a GPU holds, with copies. Source: V3, section 3.4."""
        return (self.s.c.n_routed_experts + self.d.redundant) / self.d.gpus

    @figure()
    def group_sequences(self) -> float:
        """Sequences of GPUs that share theirs. Source: the batch, in equal parts."""
        return max(1, self.d.batch * self.d.tensor / self.d.gpus)

    @figure("B", main=True)
    def gpu_weights(self) -> float:
        """Weights that a GPU holds. Source: V3, section 3.4."""
        w = self.s.weights
        main = (w.divided_bytes + 2 * w.vocabulary_bytes) / self.d.tensor + w.whole_bytes
        main_and_experts = main + self.s.m.moe_layers * self.gpu_experts * w.expert_bytes
        return main_and_experts + self.draft_weights if self.d.drafts else main_and_experts

    @counted("B")
    def draft_weights(self) -> float:
        """Weights of multi-token prediction on a GPU, divided as those of the model, where it drafts."""
        return self.drafted(self.gpu_experts, self.d.tensor)

    def drafted(self, experts: float, parts: int) -> float:
        """Return the bytes of multi-token prediction on a GPU with this many experts, and parts of a feed-forward."""
        if not self.d.drafts:
            return 0
        w, moe = self.s.draft_weights, blocks(self.s.c)[3]
        heads = (w.divided_bytes - w.width_bytes) / self.d.tensor
        return moe * experts * w.expert_bytes + heads + w.width_bytes / parts + w.whole_bytes

    @figure()
    def cache_parts(self) -> float:
        """Parts of a sequence's cache that GPUs of a group divide. Source: V3, section 3.4: MLA has one for all."""
        c = self.s.c
        return min(self.d.tensor, c.kv_heads) if c.is_baseline else 1

    @counted("B/token")
    def draft_cache(self) -> int:
        """Cache of a token in the layers of multi-token prediction, where it drafts."""
        c = self.s.c
        return int(c.n_mtp_layers * self.s.cache.cache_row) if self.d.drafts and c.compress_ratios is None else 0

    @counted("B")
    def sequence_window(self) -> float:
        """Cache of a sequence that its length does not change, in V4, with that of drafts. Source: V4, section 2.3."""
        c, cache = self.s.c, self.s.cache
        if c.compress_ratios is None:
            return 0
        drafts = c.n_mtp_layers * fixed_layer_bytes(c, 0, int(cache.attention_row)) if self.d.drafts else 0
        return (cache.window_cache or 0) + drafts

    @figure("B")
    def sequence_cache(self) -> float:
        """Cache of a sequence on a GPU. Source: V3, section 3.4."""
        cache = self.s.cache.kv_cache + self.draft_cache if self.draft_cache else self.s.cache.kv_cache
        return (self.tokens * cache + self.sequence_window) / self.cache_parts

    @figure("B", main=True)
    def gpu_cache(self) -> float:
        """Cache that a GPU holds. Source: V3, section 3.4."""
        return self.group_sequences * self.sequence_cache

    @figure("B", main=True)
    def gpu_memory(self) -> float:
        """Weights and cache that a GPU holds. Source: V3, section 3.4."""
        return self.gpu_weights + self.gpu_cache

    @figure("B")
    def usable_memory(self) -> float:
        """Memory of a GPU that weights and cache may take."""
        return self.s.h.memory * self.s.a["memory_share"]

    @figure(main=True)
    def sequences_that_fit(self) -> float:
        """Sequences of this length that fit, of all GPUs. Source: V3, section 3.4."""
        of_group = floor(max(self.usable_memory - self.gpu_weights, 0) / self.sequence_cache)
        return of_group * self.d.gpus / self.d.tensor

    @property
    def misfit(self) -> str:
        """Sentence about a GPU that does not hold weights and cache, with what would; "" if it does."""
        d, fit = self.d, int(self.sequences_that_fit)
        if self.gpu_memory <= self.usable_memory:
            return ""
        fix = f"use more {d.phase}_gpus, or hardware with more memory"
        if fit and d.phase == "decode":
            fix = f"{(n := max(1, fit // d.gpus)):,} sequences of a GPU fit; use sequences={n}"
        takes = f"{human(self.gpu_memory, 'B')} of {self.s.dtype} weights and {self.s.cache.dtype} cache"
        share = f"{100 * self.s.a['memory_share']:.3g} % of {human(self.s.h.memory, 'B')}"
        return f"{d.phase} on {plural(d.gpus, 'GPU')} takes {takes}, more than {share}; {fix}"


class Served:
    """Step of a deployment: its time, the tokens that it gives and their price, as a bound and as an estimate."""

    def __init__(self, memory: ServingMemory) -> None:
        s, d = memory.s, memory.d
        self.memory: ServingMemory = memory
        self.s: Service = s
        self.d: Deployment = d
        self.stage: str = memory.stage
        self.titles: Mapping[str, str] = memory.titles
        self.decode: bool = d.phase == "decode"
        self.acceptance: Figure = s.a["acceptance"]
        rows = s.rows(d.phase, d.gpus, d.tensor)
        self.exchange: Exchange = rows[0]
        self.least: Exchange = rows[1]
        self.exchanges: int = s.m.moe_layers if d.gpus > d.tensor else 0
        """Layers whose rows cross a link: GPUs that all share their sequences have them."""

    # --- tokens and operations

    @figure("token")
    def positions(self) -> float:
        """Tokens of a sequence in a step."""
        return 1 + self.d.drafts if self.decode else self.memory.tokens

    @figure("token")
    def gpu_tokens(self) -> float:
        """Tokens of a GPU in a step, the mean."""
        return self.d.batch * self.positions / self.d.gpus

    @figure("FLOP")
    def matrix_flops(self) -> float:
        """Operations of a GPU in a step with matrices but routed experts. Source: 2 a multiply-add."""
        return 2 * self.gpu_tokens * self.s.weights.matrix_products

    @figure("FLOP")
    def expert_flops(self) -> float:
        """Operations of a GPU in a step with routed experts. Source: 2 a multiply-add."""
        return 2 * self.gpu_tokens * self.s.weights.expert_products

    @figure("FLOP")
    def plain_flops(self) -> float:
        """Operations of a GPU in a step with gates and the head, which a prompt's last token alone meets."""
        logits = self.gpu_tokens if self.decode else self.gpu_tokens / self.positions
        return 2 * (self.gpu_tokens * self.s.weights.other_products + logits * self.s.c.vocab_size * self.s.c.dim)

    @counted()
    def attention_products(self) -> float:
        """Multiply-adds of a token's attention to its context. Source: accounting's FLOPs of a step."""
        return self.s.products[self.d.phase][0]

    @counted()
    def index_products(self) -> float:
        """Multiply-adds of a token's indexers with its context. Source: accounting's FLOPs of a step."""
        return self.s.products[self.d.phase][1]

    @figure("s")
    def attended_time(self) -> float:
        """Time of a step in attention and indexers, at the peaks."""
        attended = 2 * self.gpu_tokens * self.attention_products / self.s.attention_peak
        if not self.index_products:
            return attended
        return attended + 2 * self.gpu_tokens * self.index_products / self.s.index_peak

    @counted("B")
    def sequence_read(self) -> float:
        """Cache of a sequence that a step reads: of an indexer's keys all, of others those that are chosen."""
        return self.s.rows_read

    @figure("B")
    def cache_read(self) -> float:
        """Cache that a GPU reads in a step. Source: every row of its sequences once."""
        return self.memory.group_sequences * self.sequence_read / self.memory.cache_parts if self.decode else 0

    def missed(self, tokens: float) -> float:
        """Return the share of the experts that these tokens do not choose."""
        c = self.s.c
        return (1 - c.n_activated_experts / c.n_routed_experts) ** tokens

    # --- the bound

    @figure()
    def bound_experts_read(self) -> float:
        """Experts in each block that a GPU reads, if all tokens of a sequence choose the same. Source: even routing."""
        return self.memory.gpu_experts * (1 - self.missed(self.d.batch * (1 if self.decode else self.positions)))

    @figure("B")
    def bound_weights_read(self) -> float:
        """Least weights that a GPU reads in a step. Source: every chosen matrix once, those of heads by each group."""
        w, d = self.s.weights, self.d
        heads, shared = (w.divided_bytes - w.width_bytes) / d.tensor, (w.width_bytes + w.vocabulary_bytes) / d.gpus
        experts = self.s.m.moe_layers * self.bound_experts_read * w.expert_bytes
        main = heads + shared + experts + w.whole_bytes - w.table_bytes
        return main + self.bound_draft_weights if d.drafts else main

    @counted("B")
    def bound_draft_weights(self) -> float:
        """Least weights of multi-token prediction that a GPU reads in a step, as those of the model."""
        return self.memory.drafted(self.bound_experts_read, self.d.gpus)

    @figure("B")
    def bound_cache_read(self) -> float:
        """Least cache that a GPU reads in a step. Source: every row once, by one of the GPUs."""
        return self.d.batch * self.sequence_read / self.d.gpus if self.decode else 0

    @figure("s", main=True)
    def bound_memory_time(self) -> float:
        """Least time of a step in memory traffic. Source: amount over rate."""
        return (self.bound_weights_read + self.bound_cache_read) / self.s.h.memory_bandwidth

    @figure("s", main=True)
    def bound_compute_time(self) -> float:
        """Least time of a step in matrix products. Source: amount over rate."""
        s = self.s
        products = self.matrix_flops / s.matrix_peak + self.expert_flops / s.expert_peak
        return products + self.plain_flops / s.plain_peak + self.attended_time

    @figure("s", main=True)
    def bound_slow_time(self) -> float:
        """Least time of a step between nodes. Source: amount over rate."""
        if not (self.exchanges and self.s.h.networked):
            return 0
        return self.gpu_tokens * self.exchanges * self.least.slow_row_bytes / self.s.h.slow_link

    @figure("s", main=True)
    def bound_fast_time(self) -> float:
        """Least time of a step within a node. Source: amount over rate."""
        if not (self.exchanges and self.s.h.linked):
            return 0
        return self.gpu_tokens * self.exchanges * self.least.fast_row_bytes / self.s.h.fast_link

    @figure("s")
    def bound_time(self) -> float:
        """Least time of a step: of its slowest part, since all overlap."""
        return max(self.bound_memory_time, self.bound_compute_time, self.bound_slow_time, self.bound_fast_time)

    # --- the estimate

    @figure()
    def fullest(self) -> float:
        """Tokens of a GPU with sequences over the mean of all."""
        return self.memory.group_sequences * self.d.gpus / (self.d.batch * self.d.tensor)

    @figure()
    def experts_read(self) -> float:
        """Experts in each block that a GPU reads in a micro-batch. Source: even routing."""
        return self.memory.gpu_experts * (1 - self.missed(self.d.batch * self.positions / self.d.micro_batches))

    @figure("B")
    def weights_read(self) -> float:
        """Weights but routed experts that a GPU reads in a micro-batch. Source: every matrix once."""
        w, whole = self.s.weights, self.s.weights.whole_bytes - self.s.weights.table_bytes
        divided = w.divided_bytes + w.vocabulary_bytes
        if self.decode and self.s.c.is_mla:
            return (divided + w.absorbed_bytes) / self.d.tensor + whole
        return divided / self.d.tensor + whole

    @figure("s", main=True)
    def matrices_time(self) -> float:
        """Time of a step with matrices but routed experts. Source: the slower of reading and computing."""
        a, products = self.s.a, self.matrix_flops / self.s.matrix_peak + self.plain_flops / self.s.plain_peak
        read = self.d.micro_batches * self.weights_read / self.s.h.memory_bandwidth
        return max(read / a["matrix_bandwidth"], self.fullest * products / a["matrix_compute"])

    @figure("s", main=True)
    def experts_time(self) -> float:
        """Time of a step with routed experts, of the fullest GPU. Source: the slower of reading and computing."""
        a, w = self.s.a, self.s.weights
        read = self.d.micro_batches * self.s.m.moe_layers * self.experts_read * w.expert_bytes
        computed = a["expert_imbalance"] * self.expert_flops / self.s.expert_peak
        return max(read / self.s.h.memory_bandwidth / a["expert_bandwidth"], computed / a[self.s.expert_share])

    @figure("s", main=True)
    def attention_time(self) -> float:
        """Time of a step in attention, of a GPU with sequences. Source: the slower of reading and computing."""
        a, read = self.s.a, self.cache_read / self.s.h.memory_bandwidth
        return max(read / a["attention_bandwidth"], self.fullest * self.attended_time / a[self.s.attention_share])

    @figure("s", main=True)
    def latency_time(self) -> float:
        """Time of a step in which kernels wait for each other. Source: a latency a layer and step."""
        return self.d.micro_batches * self.s.c.n_layers * self.s.a["layer_latency"] + self.s.a["step_latency"]

    @figure("s")
    def rows_time(self) -> float:
        """Time of a step in rows of experts, of the fullest GPU. Source: the slower link, and a latency each way."""
        if not self.exchanges:
            return 0
        a, slow, fast = self.s.a, self.exchange.slow_row_bytes, self.exchange.fast_row_bytes
        links = max(slow / self.s.h.slow_link if self.s.h.networked else 0, fast / self.s.h.fast_link)
        most = max(a["expert_imbalance"], self.fullest)
        sent = most * self.gpu_tokens * self.exchanges * links / a["link_efficiency"]
        return sent + 2 * self.d.micro_batches * self.exchanges * a["exchange_latency"]

    @figure("s", main=True)
    def links_time(self) -> float:
        """Time of a step on links: rows of experts, and two sums a layer of GPUs that share sequences."""
        if self.d.tensor == 1:
            return self.rows_time
        a, sent = self.s.a, self.fullest * self.gpu_tokens * 4 * self.s.c.dim * (self.d.tensor - 1)
        group = sent / self.s.h.fast_link / a["link_efficiency"] + self.d.micro_batches * a["reduce_latency"]
        return self.rows_time + 2 * self.s.c.n_layers * group

    @figure("s")
    def main_time(self) -> float:
        """Time of a step without drafts: work and links take turns, or overlap in two micro-batches."""
        work = self.matrices_time + self.experts_time + self.attention_time + self.latency_time
        return max(work, self.links_time) if self.d.micro_batches > 1 else work + self.links_time

    @figure("s", main=True)
    def draft_time(self) -> float:
        """Time of all drafts, each a block and the head. Source: V3, section 5.4.3."""
        head = self.s.weights.vocabulary_bytes / self.d.tensor / self.s.h.memory_bandwidth
        return self.d.drafts * (self.main_time / self.s.c.n_layers + head / self.s.a["matrix_bandwidth"])

    @figure("s")
    def estimate_time(self) -> float:
        """Time of a step. Source: the sum of its parts."""
        return self.main_time + self.draft_time if self.d.drafts else self.main_time

    @property
    def waits(self) -> dict[str, float]:
        """Seconds of the parts of a step by their words: of the estimate."""
        return {name.removesuffix("_time"): time for name in PARTS if (time := getattr(self, name))}

    # --- what a step gives

    @figure()
    def tokens_per_step(self) -> float:
        """Tokens of a sequence that a step gives. Source: Leviathan et al.: 1 + p + ... + p^d."""
        if self.decode:
            return (1 - self.acceptance ** (self.d.drafts + 1)) / (1 - self.acceptance) if self.d.drafts else 1
        return self.positions

    @figure("s", main=True)
    def time(self) -> float:
        """Time of an output token, an estimate."""
        return self.estimate_time / self.tokens_per_step if self.decode else self.estimate_time

    @figure("s", main=True)
    def least_time(self) -> float:
        """Least time of an output token."""
        return self.bound_time / self.tokens_per_step if self.decode else self.bound_time

    @figure("token/s", main=True)
    def tokens_per_second(self) -> float:
        """Tokens/s of a sequence, an estimate."""
        return self.tokens_per_step / self.estimate_time

    @figure("token/s", main=True)
    def most_tokens_per_second(self) -> float:
        """Most tokens/s of a sequence."""
        return self.tokens_per_step / self.bound_time

    @figure("token/s", main=True)
    def gpu_tokens_per_second(self) -> float:
        """Tokens/s of a GPU, an estimate."""
        return self.d.batch * self.tokens_per_second / self.d.gpus

    @figure("token/s", main=True)
    def most_gpu_tokens_per_second(self) -> float:
        """Most tokens/s of a GPU."""
        return self.d.batch * self.most_tokens_per_second / self.d.gpus

    @figure("$/token", main=True)
    def cost(self) -> float | None:
        """Rent of a token at the low end, an estimate."""
        return self.s.h.price / self.gpu_tokens_per_second if self.s.h.price is not None else None

    @figure("$/token", main=True)
    def cost_most(self) -> float | None:
        """Rent of a token at the high end, an estimate."""
        return self.s.h.price_most / self.gpu_tokens_per_second if self.s.h.price_most is not None else None


def serve(service: Service, d: Deployment) -> Served:
    """Return what a deployment gives; it may not fit. Raises: ValueError for a deployment that cannot be."""
    require(not (said := misfit(d, service.c, service.h)), said)
    return Served(ServingMemory(service, d))
