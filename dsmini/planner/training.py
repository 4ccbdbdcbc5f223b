"""Training: memory of each GPU, the time of an optimizer step from its parts, the whole run, and its failures.

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
step takes 19.9 s; 19.93 are printed.

Failures. Nodes fail independently at a constant rate: mean time to failure M = 1 / (nodes * failures per node and
second). Meta counted 6.50 failures in 1000 node-days; on 16,384 GPUs, 2,048 nodes, that is one every 1.80 hours. A
failure costs the restart u and the work since the last checkpoint, and a checkpoint halts training for w. With an
interval D, to first order best at sqrt(2 w M), the share of the time that trains is

    D / (M e^(u/M) (e^((D + w)/M) - 1))

V3 on 2048 H800: a node of 256 fails every 14.4 hours. Halting 10 s every 17 minutes and restarting in 300 s keep 97.5 %
of the time.

Estimates: experts are perfectly balanced. Two all-reduces a layer of matrices that `tensor` GPUs share are not
hidden. ZeRO 0 and 1 exchange once a step, not hidden; ZeRO 2 and 3 in every micro-batch, hidden by computing.
Activations between stages are hidden. All weights are sent as wide as those of matrices.

Source: DeepSeek-V3 report, sections 3.2 and 3.3, table 2; ZeRO (arXiv 1910.02054); INS, table 4; Kokolis et al. (arXiv
2410.21680), Young (1974) and Daly (2006) for failures.
"""

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from dsmini.accounting.memory import TABLES, Saved, activation_bytes, training_bytes
from dsmini.accounting.tensors import INDEXER, SIZES, TensorUse, largest, main_tensors, smallest, total
from dsmini.config import ModelConfig
from dsmini.planner.exchange import training_exchange
from dsmini.planner.figure import Sheet
from dsmini.planner.hardware import Hardware
from dsmini.planner.request import DTYPES, Layout, Schedule, copies, presets
from dsmini.planner.words import shown

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
PROCESS = {
    "process_parameters": "parameters",
    "process_gradients": "gradients",
    "process_optimizer": "optimizer",
    "process_copies": "weights kept for backward",
    "process_head_gradient": "the head's gradient",
    "process_tables": TABLES,
}
"""What dsmini's own training holds in one process, whatever the batch, by its name in accounting."""
FAILURES = ("failures_per_node_day", "restart_time", "checkpoint_halt")
"""Rate of failures and their costs, which a user may choose."""
MOST_LOST = 7.0
"""Longest restart, checkpoint and work between two, in mean times to failure: less than 0.1 % would train."""


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
    if r.gpus > hardware.most_gpus:
        most = f"{hardware.node}{' or fewer' * hardware.linked}"
        raise ValueError(f"{hardware.title} has no link that gpus={r.gpus} need; use {most}")
    s.data = s.gpus / (s.pipeline * s.tensor)
    s.expert_data = s.data * s.tensor / s.expert
    s.micro_batches = s.batch / (s.data * s.micro_batch)
    s.micro_batch_tokens = s.micro_batch * s.seq_len / s.tensor
    s.layers_first = np.ceil(c.n_layers / s.pipeline)
    s.layers_last = np.floor(c.n_layers / s.pipeline)
    gpus = _memory(s, c, r)
    if r.gpus == 1:
        s.memory_needed = _process(s, c, r)
    else:
        s.memory_needed = _most(gpu.memory for gpu in gpus)
    s.memory_free = s.gpu_memory - s.memory_needed
    _compute(s, c, hardware, r)
    _step(s, c, hardware, r, gpus)


