"""Run python -m benchmarks with fake questions: errors, comparisons, warnings."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import runner
from benchmarks.answers import UNSTEADY
from benchmarks.case import Figure
from benchmarks.command_line import listed, parse
from benchmarks.questions import questions_here
from dsmini.machine import DTYPES
from dsmini.measure.calibration import steadiness
from dsmini.measure.rates import Roofs
from tests.helpers import fake_questions as fake
from tests.helpers.benchmark_calls import Capture, Known, Watch, go, lines
from tests.helpers.commands import ROOT

TOP = "The machine was not steady during fake_decode"


def test_last_line_is_json_and_all_there_is(tmp_path: Path, capsys: Capture) -> None:
    assert go(tmp_path) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert len(answer["figures"]) == 5 + 8 + 10 and answer["failed"] == []
    assert {"commit", "versions", "device", "dtype", "threads", "quick", "machine", "date"} <= set(answer)
    assert answer["dtype"] == "bfloat16", "the faster one by the roofs"
    first = answer["figures"][0]
    assert first["case"] == {"attention": "MLA"} and first["measured"] == first["predicted"] == 70_272
    assert "MLA stores 70,272 bytes" in err and "transformers, of the same shape, context 8,192" in err
    assert (tmp_path / "report.html").is_file()
    assert not list(tmp_path.glob("*.partial"))


def test_what_a_case_prints_is_not_on_stdout(tmp_path: Path, capsys: Capture) -> None:
    assert go(tmp_path, known={"fake_decode": fake.decode(print)}) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "\ndsmini 128\n" in err


def test_failing_case_is_told_and_the_others_run(tmp_path: Path, capsys: Capture) -> None:
    watch = Watch("dsmini 512", RuntimeError("no such kernel"))
    assert go(tmp_path, known=watch.known) == 1
    out, err = capsys.readouterr()
    assert "fake_decode dsmini 512 failed: RuntimeError: no such kernel" in err
    assert len(watch.seen) == 8
    answer = json.loads(out)
    error = {"question": "fake_decode", "case": "dsmini 512", "error": "RuntimeError: no such kernel"}
    assert len(answer["figures"]) == 12 and answer["failed"] == [error]
    (kept,) = [line for line in lines(tmp_path) if line["kind"] == "error"]
    assert "Traceback" in kept["error"]
    watch.seen.clear()
    assert go(tmp_path, known=watch.known) == 0, "a case that failed is measured again"
    assert watch.seen == ["dsmini 512"]
    assert json.loads(capsys.readouterr().out)["failed"] == []


def test_count_that_differs_from_prediction_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    assert go(tmp_path, known={"fake_cache": fake.cache(measured=70_273)}) == 1
    err = capsys.readouterr().err
    assert "bytes per token is 70,273 bytes, predicted: 70,272 bytes" in err
    assert "≠" in (tmp_path / "report.html").read_text()


def test_defect_of_one_question_spares_the_others(tmp_path: Path, capsys: Capture) -> None:
    def fail(figures: list[Figure]) -> Any:
        raise KeyError("8192")

    broken = replace(fake.decode(), finding=fail, plots=fail)

    assert go(tmp_path, known={"fake_decode": broken, "fake_cache": fake.cache()}) == 0
    assert "No finding yet: KeyError: '8192'" in capsys.readouterr().err
    assert "MLA stores" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fake_dekode"], "unknown question 'fake_dekode'; there are fake_cache, fake_decode, fake_roofline"),
        (["--threads", "0"], "--threads 0"),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--compare", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--report-only"], "has no figures yet"),
        (["--report-only", "--quick"], "--quick is about measuring"),
        (["--threads", "100000"], "use 1 to 1024"),
        (["--report-only", "--fresh"], "leave one of them out"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(tmp_path: Path, args: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        go(tmp_path / "out", *args)
    assert not (tmp_path / "out").exists()


def test_names_may_be_written_with_underscores(tmp_path: Path) -> None:
    assert go(tmp_path, "kv_cache", known={"kv-cache": fake.cache()}) == 0


def test_question_that_cannot_run_is_left_out_unless_named(tmp_path: Path, capsys: Capture) -> None:
    needy = replace(fake.decode(), needs="it needs a GPU")
    missing = replace(fake.decode(), name="other", needs="it needs nowhere, which is not installed")
    known: Known = {"fake_decode": needy, "other": missing, "fake_cache": fake.cache()}
    assert runner.main(["--list"], known, fake.roofs) == 0
    listed = capsys.readouterr().out
    assert "cannot run here: it needs a GPU" in listed and "it needs nowhere, which is not installed" in listed
    assert go(tmp_path, known=known) == 0
    assert "fake_decode is left out: it needs a GPU" in capsys.readouterr().err
    for name in ("fake_decode", "other"):
        with pytest.raises(ValueError, match=f"{name} cannot run here: it needs"):
            go(tmp_path, name, known=known)


def test_report_only_measures_nothing(tmp_path: Path, capsys: Capture) -> None:
    watch = Watch()
    go(tmp_path, known=watch.known)
    before, first = (tmp_path / "results.jsonl").read_bytes(), capsys.readouterr().out
    page = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    watch.seen.clear()
    assert go(tmp_path, "--report-only", known=watch.known) == 0
    assert watch.seen == [] and (tmp_path / "results.jsonl").read_bytes() == before
    assert capsys.readouterr().out == first
    assert (tmp_path / "report.html").read_bytes() == page, "the page is a function of the figures"


def test_last_line_names_figures_of_earlier_runs(tmp_path: Path, capsys: Capture) -> None:
    go(tmp_path, "fake_cache", "--dtype", "float32")
    go(tmp_path, "fake_decode", "--dtype", "bfloat16")
    capsys.readouterr()
    go(tmp_path, "--report-only")
    answer = json.loads(capsys.readouterr().out)
    assert answer["dtype"] == "bfloat16"
    assert {name: facts["dtype"] for name, facts in answer["earlier"].items()} == {"fake_cache": "float32"}


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([0.95, 1.1] * 4, None),
        ([1.0, 1.0, 1.0, 0.62] + [1.0] * 4, "in dsmini 512 it reached as little as 62% of the rates"),
        ([0.7] * 8, "in 4 of 4 cases it reached as little as 70%"),
        ([1.5] * 8, "up to 1.50 times as fast as when its rates were measured"),
    ],
)
def test_a_busy_machine_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, shares: list[float], said: str | None
) -> None:
    """Probe before and after each case; warn only about questions with times."""
    left = iter(shares)
    monkeypatch.setattr("benchmarks.session.steadiness", lambda roofs, device: next(left))
    go(tmp_path, "--quick", known={"fake_decode": fake.decode()})
    assert next(left, None) is None
    out, err = capsys.readouterr()
    page = (tmp_path / "report.html").read_text()
    if said:
        assert said in err and said in page
        assert page.index(TOP) < page.index('class="numbers"'), "at the top of the page"
        assert err.index(said) < err.index(f"{UNSTEADY}At context 8,192"), "before the finding, which is marked"
        assert f"{UNSTEADY}At context 8,192" in page
        assert err.rstrip().splitlines()[-3].startswith(TOP), "and next to the last line"
    else:
        assert all(words not in err + page for words in ("the rates that predictions rest on", TOP, UNSTEADY))
    lowest = min(min(shares[i : i + 2]) for i in range(0, 8, 2))
    assert json.loads(out)["steadiness"] == {"fake_decode": lowest}

    monkeypatch.setattr("benchmarks.session.steadiness", lambda roofs, device: 0.5)
    go(tmp_path / "counts", known={"fake_cache": fake.cache()})
    assert "machine was busy" not in capsys.readouterr().err, "no time was taken"


@pytest.mark.parametrize(("spread", "told"), [(0.02, False), (0.5, True)])
def test_wide_spreads_are_told_as_a_busy_machine(tmp_path: Path, capsys: Capture, spread: float, told: bool) -> None:
    """Cover short probes that happen to fall into quiet moments."""
    go(tmp_path, known={"fake_decode": fake.decode(spread=spread)})
    err, page = capsys.readouterr().err, (tmp_path / "report.html").read_text()
    assert ("the median spread of repeated times is ±50%" in err) == (TOP in err) == (TOP in page) == told


def test_steadiness_is_the_least_of_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = replace(fake.ROOFS, probes={"products": 1.0, "weights": 2.0})
    monkeypatch.setattr("dsmini.measure.calibration.probes", lambda device: {"products": 1.25, "weights": 2.1})
    assert steadiness(kept, torch.device("cpu")) == 0.8
    assert steadiness(fake.ROOFS, torch.device("cpu")) == 1.0, "nothing was kept"


def test_nothing_to_compare_with_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"old\.jsonl has no figures"):
        go(tmp_path / "new", "--compare", str(tmp_path / "old.jsonl"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("speed", "verdict"), [(0.5, "worse"), (1.01, None), (2.0, "better")])
def test_compare_shows_what_changed(tmp_path: Path, capsys: Capture, speed: float, verdict: str | None) -> None:
    go(tmp_path / "old", known={"fake_decode": fake.decode()})
    capsys.readouterr()
    old = str(tmp_path / "old" / "results.jsonl")
    go(tmp_path / "new", "--compare", old, known={"fake_decode": fake.decode(speed=speed)})
    err = capsys.readouterr().err
    assert err.count(f" {verdict}") == (8 if verdict else 0)
    assert f"{0 if verdict else 8} of 8 figures are unchanged" in err
    assert 'id="changes"' in (tmp_path / "new" / "report.html").read_text()


def test_not_finite_is_null(tmp_path: Path, capsys: Capture) -> None:
    question, figure = fake.cache(), Figure(question="fake_cache", case={}, metric="m", unit="s", measured=math.nan)
    case = replace(question.cases(None)[0], run=lambda: [figure])  # type: ignore
    nan = replace(question, cases=lambda setting: [case], plots=lambda figures: [])
    assert go(tmp_path, known={"fake_cache": nan}) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["figures"][0]["measured"] is None


def test_questions_keep_the_contract() -> None:
    """Every module of questions/ is listed under its name, with title and explanation."""
    modules = {path.stem for path in (ROOT / "benchmarks" / "questions").glob("*.py")} - {"__init__"}
    known = questions_here()
    assert {name.replace("-", "_") for name in known} == modules
    for name, question in known.items():
        assert question.name == name
        assert question.title and question.about


def test_list_imports_nothing_that_takes_long() -> None:
    """Compare the list with the one that the full command prints."""
    code = (
        "import runpy, sys; sys.argv = ['benchmarks', '--list']\n"
        "try: runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'rich', 'dsmini'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(listed(questions_here()))
    assert len(done.stdout.splitlines()) == len(questions_here())


def test_dtypes_of_the_command_line_are_the_packages() -> None:
    for name in DTYPES:
        assert parse(["--dtype", name], {}).dtype == name


def test_rates_are_measured_as_the_runner_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the real load_or_measure, with only its measurement replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[object] = []

    def measure(device: torch.device, on_part: Callable[[float, str], None]) -> Roofs:
        on_part(0.5, "products")
        asked.append(device)
        return fake.ROOFS

    monkeypatch.setattr("dsmini.measure.calibration.measure", measure)
    for _ in range(2):  # the second call finds stored rates
        assert runner.main(["fake_cache", "--out", str(tmp_path / "out"), "--device", "cpu"], fake.known()) == 0
    assert asked == [torch.device("cpu")]
    assert (tmp_path / "dsmini" / "roofs.json").is_file()
