"""Arms, seeds and metrics: what a claim is made of.

    QUESTION = study(
        name="shakespeare",
        title="How good is a minute and a half of training?",
        about="...",
        arms={"sprint": ["--train.steps", "200"], "run": []},
        run=lambda trial, arm, flags: {"loss": trial.train(arm, "shakespeare", *flags)["val_loss"]},
        pairs=[("loss", "sprint", "run")],
    )

For each seed all arms run one after the other, and a pair gives one difference: seeds are paired, and the interval is
Student's t over them.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.question import UNITS, Case, Figure, Question, Setting, cases_over, drawing, figure, pick
from benchmarks.results import ROOT
from dsmini.measure.turns import mean_of
from dsmini.report.units import words as in_words


def run_module(module: str, *arguments: str, **environment: str) -> str:
    """Run python -m module from this checkout, with these variables, and return what it printed.

    Raises: RuntimeError with its messages if it fails.
    """
    how: dict[str, Any] = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-m", module, *arguments], **how)
    if done.returncode:
        raise RuntimeError(f"python -m {module} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One seed of a study."""

    setting: Setting
    seed: int
    folder: Path
    """Folder of the arms' runs; a run that was stopped continues there."""

    def train(self, name: str, recipe: str, *flags: str, start: str = "", eval_tokens: int = 10**12) -> dict[str, Any]:
        """Run dsmini.train with configs/RECIPE.toml in the folder's NAME, and return its summary.

        "command_seconds" is the time of the whole command.

        Args:
            start: name of the run whose weights it starts from; "" starts from random ones.
            eval_tokens: of the held-out split that losses are of; by default all.
        """
        s, out = self.setting, self.folder / name
        init = ["--init", str(self.folder / start)] if start else []
        where = ["--train.device", str(s.device), "--train.dtype", s.dtype_name]
        where += ["--train.threads", str(torch.get_num_threads()), "--train.seed", str(self.seed)]
        quiet = ["--train.sample-tokens", "0", "--train.final-eval-tokens", str(eval_tokens)]
        begun = time.perf_counter()
        command = [f"configs/{recipe}.toml", "--out", str(out), "--resume", "auto", *init, *where, *quiet, *flags]
        run_module("dsmini.train", *command)
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        return summary | {"command_seconds": time.perf_counter() - begun}


def study(
    *,
    about: str | None,
    arms: Mapping[str, Sequence[str]],
    run: Callable[[Trial, str, Sequence[str]], Mapping[str, float]],
    pairs: Sequence[tuple[str, str, str]],
    seeds: tuple[int, int] = (5, 2),
    seconds: tuple[float, float] = (130.0, 40.0),
    margins: Mapping[str, float] = MappingProxyType({}),
    **words: Any,
) -> Question:
    """Return the question of arms that train with the same seeds, and metrics that are compared seed by seed.

    Args:
        arms: flags of each arm, as `run` takes them; they run in this order.
        run: runs an arm and returns its metrics; names are in question.UNITS.
        pairs: metric, arm, and the arm that is subtracted from it.
        seeds: number of them, and with --quick.
        seconds: estimate for a seed, and with --quick.
        margins: difference by which an arm may be worse and still loses nothing, by metric: below 0 where more is
            better. "No clear difference" alone does not say that nothing is lost.
        words: name, title and other fields of the Question.
    """

    def cases(setting: Setting) -> list[Case]:
        key = "seed={} quick" if setting.quick else "seed={}"
        points = ((seed,) for seed in range(seeds[setting.quick]))
        return cases_over(key, points, seconds[setting.quick], partial(measure, setting))

    def measure(setting: Setting, seed: int) -> Iterator[Figure]:
        """Run all arms with a seed, and yield their metrics and the differences of the pairs."""
        folder = setting.out.resolve() / words["name"] / f"{'quick-' if setting.quick else ''}seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        trial = Trial(setting=setting, seed=seed, folder=folder)
        found = {arm: run(trial, arm, flags) for arm, flags in arms.items()}
        shutil.rmtree(folder)  # another setting must not take these runs for its own
        for arm, metrics in found.items():
            for metric, value in metrics.items():
                yield figure(metric, {"seed": seed, "arm": arm}, value)
        for metric, arm, less in pairs:
            case = {"seed": seed, "arm": arm, "less": less}
            yield figure(f"difference of {metric}", case, found[arm][metric] - found[less][metric], of=metric)

    return Question(
        about=f"{about} Each seed gives one difference; the interval is Student's t over the seeds.",
        cases=cases,
        answer=partial(answer, pairs, margins),
        plots=[drawing(m, in_words(m), "seed {seed}", by="arm") for m in dict.fromkeys(pair[0] for pair in pairs)],
        on_request=True,
        **words,
    )


def answer(pairs: Sequence[tuple[str, str, str]], margins: Mapping[str, float], figures: list[Figure]) -> str:
    """Return the mean of each metric in both arms of a pair, of their difference, and whether that is in the margin."""
    told = []
    for metric, arm, less in pairs:
        found, mine, other = (
            [f.measured for f in pick(figures, name, **case) if f.measured is not None]
            for name, case in (
                (f"difference of {metric}", {"arm": arm, "less": less}),
                *((metric, {"arm": each}) for each in (arm, less)),
            )
        )
        if not found or not mine or not other:
            continue
        unit, mean = f" {UNITS[metric]}".rstrip(), mean_of(found)
        text = f"{in_words(metric)} of {arm} {fmean(mine):.4g}{unit}, of {less} {fmean(other):.4g}: {mean.value:+.4f}"
        clear = "" if mean.low > 0 or mean.high < 0 else ", no clear difference"
        sure = f" ({mean.low:+.4f} to {mean.high:+.4f} in 95 %, {mean.turns} seeds{clear})"
        told.append(text + (sure if mean.is_clear else ", with one seed"))
        if (margin := margins.get(metric)) is not None and mean.is_clear:
            worst, best = (mean.high, mean.low) if margin > 0 else (-mean.low, -mean.high)
            lost = "undecided: more seeds are needed" if best <= abs(margin) else "more than that is lost"
            told[-1] += f", margin {margin:+g}: {'nothing is lost' if worst <= abs(margin) else lost}"
    return f"{'; '.join(told)}." if told else ""
