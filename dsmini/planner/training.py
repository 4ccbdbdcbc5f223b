"""Training: memory of each GPU, the time of an optimizer step from its parts, the whole run, and its failures.

Memory. A parameter of a matrix takes 2 + 4 + 4 + 8 = 18 bytes in BF16 (weight, FP32 gradient, master weight,
moments), and 1 + 4 + 4 + 4 = 13 with FP8 and BF16 moments. ZeRO divides them over the GPUs that hold the same: `data`
of them for a matrix, data * tensor / expert for an expert, twice as many with DualPipe, whose halves hold the same
stages. Activations are those of the micro-batches in flight. It is a lower bound: buffers of communication and
temporary results are left out. One GPU alone is planned as dsmini itself trains, by accounting's training_bytes.

Stages. The first stage has the embedding; the last has the head, multi-token prediction and its copy of the embedding,
and as many layers as make the slowest stage fastest. The others have equally many, the first stages one more. With
DualPipe a GPU has the stages i and PP - 1 - i, and works half of its time in each. Only some GPUs can hold most or be
the slowest: the first, the second with dense layers that the first has no room for, one in the middle, and the last.
In flight, with PP stages: 1F1B PP less the stages before, ZB1P PP, DualPipe PP + 1 in both of a GPU's stages together
(V3, table 2).

Time. The slowest stage sets the pace of all. It computes at the peaks times the shares that are reached while
computing; where experts are shared, a share of each GPU carries their rows in place of computing. Rows of experts are
exchange.py's. With DualPipe a forward and a backward hide each other's rows. A bubble is

    1F1B (PP - 1) (F + B)       ZB1P (PP - 1) (F + B - 2 W)       DualPipe (PP / 2 - 1) (F&B + B - 3 W)

Ranks are numbered tensor first, then data, then pipeline: so gradients stay in a node if data * tensor GPUs fit one.

Failures. Nodes of eight GPUs fail independently at a constant rate: mean time to failure M = 1 / (nodes * failures per
node and second). Meta counted 6.50 failures in 1000 node-days; on 16,384 GPUs, 2,048 nodes, that is one every 1.80
hours. A failure costs the restart u and the work since the last checkpoint, and a checkpoint halts training for w. With
an interval D, to first order best at sqrt(2 w M), the share of the time that trains is

    D / (M e^(u/M) (e^((D + w)/M) - 1))

V3 on 2048 H800: a node of 256 fails every 14.4 hours. Halting 10 s every 17 minutes and restarting in 300 s keep 97.5 %
of the time.

Estimates: two all-reduces a layer of matrices that `tensor` GPUs share are not hidden. ZeRO 0 and 1 exchange once a
step, not hidden; ZeRO 2 and 3 in every micro-batch, hidden by computing. Activations between stages are hidden. All
weights are sent as wide as those of matrices.

Source: DeepSeek-V3 report, sections 3.2 and 3.3, table 2; ZeRO (arXiv 1910.02054); INS, table 4; Kokolis et al. (arXiv
2410.21680), Young (1974) and Daly (2006) for failures.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from dsmini.accounting.memory import TABLES, activation_bytes, training_bytes
from dsmini.accounting.tensors import BLOCK, INDEXER, SIZES, TensorUse, blocks
from dsmini.config import ModelConfig
from dsmini.planner.exchange import Exchange
from dsmini.planner.figure import Figure, given
from dsmini.planner.hardware import Hardware
from dsmini.planner.layout import Layout, gpus_in_node
from dsmini.planner.model import PARTS_OF_A_MODEL, Contents, ModelFigures, Operations, Part
from dsmini.planner.request import DTYPES, Assumptions, Inputs, Precision

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
GPUS_OF_A_FAILURE = 8
"""GPUs of a node of Meta's, whose failures were counted."""
MOST_LOST = 7.0
"""Longest restart, checkpoint and work between two, in mean times to failure: less than 0.1 % would train."""
V3 = "V3, section 3.2"


class Links:
    """Rates of the links that are reached; 0 without a link.

    Attributes:
        fast_rate: Rate to others of the node that is reached. Source: INS, section 4.3.
        slow_rate: Rate to other nodes that is reached. Source: INS, section 4.3.
    """

    def __init__(self, h: Hardware, a: Assumptions) -> None:
        def reached(name: str) -> Figure:
            formula = f"{name} * link_efficiency" if name in h.numbers else "0"
            return Figure(h.numbers.get(name, 0) * a.link_efficiency, "B/s", formula)

        self.fast_rate = reached("fast_link")
        self.slow_rate = reached("slow_link")


