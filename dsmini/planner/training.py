"""Training: memory of each GPU, and the time of an optimizer step from its parts.

Memory. A parameter of a matrix takes 2 + 4 + 4 + 8 = 18 bytes in BF16 (weight, FP32 gradient, master weight,
moments), and 1 + 4 + 4 + 4 = 13 with FP8 and BF16 moments. ZeRO divides them over the GPUs that hold the same: `data`
of them for a matrix, data * tensor / expert for an expert, twice as many with DualPipe, whose halves hold the same
stages. Activations are those of the micro-batches in flight. It is a lower bound: buffers of communication and
temporary results are left out.

Time. The slowest stage (stages.py) sets the pace of all. It computes at the peaks times the shares that are reached
while computing; where experts are shared, a share of each GPU carries their rows in place of computing. Rows of experts
are exchange.py's. With DualPipe a forward and a backward hide each other's rows. A bubble is

    1F1B (PP - 1) (F + B)       ZB1P (PP - 1) (F + B - 2 W)       DualPipe (PP / 2 - 1) (F&B + B - 3 W)

Ranks are numbered tensor first, then data, then pipeline: so gradients stay in a node if data * tensor GPUs fit one.

Estimates: two all-reduces a layer of matrices that `tensor` GPUs share are not hidden. ZeRO 0 and 1 exchange once a
step, not hidden; ZeRO 2 and 3 in every micro-batch, hidden by computing. Activations between stages are hidden. All
weights are sent as wide as those of matrices. Parts of a sequence gather the keys and values of all its layers in
each pass, not hidden; the work of a causal mask is divided evenly.

Source: DeepSeek-V3 report, sections 3.2 and 3.3, table 2; ZeRO (arXiv 1910.02054); INS, table 4.
"""

from functools import cached_property

from dsmini.accounting.memory import kv_bytes_per_token
from dsmini.accounting.tensors import BLOCK, SIZES, Dtype
from dsmini.config.fields import require
from dsmini.planner.exchange import Exchange
from dsmini.planner.figure import counted, figure
from dsmini.planner.hardware import Hardware
from dsmini.planner.layout import Layout, gpus_in_node
from dsmini.planner.model import RATES, ModelFigures
from dsmini.planner.request import DTYPES, Inputs
from dsmini.planner.stages import GpuStages, Pipeline, fastest_pipeline

ZERO3_GATHERED = 2
"""Layers whose weights ZeRO 3 holds whole: the one at work and the one that is fetched."""
PARTS = {
    "computing_seconds": "compute",
    "dispatching_seconds": "rows of experts",
    "reducing_seconds": "all-reduces of shared matrices",
    "bubble_seconds": "waiting in the pipeline",
    "exchange_seconds": "gradients and weights between GPUs",
    "update_seconds": "update of the weights",
}
"""Parts of a step, one after the other, with the words of a verdict."""


