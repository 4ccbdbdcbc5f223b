"""Run all questions of benchmarks/ in small sizes: figures are complete, and counts equal their predictions."""

import dataclasses
import math
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import models
from benchmarks.claims import nanogpt, shakespeare, sparse_training, study
from benchmarks.claims.study import Trial
from benchmarks.question import Question, Setting, figure
from benchmarks.questions import QUESTIONS, diagnose, fp8, kernels, peers, pipeline, steps
from dsmini import RunConfig, TrainConfig, Transformer
from dsmini.config.run import CHUNKS
from dsmini.diagnosis import training
from dsmini.measure.workloads import StepShape
from dsmini.report import Figure
from tests.conftest import require_cpu_kernels
from tests.helpers.commands import TINY as TINY_RUN
from tests.helpers.questions import TINY, setting

LONG = dataclasses.replace(TINY, max_seq_len=32768)
STEPS = kernels.STEPS  # the small sizes leave some out


WANTED = tomllib.loads(Path(__file__).with_name("wanted.toml").read_text())


def fake_train(trial: Trial, name: str, recipe: str, *flags: str, **how: Any) -> dict[str, Any]:
    """Return the summary of a run without training."""
    folder = trial.folder / name
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text('{"layer_indexer_recall": [0.25, 0.75]}\n' * 20)
    return {"command_seconds": 1000.0, "val_loss": 1.5, "val_loss_at_eval_context": 1.5}


def small_sizes(corpus: Path) -> list[tuple[Any, str, Any]]:
    """Return the constants and functions to replace: small models, few turns, and no other processes."""
    config = RunConfig(model=dataclasses.replace(TINY, precision="fp8"), train=TrainConfig(batch_size=3))
    run = diagnose.Fault(model=TINY, train=TrainConfig(batch_size=2, optimizer="adamw", threads=1))
    one: dict[str, Any] = {"config": TINY, "dtype": "float32", "batch": 1, "train": config.train}
    forecast = {w: StepShape(work=w, tokens=16, **one) for w in ("training", "decode")}
    random_weights = Transformer(dataclasses.replace(TINY, vocab_size=256, max_seq_len=192))
    few = {name: kernels.STEPS[name] | {"tokens": 16} for name in ("training", "decoding", "sparse prompt")}
    return [
        *((models, "BIG", LONG), (models, "QUICK", LONG), (models, "TRAINED", TINY), (models, "CORPUS", corpus)),
        (Setting, "turns", {"count": 5, "seconds": 0.0, "least": 2}),
        *((fp8, "trained_config", lambda quick: config), (fp8, "QUICK", TINY), (fp8, "QUICK_STEPS", 2)),
        (peers, "QUICK", peers.Size((16, 24), (16,), turns=2, batch=1)),
        (kernels, "STEPS", few),
        *((diagnose, "FAULTS", {"small": run}), (diagnose, "ROUNDS", 8), (training, "cores", lambda: 1)),
        *((steps, "held_out", lambda quick: forecast), (steps, "SECONDS", 0.0)),
        *((shakespeare, "run_module", lambda *_: '{"loss": 2.0}'), (Trial, "train", fake_train)),
        (pipeline, "why_not", lambda: ""),
        (pipeline, "train_in_turns", lambda folder, size: dict.fromkeys(CHUNKS, [(0.04, 30.3)] * 3)),
        *((sparse_training, "run_module", lambda *_: ""), (sparse_training, "CONTEXT", 192)),
        (sparse_training, "load_run", lambda _: (random_weights, None)),
        (sparse_training, "load_pretrained", lambda _: random_weights),
    ]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Figure]]]:
    """Yield the figures of every question from all its cases."""
    corpus = tmp_path_factory.mktemp("corpus")
    (corpus / "book.txt").write_text("A line of a book.\n" * 200)
    # kernels may read such small weights from a cache, and are faster than the invented machine
    fast: dict[str, Any] = {"bandwidth": 1e13, "peak": {"float32": 1e13, "bfloat16": 1e13}}
    there = {"text": corpus / "book.txt", "out": corpus}
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in small_sizes(corpus):
            patch.setattr(module, name, value)
        yield {
            n: run(q, dataclasses.replace(setting(**fast if n == "kernels" else {}), **there))
            for n, q in QUESTIONS.items()
        }


def run(question: Question, here: Setting) -> list[Figure]:
    if question.needs:
        return []
    return [
        dataclasses.replace(figure, question=question.name) for case in question.cases(here) for figure in case.run()
    ]


def figures_of(answers: dict[str, list[Figure]], name: str) -> list[Figure]:
    if QUESTIONS[name].needs:
        pytest.skip(f"{name}: {QUESTIONS[name].needs}")
    if name == "kernels" and (reason := kernels.why_not()):
        pytest.skip(f"{name}: {reason}")
    return answers[name]


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_is_answered_by_its_figures(answers: dict[str, list[Figure]], name: str) -> None:
    figures, want = figures_of(answers, name), WANTED[name]
    assert {f.metric.split(" of ")[0] for f in figures} == {*want.get("predicted", []), *want.get("others", [])}
    keys = [(f.metric, *sorted((k, str(v)) for k, v in f.case.items())) for f in figures]
    assert len(set(keys)) == len(keys)
    for f in figures:
        assert f.measured is not None and math.isfinite(f.measured), f
        assert f.low is None or f.high is None or f.low <= f.measured <= f.high, f
        assert (f.predicted is not None) or f.metric not in want.get("predicted", []), f
    exact = [f for f in figures if f.exact]
    assert {f.metric for f in exact} == {*want.get("exact", [])}
    assert [f for f in exact if f.measured != f.predicted] == []


