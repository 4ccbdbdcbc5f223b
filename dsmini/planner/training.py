"""Training: memory of each GPU, and the time of an optimizer step from its parts.

Memory. A parameter of a matrix takes 2 + 4 + 4 + 8 = 18 bytes in BF16 (weight, FP32 gradient, master weight,
moments), and 1 + 4 + 4 + 4 = 13 with FP8 and BF16 moments. ZeRO divides them over the GPUs that hold the same: `data`
of them for a matrix, data * tensor / expert for an expert, twice as many with DualPipe, whose halves hold the same
stages. Activations are those of the micro-batches in flight. It is a lower bound: buffers of communication and
temporary results are left out.

Stages. Layers are placed as evenly as they divide, the first stages one more. The first stage has the embedding; the
last has the head, multi-token prediction and its copy of the embedding. Only some GPUs can hold most: the first, the
second with dense layers that the first has no room for, one in the middle, and the last. In flight, with PP stages:
1F1B PP less the stages before, ZB1P PP, DualPipe PP + 1 in both of a GPU's stages together (V3, table 2).

Time. A stage computes at the peaks times the shares that are reached while computing, on the multiprocessors that
carry no rows. Rows of experts are exchange.py's. With DualPipe a forward and a backward hide each other's rows. A
bubble is

    1F1B (PP - 1) (F + B)       ZB1P (PP - 1) (F + B - 2 W)       DualPipe (PP / 2 - 1) (F&B + B - 3 W)

Worked example, DeepSeek-V3 as published: the first GPU needs 65 GB of 80. A stage computes a micro-batch in 144 ms,
as the times that DeepSeek printed imply, because fp8_efficiency is fitted to them. With rows, bubble and gradients a
step takes 20 s; 19.93 are printed.

Estimates: experts are perfectly balanced. Two all-reduces a layer of matrices that `tensor` GPUs share are not
hidden. ZeRO 0 and 1 exchange once a step, not hidden; ZeRO 2 and 3 in every micro-batch, hidden by computing.
Activations between stages are hidden. All weights are sent as wide as those of matrices.

Source: DeepSeek-V3 report, sections 3.2 and 3.3, table 2; ZeRO (arXiv 1910.02054); INS, table 4.
"""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from dsmini.accounting.activations import Saved, passes, rotary_table
from dsmini.accounting.memory import saved_copy, state_bytes
from dsmini.accounting.tensors import INDEXER, SIZES, TensorUse, largest, main_tensors, smallest, total
from dsmini.config import ModelConfig
from dsmini.planner.exchange import training_exchange
from dsmini.planner.figure import Figure, Sheet
from dsmini.planner.hardware import Hardware
from dsmini.planner.model import placed_tensors
from dsmini.planner.request import Layout, Schedule, copies

BF16_EFFICIENCY = (0.51, "LL3, table 4: 0.43 of the peak in a whole step, its bubbles and all-reduces taken out")
FP8_EFFICIENCY = (0.29, "fitted to the 143.8 ms of a forward with a backward that INS, table 4, implies")
UTILIZATION = (0.3894, "INS, table 4")
CARRYING = (20, "V3, section 3.2.2")
ZERO3_GATHERED = 2
"""Layers whose weights ZeRO 3 holds whole: the one at work and the one that is fetched."""
WITHOUT = {
    "computing": "compute",
    "links_between": "links between nodes",
    "links_within": "links within a node",
    "bubble": "waiting in the pipeline",
    "update": "update of the weights",
}
"""Resources without which a step is computed again: the figure's last words, and the words of a verdict."""


Stage = dict[str, Any]
"""Contents of a pipeline stage: layers that are dense and that have experts, those of multi-token prediction included;
its depths; 1 for embedding and head; matrices of the size of the vocabulary; and the micro-batches in flight."""


