"""Arms, seeds and metrics: what a claim is made of.

    STUDY = Study(
        name="moe-or-dense",
        title="Is a mixture of experts better than a dense model?",
        about="...",
        arms={"moe": ["--model.n-dense-layers", "0"], "dense": ["--model.n-dense-layers", "2"]},
        run=lambda trial, arm: {"loss": trial.train(arm, "shakespeare", *STUDY.arms[arm])["val_loss"]},
        pairs=[("loss", "dense", "moe")],
    )
    QUESTION = STUDY.question()

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
from typing import Any

import torch

from benchmarks.question import METRICS, Case, Figure, Question, Setting, cases_over, drawing, figure, pick
from benchmarks.results import ROOT
from dsmini.measure.turns import mean_of
from dsmini.report.units import words


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


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms that train with the same seeds, and metrics that are compared seed by seed."""

    name: str
    title: str
    about: str | None
    arms: Mapping[str, Sequence[str]]
    """Flags of each arm, as `run` takes them; they run in this order."""
    run: Callable[[Trial, str], Mapping[str, float]]
    """Function that runs an arm and returns its metrics; names are in question.METRICS."""
    pairs: Sequence[tuple[str, str, str]]
    """Metric, arm, and the arm that is subtracted from it."""
    seeds: int = 5
    quick_seeds: int = 2
    seconds: float = 130.0
    """Estimated seconds of a seed."""
    quick_seconds: float = 40.0
    needs: str = ""
    needs_text: bool = False

    def question(self) -> Question:
        """Return the study as a question, with a case for each seed."""
        drawn = dict.fromkeys(metric for metric, _, _ in self.pairs)
        return Question(
            name=self.name,
            title=self.title,
            about=f"{self.about} Each seed gives one difference; the interval is Student's t over the seeds.",
            cases=self.cases,
            answer=self.answer,
            plots=[drawing(m, words(m), by="arm", label="seed {seed}", y=METRICS[m][0]) for m in drawn],
            on_request=True,
            needs=self.needs,
            needs_text=self.needs_text,
        )

    def cases(self, setting: Setting) -> list[Case]:
        seeds, seconds = (self.quick_seeds, self.quick_seconds) if setting.quick else (self.seeds, self.seconds)
        key = "seed={} quick" if setting.quick else "seed={}"
        return cases_over(key, ((seed,) for seed in range(seeds)), seconds, partial(self.measure, setting))

    def measure(self, setting: Setting, seed: int) -> Iterator[Figure]:
        """Run all arms with a seed, and yield their metrics and the differences of the pairs."""
        folder = setting.out.resolve() / self.name / f"{'quick-' if setting.quick else ''}seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        trial = Trial(setting=setting, seed=seed, folder=folder)
        found = {arm: self.run(trial, arm) for arm in self.arms}
        shutil.rmtree(folder)  # another setting must not take these runs for its own
        for arm, metrics in found.items():
            for metric, value in metrics.items():
                yield figure(metric, {"seed": seed, "arm": arm}, value)
        for metric, arm, less in self.pairs:
            case = {"seed": seed, "arm": arm, "less": less}
            yield figure(f"difference of {metric}", case, found[arm][metric] - found[less][metric])

    def answer(self, figures: list[Figure]) -> str:
        told = []
        for metric, arm, less in self.pairs:
            found, mine, other = (
                [f.measured for f in pick(figures, name, **case) if f.measured is not None]
                for name, case in (
                    (f"difference of {metric}", {"arm": arm, "less": less}),
                    *((metric, {"arm": each}) for each in (arm, less)),
                )
            )
            if not found or not mine or not other:
                continue
            unit, mean = f" {METRICS[metric][0]}".rstrip(), mean_of(found)
            text = f"{words(metric)} of {arm} {fmean(mine):.4g}{unit}, of {less} {fmean(other):.4g}: {mean.value:+.4f}"
            clear = "" if mean.low > 0 or mean.high < 0 else ", no clear difference"
            sure = f" ({mean.low:+.4f} to {mean.high:+.4f} in 95 %, {mean.turns} seeds{clear})"
            told.append(text + (sure if mean.is_clear else ", with one seed"))
        return f"{'; '.join(told)}." if told else ""