class Training:
    """Memory and time of a step in a layout. Raises: ValueError for a precision or a link that the hardware lacks."""

    def __init__(self, m: ModelFigures, h: Hardware, a: Inputs, r: Layout) -> None:
        self.m: ModelFigures = m
        self.h: Hardware = h
        self.a: Inputs = a
        self.layout: Layout = r
        in_node = gpus_in_node(r.expert, h.gpus_per_node)
        self.exchange: Exchange = Exchange(m.config, r.expert, in_node, DTYPES[r.precision])
        self.dtype: Dtype = "float32" if r.precision == "fp32" else "bfloat16"
        self.master = 0 if r.precision == "fp32" else 4
        """Bytes of a master weight."""
        self.communication = a["communication_share"] if r.expert > 1 else 0
        """Share of a GPU that carries rows of experts."""
        self.local_experts: float = m.config.n_routed_experts / r.expert * m.expert_parameters
        """Numbers of the routed experts of a layer on a GPU."""
        h.check_links(r.gpus)
        able = [f"precision={name}" for name, dtype in DTYPES.items() if dtype in h.peaks]
        said = f"{h.title} has no {DTYPES[r.precision]} units for training in precision={r.precision}; "
        require(f"precision={r.precision}" in able, f"{said}use {' or '.join(able)}")

    # --- the layout

    @figure()
    def data(self) -> float:
        """Parts of the batch (data parallelism). Source: V3, section 3.2."""
        r = self.layout
        return r.gpus / (r.pipeline * r.tensor * r.context_parallel)

    @figure()
    def expert_data(self) -> float:
        """Copies of the experts of a stage. Source: V3, section 3.2."""
        return self.layout.gpus / self.layout.pipeline / self.layout.expert

    @figure()
    def micro_batches(self) -> float:
        """Micro-batches of a pipeline, a step."""
        return self.layout.batch / (self.data * self.layout.micro_batch)

    @figure("token")
    def micro_batch_tokens(self) -> float:
        """Tokens of a micro-batch on a GPU."""
        return self.layout.micro_batch * self.m.seq_len / self.layout.tensor / self.layout.context_parallel

    # --- bytes of a parameter of a matrix

    @figure("B")
    def state_weight(self) -> float:
        """Weight for products. Source: V3, section 3.3.3."""
        if self.layout.precision == "fp8":
            return 1 + 4 / BLOCK**2
        return SIZES[DTYPES[self.layout.precision]]

    @figure("B")
    def state_gradient(self) -> float:
        """Gradient of a parameter. Source: V3, section 3.3.3."""
        return 4

    @figure("B")
    def state_optimizer(self) -> float:
        """Master weight and moments of a parameter; FP32 needs no master. Source: V3, section 3.3.3."""
        return self.master + (2 * SIZES[self.layout.moments] if self.layout.optimizer == "adamw" else 4)

    # --- the pipeline

    @figure("FLOP/s")
    def plain_rate(self) -> float:
        """Rate of other products."""
        return self.h.peak(self.dtype) * self.a["bf16_efficiency"] * (1 - self.communication)

    @figure("FLOP/s")
    def fp8_rate(self) -> float:
        """Rate of products of attention and feed-forwards."""
        if self.layout.precision == "fp8":
            return self.h.peak("fp8") * self.a["fp8_efficiency"] * (1 - self.communication)
        return self.plain_rate

    @cached_property
    def pipeline(self) -> Pipeline:
        """Stages whose slowest GPU is fastest, forward and backward."""
        seconds = self.m.seconds(self.layout.recompute, self.fp8_rate, self.plain_rate, self.a["imbalance"])
        return fastest_pipeline(self.m, self.layout.pipeline, self.layout.schedule, seconds)

    def slowest_stage(self, phase: str) -> tuple[float, ...]:
        """Return the operations of a token in the slowest stage: FP8, those of routed experts, and plain."""
        of, worked = self.m.operations(self.layout.recompute), self.pipeline.slowest.worked
        return tuple(sum(n * of[part][phase, rate] for part, n in worked.items()) for rate in RATES)

    # --- memory

    @cached_property
    def gpus(self) -> dict[str, "Gpu"]:
        """GPUs that can hold most, by their place in the pipeline."""
        return {place.name: Gpu(self, place) for place in self.pipeline.places}

    @cached_property
    def fullest(self) -> "Gpu":
        """GPU that holds most."""
        return max(self.gpus.values(), key=lambda gpu: gpu.memory)

    @counted("B")
    def memory_again(self) -> float:
        """A block that is made again, and layers whose weights are gathered."""
        _, again = self.m.saved(SIZES[self.dtype], self.layout.precision == "fp8", self.layout.recompute)
        if self.layout.zero < 3:
            return again * self.micro_batch_tokens
        matrices, _ = self.m.local(self.layout.tensor)
        widest = max(matrices["dense"], matrices["moe"] + self.local_experts)
        return again * self.micro_batch_tokens + ZERO3_GATHERED * widest * self.state_weight

    @figure("B", main=True)
    def memory_needed(self) -> float:
        """Memory of the GPU that holds most. Source: V3, section 3.2."""
        return self.fullest.memory

    @figure("B", main=True)
    def memory_free(self) -> float:
        """Memory of a GPU that is left."""
        return self.h.memory - self.memory_needed

    @property
    def fits(self) -> bool:
        """True if every GPU has the memory, of which memory_share may be filled: the need is a lower bound."""
        return self.memory_needed <= self.h.memory * self.a["memory_share"]

    # --- parts of a step

    @figure("B/s")
    def fast_rate(self) -> float:
        """Rate to others of the node that is reached. Source: INS, section 4.3."""
        return self.h.fast_link * self.a["link_efficiency"] if self.h.linked else 0

    @figure("B/s")
    def slow_rate(self) -> float:
        """Rate to other nodes that is reached. Source: INS, section 4.3."""
        return self.h.slow_link * self.a["link_efficiency"] if self.h.networked else 0

    @figure("s")
    def chunk_forward(self) -> float:
        """Computing, forward, of a micro-batch in the slowest stage."""
        fp8, routed, plain = self.slowest_stage("forward")
        return self.micro_batch_tokens * (
            (fp8 + self.a["imbalance"] * routed) / self.fp8_rate + plain / self.plain_rate
        )

    @figure("s")
    def chunk_backward(self) -> float:
        """Computing, backward, of a micro-batch in the slowest stage."""
        fp8, routed, plain = self.slowest_stage("backward")
        return self.micro_batch_tokens * (
            (fp8 + self.a["imbalance"] * routed) / self.fp8_rate + plain / self.plain_rate
        )

    @figure("s")
    def chunk_weights(self) -> float:
        """Gradients of weights of a micro-batch in the slowest stage."""
        fp8, routed, plain = self.slowest_stage("weights")
        return self.micro_batch_tokens * (
            (fp8 + self.a["imbalance"] * routed) / self.fp8_rate + plain / self.plain_rate
        )

    @figure("s", main=True)
    def computing_seconds(self) -> float:
        """Computing, a step. Source: V3, section 3.2."""
        return self.micro_batches * (self.chunk_forward + self.chunk_backward)

    @figure("s/token")
    def slow_row_seconds(self) -> float:
        """Slow link: time of a token's rows, a layer and pass."""
        return self.exchange.slow_row_bytes / self.slow_rate if self.h.networked else 0

    @figure("s/token")
    def fast_row_seconds(self) -> float:
        """Fast link: time of a token's rows, a layer and pass."""
        return self.exchange.fast_row_bytes / self.fast_rate if self.h.linked else 0

    @figure("s/token", main=True)
    def dispatch_seconds(self) -> float:
        """Time of a token's rows, a layer and pass. Source: V3, section 3.2.2."""
        return self.a["imbalance"] * max(self.slow_row_seconds, self.fast_row_seconds)

    @figure("s")
    def chunk_dispatch(self) -> float:
        """Rows of a micro-batch, the stage with most MoE layers and pass. Source: V3, section 3.2."""
        return self.dispatch_seconds * self.micro_batch_tokens * self.pipeline.most_moe

    @figure("s")
    def chunk_tensor(self) -> float:
        """All-reduces of a micro-batch, and keys of other parts of a sequence, the fullest stage and pass."""
        if self.layout.tensor == 1 and self.layout.context_parallel == 1:
            return 0
        sent = SIZES[self.dtype] * self.m.config.dim * self.micro_batch_tokens * 4 * (self.layout.tensor - 1)
        reduced = sent * self.pipeline.most_layers / self.fast_rate if self.layout.tensor > 1 else 0
        if self.layout.context_parallel == 1:
            return reduced
        return reduced + self.gathered_keys * self.pipeline.most_layers / self.ring_rate

    @figure("B")
    def gathered_keys(self) -> float:
        """Keys of the other parts of a sequence that a GPU gathers in a layer, in training. Source: ring attention."""
        r = self.layout
        return r.micro_batch * self.m.seq_len * (1 - 1 / r.context_parallel) * self.key_bytes

    @counted("B/token")
    def key_bytes(self) -> float:
        """Keys and values of a token, the mean of all layers. Source: accounting's kv_bytes_per_token."""
        return kv_bytes_per_token(self.m.config, self.dtype) / self.m.config.n_layers

    @figure("B/s")
    def ring_rate(self) -> float:
        """Rate between the parts of a sequence."""
        inside = self.layout.tensor * self.layout.context_parallel <= self.h.gpus_per_node
        return self.fast_rate if inside else self.slow_rate

    @figure("s")
    def chunk_pair(self) -> float:
        """Forward and backward of a micro-batch, of which DualPipe hides the rows of each other."""
        if self.layout.schedule == "dualpipe":
            return max(self.chunk_forward + self.chunk_backward, 2 * self.chunk_dispatch)
        return self.chunk_forward + self.chunk_backward + 2 * self.chunk_dispatch

    @figure("s", main=True)
    def dispatching_seconds(self) -> float:
        """Rows of experts, not hidden. Source: V3, section 3.2."""
        rows = self.micro_batches * 2 * self.chunk_dispatch
        if self.layout.schedule == "dualpipe":  # hidden in the middle of a step
            alone = self.chunk_forward + self.chunk_backward + 2 * self.chunk_dispatch
            return rows - (self.micro_batches - self.layout.pipeline) * (alone - self.chunk_pair)
        return rows

    @figure("s", main=True)
    def reducing_seconds(self) -> float:
        """All-reduces of shared matrices, a step."""
        return self.micro_batches * 2 * self.chunk_tensor

    @figure("s", main=True)
    def bubble_seconds(self) -> float:
        """Waiting in the pipeline, a step. Source: V3, table 2."""
        r = self.layout
        if r.schedule == "dualpipe":
            backward = self.chunk_backward + self.chunk_dispatch + self.chunk_tensor
            return (r.pipeline / 2 - 1) * (self.chunk_pair + 2 * self.chunk_tensor + backward - 3 * self.chunk_weights)
        if r.schedule == "zb1p":
            return (r.pipeline - 1) * (self.chunk_pair + 2 * self.chunk_tensor - 2 * self.chunk_weights)
        return (r.pipeline - 1) * (self.chunk_pair + 2 * self.chunk_tensor)

    @counted()
    def sent_numbers(self) -> float:
        """Numbers that the GPU with most sends when all are reduced or gathered once. Source: ZeRO, section 7."""
        return max(gpu.sent_numbers for gpu in self.gpus.values())

    @figure("B")
    def sent_gradients(self) -> float:
        """Gradients that a GPU sends when they are reduced. Source: ZeRO, section 7."""
        return self.sent_numbers * self.state_gradient

    @figure("B")
    def sent_weights(self) -> float:
        """Weights that a GPU sends when they are gathered. Source: ZeRO, section 7."""
        return self.sent_numbers * self.state_weight

    @figure("B")
    def sent_state(self) -> float:
        """Gradients and weights that a GPU sends, a step. Source: ZeRO, section 7."""
        if self.layout.zero == 0:
            return 2 * self.sent_gradients
        if self.layout.zero == 1:
            return self.sent_gradients + self.sent_weights
        if self.layout.zero == 2:
            return self.micro_batches * self.sent_gradients + self.sent_weights
        return self.micro_batches * (self.sent_gradients + 2 * self.sent_weights)

    @figure("s")
    def state_seconds(self) -> float:
        """Gradients and weights between GPUs, a step. Source: ZeRO, section 7."""
        if self.layout.gpus == 1:
            return 0
        r, node = self.layout, self.h.gpus_per_node
        # GPUs that hold the same are in one node; but DualPipe's other copy is at the pipeline's other end
        in_node = r.gpus <= node or (r.holders * r.tensor <= node and r.copies == 1)
        return self.sent_state / (self.fast_rate if in_node else self.slow_rate)

    @figure("s", main=True)
    def exchange_seconds(self) -> float:
        """Gradients, weights, not hidden. Source: ZeRO, section 7."""
        return max(0, self.state_seconds - self.computing_seconds) if self.layout.zero >= 2 else self.state_seconds

    @counted()
    def owned_numbers(self) -> float:
        """Parameters that the GPU with most updates."""
        return max(gpu.owned_numbers for gpu in self.gpus.values())

    @figure("s", main=True)
    def update_seconds(self) -> float:
        """Update of the weights by the optimizer. Source: V3, section 3.3.3."""
        read = 2 if self.layout.precision == "fp32" else 1
        moved = self.owned_numbers * (self.state_gradient + 2 * self.state_optimizer + read * self.state_weight)
        return moved / self.h.memory_bandwidth

    @figure("s")
    def parts_seconds(self) -> float:
        """Time of a step from its parts. Source: V3, section 3.2."""
        pipeline = self.computing_seconds + self.dispatching_seconds + self.reducing_seconds + self.bubble_seconds
        return pipeline + self.exchange_seconds + self.update_seconds

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of the parts of a step by their words."""
        return {words: getattr(self, name) for name, words in PARTS.items()}


class Gpu:
    """Parameters and memory of a GPU of a pipeline."""

    def __init__(self, t: Training, place: GpuStages) -> None:
        self.t: Training = t
        self.place: GpuStages = place
        self.numbers: tuple[float, float] = place.numbers(t.m, t.layout.tensor)
        self.holders: float = t.layout.holders * t.layout.copies
        self.expert_holders: float = t.expert_data * t.layout.copies

    def divided(self, since: int) -> tuple[float, float]:
        """Return over how many GPUs a part of the state is divided from a stage of ZeRO on: of matrices, of experts."""
        return (self.holders, self.expert_holders) if self.t.layout.zero >= since else (1, 1)

    @counted()
    def gpu_matrices(self) -> float:
        """Numbers of matrices that the fullest GPU has, but routed experts."""
        return self.numbers[0]

    @counted()
    def gpu_others(self) -> float:
        """Numbers of norms, gates and vocabulary that the fullest GPU has: they are never FP8."""
        return self.numbers[1]

    @counted()
    def gpu_experts(self) -> float:
        """Numbers of routed experts that the fullest GPU has."""
        return self.place.held["moe"] * self.t.local_experts

    @figure("B")
    def memory_weights(self) -> float:
        """Weights for products, ZeRO 3 divides them. Source: V3, section 3.2."""
        of, of_expert = self.divided(since=3)
        rest = self.gpu_matrices * self.t.state_weight + self.gpu_others * SIZES[self.t.dtype]
        return rest / of + self.gpu_experts * self.t.state_weight / of_expert

    @figure("B")
    def memory_gradients(self) -> float:
        """Gradients, ZeRO 2 divides them. Source: V3, section 3.2."""
        of, of_expert = self.divided(since=2)
        rest = self.gpu_matrices * self.t.state_gradient + self.gpu_others * 4
        return rest / of + self.gpu_experts * self.t.state_gradient / of_expert

    @figure("B")
    def memory_optimizer(self) -> float:
        """Master weights and moments, ZeRO 1 divides them. Source: V3, section 3.2."""
        of, of_expert = self.divided(since=1)
        other = self.t.master + 2 * SIZES[self.t.layout.moments]
        rest = self.gpu_matrices * self.t.state_optimizer + self.gpu_others * other
        return rest / of + self.gpu_experts * self.t.state_optimizer / of_expert

    @counted("B/token")
    def saved_in_flight(self) -> float:
        """Activations of a token of each micro-batch in flight. Source: V3, section 3.2.3."""
        r = self.t.layout
        saved, _ = self.t.m.saved(SIZES[self.t.dtype], r.precision == "fp8", r.recompute)
        return sum(n * saved[part] for part, n in self.place.in_flight.items())

    @figure("B")
    def memory_activations(self) -> float:
        """Activations in flight, and what is made or gathered again. Source: V3, section 3.2."""
        return self.t.micro_batch_tokens * self.saved_in_flight + self.t.memory_again

    @figure("B")
    def memory(self) -> float:
        """Memory of the fullest GPU. Source: V3, section 3.2."""
        return self.memory_weights + self.memory_gradients + self.memory_optimizer + self.memory_activations

    @property
    def sent_numbers(self) -> float:
        """Numbers that are sent when all are reduced or gathered once."""
        rest, experts = self.gpu_matrices + self.gpu_others, self.gpu_experts
        return rest * (1 - 1 / self.holders) + experts * (1 - 1 / self.expert_holders)

    @property
    def owned_numbers(self) -> float:
        """Numbers that the GPU updates."""
        of, of_expert = self.divided(since=1)
        return (self.gpu_matrices + self.gpu_others) / of + self.gpu_experts / of_expert
