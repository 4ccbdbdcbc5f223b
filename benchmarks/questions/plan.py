"""Forecasts of steps on this machine, next to what they then take.

Six steps are forecast, then run, in each dtype: two of training, two of reading a prompt, two of decoding. A forecast
runs nothing of the model: the operations are counted dry, and each is timed alone. FP8
is simulated in training; in serving, matrices are E4M3 codes and products BF16. Memory is that of all tensors at the
peak of a step, and the resident memory of a process that trains.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import get_args

from benchmarks import models
from benchmarks.models import recipe
from benchmarks.question import Case, Figure, Question, Setting, drawing, figure, left_out, pick
from dsmini import ModelConfig, TrainConfig
from dsmini.machine import DTYPES
from dsmini.measure.counting import Count, counted_twice
from dsmini.measure.process import peak_of_process
from dsmini.measure.roofs import why_unusable
from dsmini.measure.turns import in_turns
from dsmini.measure.workloads import StepDtype, StepShape, Work

SECONDS = 1.5
"""Time to fill with steps of a shape."""
DTYPE_NAMES: tuple[StepDtype, ...] = get_args(StepDtype)


def held_out(quick: bool) -> dict[str, StepShape]:
    """Return the six steps by name, in FP32. No part of the prices was fitted to them."""
    toy, mha, trained = recipe("toy"), recipe("toy-mha"), dataclasses.replace(models.TRAINED, n_layers=2)
    adamw, served = TrainConfig(optimizer="adamw"), models.QUICK
    many = dataclasses.replace(trained, n_routed_experts=48, moe_inter_dim=48, n_activated_experts=8)
    rows: list[tuple[str, Work, ModelConfig, int, int, TrainConfig]] = [
        ("toy with MHA", "training", mha.model, 6, 192, mha.train),
        ("48 experts", "training", many, 4, 160 if quick else 224, adamw),
        ("toy", "prefill", toy.model, 5, 200, adamw),
        ("served", "prefill", served, 2, 384, adamw),
        ("served", "decode", served, 1, 1600, adamw),
        ("served, 3 sequences", "decode", served, 3, 700, adamw),
    ]
    found: dict[str, StepShape] = {}
    for name, work, config, batch, tokens, train in rows:
        roomy = dataclasses.replace(config, max_seq_len=max(config.max_seq_len, tokens + 1))
        how = {"dtype": "float32", "batch": batch, "tokens": tokens, "train": train}
        found[f"{work} {name}"] = StepShape(work=work, config=roomy, **how)
    return found


def cases(setting: Setting) -> list[Case]:
    return [
        Case(
            key=f"step={name} batch={shape.batch} tokens={shape.tokens}",
            seconds=25.0,
            run=partial(measure, setting, name, shape),
        )
        for name, shape in held_out(setting.quick).items()
    ]


def usable(setting: Setting) -> list[StepDtype]:
    """Return the dtypes that are not hopelessly slow here. FP8 multiplies in BF16."""
    slow = {name for name, dtype in DTYPES.items() if why_unusable(dtype, setting.roofs.peak)}
    return [d for d in DTYPE_NAMES if ("bfloat16" if d == "fp8" else d) not in slow]


def measure(setting: Setting, name: str, shape: StepShape) -> Iterator[Figure]:
    """Forecast the step in each dtype, then run it."""
    if (prices := setting.prices) is None:
        yield left_out("seconds", {"step": name}, "operations are timed on a CPU only")
        return
    for dtype in usable(setting):
        here = dataclasses.replace(shape, dtype=dtype)
        expected = prices.forecast(here)
        case = {"step": name, "work": shape.work, "batch": shape.batch, "tokens": shape.tokens, "dtype": dtype}
        step = here.make(setting.device)
        turns = in_turns({"step": step}, setting.device, seconds=SECONDS, least=3, on_turn=setting.deadline)
        yield figure("seconds", case, turns.estimate("step"), predicted=expected.seconds)
        del step
        there = counted_twice(lambda here=here: here.make(setting.device), Count())
        yield figure("tensor_memory", case, float(there.peak), predicted=float(expected.peak))
        if shape.work == "training":
            yield figure(
                "process_memory", case, float(peak_of_process(here)), predicted=float(expected.peak + prices.process)
            )


def errors(figures: Sequence[Figure], metric: str) -> list[float]:
    """Return the errors of the predictions, as shares of what was measured."""
    return [abs(f.predicted / f.measured - 1) for f in pick(figures, metric) if f.predicted is not None and f.measured]


def answer(figures: list[Figure]) -> str:
    seconds, peaks, tensors = (errors(figures, metric) for metric in ("seconds", "process_memory", "tensor_memory"))
    if not seconds:
        return ""
    text = f"{len(seconds)} steps, forecast before they ran: error of the time {statistics.median(seconds):.0%} in the "
    text += f"median, {max(seconds):.0%} at worst"
    text += f"; of a process's peak memory at most {max(peaks):.0%}" if peaks else ""
    text += f"; of the tensors' at most {max(tensors):.1%}" if tensors else ""
    return f"{text}."


QUESTION = Question(
    name="plan",
    title="How far is a plan of this machine from what it then does?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(drawing("seconds", "Time of a step", "{step}", by="dtype"),),
    on_request=True,
)
