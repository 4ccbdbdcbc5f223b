"""Run all questions of benchmarks/ in small sizes: figures are complete, and counts equal their predictions."""

import dataclasses
import itertools
import json
import math
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from benchmarks import models, question
from benchmarks.claims import nanogpt, shakespeare, sparse_training, study
from benchmarks.claims.study import Trial
from benchmarks.peer_models import engine
from benchmarks.peer_models.engine import Engine, write_gguf
from benchmarks.peer_models.worker import ik_llama_cpp
from benchmarks.question import Question, Setting, check_bandwidth, compared, drawing, figure, race, times
from benchmarks.questions import QUESTIONS, diagnose, fp8, kernels, peers, pipeline, sparse, steps
from benchmarks.questions.fp8 import Gemm, errors_of, operand_error, product_error, record
from benchmarks.questions.pipeline import RANKS, Passes, Size, bubble_share, formula
from dsmini import RunConfig, TrainConfig, Transformer
from dsmini.config.run import CHUNKS
from dsmini.diagnosis import training
from dsmini.measure.counting import Count, count
from dsmini.measure.workloads import StepShape
from dsmini.nn.fp8 import fp8_weights
from dsmini.numerics import E4M3, E5M2, round_tiles
from dsmini.report import Figure, pick
from tests.conftest import Clock, randomise, require_cpu_kernels
from tests.helpers.commands import TINY as TINY_RUN
from tests.helpers.configs import refusal
from tests.helpers.questions import TINY, setting
from tests.helpers.tolerances import FP32_UNIT, relative_error, rounding

LONG = dataclasses.replace(TINY, max_seq_len=32768)
STEPS, WHY_NOT = kernels.STEPS, pipeline.why_not  # the small sizes leave some out


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
    for each in QUESTIONS.values():
        for quick in (True, False):
            cases = each.cases(dataclasses.replace(setting(), quick=quick))
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


# --- other figures of questions, as by hand, the words of comparisons, and the engines of others next to dsmini

# --- comparisons in words


def ratio(middle: float, spread: float = 0.0, turns: int = 6, **case: Any) -> question.Figure:
    """Return how many times as long MHA takes as MLA, over turns that differ by this share."""
    values = [middle * (1 + spread * (2 * i / (turns - 1) - 1)) for i in range(turns)]
    return figure("times_as_long", {"attention": "MHA", "than": "MLA", **case}, values)


def test_ratios_are_told_with_their_interval() -> None:
    assert times(ratio(1.62, 0.02)) == "1.62 times (1.59 to 1.65)"
    assert times(ratio(1.1, 0.2)) == "1.10 times (0.88 to 1.32, unclear)"
    assert times(ratio(12.34, 0.0, turns=5)) == "12.3 times", "five turns have no interval"


def test_comparison_tells_both_ends() -> None:
    figures = [ratio(x / 100, context=x) for x in (400, 100, 200)]
    told = compared(figures, "context", "at context {}", key="attention")
    assert told.startswith("MHA 1.00 times (1.00 to 1.00, unclear) at context 100 and 4.00 times")
    assert compared(figures[:1], key="attention") == "MHA 4.00 times (4.00 to 4.00)"


def test_race_compares_turn_by_turn(clock: Clock) -> None:
    """A slow turn slows both sides, and leaves the ratio as it is."""
    runs = {"a": clock.work("a", 1, 1, 10, 1, 1, 1, 1), "b": clock.work("b", 2, 2, 20, 2, 2, 2, 2)}
    found = list(race(setting(), {"n": 1}, runs, predicted={"a": 3.0, "b": 9.0}, each=2, count=6, seconds=99, least=6))
    assert [(f.measured, f.predicted) for f in found] == [(0.5, 1.5), (1.0, 4.5), (2.0, 3.0)]
    assert found[2].low == found[2].high == 2 and found[2].case == {"n": 1, "model": "b", "than": "a"}


