"""How fast does a model train, compared with the roofs of this machine?

A step is forward, backward, clipping and AdamW of a model with 7.6M parameters, on random tokens.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

from benchmarks import shapes
from benchmarks.case import Case, Figure, Plot, Setting, cases_over
from benchmarks.steps import measure_step, speed_sentence
from dsmini import TrainConfig, accounting
from dsmini.measure.workloads import dtype_name, training_step
from dsmini.report.charts import lines

NAME = "train"
TRAIN = TrainConfig(optimizer="adamw")


def cases(setting: Setting) -> list[Case]:
    points = [(4, 256)] if setting.quick else [(4, 256), (16, 256), (4, 1024)]
    seconds = 9.0 if setting.quick else 30.0
    return cases_over("batch={} tokens={}", points, seconds, partial(measure, setting))


def measure(setting: Setting, batch: int, tokens: int) -> Iterator[Figure]:
    config = dataclasses.replace(shapes.TRAINED, max_seq_len=1024)
    flops = accounting.step_flops(config, batch_size=batch, seq_len=tokens)
    size = {"seq_len": tokens, "batch_size": batch, "dtype": dtype_name(setting.dtype)}
    least = partial(accounting.training_bytes_per_token, config, **size)
    case, seconds = {"batch": batch, "tokens": tokens}, 3.0 if setting.quick else 10.0
    step = training_step(config, TRAIN, setting.dtype, batch, tokens, setting.device)
    yield from measure_step(NAME, case, step, setting, seconds, flops.total, least)


def finding(figures: list[Figure]) -> str:
    return speed_sentence(figures, "sequences of")


def plots(figures: list[Figure]) -> list[Plot]:
    return lines(figures, "tokens_per_s", x="tokens", by="batch", title="Training tokens a second")