def training_figures(s: Sheet, c: ModelConfig, hardware: Hardware, r: Layout) -> None:
    """Name the figures of a training run.

    Args:
        s: sheet with the model's figures, the hardware's numbers, and as inputs the sizes of the layout, batch, seq_len
            and tokens. In a search the sizes are arrays of layouts, of which `r` is one.

    Raises: ValueError for a precision or a link that the hardware lacks.
    """
    s.data = s.gpus / (s.pipeline * s.tensor)
    s.expert_data = s.data * s.tensor / s.expert
    s.experts_per_gpu = c.n_routed_experts / s.expert
    s.micro_batches = s.batch / (s.data * s.micro_batch)
    s.micro_batch_tokens = s.micro_batch * s.seq_len / s.tensor
    s.layers_first = np.ceil(c.n_layers / s.pipeline)
    s.layers_last = np.floor(c.n_layers / s.pipeline)
    _state(s, r)
    _activations(s, c, r)
    gpus = _memory(s, c, r)
    if r.gpus == 1:
        _process(s, c, r)
    s.memory_needed = s.process_memory if r.gpus == 1 else _most(gpu.memory for gpu in gpus)
    s.memory_free = s.gpu_memory - s.memory_needed
    _compute(s, c, hardware, r)
    _step(s, c, hardware, r, gpus)


# --- memory


def _state(s: Sheet, r: Layout) -> None:
    """Name the bytes of the training state of one parameter of a matrix, undivided."""
    fp32, moment = r.precision == "fp32", SIZES[r.moments]
    s.state_weight = {"fp32": 4, "bf16": 2, "fp8": 1 + 4 / (128 * 128)}[r.precision]
    s.state_gradient = 4
    s.state_master = 0 if fp32 else 4  # in FP32 the weight is its own master
    s.state_moments = 2 * moment if r.optimizer == "adamw" else 4
    s.state_parameter = s.state_weight + s.state_gradient + s.state_master + s.state_moments


def _activations(s: Sheet, c: ModelConfig, r: Layout) -> None:
    """Name the bytes that a token saves for backward in each part of the model."""
    size = 4 if r.precision == "fp32" else 2
    saved = Saved(c=c, size=size, fp8=r.precision == "fp8", recompute=r.recompute)
    for part in ("embedding", "dense", "moe", "head", "state", "mtp"):
        setattr(s, f"activations_{part}", total(amount for _, amount in saved.part(part)))
    if r.recompute == "full":
        s.activations_again = saved.largest_block()


def _stages(s: Sheet, c: ModelConfig, r: Layout) -> dict[str, list[Stage]]:
    """Return the stages of each kind of GPU: the only one, or the first, a second, a middle one and the last."""
    dual, most, least = r.schedule == "dualpipe", s.layers_first, s.layers_last

    def stage(layers: Any, dense: Any, in_flight: Any, **ends: Any) -> Stage:
        return {"dense": dense, "moe": layers - dense, "in_flight": in_flight, **ends}

    def with_mtp(found: Stage, vocabularies: int, **ends: Any) -> Stage:
        mtp = {"dense": found["dense"] + s.mtp_dense_layers, "moe": found["moe"] + s.mtp_moe_layers}
        return {**found, **mtp, "mtp": c.n_mtp_layers, "head": 1, "vocabulary": vocabularies, **ends}

    if r.pipeline == 1:
        return {"only": [with_mtp(stage(c.n_layers, s.dense_layers, 1), vocabularies=2, embedding=1)]}
    dense = smallest(s.dense_layers, most)
    first = stage(most, dense, s.pipeline, embedding=1, vocabulary=1)
    dense_last = largest(0, s.dense_layers - (c.n_layers - least))
    last = stage(least, dense_last, s.pipeline if r.schedule == "zb1p" else 1)
    last = with_mtp(last, vocabularies=1 if dual or not c.n_mtp_layers else 2)  # a copy of the embedding
    in_flight = {"1f1b": s.pipeline - 1, "zb1p": s.pipeline, "dualpipe": (s.pipeline + 1) / 2}[r.schedule]
    middle = stage(most, most - smallest(s.moe_layers, most), in_flight)
    found = {"first": [first, last] if dual else [first]}
    if r.pipeline > 2 and c.n_dense_layers > 1:
        second = stage(most, smallest(s.dense_layers - dense, most), in_flight)
        found["second"] = [second, middle] if dual else [second]
    if r.pipeline > 2:
        found["middle"] = [middle, middle] if dual else [middle]
    return found if dual else found | {"last": [last]}


