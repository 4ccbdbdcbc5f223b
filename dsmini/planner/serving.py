"""Serving: memory of a GPU of a deployment, the time of its step, and what drafts gain.

A step reads the weights that its tokens use, reads the cache of its sequences, computes, and exchanges rows of
experts:

    memory     (weights read + cache read) / (memory bandwidth * memory_efficiency)
    compute    (FLOPs in the weights' dtype / its peak + the other FLOPs / their peak) / serving_efficiency
    links      imbalance * bytes sent / (the link's rate * link_efficiency), each link for itself

It takes at least as long as the slowest of these: all overlap, which two micro-batches are for, and launches, norms and
sampling are left out. With memory_efficiency and serving_efficiency of 1, as they are unless you choose, no step is
faster; real ones take longer.

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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from dsmini.accounting.flops import context_products, twice_the_keys
from dsmini.accounting.tensors import SIZES, divisors, main_tensors
from dsmini.accounting.traffic import expected_experts
from dsmini.config import ModelConfig
from dsmini.planner.exchange import Exchange
from dsmini.planner.figure import Figure, Figures, figures_of, given, renamed
from dsmini.planner.hardware import Hardware
from dsmini.planner.layout import Rule, check
from dsmini.planner.model import CacheFigures, ModelFigures, WeightFigures
from dsmini.planner.request import DTYPES, Assumptions, Inputs, Model, PlanRequest, presets
from dsmini.planner.search import gpu_counts, usual_precision
from dsmini.planner.training import Links
from dsmini.reading import listed
from dsmini.report.units import human, plural

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
V3 = "V3, section 3.4"


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
    """How it was chosen."""


def rules(d: Deployment, c: ModelConfig, hardware: Hardware) -> Iterator[Rule]:
    """Yield what a deployment must meet, and the sentence for one that does not."""
    node, title = hardware.gpus_per_node, hardware.title
    of, use = f"{d.stage}_tensor={d.tensor}", listed([str(n) for n in divisors(c.n_heads, hardware.node)])
    yield d.gpus % d.tensor == 0, lambda: f"{of} does not divide {d.stage}_gpus={d.gpus}; use a divisor of it"
    yield d.tensor <= node, lambda: f"{of} is more than the GPUs of a node; use one of {use}"
    yield c.n_heads % d.tensor == 0, lambda: f"{of} does not divide n_heads={c.n_heads}; use one of {use}"
    experts = c.n_routed_experts + d.redundant
    yield (
        experts % d.gpus == 0,
        lambda: (
            f"{d.stage}_redundant={d.redundant} makes {experts} experts, which {d.stage}_gpus={d.gpus} do not divide; "
            f"use {d.redundant + -experts % d.gpus}"
        ),
    )
    one_node = hardware.networked or d.gpus <= node
    yield one_node, lambda: f"{title} has no slow link, want one for several nodes; plan one node"
    linked = hardware.linked or d.gpus == 1
    yield linked, lambda: f"{title} has no fast link, want one for several GPUs in a node; plan one GPU"
    absorbed = not (c.is_mla and c.qk_norm and d.stage == "decode")
    yield absorbed, lambda: "qk_norm=True has no absorbed form, which decoding is planned in; use qk_norm=False"


@dataclass(frozen=True, kw_only=True)
class Work:
    """Requests that are served, and the model in its dtypes."""

    m: ModelFigures
    weights: WeightFigures
    cache: CacheFigures
    dtype: str
    """Dtype of the weights."""
    context: Figure
    prompt: Figure
    sequences: Figure


class Deployed:
    """Sizes and memory of a deployment.

    Attributes:
        gpu_experts: Experts in each block that a GPU holds. Source: V3, section 3.4.
        gpu_weights: Weights that a GPU holds. Source: V3, section 3.4.
        sequence_cache: Cache of a sequence on a GPU, a token. Source: V3, section 3.4.
        gpu_cache: Cache that a GPU holds. Source: V3, section 3.4.
        gpu_memory: Weights and cache that a GPU holds. Source: V3, section 3.4.
        sequences_that_fit: Sequences of this length that fit. Source: V3, section 3.4.
        longest_context: Longest context of these sequences. Source: V3, section 3.4.
    """

    def __init__(self, w: Work, d: Deployment, memory: Figure) -> None:
        self._w, self._d = w, d
        c, where, stage = w.m.config, d.how, d.stage
        self.tensor_parallel = given(d.tensor, "", "GPUs that divide attention's heads", where)
        self.expert_parallel = given(d.gpus, "", "GPUs that divide the experts", where)
        self.redundant_experts = given(d.redundant, "", "Copies of experts beyond one of each", where)
        self.micro_batches = given(d.micro_batches, "", "Micro-batches of a step", where)
        self.gpu_experts = Figure(
            (c.n_routed_experts + d.redundant) / d.gpus, "", "(n_routed_experts + redundant_experts) / expert_parallel"
        )
        held, formula = self.bytes_of(self.gpu_experts, "gpu_experts", absorbed=False)
        self.gpu_weights = Figure(
            held + w.weights.vocabulary_bytes / d.tensor, "B", f"{formula} + vocabulary_bytes / tensor_parallel"
        )
        heads = c.kv_heads
        self.sequence_cache = Figure(
            w.cache.kv_cache * (d.tensor if c.is_mla else d.tensor / min(d.tensor, heads)),
            "B/token",
            "kv_cache * tensor_parallel" + ("" if c.is_mla else f" / min(tensor_parallel, {heads})"),
        )
        mine = d.micro_batches * (w.sequences if stage == "decode" else 1)
        tokens, of = (w.context, "context") if stage == "decode" else (w.prompt, "prompt")
        formula = "micro_batches * sequences" if stage == "decode" else "micro_batches"
        self.mine = float(mine)
        self.gpu_cache = Figure(mine * tokens * self.sequence_cache, "B", f"{formula} * {of} * sequence_cache")
        self.gpu_memory = Figure(self.gpu_weights + self.gpu_cache, "B", "gpu_weights + gpu_cache")
        # inside a stage gpu_memory is the stage's own; the accelerator's is memory_of_gpu
        left, free = max(memory - self.gpu_weights, 0), "max(memory_of_gpu - gpu_weights, 0)"
        self.sequences_that_fit = Figure(
            left // (tokens * self.sequence_cache), "", f"floor({free} / ({of} * sequence_cache))"
        )
        self.longest_context = Figure(
            left // (mine * self.sequence_cache), "token", f"floor({free} / ({formula} * sequence_cache))"
        )

    def bytes_of(self, experts: float, name: str, absorbed: bool) -> tuple[float, str]:
        """Return the bytes of all blocks and the head, with this many experts in each MoE block, and the formula."""
        w, d = self._w.weights, self._d
        up, of_up = (w.absorbed_bytes, "absorbed_bytes") if absorbed else (w.latent_up_bytes, "latent_up_bytes")
        divided = (w.head_matrices_bytes + up + w.vocabulary_bytes) / d.tensor
        shared = 0 if d.shared_remote else w.shared_experts_bytes
        held = divided + self._w.m.moe_layers * experts * w.expert_bytes + shared + w.whole_bytes
        formula = f"(head_matrices_bytes + {of_up} + vocabulary_bytes) / tensor_parallel "
        formula += f"+ moe_layers * {name} * expert_bytes + whole_bytes"
        return held, formula + ("" if d.shared_remote else " + shared_experts_bytes")


class ServedStep:
    """Times of a step of a deployment, and what they are computed from.

    Raises: ValueError for hardware without units for the weights' dtype.

    Attributes:
        rows: Tokens of a GPU in a micro-batch.
        experts_read: Experts in each block that a GPU reads in a micro-batch. Source: even routing.
        weights_read: Weights that a GPU reads in a step. Source: every chosen matrix once.
        cache_read: Cache that a GPU reads in a step. Source: every row of its sequences once.
        memory_time: Time of a step in memory traffic. Source: amount over rate.
        step_time: Time of a step whose parts all overlap. Source: the slowest part: at least this.
        pair_products: Multiply-adds of a token with its context, a block. Source: accounting's context_products.
        matrix_flops: Operations of a GPU in a step in the weights' dtype. Source: 2 a multiply-add.
        other_flops: Operations of a GPU in a step on attention, gates and head. Source: 2 a multiply-add.
        compute_time: Time of a step in matrix products. Source: amount over rate.
        slow_bytes: Bytes to other nodes, a step. Source: V3, section 3.4.
        fast_bytes: Bytes that a GPU sends in its node in a step. Source: V3, section 3.4.
        slow_link_time: Time of a step between nodes. Source: amount over rate.
        fast_link_time: Time of a step within a node. Source: amount over rate.
    """

    def __init__(
        self, w: Work, d: Deployment, of: Deployed, x: Exchange | None, h: Hardware, a: Assumptions, positions: int = 1
    ) -> None:
        """Compute the times.

        Args:
            positions: tokens of each decoding sequence: 1, or drafts to verify. They share one read of its cache.
        """
        self._w, self._d, self._of, self._h, self._a = w, d, of, h, a
        c, decode, parts = w.m.config, d.stage == "decode", d.micro_batches
        absorbed = decode and c.is_mla
        rows, formula = float(w.prompt), "prompt"
        if decode:
            rows = float(w.sequences * positions)
            formula = "sequences" if positions == 1 else f"sequences * {positions}"
        self.rows = Figure(rows, "", formula)
        read = expected_experts(c, int(rows) * d.gpus)
        e, k = "n_routed_experts", "n_activated_experts"
        self.experts_read = Figure(
            of.gpu_experts * read / c.n_routed_experts,
            "",
            f"gpu_experts * (1 - (1 - {k} / {e}) ** (rows * expert_parallel))",
        )
        weights, formula = of.bytes_of(self.experts_read, "experts_read", absorbed)
        self.weights_read = Figure(parts * weights, "B", f"micro_batches * ({formula})")
        cache, formula = self._cache(c) if decode else (0.0, "0")
        self.cache_read = Figure(cache, "B", formula)
        bandwidth = h.memory_bandwidth * a.memory_efficiency
        self.memory_time = Figure(
            (self.weights_read + self.cache_read) / bandwidth,
            "s",
            "(weights_read + cache_read) / (memory_bandwidth * memory_efficiency)",
        )
        self._compute(c, absorbed, decode)
        self._links(c, x)
        self.waits = {words: float(time) for name, words in RESOURCES.items() if (time := getattr(self, name))}
        self.step_time = Figure(max(self.waits.values()), "s", f"max({', '.join(RESOURCES)})")

    def _cache(self, c: ModelConfig) -> tuple[float, str]:
        """Return the bytes of cache that a decoding step reads, and the formula."""
        w, of = self._w, self._of
        row, formula = float(of.sequence_cache), "sequence_cache"
        if c.index_topk is not None:  # an indexer's keys are read whole, and of attention's rows those that it picked
            index, met = w.cache.index_row, min(w.context, c.index_topk)
            row *= (index + (w.cache.cache_row - index) * met / w.context) / w.cache.cache_row
            formula += " * (index_row + (cache_row - index_row) * min(context, index_topk) / context) / cache_row"
        return self._d.micro_batches * w.sequences * w.context * row, f"micro_batches * sequences * context * {formula}"

    def _compute(self, c: ModelConfig, absorbed: bool, decode: bool) -> None:
        w, d, a, h = self._w, self._d, self._a, self._h
        over = [use for use in main_tensors(c) if use.place == "block" and not use.shape]
        if decode:
            pairs = sum(context_products(c, use, int(w.context), absorbed=True) for use in over)
            logits, of_logits = float(self.rows), "rows"
        else:
            halves = (Fraction(twice_the_keys(use.most_keys, int(w.prompt))) / 2 * use.per_pair for use in over)
            pairs, logits, of_logits = float(sum(halves)), 1.0, "1"
        matrices, others = w.weights.matrix_products, w.weights.other_products
        up = w.weights.latent_up_products
        of_matrices, of_others = "matrix_products", "other_products + latent_up_products"
        if not absorbed:
            of_matrices, of_others = "matrix_products + latent_up_products", "other_products"
        # the fullest GPU has more tokens of routed experts than the mean
        fuller = (a.imbalance - 1) * w.m.moe_layers * c.n_activated_experts * w.m.expert_parameters
        of_fuller = "(imbalance - 1) * moe_layers * n_activated_experts * expert_parameters"
        self.pair_products = Figure(pairs, "", f"{pairs!r}")
        rows, parts = self.rows, d.micro_batches
        self.matrix_flops = Figure(
            2 * parts * rows * (matrices + (0 if absorbed else up) + fuller),
            "FLOP",
            f"2 * micro_batches * rows * ({of_matrices} + {of_fuller})",
        )
        plain = rows * (others + up if absorbed else others) + c.n_layers * rows * pairs
        self.other_flops = Figure(
            2 * parts * (plain + logits * w.m.vocabulary_parameters),
            "FLOP",
            f"2 * micro_batches * (rows * ({of_others} + n_layers * pair_products) "
            f"+ {of_logits} * vocabulary_parameters)",
        )
        other = "float32" if w.dtype == "float32" else "bfloat16"
        self.compute_time = Figure(
            (self.matrix_flops / h.peak(w.dtype) + self.other_flops / h.peak(other)) / a.serving_efficiency,
            "s",
            f"(matrix_flops / peak_{w.dtype} + other_flops / peak_{other}) / serving_efficiency",
        )

    def _links(self, c: ModelConfig, x: Exchange | None) -> None:
        w, d, a, links = self._w, self._d, self._a, Links(self._h, self._a)
        sent, of_sent = d.micro_batches * self.rows * w.m.moe_layers, "imbalance * micro_batches * rows * moe_layers"
        several = x is not None and d.gpus > self._h.gpus_per_node
        slow = a.imbalance * sent * x.slow_row_bytes if x is not None and several else 0.0
        fast, formula = 0.0, []
        if x is not None:
            fast, formula = a.imbalance * sent * x.fast_row_bytes, [f"{of_sent} * fast_row_bytes"]
        if d.tensor > 1:
            gathered = c.dim if not c.is_mla or c.q_lora_rank is None else c.q_lora_rank
            width = gathered + (c.kv_lora_rank + c.qk_rope_head_dim if c.is_mla else 0) + c.dim
            size = SIZES[w.dtype]
            fast += d.micro_batches * self.rows * c.n_layers * size * width * (d.tensor - 1)
            formula.append(f"micro_batches * rows * n_layers * {size} * {width} * (tensor_parallel - 1)")
        self.slow_bytes = Figure(slow, "B", f"{of_sent} * slow_row_bytes" if several else "0")
        self.fast_bytes = Figure(fast, "B", " + ".join(formula) or "0")
        self.slow_link_time = Figure(
            slow / links.slow_rate if slow else 0, "s", "slow_bytes / slow_rate" if slow else "0"
        )
        self.fast_link_time = Figure(
            fast / links.fast_rate if fast else 0, "s", "fast_bytes / fast_rate" if fast else "0"
        )


class Served:
    """Times of decoding, of prompts, and of drafts where there are some, of deployments.

    Attributes:
        decode_sequences: Sequences that a GPU decodes.
        decode_time_per_token: Least time of an output token. Source: INS, section 2.3.2.
        decode_tokens_per_second: Most tokens/s of a sequence. Source: INS, section 2.3.2.
        decode_gpu_tokens_per_second: Most tokens/s of a GPU. Source: INS, section 2.3.2.
        prefill_time_to_first_token: Least time to the first token. Source: V3, section 3.4.1.
        prefill_gpu_tokens_per_second: Most prompt tokens/s of a GPU. Source: V3, section 3.4.1.
        decode_cost: Least rent of an output token.
        prefill_cost: Least rent of a prompt token.
    """

    def __init__(self, w: Work, h: Hardware, a: Assumptions, inputs: Inputs, decode: Deployment, prefill: Deployment):
        c = w.m.config
        self.deployments = {"decode": decode, "prefill": prefill}
        self.deployed = {stage: Deployed(w, d, h.memory) for stage, d in self.deployments.items()}
        self.exchanges: dict[str, Exchange] = {}
        for stage, d in self.deployments.items():
            each = None if d.two_hop else c.n_activated_experts + c.n_shared_experts * d.shared_remote
            if d.gpus > 1:
                names = ("expert_parallel", "gpus_per_node")
                self.exchanges[stage] = Exchange(c, d.gpus, h.gpus_per_node, w.dtype, names, each)
        self.steps = {
            stage: ServedStep(w, d, self.deployed[stage], self.exchanges.get(stage), h, a)
            for stage, d in self.deployments.items()
        }
        step, prompt = self.steps["decode"].step_time, self.steps["prefill"].step_time
        self.decode_sequences = Figure(self.deployed["decode"].mine, "", "decode_micro_batches * sequences")
        self.decode_time_per_token = Figure(step, "s/token", "decode_step_time")
        self.decode_tokens_per_second = Figure(1 / step, "token/s", "1 / decode_step_time")
        self.decode_gpu_tokens_per_second = Figure(
            self.decode_sequences / step, "token/s", "decode_sequences / decode_step_time"
        )
        self.prefill_time_to_first_token = Figure(prompt, "s", "prefill_step_time")
        self.prefill_gpu_tokens_per_second = Figure(
            prefill.micro_batches * w.prompt / prompt, "token/s", "prefill_micro_batches * prompt / prefill_step_time"
        )
        self.decode_cost: Figure | None = None
        self.prefill_cost: Figure | None = None
        if h.price is not None:
            cost, formula = h.price / self.decode_gpu_tokens_per_second, "gpu_price / decode_gpu_tokens_per_second"
            self.decode_cost = Figure(cost, "$/token", formula)
            cost, formula = h.price / self.prefill_gpu_tokens_per_second, "gpu_price / prefill_gpu_tokens_per_second"
            self.prefill_cost = Figure(cost, "$/token", formula)
        self.drafts: Drafts | None = None
        if c.n_mtp_layers and inputs.request.drafts:
            self.drafts = Drafts(w, h, a, inputs, self)

    @property
    def figures(self) -> Figures:
        """All figures by name; those of a stage begin with its name."""
        found, names = figures_of(self), dict[str, str]()
        for stage, d in reversed(self.deployed.items()):
            parts = [*filter(None, (d, self.exchanges.get(stage), self.steps[stage]))]
            names = _names(stage, parts)  # decode's are the last
            found |= _staged(names, parts)
        if self.drafts is not None:
            found |= figures_of(self.drafts) | _staged(names | _names("verify", [self.drafts.step]), [self.drafts.step])
        return found


def _names(stage: str, parts: Sequence[object]) -> dict[str, str]:
    """Return the whole names of the figures of a stage."""
    return {name: f"{stage}_{name}" for part in parts for name in figures_of(part)} | {"memory_of_gpu": "gpu_memory"}


def _staged(names: Mapping[str, str], parts: Sequence[object]) -> dict[str, Figure]:
    """Return the figures of a stage by their whole names, which their formulas then have too."""
    every = {names[name]: figure for part in parts for name, figure in figures_of(part).items()}
    return {n: Figure(f, f.unit, renamed(f.formula, names), f.title, f.source) for n, f in every.items()}


class Drafts:
    """Gain of tokens that multi-token prediction drafts. A draft is one more block, and reads the head.

    Attributes:
        draft_time: Time of a draft: a block and the head. Source: V3, section 5.4.3.
        tokens_per_step: Tokens of a step, before overhead. Source: V3, section 5.4.3.
        speculative_step: Time of all drafts and of the step that verifies them. Source: V3, section 5.4.3.
        speculation_gain: Speedup by drafts. Source: V3, section 5.4.3.
    """

    def __init__(self, w: Work, h: Hardware, a: Assumptions, inputs: Inputs, served: Served) -> None:
        n = inputs.request.drafts
        d, of, plain = served.deployments["decode"], served.deployed["decode"], served.steps["decode"].step_time
        acceptance = inputs.request.acceptance
        self.step = ServedStep(w, d, of, served.exchanges.get("decode"), h, a, positions=n + 1)
        bandwidth = h.memory_bandwidth * a.memory_efficiency
        self.draft_time = Figure(
            plain / w.m.config.n_layers + d.micro_batches * w.weights.vocabulary_bytes / d.tensor / bandwidth,
            "s",
            "decode_step_time / n_layers + decode_micro_batches * vocabulary_bytes / decode_tensor_parallel "
            "/ (memory_bandwidth * memory_efficiency)",
        )
        self.tokens_per_step = Figure(
            (1 - acceptance ** (n + 1)) / (1 - acceptance), "", "(1 - acceptance ** (drafts + 1)) / (1 - acceptance)"
        )
        self.speculative_step = Figure(
            self.step.step_time + n * self.draft_time, "s", "verify_step_time + drafts * draft_time"
        )
        self.speculation_gain = Figure(
            self.tokens_per_step * plain / self.speculative_step,
            "",
            "tokens_per_step * decode_step_time / speculative_step",
        )


# --- what a user leaves open


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Complete request for serving: what is served, and by which GPUs."""

    request: PlanRequest
    sources: dict[str, str]
    work: Work
    decode: Deployment
    prefill: Deployment
    misfit: dict[str, str]
    """Sentences about deployments that do not hold weights and cache, with what would, by stage."""