def test_drawing_has_a_line_for_each_value_or_a_place_for_each_label() -> None:
    """Check lines over a number, in its order and with their predictions, and one group over labels."""
    given = [("MLA", 400, 2.0), ("MLA", 100, 1.0), ("MHA", 100, 3.0)]
    figures = [figure("seconds", {"context": n, "model": m}, value, predicted=9.0) for m, n, value in given]
    (over_numbers,) = drawing("seconds", "Time", x="context", by="model")(figures)
    assert [series.label for series in over_numbers.series] == ["MLA", "MLA, predicted", "MHA", "MHA, predicted"]
    mla, predicted, *_ = over_numbers.series
    assert (mla.x, mla.y, predicted.y, predicted.of) == ([100.0, 400.0], [1.0, 2.0], [9.0, 9.0], "MLA")
    (over_labels,) = drawing("seconds", "Time", "{model}", by="context", kind="bars")(figures)
    assert over_labels.labels == ["MLA", "MHA"]
    assert [(s.label, s.x, s.y) for s in over_labels.series] == [("400", [0.0], [2.0]), ("100", [0.0, 1.0], [1.0, 3.0])]


def test_sparse_attention_pays_between_two_cases() -> None:
    gains = [figure("times_as_long", {"context": n}, gain, predicted=1.1) for n, gain in ((1000, 0.5), (4000, 2.0))]
    assert sparse.break_even(gains, "context", "measured") == "2,000 tokens"
    assert sparse.break_even(gains, "context", "predicted") == "every length"
    assert sparse.break_even(gains[:1], "context", "measured") == "no length"


def test_plan_says_how_far_its_forecasts_were() -> None:
    found = [figure("seconds", {"step": str(i)}, 1.0, predicted=p) for i, p in enumerate((1.1, 0.9, 1.29))]
    said = "3 steps, forecast before they ran: error of the time 10% in the median, 29% at worst."
    assert steps.forecast_answer(found) == said
    found.append(figure("tensor_memory", {}, 100.0, predicted=101.0))
    assert steps.forecast_answer(found).endswith("; of the memory of tensors at most 1.0%.")


# --- bandwidth above the roof

ROOF = {"bandwidth": 10e9, "copy": 8e9}
# bytes a second, a reading of the memory now, and the roof that is allowed, if any
ALLOWED: list[tuple[float, float, float | None]] = [
    (9.9e9, 0, 10e9),
    (12.4e9, 10e9, 10e9),  # a kernel may read faster than a sum
    (12.6e9, 10e9, None),
    (19e9, 20e9, 20e9),  # the stored roof was measured on a busy machine
]


@pytest.mark.parametrize(("reached", "reading", "roof"), ALLOWED)
def test_a_bandwidth_far_above_the_roof_is_an_error(
    monkeypatch: pytest.MonkeyPatch, reached: float, reading: float, roof: float | None
) -> None:
    monkeypatch.setattr(question, "read_bandwidth", lambda device: reading)
    if roof is not None:
        assert check_bandwidth("x", reached, setting(**ROOF)) == roof
        return
    with pytest.raises(ValueError, match=r"x: 12.6 GB/s from memory is above the roof of 10.0: .* --fresh"):
        check_bandwidth("x", reached, setting(**ROOF))