def _memory(s: Sheet, c: ModelConfig, r: Layout) -> list[Sheet]:
    """Name the parameters and the memory of each kind of GPU; return its part of the sheet."""
    main = list(main_tensors(c))
    block = [use for use in main if use.place == "block"]
    s.local_dense = _on_gpu(s, [*block, *(use for use in main if use.place == "dense")])
    s.local_moe = _on_gpu(s, [*block, *(use for use in main if use.module == "shared experts")])
    s.local_experts = s.experts_per_gpu * s.or_zero("expert_parameters")
    norms = total(use.numbers for use in block if use.form == "fp32")
    matrices_of = {"dense": s.local_dense, "moe": s.local_moe}
    plain_of = {  # what is never FP8
        "dense": norms,
        "moe": norms + s.or_zero("gate_parameters"),
        "embedding": c.dim if c.embed_norm else 0,
        "head": c.dim,
        "mtp": 3 * c.dim + 2 * c.dim * c.dim,
        "vocabulary": s.vocabulary_parameters / s.tensor,
    }
    saved_of = {part: getattr(s, f"activations_{part}") for part in ("dense", "moe", "embedding", "head", "mtp")}
    working = _working(s, c, r)
    found: list[Sheet] = []
    for place, stages in _stages(s, c, r).items():
        gpu = s.each(f"{{}}_{place}")
        matrices, plain = (total(_held(one, of) for one in stages) for of in (matrices_of, plain_of))
        gpu.expert_parameters = total(one["moe"] for one in stages) * s.local_experts
        gpu.parameters = matrices + plain + gpu.expert_parameters
        _gpu_state(s, gpu, r, matrices, plain)
        saved = total(one["in_flight"] * _held(one, saved_of) for one in stages)
        gpu.memory_activations = saved * s.micro_batch_tokens
        gpu.memory_working = working
        state = gpu.memory_weights + gpu.memory_gradients + gpu.memory_master + gpu.memory_moments
        gpu.memory = state + gpu.memory_activations + gpu.memory_working
        found.append(gpu)
    return found


def _held(stage: Stage, of: dict[str, Any]) -> Any:
    """Return the sum over the parts of a stage, each with its amount."""
    return total(stage[part] * amount for part, amount in of.items() if part in stage)


def _on_gpu(s: Sheet, uses: list[TensorUse]) -> Any:
    """Return the numbers that a GPU holds of matrices that `tensor` GPUs share."""
    whole = total(use.numbers for use in uses if use.form == "fp8" and use.split == "whole")
    return total(use.numbers for use in uses if use.form == "fp8" and use.split != "whole") / s.tensor + whole


def _gpu_state(s: Sheet, gpu: Sheet, r: Layout, matrices: Any, plain: Any) -> None:
    """Name the bytes of the training state of a GPU, each part divided from a stage of ZeRO on."""
    for part, divided_from, of_matrices, of_plain in (
        ("weights", 3, s.state_weight, 4 if r.precision == "fp32" else 2),
        ("gradients", 2, s.state_gradient, s.state_gradient),
        ("master", 1, s.state_master, s.state_master),
        ("moments", 1, s.state_moments, 2 * SIZES[r.moments]),
    ):
        rest, experts = matrices * of_matrices + plain * of_plain, gpu.expert_parameters * of_matrices
        if r.zero >= divided_from:
            rest, experts = rest / (s.data * copies(r)), experts / (s.expert_data * copies(r))
        setattr(gpu, f"memory_{part}", rest + experts)


