"""Is a mixture of experts better than a dense model, on equal tokens with equal active parameters?

Two layers of MLA with eight experts each, of which a token visits two and the shared one, by the recipe of
configs/shakespeare.toml; and a dense model, whose feed-forwards are as wide as these three experts together. Both are
trained on the source code of Python's standard library, and scored over the whole held-out split. Each seed gives one
difference; the interval is Student's t.
"""

import math
import statistics
from collections.abc import Iterator
from functools import partial

from benchmarks.case import Case, Figure, Figures, Plot, Setting, cases_over, values
from benchmarks.trained import plots_by_seed, run_recipe

NAME = "moe-or-dense"
SEEDS, QUICK_SEEDS = 5, 2
STEPS, QUICK_STEPS = 1000, 50
MODELS = {"moe": ["--model.n-dense-layers", "0"], "dense": ["--model.n-dense-layers", "2", "--model.inter-dim", "384"]}
"""The dense model's feed-forwards are as wide as the three experts together that a token visits."""
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95 % quantiles of Student's t, by degrees of freedom."""

figure = Figures(
    NAME,
    higher={"tokens_per_s": "tokens/s", "gain": "nats"},
    lower={"loss": "nats"},
    neither={"active_parameters": "parameters"},
)


def cases(setting: Setting) -> list[Case]:
    seeds, steps = (QUICK_SEEDS, QUICK_STEPS) if setting.quick else (SEEDS, STEPS)
    points = [(seed, steps) for seed in range(seeds)]
    return cases_over("seed={} steps={}", points, 40 if setting.quick else 130, partial(measure, setting))


def measure(setting: Setting, seed: int, steps: int) -> Iterator[Figure]:
    length = ["--train.steps", str(steps), "--train.eval-every", str(steps)]
    runs = {name: run_recipe(setting, *flags, "--train.seed", str(seed), *length)[1] for name, flags in MODELS.items()}
    for name, run in runs.items():
        case = {"seed": seed, "model": name}
        note = f"a byte, over the whole held-out split, after {run['tokens']:,} tokens"
        yield figure("loss", case, run["val_loss"], note=note)
        yield figure("tokens_per_s", case, run["tokens_per_s"])
        yield figure("active_parameters", case, float(run["active_parameters"]))
    yield figure("gain", {"seed": seed}, runs["dense"]["val_loss"] - runs["moe"]["val_loss"], note="dense - MoE")


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean of a few values and the half width of its 95 % interval, by Student's t."""
    return statistics.mean(values), STUDENT_T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def finding(figures: list[Figure]) -> str:
    gains = values(figures, "gain")
    if len(gains) < 2:
        return f"MoE is better by {gains[0]:.4f} nats a byte, with one seed." if gains else ""
    mean, half = interval(gains)
    return (
        f"MoE is better by {mean:.4f} nats a byte, 95 % interval {mean - half:.4f} to {mean + half:.4f} "
        f"over {len(gains)} seeds."
    )


def plots(figures: list[Figure]) -> list[Plot]:
    loss, speed = ("Loss over the held-out split", "nats a byte"), ("Speed of training", "tokens/s")
    return plots_by_seed(figures, "model", MODELS, {"loss": loss, "tokens_per_s": speed})
