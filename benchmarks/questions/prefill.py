"""How fast is a prompt read?

The whole prompt goes through the model at once and into the latent cache; the head reads the last token.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import shapes
from benchmarks.case import Case, Figure, Plot, Setting, cases_over
from benchmarks.steps import measure_step, speed_sentence
from dsmini import ModelConfig, accounting
from dsmini.measure.workloads import dtype_name, random_model, random_tokens
from dsmini.nn import Routing
from dsmini.report.charts import lines

NAME = "prefill"


def cases(setting: Setting) -> list[Case]:
    points = [(1, 128), (1, 512)] if setting.quick else [(1, 128), (1, 512), (1, 2048), (4, 512)]
    seconds = 3.75 if setting.quick else 15.0
    return cases_over("batch={} tokens={}", points, seconds, partial(measure, setting))


def reading_step(setting: Setting, batch: int, tokens: int) -> tuple[ModelConfig, Callable[[], list[Routing]]]:
    """Return a config, and a step that reads a prompt, makes the logits of its last token, and returns its routing."""
    model = random_model(shapes.decoded(setting.quick), setting.device, setting.dtype)
    prompt = random_tokens(model.config, batch, tokens, setting.device)
    cache = model.new_cache(batch, tokens)

    def step() -> list[Routing]:
        cache.truncate(0)
        read = model.states(prompt, cache)
        model.head(read.normed[:, -1:])
        return read.routing

    return model.config, step


@torch.no_grad()
def measure(setting: Setting, batch: int, tokens: int) -> Iterator[Figure]:
    config, step = reading_step(setting, batch, tokens)
    flops = accounting.step_flops(config, batch_size=batch, seq_len=tokens, training=False, last_logits=True)
    size = {"seq_len": tokens, "batch": batch, "dtype": dtype_name(setting.dtype)}
    least = partial(accounting.prefill_bytes_per_token, config, **size)
    case, seconds = {"batch": batch, "tokens": tokens}, 1.5 if setting.quick else 6.0
    yield from measure_step(NAME, case, step, setting, seconds, flops.total, least)


def finding(figures: list[Figure]) -> str:
    return speed_sentence(figures, "a prompt of")


def plots(figures: list[Figure]) -> list[Plot]:
    return lines(figures, "tokens_per_s", x="tokens", by="batch", title="Tokens of a prompt a second")