# --- memory


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
    fp32, moment = r.precision == "fp32", SIZES[r.moments]
    s.state_weight = {"fp32": 4, "bf16": 2, "fp8": 1 + 4 / (128 * 128)}[r.precision]
    s.state_gradient = 4
    s.state_optimizer = (0 if fp32 else 4) + (2 * moment if r.optimizer == "adamw" else 4)  # FP32 needs no master
    s.state_parameter = s.state_weight + s.state_gradient + s.state_optimizer
    # bytes of a parameter of a matrix, and of what is never FP8 and AdamW's, each divided from a stage of ZeRO on
    state = {
        "weights": (3, s.state_weight, 4 if fp32 else 2),
        "gradients": (2, s.state_gradient, s.state_gradient),
        "optimizer": (1, s.state_optimizer, (0 if fp32 else 4) + 2 * moment),
    }
    saved = Saved(c=c, size=4 if fp32 else 2, fp8=r.precision == "fp8", recompute=r.recompute)
    kinds = ("dense", "moe", "embedding", "head", "mtp")
    saved_of = {part: s.name(f"activations_{part}", total(n for _, n in saved.part(part))) for part in kinds}
    block = [use for use in main_tensors(c) if use.place == "block"]
    s.local_dense = _on_gpu(s, [*block, *(use for use in main_tensors(c) if use.place == "dense")])
    s.local_moe = _on_gpu(s, [*block, *(use for use in main_tensors(c) if use.kind == "shared experts")])
    s.local_experts = c.n_routed_experts / s.expert * s.get("expert_parameters", 0)
    norms = s.norm_parameters + total(use.numbers for use in block if use.kind == INDEXER and use.form == "fp32")
    matrices_of = {"dense": s.local_dense, "moe": s.local_moe}
    plain_of = {  # what is never FP8
        "dense": norms,
        "moe": norms + s.get("gate_parameters", 0),
        "embedding": c.dim if c.embed_norm else 0,
        "head": c.dim,
        "mtp": s.get("mtp_norm_layer", 0) + s.get("mtp_projection_layer", 0),
        "vocabulary": s.vocabulary_parameters / s.tensor,
    }
    working = _working(s, c, r, saved)
    found: list[Sheet] = []
    for place, stages in _stages(s, c, r).items():
        gpu = s.each(f"{{}}_{place}")
        matrices, plain = (total(_held(one, of) for one in stages) for of in (matrices_of, plain_of))
        gpu.expert_parameters = total(one["moe"] for one in stages) * s.local_experts
        gpu.parameters = matrices + plain + gpu.expert_parameters
        for part, (divided_from, of_matrix, of_plain) in state.items():
            rest, experts = matrices * of_matrix + plain * of_plain, gpu.expert_parameters * of_matrix
            if r.zero >= divided_from:
                rest, experts = rest / (s.data * copies(r)), experts / (s.expert_data * copies(r))
            setattr(gpu, f"memory_{part}", rest + experts)
        in_flight = total(one["in_flight"] * _held(one, saved_of) for one in stages)
        gpu.memory_activations = in_flight * s.micro_batch_tokens + working
        gpu.memory = gpu.memory_weights + gpu.memory_gradients + gpu.memory_optimizer + gpu.memory_activations
        found.append(gpu)
    return found


def _held(stage: Stage, of: dict[str, Any]) -> Any:
    """Return the sum over the parts of a stage, each with its amount."""
    return total(stage[part] * amount for part, amount in of.items() if part in stage)


def _on_gpu(s: Sheet, uses: list[TensorUse]) -> Any:
    """Return the numbers that a GPU holds of matrices that `tensor` GPUs share."""
    whole = total(use.numbers for use in uses if use.form == "fp8" and use.split == "whole")
    return total(use.numbers for use in uses if use.form == "fp8" and use.split != "whole") / s.tensor + whole


def _working(s: Sheet, c: ModelConfig, r: Layout, saved: Saved) -> Any:
    """Return the bytes of a block that is made again, and of layers whose weights are gathered."""
    parts: list[Any] = []
    if r.recompute == "full":
        s.activations_again = saved.largest_block()
        parts.append(s.activations_again * s.micro_batch_tokens)
    if r.zero == 3:
        has_moe = c.n_dense_layers < c.n_layers + c.n_mtp_layers
        widest = largest(s.local_dense, s.local_moe + s.local_experts) if has_moe else s.local_dense
        parts.append(ZERO3_GATHERED * widest * s.state_weight)
    return total(parts)


def _process(s: Sheet, c: ModelConfig, r: Layout) -> Any:
    """Return the bytes that one process holds at the end of a forward, as dsmini itself trains, counted by accounting.

    Its numbers are inputs. `--explain` of GPUs together shows how such counts follow from a model's sizes.
    """
    config: ModelConfig = replace(getattr(c, "plain", c), precision="fp8" if r.precision == "fp8" else "native")
    dtype = "float32" if r.precision == "fp32" else "bfloat16"
    how: dict[str, Any] = {"dtype": dtype, "optimizer": r.optimizer, "moments": r.moments, "recompute": r.recompute}
    counted = dict(training_bytes(config, batch_size=1, seq_len=r.seq_len, **how).by_part)
    tables = activation_bytes(config, batch_size=1, seq_len=r.seq_len, dtype=dtype).by_part[TABLES]
    counted |= {TABLES: tables, "activations": counted["activations"] - tables}
    for name, part in PROCESS.items():
        s.put(name, counted.get(part, 0), "dsmini.accounting.training_bytes")
    s.put("process_activations", counted["activations"], "dsmini.accounting.activation_bytes")
    return total(getattr(s, name) for name in PROCESS) + s.micro_batch * s.process_activations


# --- time