def test_figures_of_a_step_are_over_its_bytes_and_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read two prompts of eight tokens at a given rate of memory."""
    counted: list[Count] = []
    monkeypatch.setattr(question, "read_bandwidth", lambda device: 9e9)
    monkeypatch.setattr(models, "QUICK", TINY)
    monkeypatch.setattr(question.Setting, "predicted", lambda *_: {"step": 0.5})
    monkeypatch.setattr(steps, "count", lambda *args: (counted.append(count(*args)), counted[-1])[1])

    def measured_at(rate: float) -> dict[str, question.Figure]:
        def seconds() -> list[float]:
            return [sum(op.cold for op in counted[-1].operations) / rate] * 5

        monkeypatch.setattr(steps, "in_turns", lambda *_, **__: SimpleNamespace(seconds={"step": seconds()}))
        return {f.metric: f for f in steps.measure("prefill", setting(**ROOF, cache_bytes=1 << 10), 2, 8)}

    figures = measured_at(9e9)
    assert figures["bandwidth"].measured == pytest.approx(9e9) and figures["bandwidth"].bound
    moved = sum(op.cold for op in counted[-1].operations)
    rate = figures["tokens_per_s"]
    assert rate.measured == pytest.approx(16 / (moved / 9e9)) and rate.predicted == 32
    for metric, total in (("bytes_per_token", counted[-1].bytes), ("flops_per_token", counted[-1].flops)):
        least = figures[metric].predicted
        assert figures[metric].measured == pytest.approx(total / 16) and least and least <= total / 16
    with pytest.raises(ValueError, match="above the roof"):
        measured_at(13e9)


@pytest.mark.parametrize(
    ("moved", "flops", "dtype", "seconds"),
    [(2e10, 0, "float32", 1.0), (1e10, 1e11, "float32", 1.0), (1e10, 1e11, "bfloat16", 0.5)],
)
def test_roof_of_a_kernel_is_the_slower_of_memory_and_arithmetic(
    moved: float, flops: float, dtype: str, seconds: float
) -> None:
    """Expect 20 GB/s and 100 GFLOP/s in FP32, 300 in BF16, of the invented machine, for a call of a second."""
    calls: Any = [SimpleNamespace(kind="x", cold=moved / 2, flops=flops / 2)] * 2
    assert kernels.roof_seconds(calls, 1.0, dtype, setting()) == seconds


# --- FP8: errors of the products of a step


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_expected_error_is_that_of_rounding(format: Any) -> None:
    x = torch.randn(1024, 256) * torch.rand(1024, 1).mul(4).exp()  # fractions spread over many powers of two
    rounded = round_tiles(x, (1, 128), "ue8m0", format.name, 1e-4, torch.float32)
    assert abs(relative_error(rounded, x) / operand_error(format) - 1) < 0.03


def test_recorded_products_make_the_gradients() -> None:
    model = randomise(Transformer(dataclasses.replace(TINY, n_mtp_layers=1)))
    tokens, targets = torch.randint(0, 256, (2, 2, 32)).unbind()
    gemms = record(model, tokens, targets)
    assert all(p.grad is None for p in model.parameters())
    model.losses(tokens, targets).total.backward()
    assert {g.name for g in gemms} == set(fp8_weights(model))
    for name in fp8_weights(model):
        grad = model.get_parameter(name).grad
        assert grad is not None
        mine = [g.exact()[2] for g in gemms if g.name == name]
        chosen = grad if grad.dim() == 2 else grad[[bool(g.any()) for g in grad]]
        got = torch.stack(sorted(mine, key=torch.norm))  # backward has an order of its own
        want = torch.stack(sorted(chosen.view(-1, *grad.shape[-2:]), key=torch.norm))
        assert relative_error(got, want) < rounding(FP32_UNIT, terms=64, chained=8), name


def test_errors_are_those_of_the_shipped_products() -> None:
    gemms = [Gemm("layers.0.attn.wo.weight", torch.randn(63, 130), torch.randn(200, 130), torch.randn(63, 200))] * 2
    found, expected = errors_of(gemms), product_error(E4M3, E4M3)
    for product in ("fprop", "dgrad", "wgrad"):
        assert abs(found["tiles", gemms[0].name, product] / expected - 1) < 0.2
        assert found["e5m2 gradients", gemms[0].name, product] > (1.3 if product != "fprop" else 0.9) * expected


# --- bubbles of a pipeline: the formulas by hand, and two real processes

BY_HAND = {
    "1f1b": 9 / 33,
    "interleaved1f1b": 4.5 / 28.5,
    "zero_bubble": 1.5 / 25.5,
    "zbv": 1.5 / 25.5,
    "dualpipev": 3 / 27,
}
"""Shares of 4 ranks and 8 micro-batches, where F, I and W take 1 each."""


@pytest.mark.parametrize("name", CHUNKS)
def test_formulas_are_those_of_the_report(name: pipeline.ScheduleName) -> None:
    assert formula(name, 4, 8) == pytest.approx(BY_HAND[name], rel=1e-12)


def test_bubble_is_the_time_without_the_processor() -> None:
    """The slower of two ranks takes 4 seconds, and both together compute for 6 of 8."""
    assert bubble_share([Passes(whole=3.0, busy=3.0), Passes(whole=4.0, busy=3.0)]) == pytest.approx(1 / 4)


def test_pipeline_is_left_out_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "cores", lambda: 1)
    monkeypatch.setattr(pipeline, "why_not", WHY_NOT)
    found = list(pipeline.measure(setting(), Size(1, 1, 1, 1)))
    assert [f.case["schedule"] for f in found] == list(CHUNKS)
    assert {f.note for f in found} == {"left out: 2 ranks need 2 processor cores, and there is 1"}
    assert pipeline.answer(found) == ""


@pytest.mark.slow
def test_two_processes_measure_every_schedule(tmp_path: Path) -> None:
    size = Size(sequences=1, tokens=64, warm=1, steps=3)
    found = list(pipeline.measure(dataclasses.replace(setting(), out=tmp_path), size))
    bubbles = {str(f.case["schedule"]): f for f in pick(found, "bubble")}
    assert list(bubbles) == list(CHUNKS)
    assert all(0 < (f.measured or 0.0) < 0.9 for f in bubbles.values())
    told = pipeline.answer(found)
    assert "(formula 11%)" in told and "the fastest step is that of" in told
    for name, rank in itertools.product(CHUNKS, range(RANKS)):
        events = json.loads((tmp_path / "pipeline" / f"{name}-rank{rank}.json").read_text())["traceEvents"]
        assert any("mm" in str(event.get("name")) for event in events)


# --- llama.cpp and ik_llama.cpp: found in any Python, run in a process of their own, compared fairly

NOTED = """
import json, os
from pathlib import Path
here = Path(__file__).parent
def load(path, *how, **more):
    with (here / "loads").open("a") as file:
        print(json.dumps({"file": os.path.getsize(path), **more}), file=file)
    print("noise on standard output")
    return not (here / "refuse").exists()