def choose_serving(
    r: PlanRequest, sources: dict[str, str], model: Model, m: ModelFigures, h: Hardware, published: bool
) -> Serving:
    """Return both deployments, and as many sequences as fit where the user leaves them open.

    Args:
        published: the model has DeepSeek-V3's sizes, or is varied from it.

    Raises: ValueError for what the model or the hardware cannot have.
    """
    longest = m.config.max_seq_len
    for name in ("context", "prompt"):
        tokens = getattr(r, name) or 1
        if tokens > longest:
            raise ValueError(f"{name}={tokens} is longer than the model's max_seq_len={longest}; shorten it")
    context = r.context or min(CONTEXT, longest)
    precision = usual_precision(model, h)  # however training multiplies
    filled = {"context": context, "prompt": context, "weight_dtype": DTYPES[precision], "cache_dtype": "bfloat16"}  # pyright: ignore
    r, sources = fill(r, sources, "chosen", filled)
    weights, cache = WeightFigures(m, r.weight_dtype), CacheFigures(m, r.cache_dtype)

    def work(r: PlanRequest) -> Work:
        inputs = Inputs(request=r if r.sequences else replace(r, sequences=1), sources=sources)
        tokens = {name: inputs.of(name, "token") for name in ("context", "prompt")}
        return Work(
            m=m, weights=weights, cache=cache, dtype=str(r.weight_dtype), sequences=inputs.of("sequences"), **tokens
        )

    found: dict[StageName, Deployment] = {}
    for stage in STAGES:
        found[stage] = _deployment(r, stage, work(r), h, published)
    one = Deployed(work(replace(r, sequences=1)), found["decode"], h.memory)
    fit = int(one.sequences_that_fit / found["decode"].micro_batches)
    r, sources = fill(r, sources, "chosen", {"sequences": max(1, min(SEQUENCES, fit))})
    done = work(r)
    misfit = {stage: text for stage, d in found.items() if (text := _misfit(d, Deployed(done, d, h.memory), h))}
    return Serving(request=r, sources=sources, work=done, misfit=misfit, **found)


