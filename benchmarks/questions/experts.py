"""Sparse experts next to dense feed-forwards of equal active and of equal total parameters.

Layers with 64 routed experts, of which a token chooses six, and one shared expert are compared with dense layers of
equal active and of equal total parameters. Each step decodes one token per sequence. The three models take turns.
"""

import dataclasses
import statistics
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import models
from benchmarks.models import decoding
from benchmarks.question import Case, Figure, Question, Setting, cases_over, compared, drawing, figure, pick, race
from dsmini import ModelConfig, accounting
from dsmini.measure.workloads import random_model


def configs(setting: Setting) -> dict[str, ModelConfig]:
    """Return a model with experts, a dense one with equal active parameters, and a dense one with equal total ones."""
    layers = 1 if setting.quick else 3
    moe = dataclasses.replace(models.BIG, n_layers=layers, n_dense_layers=0, vocab_size=256)
    dense = dataclasses.replace(moe, n_dense_layers=layers)
    active, total = (n + moe.n_shared_experts for n in (moe.n_activated_experts, moe.n_routed_experts))
    return {
        "experts": moe,
        "dense, equal active": dataclasses.replace(dense, inter_dim=active * moe.moe_inter_dim),
        "dense, equal total": dataclasses.replace(dense, inter_dim=total * moe.moe_inter_dim),
    }


def cases(setting: Setting) -> list[Case]:
    batches = [1, 8, 64] if setting.quick else [1, 2, 4, 8, 16, 32, 64, 128]
    return cases_over("batch={}", ((n,) for n in batches), 3.0 if setting.quick else 15.0, partial(measure, setting))


@torch.no_grad()
def measure(setting: Setting, batch: int) -> Iterator[Figure]:
    every = {name: random_model(config, setting.device, setting.dtype) for name, config in configs(setting).items()}
    runs, predicted = decoding(every, setting, batch, 64)
    yield from race(setting, {"batch": batch}, runs, predicted=predicted, tokens=batch)
    read = [float((routing.counts > 0).sum()) for _ in range(20) for routing in runs["experts"]()]
    expected = accounting.expected_experts(every["experts"].config, batch)
    note = "of a layer in a step; predicted for independent tokens and equally likely experts; the gate is random"
    case = {"batch": batch, "model": "experts"}
    yield figure("distinct_experts", case, statistics.fmean(read), predicted=expected, note=note)


def answer(figures: list[Figure]) -> str:
    told = compared(figures, "batch", "at batch {}")
    read = [f for f in pick(figures, "distinct_experts") if f.measured]
    last = f" A layer reads {read[-1].measured:.0f} experts at batch {read[-1].case['batch']}." if read else ""
    return f"Time of a decoded token, next to experts: {told}.{last}" if told else last.strip()


QUESTION = Question(
    name="moe",
    title="How fast are sparse experts at my batch size?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(
        drawing("tokens_per_s", "Decoded tokens a second", x="batch", by="model"),
        drawing("distinct_experts", "Distinct experts of a layer in a step", x="batch", by="model"),
    ),
)