def _working(s: Sheet, c: ModelConfig, r: Layout) -> Any:
    """Return the bytes of a block that is made again, and of layers whose weights are gathered."""
    parts = [s.activations_again * s.micro_batch_tokens] if r.recompute == "full" else []
    if r.zero == 3:
        has_moe = c.n_dense_layers < c.n_layers + c.n_mtp_layers
        widest = largest(s.local_dense, s.local_moe + s.local_experts) if has_moe else s.local_dense
        parts.append(ZERO3_GATHERED * widest * s.state_weight)
    return total(parts)


def _process(s: Sheet, c: ModelConfig, r: Layout) -> None:
    """Name what one process holds at the end of a forward, as dsmini itself trains; see dsmini.accounting.memory.

    Left out: AdamW's counts of steps, 4 bytes a tensor.
    """
    main, mtp = placed_tensors(s, c)
    dtype = "float32" if r.precision == "fp32" else "bfloat16"
    owned = [use for use in main + mtp if use.owned]
    s.process_parameters = 4 * (s.parameters_total + s.routing_biases)
    s.process_gradients = 4 * s.parameters_total
    if r.optimizer == "adamw":
        s.process_optimizer = 2 * SIZES[r.moments] * s.parameters_total
    else:
        s.process_optimizer = total(state_bytes(use, "muon", r.moments) * use.parameters for use in owned)
    copies = (saved_copy(use, dtype, fp8=r.precision == "fp8") for use in owned)
    s.process_copies = total(copies)
    s.process_head_gradient = 4 * (1 + c.n_mtp_layers) * s.vocabulary_parameters
    parts = (tokens * getattr(s, f"activations_{part}") for _, part, tokens in passes(c, s.seq_len))
    again = [s.seq_len * s.activations_again] if r.recompute == "full" else []
    tables = (rotary_table(c, s.seq_len - depth) for depth in range(int(c.n_mtp_layers) + 1))
    s.process_activations = s.micro_batch * total([*parts, *again]) + total(tables)
    held = s.process_parameters + s.process_gradients + s.process_optimizer + s.process_activations
    s.process_memory = held + s.process_copies + s.process_head_gradient


# --- time


def _compute(s: Sheet, c: ModelConfig, hardware: Hardware, r: Layout) -> None:
    """Name the computing time of a token, and of a micro-batch in a stage."""
    s.put("bf16_efficiency", *BF16_EFFICIENCY)
    s.put("fp8_efficiency", *FP8_EFFICIENCY)
    share = 1
    if r.expert > 1 and "multiprocessors" in hardware.numbers:
        share = 1 - s.put("communication_multiprocessors", *CARRYING) / s.multiprocessors
    s.computing_share = share
    peak = hardware.peak(s, "float32" if r.precision == "fp32" else "bfloat16")
    s.plain_rate = peak * s.bf16_efficiency * s.computing_share
    fp8 = r.precision == "fp8"
    s.fp8_rate = hardware.peak(s, "fp8") * s.fp8_efficiency * s.computing_share if fp8 else s.plain_rate
    # of an indexer's operations over the context, as of all products, backward takes two thirds
    s.pair_seconds = (s.attention_flops + s.or_zero("indexer_flops") / 3) / c.n_layers / s.plain_rate
    block = [use for use in main_tensors(c) if use.place == "block" and use.visits]
    indexer, blocks = [use for use in block if use.module == INDEXER], c.n_layers + c.n_mtp_layers
    inside = _products(s, block) + s.pair_seconds
    chosen = c.n_activated_experts * s.or_zero("expert_parameters") + s.or_zero("shared_parameters")
    kinds: list[Any] = []
    if s.get("dense_parameters") is not None:
        s.dense_layer_seconds = 2 * s.dense_parameters / s.fp8_rate + inside
        kinds += [s.dense_layer_seconds] * (c.n_dense_layers > 0)
    if s.get("expert_parameters") is not None:
        s.moe_layer_seconds = 2 * chosen / s.fp8_rate + 2 * s.gate_parameters / s.plain_rate + inside
        kinds += [s.moe_layer_seconds] * (c.n_dense_layers < c.n_layers)
    heads = (1 + c.n_mtp_layers) * s.vocabulary_parameters + s.mtp_projection_parameters
    s.outside_seconds = 2 * heads / s.plain_rate
    dense, moe = s.dense_layers + s.mtp_dense_layers, s.moe_layers + s.mtp_moe_layers
    layers = dense * s.or_zero("dense_layer_seconds") + moe * s.or_zero("moe_layer_seconds")
    s.context_seconds = blocks * s.pair_seconds
    s.forward_seconds = layers + s.outside_seconds
    up = [use for use in block if use.name in ("wkv_b", "wq_b") and use.module == "attention"]
    again = {"none": 0.0, "selective": blocks * _products(s, up) if c.is_mla else 0.0, "full": layers}
    s.again_seconds = again[r.recompute]
    if indexer:
        s.detached_seconds = blocks * _products(s, indexer)
    s.stage_share = largest(1 / s.pipeline, s.layers_first * functools.reduce(smallest, kinds) / s.forward_seconds)
    s.chunk_forward = s.forward_seconds * s.micro_batch_tokens * s.stage_share
    backward = 2 * s.forward_seconds + s.again_seconds - s.or_zero("detached_seconds")
    s.chunk_backward = backward * s.micro_batch_tokens * s.stage_share
    # W makes no gradients of attention over the context, whose factors are no weights
    s.chunk_weights = (s.forward_seconds - s.context_seconds) * s.micro_batch_tokens * s.stage_share