def check_links(h: Hardware, gpus: int) -> None:
    """Raise ValueError for more GPUs than links connect."""
    if gpus > h.most_gpus:
        most = f"{h.node} or fewer" if h.linked else f"{h.node}"
        raise ValueError(f"{h.title} has no link that gpus={gpus} need; use {most}")


class Rates:
    """Rates of products. Raises: ValueError for a precision that the hardware lacks.

    Attributes:
        plain_rate: Rate of other products.
        fp8_rate: Rate of products of attention and feed-forwards.
    """

    def __init__(self, h: Hardware, a: Assumptions, r: Layout) -> None:
        share, formula = (1 - a.communication_share, " * (1 - communication_share)") if r.expert > 1 else (1.0, "")
        dtype = "float32" if r.precision == "fp32" else "bfloat16"
        self.imbalance = float(a.imbalance)
        self.plain_rate = Figure(
            h.peak(dtype) * a.bf16_efficiency * share, "FLOP/s", f"peak_{dtype} * bf16_efficiency{formula}"
        )
        self.fp8_rate = Figure(self.plain_rate, "FLOP/s", "plain_rate")
        if r.precision == "fp8":
            rate = h.peak("fp8") * a.fp8_efficiency * share
            self.fp8_rate = Figure(rate, "FLOP/s", f"peak_fp8 * fp8_efficiency{formula}")

    def seconds(self, operations: Operations, phase: str) -> float:
        """Return the time of operations of a phase; the fullest GPU has more of routed experts than the mean."""
        routed = self.imbalance * operations[phase, "routed"]
        return (operations[phase, "fp8"] + routed) / self.fp8_rate + operations[phase, "plain"] / self.plain_rate

    def of_parts(self, operations: Mapping[Part, Operations]) -> tuple[tuple[Part, float], ...]:
        """Return the time of a token in each part, forward and backward."""
        phases = ("forward", "backward")
        return tuple((part, sum(self.seconds(ops, phase) for phase in phases)) for part, ops in operations.items())


# --- stages


class Stage(NamedTuple):
    """Pipeline stage."""

    contents: Contents
    vocabulary: int
    """Matrices of the size of the vocabulary."""
    in_flight: float
    """Micro-batches whose activations it holds."""

    @property
    def layers(self) -> float:
        """Blocks, those of multi-token prediction included."""
        return self.contents.get("dense", 0) + self.contents.get("moe", 0)


@functools.lru_cache(maxsize=4096)
def stages(c: ModelConfig, pipeline: int, schedule: str, last_layers: int) -> dict[str, list[Stage]]:
    """Return the stages of each kind of GPU: the only one, or the first, a second, a middle one and the last."""
    dense, moe, mtp_dense, _ = blocks(c)
    dual, mtp = schedule == "dualpipe", c.n_mtp_layers

    def stage(layers: int, dense: int, in_flight: float, vocabulary: int = 0, **ends: int) -> Stage:
        return Stage({"dense": dense, "moe": layers - dense, **ends}, vocabulary, in_flight)  # pyright: ignore

    if pipeline == 1:
        return {"only": [stage(c.n_layers + mtp, dense + mtp_dense, 1, 2, embedding=1, head=1, mtp=mtp)]}
    most = math.ceil((c.n_layers - last_layers) / (pipeline - 1))
    first = stage(most, min(dense, most), pipeline, 1, embedding=1)
    dense_last = max(0, dense - (c.n_layers - last_layers)) + mtp_dense
    copy = 1 if dual or not mtp else 2  # of the embedding, which with DualPipe is there
    last = stage(last_layers + mtp, dense_last, pipeline if schedule == "zb1p" else 1, copy, head=1, mtp=mtp)
    in_flight = {"1f1b": pipeline - 1, "zb1p": pipeline, "dualpipe": (pipeline + 1) / 2}[schedule]
    middle = stage(most, most - min(moe, most), in_flight)
    found = {"first": [first, last] if dual else [first]}
    if pipeline > 2 and c.n_dense_layers > 1:
        second = stage(most, max(0, min(dense - first.contents["dense"], most)), in_flight)  # pyright: ignore
        found["second"] = [second, middle] if dual else [second]
    if pipeline > 2:
        found["middle"] = [middle, middle] if dual else [middle]
    return found if dual else found | {"last": [last]}


def fullest(name: str, places: Iterable[str]) -> str:
    """Return the formula of the largest figure of this name among GPUs."""
    found = ", ".join(f"{name}_{place}" for place in places)
    return f"max({found})" if "," in found else found


def mean_contents(found: list[Stage]) -> dict[Part, float]:
    """Return the contents of a GPU's stages, in each of which it works an equal part of its time."""
    return {part: sum(stage.contents.get(part, 0) for stage in found) / len(found) for part in PARTS_OF_A_MODEL}