def _compute(s: Sheet, c: ModelConfig, hardware: Hardware, r: Layout) -> None:
    """Name the computing time of a token, and of a micro-batch in a stage."""
    assume(s, "bf16_efficiency", "fp8_efficiency")
    share = 1
    if r.expert > 1 and "multiprocessors" in hardware.numbers:
        assume(s, "communication_multiprocessors")
        share = 1 - s.communication_multiprocessors / s.multiprocessors
        if float(share) <= 0:
            raise ValueError(f"{hardware.title} has no multiprocessors but those that carry rows; use expert=1")
    peak = hardware.peak(s, "float32" if r.precision == "fp32" else "bfloat16")
    s.plain_rate = peak * s.bf16_efficiency * share
    fp8 = r.precision == "fp8"
    s.fp8_rate = hardware.peak(s, "fp8") * s.fp8_efficiency * share if fp8 else s.plain_rate
    # of an indexer's operations over the context, as of all products, backward takes two thirds
    s.pair_seconds = (s.attention_flops + s.get("indexer_flops", 0) / 3) / c.n_layers / s.plain_rate
    block = [use for use in main_tensors(c) if use.place == "block" and use.visits]
    blocks, inside = c.n_layers + c.n_mtp_layers, _products(s, block) + s.pair_seconds
    kinds: list[Any] = []
    if s.get("dense_parameters") is not None:
        s.dense_layer_seconds = 2 * s.dense_parameters / s.fp8_rate + inside
        kinds += [s.dense_layer_seconds] * (c.n_dense_layers > 0)
    if s.get("expert_parameters") is not None:
        chosen = c.n_activated_experts * s.expert_parameters + s.get("shared_parameters", 0)
        s.moe_layer_seconds = 2 * chosen / s.fp8_rate + 2 * s.gate_parameters / s.plain_rate + inside
        kinds += [s.moe_layer_seconds] * (c.n_dense_layers < c.n_layers)
    heads = s.vocabulary_parameters + c.n_mtp_layers * (s.vocabulary_parameters + s.get("mtp_projection_layer", 0))
    dense, moe = s.dense_layers + s.mtp_dense_layers, s.moe_layers + s.mtp_moe_layers
    layers = dense * s.get("dense_layer_seconds", 0) + moe * s.get("moe_layer_seconds", 0)
    s.forward_seconds = layers + 2 * heads / s.plain_rate
    up = [use for use in block if use.name in ("wkv_b", "wq_b") and use.kind == "attention"]
    again = {"none": 0.0, "selective": blocks * _products(s, up) if c.is_mla else 0.0, "full": layers}[r.recompute]
    backward = 2 * s.forward_seconds + again
    if indexer := [use for use in block if use.kind == INDEXER]:  # whose inputs have no gradients
        backward = backward - blocks * _products(s, indexer)
    s.backward_seconds = backward
    s.stage_share = largest(1 / s.pipeline, s.layers_first * functools.reduce(smallest, kinds) / s.forward_seconds)
    s.chunk_forward = s.forward_seconds * s.micro_batch_tokens * s.stage_share
    s.chunk_backward = s.backward_seconds * s.micro_batch_tokens * s.stage_share
    # W makes no gradients of attention over the context, whose factors are no weights
    s.chunk_weights = (s.forward_seconds - blocks * s.pair_seconds) * s.micro_batch_tokens * s.stage_share


def assume(s: Sheet, *names: str) -> None:
    """Put numbers of presets.toml on the sheet as inputs, unless it has others."""
    for name in names:
        s.put(name, *presets()["assumed"][name])


def _products(s: Sheet, uses: list[TensorUse]) -> Any:
    """Return the time of a token with some matrices of a block: at the rate of FP8 those that may be FP8."""
    rates = {"fp8": s.fp8_rate, "fp32": s.plain_rate}
    found = {form: [use.numbers for use in uses if use.form == form] for form in rates}
    return total(2 * total(numbers) / rates[form] for form, numbers in found.items() if numbers)


def _step(s: Sheet, c: ModelConfig, hardware: Hardware, r: Layout, gpus: list[Sheet]) -> None:
    """Name the parts of a step's time: what a GPU waits for, one after the other."""
    rows = 0.0
    if r.expert > 1:
        training_exchange(s, c, hardware, DTYPES[r.precision])
        layers = (s.moe_layers + s.mtp_moe_layers) / s.pipeline
        s.chunk_dispatch = s.dispatch_seconds * s.micro_batch_tokens * layers
        rows = s.chunk_dispatch
    s.chunk_tensor = _reduce_seconds(s, c, r)
    alone, number = s.chunk_forward + s.chunk_backward, s.micro_batches
    both, shown_rows = alone + 2 * rows, number * (2 * rows)
    if r.schedule == "dualpipe":  # in the middle of a step, a forward and a backward hide each other's rows
        both = largest(alone, 2 * rows)
        shown_rows = shown_rows - (number - s.pipeline) * (alone + 2 * rows - both)
    s.computing_seconds = number * alone
    s.dispatching_seconds = shown_rows
    s.reducing_seconds = number * (2 * s.chunk_tensor)
    s.bubble_seconds = bubble_seconds(
        r.schedule,
        s.pipeline,
        forward=s.chunk_forward + rows + s.chunk_tensor,
        backward=s.chunk_backward + rows + s.chunk_tensor,
        weights=s.chunk_weights,
        both=both + 2 * s.chunk_tensor,
    )
    s.state_seconds = _state_seconds(s, hardware, r, gpus)
    s.exchange_seconds = s.state_seconds if r.zero < 2 else largest(0.0, s.state_seconds - s.computing_seconds)
    moved = s.state_gradient + 2 * s.state_optimizer + s.state_weight * (2 if r.precision == "fp32" else 1)
    s.update_seconds = _most(_owned(s, r, gpu) for gpu in gpus) * moved / s.memory_bandwidth
    s.parts_seconds = total(getattr(s, part) for part in PARTS)


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