"""
LLAMA = """
from noted import here, load
class Llama:
    def __init__(self, path, **how):
        if not load(path, **how):
            raise RuntimeError("cannot load the model")
        self.eval = lambda tokens: print(tokens, file=(here / "calls").open("a"))
        self.reset = lambda: self.eval([])
"""
IK = """
import sys
from unittest.mock import MagicMock
from noted import load
_ctypes_api = MagicMock(**{"llama_decode.return_value": 0, "llama_model_load_from_file.side_effect": load})
sys.modules["ik_llama_cpp._internals"] = MagicMock()
"""


@pytest.fixture
def pythons(tmp_path: Path) -> dict[str, Path]:
    """Return two Pythons, in which llama_cpp and ik_llama_cpp are modules that note what they are told."""
    pytest.importorskip("gguf")
    found = {}
    for name, module, text in (("llama.cpp", "llama_cpp", LLAMA), ("ik_llama.cpp", "ik_llama_cpp", IK)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "noted.py").write_text(NOTED)
        (folder / f"{module}.py").write_text(text)
        path = found[name] = folder / "python"
        path.write_text(f'#!/bin/sh\n[ -z "$PYTHONPATH" ] || exit 3\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
        path.chmod(0o700)
    engine.engines.cache_clear()
    return found


def loads(python: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (python.parent / "loads").read_text().splitlines()]


def test_engine_of_another_python_appends_what_it_is_told(
    pythons: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYTHONPATH, which is meant for this Python, must not reach it."""
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    python = pythons["llama.cpp"]
    assert engine.engines(tuple(pythons.values())) == {name: str(path) for name, path in pythons.items()}
    side = Engine("llama.cpp", str(python), Transformer(TINY), "Q8_0", room=64, at_once=4)
    side.fill(torch.arange(6)[None], 8)
    assert 0 < side.feed(torch.tensor([[50]])) < 10
    side.start(8)
    side.feed(torch.tensor([[51]]))
    (settings,), threads = loads(python), torch.get_num_threads()
    wanted = {"n_ctx": 64, "n_batch": 4, "n_threads": threads, "n_threads_batch": threads, "use_mmap": False}
    assert settings.items() >= wanted.items()
    assert (python.parent / "calls").read_text().split("\n")[:-1] == ["[]", "[0, 1, 2, 3, 4, 5]", "[50]", "[]", "[51]"]
    side.process.kill()
    with pytest.raises(RuntimeError, match=r"llama.cpp ended with status -?\d"):
        side.feed(torch.tensor([[99]]))
    (python.parent / "refuse").touch()
    with pytest.raises(RuntimeError, match=r"llama.cpp does not run: RuntimeError: cannot load the model"):
        Engine("llama.cpp", str(python), Transformer(TINY), "BF16", room=64, at_once=4)


