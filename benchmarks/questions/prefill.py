"""How fast is a prompt read?"""

from collections.abc import Iterator

import torch

from benchmarks import shapes
from benchmarks.question import Case, Figure, Plot, Question, Setting
from benchmarks.steps import LEAST, speed_sentence, step_figures
from dsmini import ModelConfig, accounting
from dsmini.measure.counting import count
from dsmini.measure.memory import reset_peak
from dsmini.measure.timing import times
from dsmini.measure.workloads import dtype_name, random_model, random_tokens
from dsmini.report.charts import lines

NAME = "prefill"


def cases(setting: Setting) -> list[Case]:
    config = shapes.QUICK if setting.quick else shapes.BIG
    points = [(1, 128), (1, 512)] if setting.quick else [(1, 128), (1, 512), (1, 2048), (4, 512)]
    seconds = 1.5 if setting.quick else 6.0
    return [
        Case(
            key=f"batch={batch} tokens={tokens}",
            seconds=2.5 * seconds,
            run=lambda b=batch, t=tokens: measure(config, setting, b, t, seconds),
        )
        for batch, tokens in points
    ]


@torch.no_grad()
def measure(config: ModelConfig, setting: Setting, batch: int, tokens: int, seconds: float) -> Iterator[Figure]:
    model = random_model(config, setting.device, setting.dtype)
    prompt = random_tokens(config, batch, tokens, setting.device)
    cache = model.new_cache(batch, tokens)
    reset_peak()

    def step() -> None:
        cache.truncate(0)
        model.head(model.advance(prompt, cache).normed[:, -1:])

    step()
    counted = count(step, setting.roofs.cache_bytes)
    taken = times(step, setting.device, seconds)
    dtype = dtype_name(setting.dtype)
    run = accounting.step_flops(config, batch_size=batch, seq_len=tokens, training=False, dtype=dtype, last_logits=True)
    unread = 2 * config.dim * config.vocab_size * (1 - 1 / tokens)  # logits of the last token alone are made
    yield from step_figures(
        NAME,
        {"batch": batch, "tokens": tokens},
        counted,
        taken,
        batch * tokens,
        setting,
        bytes_predicted=accounting.prefill_bytes_per_token(config, seq_len=tokens, batch=batch, dtype=dtype).total,
        bytes_note=LEAST,
        flops_predicted=run.total / (batch * tokens),
        flops_ideal=accounting.flops_per_token(config, tokens, causal=True).total - unread,
    )


def finding(figures: list[Figure]) -> str:
    return speed_sentence(figures, "tokens", "a prompt of")


def plots(figures: list[Figure]) -> list[Plot]:
    return lines(figures, "tokens_per_s", x="tokens", by="batch", title="Tokens of a prompt a second", unit="tokens/s")


QUESTION = Question(
    name=NAME,
    title="How fast is a prompt read?",
    cases=cases,
    finding=finding,
    plots=plots,
    about="The whole prompt goes through the model at once and into the latent cache; the head reads the last token.",
)