@pytest.mark.parametrize("name", QUESTIONS)
def test_answers_and_plots_are_made_of_what_there_is(answers: dict[str, list[Figure]], name: str) -> None:
    question, figures = QUESTIONS[name], figures_of(answers, name)
    assert question.answer([]) == "" and [plot for draw in question.plots for plot in draw([])] == []
    whole = question.answer(figures)
    assert any(digit in whole for digit in "123456789") and whole.endswith(".") and "  " not in whole
    assert len([plot for draw in question.plots for plot in draw(figures)]) == WANTED[name]["plots"]
    half = len(figures) // 2
    for some in (figures[:half], figures[half:], figures[::2], figures[1::2], *([f] for f in figures)):
        assert question.answer(some).endswith(".") or question.answer(some) == ""
        for series in (series for draw in question.plots for plot in draw(some) for series in plot.series):
            assert len(series.x) == len(series.y) > 0


def test_keys_of_cases_are_unique() -> None:
    for question in QUESTIONS.values():
        for quick in (True, False):
            cases = question.cases(dataclasses.replace(setting(), quick=quick))
            assert len({case.key for case in cases}) == len(cases) and all(case.seconds > 0 for case in cases)


def test_bf16_cases_are_left_out_where_its_products_are_slow(answers: dict[str, list[Figure]]) -> None:
    """Expect the reason in the note of the figure."""
    fast = setting()
    slow = dataclasses.replace(fast.roofs, peak={"float32": 170e9, "bfloat16": 0.3e9})
    here = dataclasses.replace(fast, dtype=torch.float32, roofs=slow)
    (told,) = peers.train(dataclasses.replace(here, dtype=torch.bfloat16))
    assert told.measured is None and told.case == {"what": "train", "dtype": "bfloat16"}
    assert told.note == "left out: bfloat16 products run at 0.3 GFLOP/s here, float32 at 170"
    (left,) = run(QUESTIONS["fp8"], here)
    assert left.measured is None and left.note == told.note and QUESTIONS["fp8"].answer([left]) == ""


# --- kernels


def test_every_kernel_is_measured_in_some_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsmini_kernels import cpu  # pyright: ignore[reportMissingImports]

    require_cpu_kernels()
    for module, name, value in ((models, "QUICK", LONG), (models, "TRAINED", LONG), (kernels, "STEPS", STEPS)):
        monkeypatch.setattr(module, name, value)
    found = {
        call.name
        for step in STEPS
        for dtype in ("float32", "bfloat16", "fp8")
        for calls in kernels.calls_of(setting(), step, dtype).values()
        for call in calls
    }
    # a step's blocks are measured one by one; later parts of a prompt run the kernel of its first one
    assert found == set(cpu.OPERATIONS) - {"blocks_step", "cached_attention"}


# --- claims


def test_study_pairs_its_arms_by_seed(tmp_path: Path) -> None:
    """Losses differ by far more between seeds than between arms, and the difference is clear all the same."""
    losses = {"small": lambda seed: 1.0 + seed, "large": lambda seed: 0.9 + seed + 0.001 * seed}

    def run_arm(trial: Trial, arm: str, flags: Sequence[str]) -> dict[str, float]:
        assert trial.folder.is_dir()
        return {"loss": losses[arm](trial.seed)}

    arms = {"small": [], "large": []}
    pairs = [("loss", "small", "large")]
    here = study.study(name="s", title="?", about="", arms=arms, run=run_arm, pairs=pairs)
    figures = run(here, dataclasses.replace(setting(), quick=False, out=tmp_path))
    assert "+0.0980 (+0.0960 to +0.1000 in 95 %, 5" in here.answer(figures)
    assert "clear" not in here.answer(figures) and not list((tmp_path / "s").iterdir()), "runs are not left behind"
    again = [f for f in figures if f.case["seed"] in (0, 4)]
    flipped = [dataclasses.replace(f, measured=-(f.measured or 0)) if f.case["seed"] else f for f in again]
    assert "no clear difference" in here.answer(flipped) and "with one seed" in here.answer(figures[:3])


@pytest.mark.parametrize(
    ("margin", "said"),
    [(0.25, "nothing is lost"), (0.15, "undecided"), (0.01, "more than that is lost"), (-0.01, "nothing is lost")],
)
def test_study_says_whether_a_difference_is_within_its_margin(margin: float, said: str) -> None:
    """Three seeds give 0.10, 0.12 and 0.16, whose interval ends at 0.05 and 0.20."""
    case = {"arm": "sparse", "less": "dense"}
    found = [figure("difference of loss", case, value, of="loss") for value in (0.10, 0.12, 0.16)]
    found += [figure("loss", {"arm": arm}, 1.0) for arm in case.values()]
    told = study.answer([("loss", "sparse", "dense")], {"loss": margin}, found)
    assert f"margin {margin:+g}: {said}" in told


@pytest.mark.slow
def test_trial_trains_and_resumes(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("It was a bright cold day in April. " * 200)
    tiny = [*TINY_RUN.split(), "--train.eval-context", "16", "--train.steps", "2", "--data.path", str(book)]
    trial = Trial(setting=dataclasses.replace(setting(), dtype=torch.float32), seed=0, folder=tmp_path)
    first, again = (trial.train("run", "shakespeare", *tiny) for _ in range(2))
    assert first.keys() >= {"val_loss", "val_loss_at_eval_context", "command_seconds"}
    assert again["val_loss"] == first["val_loss"], "a finished run is not trained again"


def test_command_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)json.tool ended with status 2: .*--no-such"):
        study.run_module("json.tool", "--no-such")


def test_nanogpt_learns_a_text() -> None:
    text = "It was a bright cold day in April. " * 60
    first, last = (nanogpt.train(text, seed=0, steps=steps) for steps in (1, 15))
    assert 0 < last < first - 0.1 < math.log(len(set(text))) + 0.4