def test_ik_appends_in_parts_at_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    api, internals = MagicMock(**{"llama_decode.return_value": 0}), MagicMock()
    for name, module in {"": SimpleNamespace(_ctypes_api=api), "._internals": internals}.items():
        monkeypatch.setitem(sys.modules, f"ik_llama_cpp{name}", module)
    feed, reset = ik_llama_cpp("a file", room=64, at_once=4, threads=2)
    feed(range(6))
    feed([50])
    reset()
    feed([51])
    made = [(call.args[0], call.kwargs["pos_start"]) for call in internals.make_batch_range.call_args_list]
    assert made == [([0, 1, 2, 3], 0), ([4, 5], 4), ([50], 6), ([51], 0)]
    api.llama_decode.return_value = 1
    with pytest.raises(RuntimeError, match="cannot append 1 tokens at 1: status 1"):
        feed([99])


def test_wrong_peer_python_is_one_sentence(pythons: dict[str, Path]) -> None:
    bare = pythons["llama.cpp"].with_name("bare")
    for text, why in ((f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', "has no engine"), ("none", "cannot be run")):
        bare.write_text(text)
        bare.chmod(0o700)
        assert f"bare {why}" in refusal(engine.engines, (bare,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_engine_is_compared_with_the_side_of_its_bits(
    pythons: dict[str, Path], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """ik_llama.cpp has its own shape. A machine without BF16 units compares in FP32 in place of BF16."""
    monkeypatch.setattr(models, "QUICK", dataclasses.replace(TINY, max_seq_len=512))
    monkeypatch.setattr(models, "WIDE", {"n_expert_groups": 1, "n_limited_groups": 1})
    monkeypatch.setattr(peers, "QUICK", peers.Size((16,), (16,), turns=1, batch=1))
    peak = {"float32": 1e11, "bfloat16": 3e11 if dtype == torch.bfloat16 else 1e9}
    here = dataclasses.replace(setting(peak=peak), dtype=dtype, peer_python=tuple(pythons.values()))
    figures = [f for case in peers.cases(here) if "train" not in case.key for f in case.run()]
    bits = {"transformers BF16": "dsmini BF16", "llama.cpp BF16": "dsmini BF16"}
    if dtype == torch.float32:
        bits = {"transformers FP32": "dsmini FP32", "llama.cpp F32": "dsmini FP32"}
    bits |= dict.fromkeys(("llama.cpp Q8_0", "llama.cpp Q8_0, BF16 head"), "dsmini FP8")
    wide = bits | {f"ik_{peer}": than for peer, than in bits.items() if peer.startswith("llama")}
    for what, shape, want in [(w, *s) for w in ("decode", "prefill") for s in (("", bits), ("wide", wide))]:
        mine = [f for f in figures if (f.case["what"], f.case.get("shape", "")) == (what, shape)]
        assert {f.case["who"]: f.case["than"] for f in pick(mine, "times_as_long")} == want
        assert {f.case["who"] for f in pick(mine, "share_of_roof") if f.measured} == want.keys() | set(want.values())
    assert len({call["file"] for call in loads(pythons["ik_llama.cpp"])}) == 3
    told = peers.answer(figures)
    assert "; ik_llama.cpp Q8_0 " in told and "in decoding wide FP8" in told


def test_a_gguf_file_has_the_models_logits(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    model = randomise(Transformer(TINY)).eval()
    write_gguf(model, tmp_path / "m.gguf", "F32")
    path = str(tmp_path / "m.gguf")
    llama = llama_cpp.Llama(path, n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    tokens = torch.randint(0, 256, (1, 40))
    llama.eval(tokens[0].tolist())
    with torch.no_grad():
        want = model(tokens)[0]
    got = torch.stack([torch.from_numpy(row.copy()) for row in llama.scores[:40]])
    assert relative_error(got, want) < 2e-3  # llama.cpp's cache is FP16