def _products(s: Sheet, uses: list[TensorUse]) -> Any:
    """Return the time of a token with some matrices of a block: at the rate of FP8 those that may be FP8."""
    fp8, plain = ([use.numbers for use in uses if use.form == form] for form in ("fp8", "fp32"))
    seconds = 2 * total(fp8) / s.fp8_rate
    return seconds + 2 * total(plain) / s.plain_rate if plain else seconds


def _step(s: Sheet, c: ModelConfig, hardware: Hardware, r: Layout, gpus: list[Sheet]) -> None:
    """Name the parts of a step's time, and the step without each resource."""
    rows = between = within = 0.0
    if r.expert > 1:
        nodes = r.expert / hardware.value("gpus_per_node")
        training_exchange(s, c, hardware, nodes, "fp8" if r.precision == "fp8" else "bfloat16")
        s.stage_moe_layers = (s.moe_layers + s.mtp_moe_layers) / s.pipeline
        s.chunk_slow = s.dispatch_slow_seconds * s.micro_batch_tokens * s.stage_moe_layers
        s.chunk_fast = s.dispatch_fast_seconds * s.micro_batch_tokens * s.stage_moe_layers
        s.chunk_dispatch = s.dispatch_seconds * s.micro_batch_tokens * s.stage_moe_layers
        s.compute_to_dispatch = (s.chunk_forward + s.chunk_backward) / (2 * s.chunk_dispatch)
        between, within, rows = s.chunk_slow, s.chunk_fast, s.chunk_dispatch
    s.chunk_tensor = _reduce_seconds(s, c, hardware, r)
    s.state_seconds = _state_seconds(s, hardware, r, gpus)
    moved = s.state_gradient + 2 * s.state_master + 2 * s.state_moments + s.state_weight
    if r.precision == "fp32":
        moved = moved + s.state_weight  # its own master: read too
    s.update_seconds = _most(_owned(s, r, gpu) for gpu in gpus) * moved / s.memory_bandwidth
    computing = {"forward": s.chunk_forward, "backward": s.chunk_backward, "weights": s.chunk_weights}
    load = {**computing, "rows": rows, "reduce": s.chunk_tensor, "state": s.state_seconds}
    for name, part in _parts(s, r, **load).items():
        setattr(s, f"{name}_seconds", part)
    waiting = s.computing_seconds + s.dispatching_seconds + s.reducing_seconds + s.bubble_seconds
    s.roof_step_seconds = waiting + s.exchange_seconds + s.update_seconds
    one_node = r.gpus <= hardware.value("gpus_per_node")
    for name, change in {
        "computing": dict.fromkeys(computing, 0.0),
        "links_between": {"rows": within, "state": s.state_seconds if one_node else 0.0},
        "links_within": {"rows": between, "reduce": 0.0, "state": 0.0 if one_node else s.state_seconds},
    }.items():
        parts = _parts(s, r, **{**load, **change})
        setattr(s, f"step_without_{name}", total(parts.values()) + s.update_seconds)
    s.step_without_bubble = s.roof_step_seconds - s.bubble_seconds
    s.step_without_update = s.roof_step_seconds - s.update_seconds


