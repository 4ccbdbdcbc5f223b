"""How fast does a model train, and what would this machine allow?"""

import dataclasses
from collections.abc import Callable, Iterator

import torch

from benchmarks import shapes
from benchmarks.question import Case, Figure, Plot, Question, Setting
from benchmarks.steps import LEAST, speed_sentence, step_figures
from dsmini import ModelConfig, TrainConfig, Transformer, accounting
from dsmini.measure.counting import count
from dsmini.measure.memory import reset_peak
from dsmini.measure.timing import times
from dsmini.measure.workloads import dtype_name, random_tokens
from dsmini.report.charts import lines
from dsmini.training.optim import optimizers

NAME = "train"


def cases(setting: Setting) -> list[Case]:
    points = [(4, 256)] if setting.quick else [(4, 256), (16, 256), (4, 1024)]
    seconds = 3.0 if setting.quick else 10.0
    config = dataclasses.replace(shapes.TRAINED, max_seq_len=1024)
    return [
        Case(
            key=f"batch={batch} tokens={tokens}",
            seconds=3 * seconds,
            run=lambda b=batch, t=tokens: measure(config, setting, b, t, seconds),
        )
        for batch, tokens in points
    ]


def training_step(config: ModelConfig, setting: Setting, batch: int, tokens: int) -> Callable[[], None]:
    """A step of training a model with random weights on random tokens."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = Transformer(config, compute_dtype=setting.dtype)
    moving = optimizers(model, TrainConfig(optimizer="adamw"))
    text = random_tokens(config, batch, tokens + 1, setting.device)

    def step() -> None:
        model.losses(text[:, :-1], text[:, 1:]).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for optimizer in moving:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def measure(config: ModelConfig, setting: Setting, batch: int, tokens: int, seconds: float) -> Iterator[Figure]:
    step = training_step(config, setting, batch, tokens)
    reset_peak()
    step()
    step()
    counted = count(step, setting.roofs.cache_bytes)
    taken = times(step, setting.device, seconds)
    dtype = dtype_name(setting.dtype)
    run = accounting.step_flops(config, batch_size=batch, seq_len=tokens, dtype=dtype)
    moved = accounting.training_bytes_per_token(config, seq_len=tokens, batch_size=batch, dtype=dtype)
    yield from step_figures(
        NAME,
        {"batch": batch, "tokens": tokens},
        counted,
        taken,
        batch * tokens,
        setting,
        bytes_predicted=moved.total,
        bytes_note=LEAST,
        flops_predicted=run.total / (batch * tokens),
        flops_ideal=accounting.flops_per_token(config, tokens, causal=True, training=True).total,
    )


def finding(figures: list[Figure]) -> str:
    return speed_sentence(figures, "tokens", "sequences of")


def plots(figures: list[Figure]) -> list[Plot]:
    return lines(figures, "tokens_per_s", x="tokens", by="batch", title="Tokens trained a second", unit="tokens/s")


QUESTION = Question(
    name=NAME,
    title="How fast does a model train, and what would this machine allow?",
    cases=cases,
    finding=finding,
    plots=plots,
    about="A step is forward, backward, clipping and AdamW on a model of 7.6M parameters, on random tokens.",
)