def fill(
    r: PlanRequest, sources: dict[str, str], source: str, values: dict[str, object]
) -> tuple[PlanRequest, dict[str, str]]:
    """Return a request with values for the fields that are open, and where all come from."""
    open_ = {name: value for name, value in values.items() if getattr(r, name) is None}
    return replace(r, **open_), {**dict.fromkeys(values, source), **sources}  # pyright: ignore


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
        parts = 1 if gpus == 1 else 2
        two_hop = stage == "prefill"
        return Deployment(
            stage=stage, gpus=gpus, tensor=tensor, redundant=spare, micro_batches=parts, two_hop=two_hop, how=how
        )

    tried = [made(gpus, tensor or 1, "as chosen")] if gpus is not None else []
    if gpus is None:
        tried = [made(*each) for each in _tried(stage, tensor, w.m.config, h, published)]
    for d in tried or [made(tensor or 1, tensor or 1, "")]:
        check(rules(d, w.m.config, h))
        h.peak(w.dtype)
        if Deployed(w, d, h.memory).gpu_memory <= h.memory:
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


def _misfit(d: Deployment, memory: Deployed, h: Hardware) -> str:
    """Return one sentence for a deployment that does not hold weights and cache, with what would; "" if it does."""
    if memory.gpu_memory <= h.memory:
        return ""
    fix = f"use more {d.stage}_gpus, or hardware with more memory"
    if d.stage == "decode" and (fit := int(memory.sequences_that_fit / d.micro_batches)):
        fix = f"use sequences={fit}"
    elif memory.longest_context >= 1:
        fix = f"use {'context' if d.stage == 'decode' else 'prompt'}={memory.longest_context:.0f}"
    takes = f"weights and cache take {memory.gpu_memory} of {human(h.memory, 'B')}"
    return f"{d.stage} on {plural(d.gpus, 'GPU')} does not fit: {takes}; {fix}"