def _parts(
    s: Sheet, r: Layout, forward: Any, backward: Any, weights: Any, rows: Any, reduce: Any, state: Any
) -> dict[str, Any]:
    """Return what a GPU waits for in a step: computing, rows, all-reduces, the pipeline, gradients and weights.

    Args:
        forward, backward, weights, rows, reduce: times of a micro-batch in a stage and pass, before any hides another.
        state: time of gradients and weights of a step.
    """
    dual, number = r.schedule == "dualpipe", s.micro_batches
    alone, sent = forward + backward, 2 * rows
    both = largest(alone, sent) if dual else alone + sent
    found = {"computing": number * alone, "dispatching": number * sent, "reducing": number * (2 * reduce)}
    if dual:  # in the middle of a step, a forward and a backward hide each other's rows
        found["dispatching"] = found["dispatching"] - (number - s.pipeline) * (alone + sent - both)
    found["bubble"] = bubble_seconds(
        r.schedule,
        s.pipeline,
        forward=forward + rows + reduce,
        backward=backward + rows + reduce,
        weights=weights,
        both=both + 2 * reduce,
    )
    found["exchange"] = state if r.zero < 2 else largest(0.0, state - found["computing"])
    return found


def bubble_seconds(schedule: Schedule, pipeline: Any, *, forward: Any, backward: Any, weights: Any, both: Any) -> Any:
    """Return the time that a GPU waits in a step. Source: DeepSeek-V3 report, table 2.

    Args:
        forward, backward: times of a micro-batch in a stage; backward makes all gradients.
        weights: the part of backward that makes the gradients of weights.
        both: time of a forward and a backward at the same time.
    """
    if schedule == "dualpipe":
        return (pipeline / 2 - 1) * (both + backward - 3 * weights)
    alone = forward + backward
    return (pipeline - 1) * (alone - 2 * weights if schedule == "zb1p" else alone)


def _reduce_seconds(s: Sheet, c: ModelConfig, hardware: Hardware, r: Layout) -> Any:
    """Return the time of two all-reduces a layer in one pass; each moves every row twice but for the own part."""
    if r.tensor == 1:
        return 0.0
    if not hardware.linked:
        raise ValueError(f"{hardware.title} has no fast link between GPUs, which tensor={r.tensor} needs; use 1")
    layers = (c.n_layers + c.n_mtp_layers) / s.pipeline
    return 2 * c.dim * s.micro_batch_tokens * (4 * (s.tensor - 1) * layers) / s.fast_link


def _state_seconds(s: Sheet, hardware: Hardware, r: Layout, gpus: list[Sheet]) -> Any:
    """Return the time of gradients and weights between data-parallel GPUs, before computing hides any of it."""
    if r.gpus == 1:
        return 0.0
    one_node = r.gpus <= hardware.value("gpus_per_node")
    if not (hardware.linked if one_node else hardware.networked):
        most = f"{hardware.node} or fewer" if hardware.linked else 1
        raise ValueError(f"{hardware.title} has no link that gpus={r.gpus} need; use {most}")
    s.sent_gradients, s.sent_weights = (
        _most(_sent(s, r, gpu, size) for gpu in gpus) for size in (s.state_gradient, s.state_weight)
    )
    sent = {
        0: 2 * s.sent_gradients,
        1: s.sent_gradients + s.sent_weights,
        2: s.micro_batches * s.sent_gradients + s.sent_weights,
        3: s.micro_batches * (s.sent_gradients + 2 * s.sent_weights),
    }[r.zero]
    return sent / (s.fast_link if one_node else s.slow_link)