def stage_operations(of: Mapping[Part, Operations], found: list[Stage]) -> Operations:
    """Return the operations of a token in the mean of a GPU's stages."""
    mine: Operations = dict.fromkeys(of["dense"], 0.0)
    for part, n in mean_contents(found).items():
        for key, flops in of[part].items():
            mine[key] += n * flops
    return mine


@functools.lru_cache(maxsize=4096)
def placed(c: ModelConfig, pipeline: int, schedule: str, seconds: tuple[tuple[Part, float], ...]) -> tuple[int, str]:
    """Return how many layers the last stage has, so that the slowest GPU is fastest, and which GPU that is.

    Args:
        seconds: of a token in each part.
    """
    of = dict(seconds)

    def slowest(last_layers: int) -> tuple[float, str]:
        found = stages(c, pipeline, schedule, last_layers)
        return max((sum(n * of[part] for part, n in mean_contents(two).items()), place) for place, two in found.items())

    if pipeline == 1:
        return c.n_layers, "only"
    tried = [(slowest(n), -n) for n in range(c.n_layers // pipeline + 1)]
    (_, place), layers = min(tried, key=lambda one: (one[0][0], one[1]))
    return -layers, place


# --- memory


class State:
    """Bytes of a parameter of a matrix in training.

    Attributes:
        state_weight: Weight for products. Source: V3, section 3.3.3.
        state_gradient: Gradient of a parameter. Source: V3, section 3.3.3.
        state_optimizer: Master weight and moments of a parameter. Source: V3, section 3.3.3.
        state_parameter: Training state of a parameter. Source: V3, section 3.3.3.
    """

    def __init__(self, r: Layout) -> None:
        fp32, moments = r.precision == "fp32", 2 * SIZES[r.moments]
        master = 0 if fp32 else 4  # FP32 needs none
        weight, formula = {"fp32": (4, "4"), "bf16": (2, "2"), "fp8": (1 + 4 / BLOCK**2, f"1 + 4 / {BLOCK} ** 2")}[
            r.precision
        ]
        momentum = moments if r.optimizer == "adamw" else 4
        self.state_weight = Figure(weight, "B", formula)
        self.state_gradient = Figure(4, "B", "4")
        self.state_optimizer = Figure(master + momentum, "B", f"{master} + {momentum}")
        self.state_parameter = Figure(
            weight + 4 + master + momentum, "B", "state_weight + state_gradient + state_optimizer"
        )
        self.others = {"weight": 4 if fp32 else 2, "gradient": 4, "optimizer": master + moments}
        """Bytes of a parameter that is never FP8, and AdamW's."""


class Local:
    """Matrices of a block on one of the GPUs that share it.

    Attributes:
        local_dense: Matrices of a dense layer on a GPU.
        local_moe: Matrices of a MoE layer on a GPU, shared part.
        local_experts: Routed experts of a MoE layer on a GPU. Source: V3, section 3.2.
        local_norms: Parameters of a block that are never FP8.
    """

    def __init__(self, m: ModelFigures, r: Layout) -> None:
        block = [use for use in m.uses if use.place == "block"]

        def here(uses: list[TensorUse]) -> Figure:
            matrices = [use for use in uses if use.form == "fp8"]
            whole = sum(use.numbers for use in matrices if use.split == "whole")
            divided = sum(use.numbers for use in matrices) - whole
            return Figure(divided / r.tensor + whole, "", f"{divided} / tensor + {whole}")

        dense = [use for use in m.uses if use.place == "dense"]
        shared = [use for use in m.uses if use.kind == "shared experts"]
        self.local_dense = here([*block, *dense])
        self.local_moe = here([*block, *shared])
        self.local_experts = Figure(
            m.config.n_routed_experts / r.expert * m.expert_parameters,
            "",
            "n_routed_experts / expert * expert_parameters",
        )
        indexer = sum(use.numbers for use in block if use.kind == INDEXER and use.form == "fp32")
        self.local_norms = Figure(m.norm_parameters + indexer, "", f"norm_parameters + {indexer}")


class Gpu:
    """Parameters and memory of a GPU of a pipeline, by its place.

    Attributes:
        matrices: Matrices but routed experts.
        others: Parameters that are never FP8.
        expert_parameters: Parameters of routed experts.
        parameters: Parameters.
        memory_weights: Weights for products. Source: V3, section 3.2.
        memory_gradients: Gradients. Source: V3, section 3.2.
        memory_optimizer: Master weights and moments. Source: V3, section 3.2.
        memory_activations: Activations in flight, and what is made or gathered again. Source: V3, section 3.2.
        memory: Memory. Source: V3, section 3.2.
        sent_numbers: Numbers that it sends when all are reduced or gathered once. Source: ZeRO, section 7.
        owned: Parameters that it updates.
    """

    def __init__(self, m: ModelFigures, r: Layout, t: "Training", found: list[Stage]) -> None:
        state, local, saved = t.state, t.local, t.saved
        held = {part: n * len(found) for part, n in mean_contents(found).items()}
        dense, moe, mtp = held["dense"], held["moe"], held["mtp"]
        vocabulary = sum(stage.vocabulary for stage in found)
        self.matrices = Figure(
            dense * local.local_dense + moe * local.local_moe, "", f"{dense:g} * local_dense + {moe:g} * local_moe"
        )
        norms = m.config.dim * (held["head"] + held["embedding"] * m.config.embed_norm)
        others = (dense + moe) * local.local_norms + moe * m.gate_parameters + norms
        others += mtp * (m.mtp_norm_layer + m.mtp_projection_layer) + vocabulary * m.vocabulary_parameters / r.tensor
        self.others = Figure(
            others,
            "",
            f"{dense + moe:g} * local_norms + {moe:g} * gate_parameters + {norms:g} + {mtp:g} * (mtp_norm_layer "
            f"+ mtp_projection_layer) + {vocabulary} * vocabulary_parameters / tensor",
        )
        self.expert_parameters = Figure(moe * local.local_experts, "", f"{moe:g} * local_experts")
        by, by_expert = r.data * r.copies, t.expert_data * r.copies
        of, of_expert = f"(data * {r.copies})", f"(expert_data * {r.copies})"
        rest, experts = self.matrices + self.others, self.expert_parameters
        self.parameters = Figure(rest + experts, "", "matrices + others + expert_parameters")

        def held_of(kind: str, of_matrix: Figure, since: int) -> Figure:
            """Return the bytes of weights, gradients or the optimizer, which are divided from a stage of ZeRO on."""
            other = state.others[kind]
            shared, own = self.matrices * of_matrix + self.others * other, experts * of_matrix
            formula, own_formula = f"(matrices * state_{kind} + others * {other})", f"expert_parameters * state_{kind}"
            if r.zero >= since:
                shared, own = shared / by, own / by_expert
                formula, own_formula = f"{formula} / {of}", f"{own_formula} / {of_expert}"
            return Figure(shared + own, "B", f"{formula} + {own_formula}")

        self.memory_weights = held_of("weight", state.state_weight, 3)
        self.memory_gradients = held_of("gradient", state.state_gradient, 2)
        self.memory_optimizer = held_of("optimizer", state.state_optimizer, 1)
        flying = {part: sum(one.in_flight * one.contents.get(part, 0) for one in found) for part in PARTS_OF_A_MODEL}
        terms = [f"{n:g} * activations_{part}" for part, n in flying.items() if n]
        self.memory_activations = Figure(
            t.micro_batch_tokens * sum(flying[part] * saved.each(part) for part in PARTS_OF_A_MODEL) + t.memory_again,
            "B",
            f"micro_batch_tokens * ({' + '.join(terms)}) + memory_again",
        )
        self.memory = Figure(
            self.memory_weights + self.memory_gradients + self.memory_optimizer + self.memory_activations,
            "B",
            "memory_weights + memory_gradients + memory_optimizer + memory_activations",
        )
        self.sent_numbers = Figure(
            rest * (1 - 1 / by) + experts * (1 - 1 / by_expert),
            "",
            f"(matrices + others) * (1 - 1 / {of}) + expert_parameters * (1 - 1 / {of_expert})",
        )
        owned, formula = (
            rest / by + experts / by_expert,
            f"(matrices + others) / {of} + expert_parameters / {of_expert}",
        )
        self.owned = Figure(owned, "", formula) if r.zero else Figure(self.parameters, "", "parameters")


class Process:
    """Bytes that one process holds at the end of a forward, as dsmini itself trains, counted by accounting."""

    def __init__(self, m: ModelFigures, r: Layout) -> None:
        config = replace(m.config, precision="fp8" if r.precision == "fp8" else "native")
        dtype = "float32" if r.precision == "fp32" else "bfloat16"
        size: dict[str, Any] = {"batch_size": 1, "seq_len": int(m.seq_len), "dtype": dtype}
        how: dict[str, Any] = {"optimizer": r.optimizer, "moments": r.moments, "recompute": r.recompute}
        held = training_bytes(config, **size, **how).by_part
        tables = activation_bytes(config, **size).by_part[TABLES]
        source, of = "dsmini.accounting.training_bytes", "One process: "
        activations = held["activations"] - tables
        self.process_state = given(
            sum(held.values()) - activations, "B", f"{of}parameters, gradients, optimizer, copies, tables", source
        )
        self.process_activations = given(activations, "B", f"{of}activations of a sequence, without tables", source)


# --- a step


class Training:
    """Figures of a training step in a layout.

    Raises: ValueError for a precision or a link that the hardware lacks.

    Attributes:
        data: Parts of the batch (data parallelism). Source: V3, section 3.2.
        expert_data: Copies of the experts of a stage. Source: V3, section 3.2.
        micro_batches: Micro-batches of a pipeline, a step.
        micro_batch_tokens: Tokens of a micro-batch on a GPU.
        chunk_forward: Computing, forward, of a micro-batch in the slowest stage.
        chunk_backward: Computing, backward, of a micro-batch in the slowest stage.
        chunk_weights: Gradients of weights of a micro-batch in the slowest stage.
        computing_seconds: Computing, a step. Source: V3, section 3.2.
        memory_again: A block that is made again, and layers whose weights are gathered.
        memory_needed: Memory of the GPU that holds most. Source: V3, section 3.2.
        memory_free: Memory of a GPU that is left.
    """

    def __init__(self, m: ModelFigures, h: Hardware, a: Assumptions, r: Layout) -> None:
        check_links(h, r.gpus)
        self._m, self._h, self._a, self.layout, self.links = m, h, a, r, Links(h, a)
        self.data = Figure(r.data, "", "gpus / (pipeline * tensor)")
        self.expert_data = Figure(r.data * r.tensor / r.expert, "", "data * tensor / expert")
        self.micro_batches = Figure(r.batch / (r.data * r.micro_batch), "", "batch / (data * micro_batch)")
        self.micro_batch_tokens = Figure(
            r.micro_batch * m.seq_len / r.tensor, "token", "micro_batch * seq_len / tensor"
        )
        self.rates = Rates(h, a, r)
        self._stages()
        self._memory()

    def _stages(self) -> None:
        """Set the layers of stages, and the computing time of a micro-batch in the slowest one."""
        m, r = self._m, self.layout
        of = m.operations(r.recompute)
        last, self.slowest = placed(m.config, r.pipeline, r.schedule, self.rates.of_parts(of))
        self.places = stages(m.config, r.pipeline, r.schedule, last)
        self.layers_last = given(last, "", "Layers of the last stage, without MTP", "chosen for the fastest pipeline")
        most = max(stage.layers for found in self.places.values() for stage in found)
        self.layers_most = given(most, "", "Layers of the fullest stage, with MTP", "chosen for the fastest pipeline")
        mine = stage_operations(of, self.places[self.slowest])

        def chunk(phase: str) -> Figure:
            fp8, routed, plain = (mine[phase, rate] for rate in ("fp8", "routed", "plain"))
            formula = f"micro_batch_tokens * (({fp8} + imbalance * {routed}) / fp8_rate + {plain} / plain_rate)"
            return Figure(self.micro_batch_tokens * self.rates.seconds(mine, phase), "s", formula)

        self.chunk_forward, self.chunk_backward, self.chunk_weights = map(chunk, ("forward", "backward", "weights"))
        computing = self.micro_batches * (self.chunk_forward + self.chunk_backward)
        self.computing_seconds = Figure(computing, "s", "micro_batches * (chunk_forward + chunk_backward)")

    def _memory(self) -> None:
        m, r = self._m, self.layout
        self.state, self.local = State(r), Local(m, r)
        self.saved = m.saved(4 if r.precision == "fp32" else 2, r.precision == "fp8", r.recompute)
        again, formula = 0.0, "0"
        if r.recompute == "full":
            again, formula = (
                self.saved.activations_again * self.micro_batch_tokens,
                "activations_again * micro_batch_tokens",
            )
        if r.zero == 3:
            widest = max(self.local.local_dense, self.local.local_moe + self.local.local_experts)
            again += ZERO3_GATHERED * widest * self.state.state_weight
            formula += f" + {ZERO3_GATHERED} * max(local_dense, local_moe + local_experts) * state_weight"
        self.memory_again = Figure(again, "B", formula)
        self.gpus = {place: Gpu(m, r, self, found) for place, found in self.places.items()}
        needed, formula = max(gpu.memory for gpu in self.gpus.values()), fullest("memory", self.gpus)
        self.process = Process(m, r) if r.gpus == 1 else None
        if self.process is not None:
            needed = self.process.process_state + r.micro_batch * self.process.process_activations
            formula = "process_state + micro_batch * process_activations"
        self.memory_needed = Figure(needed, "B", formula)
        self.memory_free = Figure(self._h.memory - needed, "B", "gpu_memory - memory_needed")

    @property
    def fits(self) -> bool:
        """True if every GPU has the memory. The need is a lower bound, so leave room."""
        return self.memory_free >= 0


class Rows:
    """Traffic of a token among the GPUs that share experts in training, and its time.

    Attributes:
        slow_row_seconds: Slow link: time of a token's rows, a layer and pass.
        fast_row_seconds: Fast link: time of a token's rows, a layer and pass.
        dispatch_seconds: Time of a token's rows, a layer and pass. Source: V3, section 3.2.2.
    """

    def __init__(self, m: ModelFigures, h: Hardware, a: Assumptions, expert: int, precision: Precision) -> None:
        links, in_node = Links(h, a), gpus_in_node(expert, h.gpus_per_node)
        self.expert_in_node = given(in_node, "", "GPUs of a node that share experts", "the most that divide expert")
        self.exchange = Exchange(m.config, expert, in_node, DTYPES[precision], ("expert", "expert_in_node"))
        x, slow, fast = self.exchange, 0.0, 0.0
        if h.networked:
            slow = x.slow_row_bytes / links.slow_rate
        if h.linked:
            fast = x.fast_row_bytes / links.fast_rate
        self.slow_row_seconds = Figure(slow, "s/token", "slow_row_bytes / slow_rate" if h.networked else "0")
        self.fast_row_seconds = Figure(fast, "s/token", "fast_row_bytes / fast_rate" if h.linked else "0")
        self.dispatch_seconds = Figure(
            a.imbalance * max(slow, fast), "s/token", "imbalance * max(slow_row_seconds, fast_row_seconds)"
        )


class Step:
    """Parts of the time of a step, one after the other.

    Attributes:
        chunk_dispatch: Rows of a micro-batch, the stage with most MoE layers and pass. Source: V3, section 3.2.
        chunk_tensor: All-reduces of a micro-batch, the fullest stage and pass.
        dispatching_seconds: Rows of experts, not hidden. Source: V3, section 3.2.
        reducing_seconds: All-reduces of shared matrices, a step.
        parts_seconds: Time of a step from its parts. Source: V3, section 3.2.
        bubble_seconds: Waiting in the pipeline, a step. Source: V3, table 2.
        sent_gradients: Gradients that a GPU sends when they are reduced. Source: ZeRO, section 7.
        sent_weights: Weights that a GPU sends when they are gathered. Source: ZeRO, section 7.
        state_seconds: Gradients and weights between GPUs, a step. Source: ZeRO, section 7.
        exchange_seconds: Gradients, weights, not hidden. Source: ZeRO, section 7.
        update_seconds: Update of the weights by the optimizer. Source: V3, section 3.3.3.
    """

    def __init__(self, m: ModelFigures, h: Hardware, a: Assumptions, r: Layout, t: Training) -> None:
        links, number = t.links, t.micro_batches
        self.rows = Rows(m, h, a, r.expert, r.precision) if r.expert > 1 else None
        moe = max(mean_contents(found)["moe"] for found in t.places.values())
        rows = self.rows.dispatch_seconds * t.micro_batch_tokens * moe if self.rows else 0.0
        self.chunk_dispatch = Figure(
            rows, "s", f"dispatch_seconds * micro_batch_tokens * {moe:g}" if self.rows else "0"
        )
        self.chunk_tensor = Figure(
            SIZES[DTYPES[r.precision]]
            * m.config.dim
            * t.micro_batch_tokens
            * 4
            * (r.tensor - 1)
            * t.layers_most
            / links.fast_rate
            if r.tensor > 1
            else 0,
            "s",
            f"{SIZES[DTYPES[r.precision]]} * dim * micro_batch_tokens * 4 * (tensor - 1) * layers_most / fast_rate"
            if r.tensor > 1
            else "0",
        )
        chunk = t.chunk_forward, t.chunk_backward, t.chunk_weights
        unhidden, wait = waiting(r, number, chunk, rows, self.chunk_tensor)
        alone = "(chunk_forward + chunk_backward)"
        pair = f"{alone} + 2 * (chunk_dispatch + chunk_tensor)"
        rows_formula, formula = "micro_batches * 2 * chunk_dispatch", f"(pipeline - 1) * ({pair})"
        if r.schedule == "zb1p":
            formula = f"(pipeline - 1) * ({pair} - 2 * chunk_weights)"
        if r.schedule == "dualpipe":
            both = f"max({alone}, 2 * chunk_dispatch)"
            rows_formula += f" - (micro_batches - pipeline) * ({alone} + 2 * chunk_dispatch - {both})"
            backward = "chunk_backward + chunk_dispatch + chunk_tensor"
            formula = f"(pipeline / 2 - 1) * ({both} + 2 * chunk_tensor + {backward} - 3 * chunk_weights)"
        self.dispatching_seconds = Figure(unhidden, "s", rows_formula)
        self.reducing_seconds = Figure(number * 2 * self.chunk_tensor, "s", "micro_batches * 2 * chunk_tensor")
        self.bubble_seconds = Figure(wait, "s", formula)
        self._state(h, r, t)
        parts = t.computing_seconds + self.dispatching_seconds + self.reducing_seconds + self.bubble_seconds
        self.parts_seconds = Figure(parts + self.exchange_seconds + self.update_seconds, "s", " + ".join(PARTS))
        self.parts = {words: float(getattr(t, name, None) or getattr(self, name, 0)) for name, words in PARTS.items()}

    def _state(self, h: Hardware, r: Layout, t: Training) -> None:
        """Set the time of gradients and weights between data-parallel GPUs, and of the update."""
        state, gpus = t.state, t.gpus.values()
        numbers = max(gpu.sent_numbers for gpu in gpus)
        most = fullest("sent_numbers", t.gpus)
        self.sent_gradients = Figure(numbers * state.state_gradient, "B", f"{most} * state_gradient")
        self.sent_weights = Figure(numbers * state.state_weight, "B", f"{most} * state_weight")
        sent = state_sent(r.zero, t.micro_batches, self.sent_gradients, self.sent_weights)
        formula = {
            0: "2 * sent_gradients",
            1: "(sent_gradients + sent_weights)",
            2: "(micro_batches * sent_gradients + sent_weights)",
            3: "micro_batches * (sent_gradients + 2 * sent_weights)",
        }[r.zero]
        inside = state_stays_in_node(r, h.gpus_per_node)
        link, name = (t.links.fast_rate, "fast_rate") if inside else (t.links.slow_rate, "slow_rate")
        alone = r.gpus == 1
        self.state_seconds = Figure(0 if alone else sent / link, "s", "0" if alone else f"{formula} / {name}")
        hidden = r.zero >= 2
        self.exchange_seconds = Figure(
            max(0.0, self.state_seconds - t.computing_seconds) if hidden else self.state_seconds,
            "s",
            "max(0, state_seconds - computing_seconds)" if hidden else "state_seconds",
        )
        read = 2 if r.precision == "fp32" else 1
        moved = state.state_gradient + 2 * state.state_optimizer + read * state.state_weight
        owned = fullest("owned", t.gpus)
        self.update_seconds = Figure(
            max(gpu.owned for gpu in gpus) * moved / h.memory_bandwidth,
            "s",
            f"{owned} * (state_gradient + 2 * state_optimizer + {read} * state_weight) / memory_bandwidth",
        )


def waiting(
    r: Layout, number: float, chunk: tuple[float, float, float], rows: float, shared: float
) -> tuple[float, float]:
    """Return the time of a step that rows take and nothing hides, and that of waiting in the pipeline.

    Args:
        number: micro-batches.
        chunk: times of a micro-batch in the slowest stage: forward, backward, and of it the gradients of weights.
        rows, shared: times of a micro-batch's rows, and of its all-reduces, in one pass.

    Source: DeepSeek-V3 report, table 2.
    """
    forward, backward, weights = chunk
    alone, pair = forward + backward, forward + backward + 2 * (rows + shared)
    if r.schedule == "dualpipe":  # in the middle of a step, a forward and a backward hide each other's rows
        both = max(alone, 2 * rows)
        unhidden = number * 2 * rows - (number - r.pipeline) * (alone + 2 * rows - both)
        return unhidden, (r.pipeline / 2 - 1) * (both + 3 * shared + backward + rows - 3 * weights)
    return number * 2 * rows, (r.pipeline - 1) * (pair - 2 * weights if r.schedule == "zb1p" else pair)


def state_sent(zero: int, micro_batches: float, gradients: float, weights: float) -> float:
    """Return the bytes that a GPU sends in a step, with those of reducing and of gathering all once."""
    return {
        0: 2 * gradients,
        1: gradients + weights,
        2: micro_batches * gradients + weights,
        3: micro_batches * (gradients + 2 * weights),
    }[zero]


def state_stays_in_node(r: Layout, node: int) -> bool:
    """Return whether the GPUs that hold the same are in one node.

    DualPipe's other copy of a stage is at the other end of the pipeline.
    """
    return r.gpus <= node or (r.data * r.tensor <= node and r.copies == 1)


# --- the whole run


class Run:
    """Time and cost of a run: by the parts of a step, or by a utilization.

    Operations are those of training_flops, without multi-token prediction and recomputation. The peak is that of BF16
    also where products are FP8. DeepSeek counts both like this.

    Attributes:
        step_tokens: Tokens of a step. Source: V3, section 4.2.
        step_flops: Operations of a step. Source: INS, table 2.
        step_seconds: Time of a step.
        mfu: Share of BF16's peak that a step reaches (MFU, causal). Source: INS, table 4.
        training_tokens_per_second: Tokens a second, all GPUs.
        training_time: Time of the whole run without failures.
        training_gpu_hours: GPU-hours of the whole run. Source: V3, table 1.
        training_cost: Rent of the whole run. Source: V3, table 1.
    """

    def __init__(
        self, m: ModelFigures, h: Hardware, r: Layout, tokens: Figure, step: Step, reached: Figure | None
    ) -> None:
        dtype = "float32" if r.precision == "fp32" else "bfloat16"
        peak = r.gpus * h.peak(dtype)
        self.step_tokens = Figure(r.batch * m.seq_len, "token", "batch * seq_len")
        self.step_flops = Figure(m.training_flops * self.step_tokens, "FLOP", "training_flops * step_tokens")
        seconds, formula = float(step.parts_seconds), "parts_seconds"
        if reached is not None:
            seconds, formula = self.step_flops / (peak * reached), f"step_flops / (gpus * peak_{dtype} * utilization)"
        self.step_seconds = Figure(seconds, "s", formula)
        self.mfu = Figure(self.step_flops / (peak * seconds), "", f"step_flops / (gpus * peak_{dtype} * step_seconds)")
        self.training_tokens_per_second = Figure(self.step_tokens / seconds, "token/s", "step_tokens / step_seconds")
        self.training_time = Figure(
            tokens / self.training_tokens_per_second, "s", "tokens / training_tokens_per_second"
        )
        self.training_gpu_hours = Figure(r.gpus * self.training_time / 3600, "", "gpus * training_time / 3600")
        self.training_cost: Figure | None = None
        if h.price is not None:
            cost = self.training_gpu_hours * 3600 * h.price
            formula = "training_gpu_hours * 3600 * gpu_price"
            self.training_cost = Figure(cost, "$", formula)


class Failures:
    """Cost of failures to a run, or to GPUs alone.

    Raises: ValueError for more of them than a run survives.

    Attributes:
        mean_time_to_failure: Mean time between failures. Source: Kokolis et al. (arXiv 2410.21680).
        checkpoint_interval: Time between checkpoints, best to first order. Source: Young (1974): sqrt(2 w M).
        effective_share: Share of the time that trains. Source: Daly (2006): the complete cost function.
        elapsed_time: Time of the run with failures. Source: Kokolis et al. (arXiv 2410.21680).
        elapsed_cost: Rent of the run with failures.
    """

    def __init__(self, inputs: Inputs, gpus: float, run: Run | None = None) -> None:
        self.failures_per_node_day = inputs.of("failures_per_node_day")
        self.restart_time = inputs.of("restart_time", "s")
        self.checkpoint_halt = inputs.of("checkpoint_halt", "s")
        restart, halt = self.restart_time, self.checkpoint_halt
        mean = 86400 / (gpus / GPUS_OF_A_FAILURE * self.failures_per_node_day)
        interval = math.sqrt(2 * halt * mean)
        self.mean_time_to_failure = Figure(mean, "s", f"86400 / (gpus / {GPUS_OF_A_FAILURE} * failures_per_node_day)")
        self.checkpoint_interval = Figure(interval, "s", "sqrt(2 * checkpoint_halt * mean_time_to_failure)")
        if restart + halt + interval > MOST_LOST * mean:
            raise ValueError(
                f"a failure every {self.mean_time_to_failure} leaves no time to train, with {restart} "
                f"for a restart and {halt} for a checkpoint; lower one of the three"
            )
        self.effective_share = Figure(
            effective_share(mean, interval, restart, halt),
            "",
            "checkpoint_interval / (mean_time_to_failure * exp(restart_time / mean_time_to_failure) "
            "* (exp((checkpoint_interval + checkpoint_halt) / mean_time_to_failure) - 1))",
        )
        self.elapsed_time: Figure | None = None
        self.elapsed_cost: Figure | None = None
        if run is not None:
            self.elapsed_time = Figure(run.training_time / self.effective_share, "s", "training_time / effective_share")
            if run.training_cost is not None:
                cost = run.training_cost / self.effective_share
                self.elapsed_cost = Figure(cost, "$", "training_cost / effective_share")


def effective_share(mean: float, interval: float, restart: float, write: float) -> float:
    """Return the share of the time that trains, where failures also interrupt restarts and writes (Daly)."""
    return interval / (mean * math.exp(restart / mean) * (math.exp((interval + write) / mean) - 1))