def _reduce_seconds(s: Sheet, c: ModelConfig, r: Layout) -> Any:
    """Return the time of two all-reduces a layer in one pass; each moves every row twice but for the own part."""
    if r.tensor == 1:
        return 0.0
    layers = (c.n_layers + c.n_mtp_layers) / s.pipeline
    return SIZES[DTYPES[r.precision]] * c.dim * s.micro_batch_tokens * (4 * (s.tensor - 1) * layers) / s.fast_link


def _state_seconds(s: Sheet, hardware: Hardware, r: Layout, gpus: list[Sheet]) -> Any:
    """Return the time of gradients and weights between data-parallel GPUs, before computing hides any of it."""
    if r.gpus == 1:
        return 0.0
    # what a GPU sends when a number for each parameter is reduced or gathered once
    numbers = _most(total(n * (1 - 1 / holders) for n, holders in _held_by(s, r, gpu)) for gpu in gpus)
    s.sent_gradients, s.sent_weights = numbers * s.state_gradient, numbers * s.state_weight
    sent = {
        0: 2 * s.sent_gradients,
        1: s.sent_gradients + s.sent_weights,
        2: s.micro_batches * s.sent_gradients + s.sent_weights,
        3: s.micro_batches * (s.sent_gradients + 2 * s.sent_weights),
    }[r.zero]
    return sent / (s.fast_link if r.gpus <= hardware.gpus_per_node else s.slow_link)


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


def run_figures(s: Sheet, hardware: Hardware, r: Layout) -> None:
    """Name the time and the cost of a run: by the parts of a step, or by the utilization that the sheet has.

    Operations are those of training_flops, without multi-token prediction and recomputation. The peak is that of BF16
    also where products are FP8. DeepSeek counts both like this.
    """
    peak = s.gpus * hardware.peak(s, "float32" if r.precision == "fp32" else "bfloat16")
    s.step_tokens = s.batch * s.seq_len
    s.step_flops = s.training_flops * s.step_tokens
    reached = s.get("utilization")
    s.step_seconds = s.parts_seconds if reached is None else s.step_flops / (peak * reached)
    s.mfu = s.step_flops / (peak * s.step_seconds)
    s.training_tokens_per_second = s.step_tokens / s.step_seconds
    s.training_time = s.tokens / s.training_tokens_per_second
    s.training_gpu_hours = s.gpus * s.training_time / 3600
    if s.get("gpu_price") is not None:
        s.training_cost = s.training_gpu_hours * 3600 * s.gpu_price


def failure_figures(s: Sheet) -> None:
    """Name what failures do to GPUs; what the sheet lacks is Meta's.

    Raises: ValueError for more of them than a run survives.
    """
    assume(s, *FAILURES, "gpus_per_failing_node")
    s.mean_time_to_failure = 86400 / (s.gpus / s.gpus_per_failing_node * s.failures_per_node_day)
    s.checkpoint_interval = np.sqrt(2 * s.checkpoint_halt * s.mean_time_to_failure)
    lost = s.restart_time + s.checkpoint_halt + s.checkpoint_interval
    if float(lost) > MOST_LOST * float(s.mean_time_to_failure):
        raise ValueError(
            f"a failure every {shown(s.mean_time_to_failure)} leaves no time to train, with {shown(s.restart_time)} "
            f"for a restart and {shown(s.checkpoint_halt)} for a checkpoint; lower one of the three"
        )
    times = s.mean_time_to_failure, s.checkpoint_interval, s.restart_time, s.checkpoint_halt
    s.effective_share = effective_share(*times)


def effective_share(mean: Any, interval: Any, restart: Any, write: Any) -> Any:
    """Return the share of the time that trains, where failures also interrupt restarts and writes (Daly)."""
    return interval / (mean * np.exp(restart / mean) * (np.exp((interval + write) / mean) - 1))