def _sent(s: Sheet, r: Layout, gpu: Sheet, size: Any) -> Any:
    """Return the bytes that a GPU sends when a number of `size` for each parameter is reduced or gathered once."""
    return total(numbers * (1 - 1 / holders) for numbers, holders in _held_by(s, r, gpu)) * size


def _owned(s: Sheet, r: Layout, gpu: Sheet) -> Any:
    """Return the parameters that a GPU updates."""
    return gpu.parameters if r.zero == 0 else total(numbers / holders for numbers, holders in _held_by(s, r, gpu))


def _held_by(s: Sheet, r: Layout, gpu: Sheet) -> list[tuple[Any, Any]]:
    """Return the parameters of a GPU that are of no expert, and those of experts, each with the GPUs that hold them."""
    rest = gpu.parameters - gpu.expert_parameters
    return [(rest, s.data * copies(r)), (gpu.expert_parameters, s.expert_data * copies(r))]


def _most(amounts: Iterable[Any]) -> Any:
    return functools.reduce(largest, amounts)


# --- the whole run


def run_figures(s: Sheet, hardware: Hardware, r: Layout, utilization: tuple[float, str] | None) -> None:
    """Name the time and the cost of a run, at the assumed utilization or by the parts of a step if these take longer.

    Operations are those of training_flops, without multi-token prediction and recomputation. The peak is that of BF16
    also where products are FP8. DeepSeek counts both like this.

    Args:
        utilization: the share of the peak that the user measured, and its source; None: V3's 0.3894.
    """
    s.put("utilization", *(utilization or UTILIZATION))
    peak = s.gpus * hardware.peak(s, "float32" if r.precision == "fp32" else "bfloat16")
    s.step_tokens = s.batch * s.seq_len
    s.step_flops = s.training_flops * s.step_tokens
    s.assumed_step_seconds = s.step_flops / (peak * s.utilization)
    s.roof_utilization = s.step_flops / (peak * s.roof_step_seconds)
    s.step_seconds = s.assumed_step_seconds if utilization else largest(s.assumed_step_seconds, s.roof_step_seconds)
    s.training_binding_ratio = s.roof_step_seconds / functools.reduce(
        smallest, (getattr(s, f"step_without_{name}") for name in WITHOUT)
    )
    speed_figures(s, s.step_seconds)
    if r.expert > 1 and hardware.networked:
        passes_of_stage = 2 * s.stage_moe_layers
        tokens = s.training_tokens_per_second / (s.data * s.tensor)
        s.slow_link_rate = tokens * passes_of_stage * s.slow_bytes
        s.slow_link_share = s.slow_link_rate / s.slow_link
        s.slow_link_share_unlimited = tokens * passes_of_stage * s.slow_bytes_unlimited / s.slow_link


def speed_figures(s: Sheet, step: Figure) -> None:
    """Name time, cost and operations a second of a run from the time of a step, predicted or measured."""
    s.training_tokens_per_second = s.step_tokens / step
    s.training_tokens_per_day = s.training_tokens_per_second * 86400
    s.training_hours_per_trillion = s.gpus * (1e12 / s.training_tokens_per_second) / 3600
    s.training_days_per_trillion = 1e12 / s.training_tokens_per_second / 86400
    s.training_time = s.tokens / s.training_tokens_per_second
    s.training_gpu_hours = s.gpus * s.training_time / 3600
    s.training_days = s.training_time / 86400
    if s.get("gpu_price") is not None:
        s.training_cost = s.training_gpu_hours * 3600 * s.gpu_price
    s.flops_per_gpu = s.training_tokens_per_second * s.training_flops / s.gpus
    s.flops_per_gpu_full_square = s.training_tokens_per_second * s.training_flops_full_square / s.gpus
