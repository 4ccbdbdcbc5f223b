"""How fast does a model read a prompt?

The whole prompt goes through the model in one call and fills the latent cache; the head computes the logits of the last
token.
"""

from collections.abc import Iterator
from functools import partial

from benchmarks import shapes
from benchmarks.case import Case, Figure, Plot, Setting, cases_over
from benchmarks.steps import measure_step, speed_sentence
from dsmini import accounting
from dsmini.measure.workloads import dtype_name, prefill_step, random_model
from dsmini.report.charts import lines

NAME = "prefill"


def cases(setting: Setting) -> list[Case]:
    points = [(1, 128), (1, 512)] if setting.quick else [(1, 128), (1, 512), (1, 2048), (4, 512)]
    seconds = 3.75 if setting.quick else 15.0
    return cases_over("batch={} tokens={}", points, seconds, partial(measure, setting))


def measure(setting: Setting, batch: int, tokens: int) -> Iterator[Figure]:
    model = random_model(shapes.decoded(setting.quick), setting.device, setting.dtype)
    step, config = prefill_step(model, batch, tokens), model.config
    flops = accounting.step_flops(config, batch_size=batch, seq_len=tokens, training=False, last_logits=True)
    size = {"seq_len": tokens, "batch": batch, "dtype": dtype_name(setting.dtype)}
    least = partial(accounting.prefill_bytes_per_token, config, **size)
    case, seconds = {"batch": batch, "tokens": tokens}, 1.5 if setting.quick else 6.0
    yield from measure_step(NAME, case, step, setting, seconds, flops.total, least)


def finding(figures: list[Figure]) -> str:
    return speed_sentence(figures, "a prompt of")


def plots(figures: list[Figure]) -> list[Plot]:
    return lines(figures, "tokens_per_s", x="tokens", by="batch", title="Prompt tokens a second")
