"""What does a sparse expert cost at my batch size?

Layers with 64 experts, of which a token visits six, and one shared, next to dense layers with equal active parameters
and with equal total parameters. One token of each sequence is decoded at a time. The three models take turns.
"""

import dataclasses
import statistics
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import shapes
from benchmarks.case import Case, Figure, Figures, Plot, Setting, cases_over, pick, values
from benchmarks.steps import decode_in_turns
from dsmini import ModelConfig, Transformer, accounting
from dsmini.measure.workloads import random_cache, random_model, random_tokens
from dsmini.nn import Cache, max_violation
from dsmini.report.charts import lines

NAME = "moe"
NAMES = ("experts", "dense, equal active", "dense, equal total")

figure = Figures(
    NAME,
    higher={"tokens_per_s": "tokens/s"},
    lower={"expert_bytes_per_token": "bytes"},
    neither={"distinct_experts": "experts", "max_violation": ""},
)


def configs(setting: Setting) -> dict[str, ModelConfig]:
    """Return a model with experts, a dense one with equal active parameters, and a dense one with equal total ones."""
    layers = 1 if setting.quick else 3
    moe = dataclasses.replace(shapes.BIG, n_layers=layers, n_dense_layers=0, vocab_size=256)
    dense = dataclasses.replace(moe, n_dense_layers=layers)
    visited, all_of_them = (n + moe.n_shared_experts for n in (moe.n_activated_experts, moe.n_routed_experts))
    wide = (dataclasses.replace(dense, inter_dim=n * moe.moe_inter_dim) for n in (visited, all_of_them))
    return dict(zip(NAMES, (moe, *wide), strict=True))


def cases(setting: Setting) -> list[Case]:
    batches = [1, 8, 64] if setting.quick else [1, 2, 4, 8, 16, 32, 64, 128]
    seconds = 1.5 if setting.quick else 6.0
    return cases_over("batch={}", ((n,) for n in batches), seconds, partial(measure, setting))


@torch.no_grad()
def measure(setting: Setting, batch: int) -> Iterator[Figure]:
    models = {name: random_model(config, setting.device, setting.dtype) for name, config in configs(setting).items()}
    rounds = 9 if setting.quick else 25

    def decode(model: Transformer, cache: Cache) -> None:
        model.hidden(random_tokens(model.config, batch, 1, setting.device), cache)

    for name, (predicted, taken) in decode_in_turns(models, setting, batch, 64, rounds, decode).items():
        case = {"batch": batch, "model": name}
        yield figure("tokens_per_s", case, [batch / s for s in taken], predicted=batch / predicted)
    yield from routing(setting, models["experts"], batch)


def routing(setting: Setting, model: Transformer, batch: int) -> Iterator[Figure]:
    """Tell which experts the tokens of a step visit, and the bytes of their weights."""
    c = model.config
    distinct, uneven = list[float](), list[float]()
    for _ in range(20):
        cache = random_cache(model, batch, 64, 8)
        out = model.run(random_tokens(c, batch, 1, setting.device), cache)
        for decided in out.routing:
            distinct.append(float((decided.counts > 0).sum()))
            uneven.append(float(max_violation(decided.counts)))
    case, expected = {"batch": batch, "model": "experts"}, accounting.expected_experts(c, batch)
    note = "predicted for tokens that choose alike and independently; the gate here is random"
    mean = statistics.fmean(distinct)
    of_all = figure("distinct_experts", case, distinct, predicted=expected, note=note)
    yield dataclasses.replace(of_all, measured=mean)
    bytes_of_one = 3 * c.dim * c.moe_inter_dim * setting.dtype.itemsize / batch
    yield figure("expert_bytes_per_token", case, mean * bytes_of_one, predicted=expected * bytes_of_one)
    yield figure("max_violation", case, statistics.fmean(uneven))


def finding(figures: list[Figure]) -> str:
    speed = {(f.case["model"], f.case["batch"]): f.measured or 0.0 for f in pick(figures, "tokens_per_s")}
    batches = sorted({b for _, b in speed if all((name, b) in speed for name in NAMES)})
    if not batches:
        return ""
    parts = []
    for batch in dict.fromkeys((batches[0], batches[-1])):
        sparse, active, total = (speed[name, batch] for name in NAMES)
        text = f"{sparse / active:.2f} times the speed of the dense model with equal active parameters"
        parts.append(f"{text} and {sparse / total:.1f} times that with equal total parameters at batch {batch}")
    touched = [f", where {n:.0f} experts are touched" for n in values(figures, "distinct_experts", batch=batches[-1])]
    return f"Experts run at {', '.join(parts)}{''.join(touched)}."


def plots(figures: list[Figure]) -> list[Plot]:
    titles = {"tokens_per_s": "Tokens made a second", "distinct_experts": "Distinct experts that a step touches"}
    drawn = [lines(figures, metric, x="batch", by="model", title=titles[metric], label=str) for metric in titles]
    return [plot for plots in drawn for plot in plots]
