"""How fast does a model train, and what would this machine allow?

A step is forward, backward, clipping and AdamW on a model of 7.6M parameters, on random tokens.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import shapes
from benchmarks.case import Case, Figure, Plot, Setting, cases_over
from benchmarks.steps import measure_step, speed_sentence
from dsmini import ModelConfig, TrainConfig, Transformer, accounting
from dsmini.measure.workloads import dtype_name, random_tokens
from dsmini.nn import Routing
from dsmini.report.charts import lines
from dsmini.training.optim import optimizers

NAME = "train"


def cases(setting: Setting) -> list[Case]:
    points = [(4, 256)] if setting.quick else [(4, 256), (16, 256), (4, 1024)]
    seconds = 9.0 if setting.quick else 30.0
    return cases_over("batch={} tokens={}", points, seconds, partial(measure, setting))


def training_step(config: ModelConfig, setting: Setting, batch: int, tokens: int) -> Callable[[], list[Routing]]:
    """Return a step that trains a model with random weights on random tokens, and returns its routing."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = Transformer(config, compute_dtype=setting.dtype)
    moving = optimizers(model, TrainConfig(optimizer="adamw"))
    text = random_tokens(config, batch, tokens + 1, setting.device)

    def step() -> list[Routing]:
        losses = model.losses(text[:, :-1], text[:, 1:])
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for optimizer in moving:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return losses.routing

    return step


def measure(setting: Setting, batch: int, tokens: int) -> Iterator[Figure]:
    config = dataclasses.replace(shapes.TRAINED, max_seq_len=1024)
    flops = accounting.step_flops(config, batch_size=batch, seq_len=tokens)
    size = {"seq_len": tokens, "batch_size": batch, "dtype": dtype_name(setting.dtype)}
    least = partial(accounting.training_bytes_per_token, config, **size)
    case, seconds = {"batch": batch, "tokens": tokens}, 3.0 if setting.quick else 10.0
    step = training_step(config, setting, batch, tokens)
    yield from measure_step(NAME, case, step, setting, seconds, flops.total, least)


def finding(figures: list[Figure]) -> str:
    return speed_sentence(figures, "sequences of")


def plots(figures: list[Figure]) -> list[Plot]:
    return lines(figures, "tokens_per_s", x="tokens", by="batch", title="Tokens trained a second")
