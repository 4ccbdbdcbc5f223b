"""Run python -m benchmarks with fake questions: what it prints, refuses and compares, how it resumes and keeps time."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import clock, display, runner
from benchmarks.answers import UNSTEADY
from benchmarks.case import Case, Figure, Setting
from benchmarks.command_line import listed, parse
from benchmarks.questions import Question, questions_here
from dsmini.machine import DTYPES
from dsmini.measure import calibration
from dsmini.measure.calibration import steadiness
from dsmini.measure.rates import Roofs
from dsmini.report import plots
from dsmini.report.results import ResultsWriter, read
from tests.helpers import fake_questions as fake
from tests.helpers.commands import ROOT

TOP = "The machine was not steady during fake_decode"
LAST = "transformers, of the same shape 8192"


@dataclass(frozen=True, kw_only=True)
class Ran:
    """Outcome of a run."""

    status: int
    out: str
    err: str
    out_folder: Path

    @property
    def answer(self) -> dict[str, Any]:
        """The line of the standard output, which is all of it."""
        (line,) = self.out.splitlines()
        return json.loads(line, parse_constant=pytest.fail)

    @property
    def page(self) -> str:
        return (self.out_folder / "report.html").read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Lines of the file of results."""
        return [json.loads(line) for line in (self.out_folder / "results.jsonl").read_text().splitlines()]


class Watch:
    """Record of the measured cases in order, which raises once at a given case."""

    def __init__(self, at: str = "", error: BaseException | None = None) -> None:
        self.seen, self.at, self.error = list[str](), at, error

    def __call__(self, key: str) -> None:
        self.seen.append(key)
        if key == self.at and self.error is not None:
            error, self.error = self.error, None
            raise error

    @property
    def known(self) -> Mapping[str, Question]:
        """Two fake questions, of which the first is watched."""
        return {"fake_decode": fake.decode(self), "fake_cache": fake.cache()}


Go = Callable[..., Ran]


@pytest.fixture
def go(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Go:
    """Return what runs the command in this process, by default with all fake questions and into tmp_path / "out"."""
    monkeypatch.setattr(plots, "svg", lambda *_: "<svg></svg>")

    def run(*args: str, known: Mapping[str, Question] | None = None, out: str = "out") -> Ran:
        capsys.readouterr()
        status = runner.main([*args, "--out", str(tmp_path / out)], known or fake.known(), fake.roofs)
        printed = capsys.readouterr()
        return Ran(status=status, out=printed.out, err=printed.err, out_folder=tmp_path / out)

    return run


def test_last_line_is_json_and_all_there_is(go: Go) -> None:
    ran = go(known=fake.known())
    assert ran.status == 0 and len(ran.answer["figures"]) == 3 + 8 + 4 and ran.answer["failed"] == []
    assert {"commit", "versions", "device", "dtype", "threads", "quick", "machine", "date"} <= set(ran.answer)
    assert ran.answer["dtype"] == "bfloat16", "the faster one by the roofs"
    first = ran.answer["figures"][0]
    assert first["case"] == {"attention": "MLA"} and first["measured"] == first["predicted"] == 70_272
    assert "MLA stores 70,272 bytes" in ran.err and "transformers, of the same shape, context 8,192" in ran.err
    assert ran.page and not list(ran.out_folder.glob("*.partial"))


def test_what_a_case_prints_is_not_on_stdout(go: Go) -> None:
    ran = go(known={"fake_decode": fake.decode(print)})
    assert ran.answer and "\ndsmini 128\n" in ran.err


def test_failing_case_is_told_and_the_others_run(go: Go) -> None:
    watch = Watch("dsmini 512", RuntimeError("no such kernel"))
    ran = go(known=watch.known)
    assert ran.status == 1 and len(watch.seen) == 8 and len(ran.answer["figures"]) == 10
    assert "fake_decode dsmini 512 failed: RuntimeError: no such kernel" in ran.err
    error = {"question": "fake_decode", "case": "dsmini 512", "error": "RuntimeError: no such kernel"}
    assert ran.answer["failed"] == [error]
    (kept,) = [line for line in ran.lines if line["kind"] == "error"]
    assert "Traceback" in kept["error"]
    watch.seen.clear()
    ran = go(known=watch.known)
    assert (ran.status, ran.answer["failed"], watch.seen) == (0, [], ["dsmini 512"]), "it is measured again"


def test_count_that_differs_from_prediction_is_an_error(go: Go) -> None:
    ran = go(known={"fake_cache": fake.cache(measured=70_273)})
    assert ran.status == 1 and "bytes per token is 70,273 bytes, predicted: 70,272 bytes" in ran.err
    assert "≠" in ran.page


def test_defect_of_one_question_spares_the_others(go: Go) -> None:
    def fail(figures: list[Figure]) -> Any:
        raise KeyError("8192")

    broken = replace(fake.decode(), finding=fail, plots=fail)
    ran = go(known={"fake_decode": broken, "fake_cache": fake.cache()})
    assert ran.status == 0 and "No finding yet: KeyError: '8192'" in ran.err and "MLA stores" in ran.page


def test_not_finite_is_null(go: Go) -> None:
    question, figure = fake.cache(), Figure(question="fake_cache", case={}, metric="m", unit="s", measured=math.nan)
    case = Case(key="a", seconds=1.0, run=lambda: [figure])
    ran = go(known={"fake_cache": replace(question, cases=lambda setting: [case], plots=lambda figures: [])})
    assert ran.status == 0 and ran.answer["figures"][0]["measured"] is None


def test_question_that_cannot_run_is_left_out_unless_named(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    needy = replace(fake.decode(), needs="it needs a GPU")
    missing = replace(fake.decode(), name="other", needs="it needs nowhere, which is not installed")
    known = {"fake_decode": needy, "other": missing, "kv-cache": fake.cache()}
    assert runner.main(["--list"], known, fake.roofs) == 0
    listed = capsys.readouterr().out
    assert "cannot run here: it needs a GPU" in listed and "it needs nowhere, which is not installed" in listed
    ran = go(known=known)
    assert ran.status == 0 and "fake_decode is left out: it needs a GPU" in ran.err
    for name in ("fake_decode", "other"):
        with pytest.raises(ValueError, match=f"{name} cannot run here: it needs"):
            go(name, known=known)
    assert go("kv_cache", known=known).status == 0, "names may be written with underscores"


# --- refusals


def nothing(folder: Path) -> None:
    """Leave the folder of the results out."""


def file_in_its_place(folder: Path) -> None:
    folder.write_text("")


def of_results(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return what makes the file of results something else."""

    def prepare(folder: Path) -> None:
        folder.mkdir()
        make(folder / "results.jsonl")

    return prepare


REFUSED: list[tuple[Callable[[Path], None], str, str]] = [
    (nothing, "fake_dekode", "unknown question 'fake_dekode'; there are fake_cache, fake_decode, fake_roofline"),
    (nothing, "--threads 0", "--threads 0"),
    (nothing, "--threads 100000", "use 1 to 1024"),
    (nothing, "--device abacus", "device 'abacus' is unknown"),
    (nothing, "--compare nowhere.jsonl", "there is no file nowhere.jsonl"),
    (nothing, "--report-only", "has no figures yet"),
    (nothing, "--report-only --quick", "--quick is about measuring"),
    (nothing, "--report-only --fresh", "leave one of them out"),
    (file_in_its_place, "", r"cannot be written: .*choose another folder by --out"),
    (of_results(os.mkfifo), "", r"results\.jsonl: it is a FIFO, want a regular file"),
    (of_results(os.mkfifo), "--report-only", r"results\.jsonl: it is a FIFO, want a regular file"),
    (of_results(os.mkdir), "", r"results\.jsonl: it is a folder, want a regular file"),
    (of_results(lambda path: path.write_text("{half\n{}\n")), "", "line 1 of .* is not JSON: '{half'"),
    (of_results(lambda path: path.write_text('{"kind": "figure"}\n' * 2)), "", "is not a line of"),
]


@pytest.mark.parametrize(("prepare", "args", "words"), REFUSED)
def test_mistakes_are_refused_in_a_sentence(go: Go, tmp_path: Path, prepare: Any, args: str, words: str) -> None:
    prepare(tmp_path / "out")
    watch = Watch()
    with pytest.raises(ValueError, match=words):
        go(*args.split(), known={**fake.known(), **watch.known})
    assert watch.seen == [] and (tmp_path / "out").exists() == (prepare is not nothing)


def test_nothing_to_compare_with_is_refused(go: Go, tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"old\.jsonl has no figures"):
        go("--compare", str(tmp_path / "old.jsonl"))
    assert not (tmp_path / "out").exists()


def test_two_runs_do_not_write_into_one_file(go: Go, tmp_path: Path) -> None:
    with (
        ResultsWriter(tmp_path / "out" / "results.jsonl"),
        pytest.raises(ValueError, match="is being written by another run; wait for it"),
    ):
        go()


# --- what is shown


def test_report_only_measures_nothing(go: Go) -> None:
    watch = Watch()
    first = go(known=watch.known)
    results, page = (first.out_folder / "results.jsonl").read_bytes(), first.page
    (first.out_folder / "report.html").unlink()
    watch.seen.clear()
    again = go("--report-only", known=watch.known)
    assert (again.status, watch.seen, again.out) == (0, [], first.out)
    assert (first.out_folder / "results.jsonl").read_bytes() == results
    assert again.page == page, "the page is a function of the figures"


def test_last_line_names_figures_of_earlier_runs(go: Go) -> None:
    go("fake_cache", "--dtype", "float32")
    go("fake_decode", "--dtype", "bfloat16")
    answer = go("--report-only").answer
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
def test_a_busy_machine_is_told(go: Go, monkeypatch: pytest.MonkeyPatch, shares: list[float], said: str | None) -> None:
    """Probe before and after each case; warn only about questions with times."""
    left = iter(shares)
    monkeypatch.setattr("benchmarks.session.steadiness", lambda roofs, device: next(left))
    ran = go("--quick", known={"fake_decode": fake.decode()})
    assert next(left, None) is None
    if said:
        assert said in ran.err and said in ran.page
        assert ran.page.index(TOP) < ran.page.index('class="numbers"'), "at the top of the page"
        assert ran.err.index(said) < ran.err.index(f"{UNSTEADY}At context 8,192"), "before the finding, marked"
        assert f"{UNSTEADY}At context 8,192" in ran.page
        assert ran.err.rstrip().splitlines()[-3].startswith(TOP), "and next to the last line"
    else:
        words = ("the rates that predictions rest on", TOP, UNSTEADY)
        assert not any(each in ran.err + ran.page for each in words)
    lowest = min(min(shares[i : i + 2]) for i in range(0, 8, 2))
    assert ran.answer["steadiness"] == {"fake_decode": lowest}
    monkeypatch.setattr("benchmarks.session.steadiness", lambda roofs, device: 0.5)
    assert TOP not in go(known={"fake_cache": fake.cache()}, out="counts").err, "no time was taken"


@pytest.mark.parametrize(("spread", "told"), [(0.02, False), (0.5, True)])
def test_wide_spreads_are_told_as_a_busy_machine(go: Go, spread: float, told: bool) -> None:
    """Cover short probes that happen to fall into quiet moments."""
    ran = go(known={"fake_decode": fake.decode(spread=spread)})
    words = "the median spread of repeated times is ±50%"
    assert [words in ran.err, TOP in ran.err, TOP in ran.page] == [told] * 3


def test_steadiness_is_the_least_of_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = replace(fake.ROOFS, probes={"products": 1.0, "weights": 2.0})
    monkeypatch.setattr(calibration, "probes", lambda device: {"products": 1.25, "weights": 2.1})
    assert steadiness(kept, torch.device("cpu")) == 0.8
    assert steadiness(fake.ROOFS, torch.device("cpu")) == 1.0, "nothing was kept"


@pytest.mark.parametrize(("speed", "verdict"), [(0.5, "worse"), (1.01, None), (2.0, "better")])
def test_compare_shows_what_changed(go: Go, tmp_path: Path, speed: float, verdict: str | None) -> None:
    go(known={"fake_decode": fake.decode()}, out="old")
    known = {"fake_decode": fake.decode(speed=speed)}
    ran = go("--compare", str(tmp_path / "old" / "results.jsonl"), known=known)
    assert ran.err.count(f" {verdict}") == (8 if verdict else 0)
    assert f"{0 if verdict else 8} of 8 figures are unchanged" in ran.err and 'id="changes"' in ran.page


# --- the command line


def test_questions_keep_the_contract() -> None:
    """Every module of questions/ is listed under its name, with title and explanation."""
    modules = {path.stem for path in (ROOT / "benchmarks" / "questions").glob("*.py")} - {"__init__"}
    known = questions_here()
    assert {name.replace("-", "_") for name in known} == modules
    assert all(question.name == name and question.title and question.about for name, question in known.items())


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
    assert all(parse(["--dtype", name], {}).dtype == name for name in DTYPES)


def test_rates_are_measured_as_the_runner_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the real load_or_measure, with only its measurement replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[object] = []

    def measure(device: torch.device, on_part: Callable[[float, str], None]) -> Roofs:
        on_part(0.5, "products")
        asked.append(device)
        return fake.ROOFS

    monkeypatch.setattr(calibration, "measure", measure)
    monkeypatch.setattr(plots, "svg", lambda *_: None)
    for _ in range(2):  # the second call finds stored rates
        assert runner.main(["fake_roofline", "--out", str(tmp_path / "out"), "--device", "cpu"], fake.known()) == 0
    assert asked == [torch.device("cpu")]
    assert (tmp_path / "dsmini" / "roofs.json").is_file()


# --- resuming: stopped in every way, finished cases stay done, and the same command continues


def test_interrupted_run_continues(go: Go) -> None:
    watch = Watch("dsmini 2048", KeyboardInterrupt())
    ran = go(known=watch.known)
    assert ran.status == 130 and "Continue with: python -m benchmarks" in ran.err
    assert len(ran.answer["figures"]) == 2 and ran.answer["left"] == {"fake_decode": 6, "fake_cache": 3}
    assert watch.seen == ["dsmini 128", "dsmini 512", "dsmini 2048"]
    assert "6 of 8 cases are still to be measured" in ran.page
    watch.seen.clear()
    ran = go(known=watch.known)
    assert ran.status == 0 and "2 of 11 cases are already done" in ran.err
    assert watch.seen[0] == "dsmini 2048" and len(watch.seen) == 6 and len(ran.answer["figures"]) == 11
    contexts = [f["case"]["context"] for f in ran.answer["figures"] if f["case"].get("side") == "dsmini"]
    assert contexts == [128, 512, 2048, 8192], "in the order of the cases, not of the runs"
    watch.seen.clear()
    assert go(known=watch.known).status == 0 and watch.seen == []


def test_interrupt_while_drawing_tells_what_is_done(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    real, drawn = display.write_text, list[Path]()

    def write_text(path: Path, text: str) -> None:
        drawn.append(path)
        if len(drawn) == 1:
            raise KeyboardInterrupt
        real(path, text)

    monkeypatch.setattr(display, "write_text", write_text)
    ran = go()
    assert ran.status == 130 and "Continue with: python -m benchmarks" in ran.err
    assert len(ran.answer["figures"]) == 3 and ran.page


def script(code: str) -> tuple[list[str], dict[str, Any]]:
    """Return a command and the arguments of its process: a run of fake_decode, told of each case by `on_case`."""
    start = "import sys, time, torch, tests.helpers.fake_questions as f; from benchmarks import clock, runner;"
    end = "sys.exit(runner.main(sys.argv[1:], {'fake_decode': f.decode(on_case)}, f.roofs))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return [sys.executable, "-c", f"{start}{code};{end}"], {"env": env, "cwd": ROOT, "text": True}


@pytest.mark.slow
def test_killed_run_leaves_what_is_done(go: Go, tmp_path: Path) -> None:
    """Kill the process in the middle of the third case, without an exception."""
    command, how = script("on_case = lambda key: time.sleep(600) if key == 'dsmini 2048' else None")
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], **how)
    path = tmp_path / "out" / "results.jsonl"
    while not (path.exists() and path.read_text().count('"done"') == 2):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    watch = Watch()
    threads = json.loads(path.read_text().splitlines()[0])["threads"]
    assert go("fake_decode", "--threads", str(threads), known=watch.known).status == 0
    assert len(watch.seen) == 6


def cut(count: int) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """Return what removes the last bytes of the results."""
    return lambda path, patch: (path.write_bytes(path.read_bytes()[:-count]), None)[1]


def without_its_end(path: Path, patch: pytest.MonkeyPatch) -> None:
    """Leave the figures of the last case, whose end was not written."""
    lines = path.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["kind"] == "done"
    path.write_text("".join(lines[:-1]))


def patched(name: str, value: object) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda path, patch: patch.setattr(f"dsmini.report.provenance.{name}", lambda: value)


def another_backend(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("DSMINI_BACKEND", "reference")


# what happens after a run of fake_decode, arguments of the next one, and the number of cases that it measures
NEXT: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object] | None, str, int]] = {
    "nothing": (None, "", 0),
    "an end of line is missing": (cut(1), "", 0),
    "the end of a line is missing": (cut(2), "", 1),
    "half a line is missing": (cut(30), "", 1),
    "a case was killed": (without_its_end, "", 1),
    "fresh": (None, "--fresh", 8),
    "quick": (None, "--quick", 4),
    "another dtype": (None, "--dtype float32", 8),
    "other threads": (None, "--threads 2", 8),
    "other sources": (patched("code", "other"), "", 8),
    "other versions": (patched("versions", {"torch": "another"}), "", 8),
    "another backend": (another_backend, "", 8),
}


@pytest.mark.parametrize("case", NEXT)
def test_next_run_measures_what_is_not_done(go: Go, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Check that half a line is passed over, and that figures of another setting are not among the new ones."""
    happens, args, cases = NEXT[case]
    watch = Watch()
    path = go("fake_decode", "--threads", "1", known=watch.known).out_folder / "results.jsonl"
    if happens is not None:
        happens(path, monkeypatch)
    watch.seen.clear()
    if happens is None or cases < 8:
        assert go("--report-only", known=watch.known).status == 0 and watch.seen == []
    ran = go("fake_decode", "--threads", "1", *args.split(), known=watch.known)
    assert ran.status == 0 and len(watch.seen) == cases and (cases != 1 or watch.seen == [LAST])
    assert len(ran.answer["figures"]) == (cases if cases > 1 else 8)
    assert all(ran.lines), "every line is whole again"
    assert set(ran.lines[0]["versions"]) >= {"dsmini", "torch", "python", "kernels"}


def test_question_that_was_not_measured_again_is_still_shown(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "Measured by an earlier run than the rest"
    go("fake_decode")
    monkeypatch.setattr("dsmini.report.provenance.code", lambda: "other")
    assert words in go("fake_cache").page
    assert words not in go("fake_decode", "fake_cache").page


def test_interrupted_fresh_run_ignores_old_figures(go: Go) -> None:
    watch = Watch()
    go("fake_decode", known=watch.known)
    watch.at, watch.error = "dsmini 512", KeyboardInterrupt()
    assert go("fake_decode", "--fresh", known=watch.known).status == 130
    watch.seen.clear()
    assert go("fake_decode", known=watch.known).status == 0 and len(watch.seen) == 7


def test_full_disk_stops_and_keeps_what_was_written(go: Go, tmp_path: Path) -> None:
    go("fake_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsmini.report.results.os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            go("fake_decode")
    assert len(read(tmp_path / "out" / "results.jsonl").by_fingerprint) == 1
    assert go("fake_decode").status == 0


def test_unwritable_report_loses_no_figure(go: Go, tmp_path: Path) -> None:
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    ran = go()
    assert ran.status == 1 and len(ran.answer["figures"]) == 15
    assert ran.err.count("report.html could not be written: Is a directory; the figures are saved") == 1
    (tmp_path / "out" / "report.html").rmdir()
    assert go("--report-only").status == 0


def test_rates_of_an_older_version_are_left_out(go: Go) -> None:
    path = go("fake_cache").out_folder / "results.jsonl"
    path.write_text(path.read_text().replace('"costs"', '"rates"'))
    ran = go("--report-only")
    assert ran.status == 0 and "70,272 bytes" in ran.page and "copying memory" not in ran.page


# --- time: ten times the estimate for a case, two minutes for --quick

SETTING = Setting(quick=True, device=torch.device("cpu"), dtype=torch.bfloat16, roofs=fake.ROOFS)


def test_estimates_are_of_the_last_run_as_quick(go: Go, tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.jsonl"
    for seconds, quick in ((7.0, []), (1.0, ["--quick"]), (9.0, [])):
        lines = go("fake_decode", "--fresh", *quick).lines
        path.write_text("".join(f"{json.dumps(line)}\n" for line in [*lines[:-1], lines[-1] | {"seconds": seconds}]))
    assert read(path).seconds("fake_decode", LAST, quick=False) == 9.0
    assert read(path).seconds("fake_decode", LAST, quick=True) is None


def test_time_left_learns_from_what_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    times = clock.Clock([10.0] * 10)
    assert times.left() == 100
    times.begin(10.0)
    now[0] = 4.0
    assert times.left() == 96
    times.end(20.0)  # twice the estimate
    assert 140 < times.left() < 180
    for _ in range(9):
        times.begin(10.0)
        times.end(20.0)
    assert times.left() == pytest.approx(0)


def test_estimate_grows_with_products_on_a_slow_machine() -> None:
    slow = replace(SETTING, roofs=replace(fake.ROOFS, peak={"float32": 170e9, "bfloat16": 0.3e9}))
    case = Case(key="a", seconds=2.0, run=list, flops=9e9)
    assert case.estimate(SETTING) == pytest.approx(2.02)
    assert case.estimate(slow) == pytest.approx(62)
    assert replace(case, dtype=torch.float32).estimate(slow) == pytest.approx(2.0 + 18 / 170)
    assert replace(case, flops=0.0).estimate(slow) == 2.0


def test_a_case_has_ten_times_its_estimate_or_half_a_minute() -> None:
    assert clock.allowed(12.0, None) == 120
    assert clock.allowed(0.1, None) == 30
    assert clock.allowed(12.0, 50.0) == 70, "--quick has two minutes for all"
    assert clock.allowed(12.0, 119.0) == 30


def test_a_case_that_takes_too_long_is_stopped(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a case that swallows exceptions and would end by the limit of this test alone."""
    monkeypatch.setattr(clock, "LEAST", 0.3)
    monkeypatch.setattr(clock, "TIMES", 0.01)

    def swallow(key: str) -> None:
        while key == "dsmini 512":
            try:
                time.sleep(3600)
            except Exception:
                continue

    ran = go(known={"fake_decode": fake.decode(swallow)})
    said = "stopped after 0 s; its estimate was 2.00 s"
    assert ran.status == 1 and f"fake_decode dsmini 512 failed: {said}" in ran.err
    assert len(ran.answer["figures"]) == 7, "the others go on"
    assert ran.answer["failed"] == [{"question": "fake_decode", "case": "dsmini 512", "error": said}]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert go(known={"fake_decode": fake.decode()}).status == 0, "it is tried again"


@pytest.mark.slow
def test_one_endless_call_into_torch_is_stopped(tmp_path: Path) -> None:
    """Restart the command without a case that no signal interrupts, and measure the others."""
    command, how = script(
        "clock.LEAST = clock.GRACE = 0.2; clock.TIMES = 0;"
        "on_case = lambda key: torch.ones(1).expand(10**13).sum() if key == 'dsmini 512' else None"
    )
    done = subprocess.run([*command, "--fresh", "--out", str(tmp_path)], **how, capture_output=True)
    assert done.returncode == 1, done.stderr
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    assert [failed["case"] for failed in answer["failed"]] == ["dsmini 512"]
    assert len(answer["figures"]) == 7
    assert "1 of 8 cases are already done" in done.stderr


def test_quick_leaves_out_the_longest_and_says_why(go: Go) -> None:
    question, long = fake.cache(), {"MHA, 128 wide": 500.0, "MLA": 100.0}
    slow = replace(question, cases=lambda s: [replace(c, seconds=long.get(c.key, 30.0)) for c in question.cases(s)])
    ran = go("--quick", known={"fake_cache": slow})
    why = {"MHA, 128 wide": "it takes about 8 min here", "MLA": "it takes about 2 min here"}
    for key, reason in why.items():
        assert f"fake_cache {key} is left out: {reason}, and --quick has two minutes for all" in ran.err
        assert f"{key} was left out: {reason}" in ran.page
    assert ran.status == 0 and ran.answer["left_out"]["fake_cache"].keys() == why.keys()
    assert ran.answer["left"] == {} and len(ran.answer["figures"]) == 1
    assert len(go(known={"fake_cache": slow}).answer["figures"]) == 3, "without --quick all are measured"


def test_quick_ends_when_its_time_is_over(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a case that takes 119 s of a clock of its own; two cases of a second do not fit after it."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    question = fake.decode(lambda key: now.__setitem__(0, now[0] + 119.0) if key == "dsmini 512" else None)
    late = replace(question, cases=lambda setting: [replace(c, seconds=1.0) for c in question.cases(SETTING)])
    ran = go("--quick", known={"fake_decode": late})
    assert ran.status == 0 and ran.err.count("is left out: the two minutes of --quick are over") == 2
    assert ran.answer["left"] == {"fake_decode": 2}, "the same command measures them"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("float32", "bfloat16"), [(224e9, 940e9), (170e9, 0.3e9)])
def test_quick_leaves_nothing_out_on_a_usual_cpu(
    monkeypatch: pytest.MonkeyPatch, float32: float, bfloat16: float, threads: int
) -> None:
    """Plan for CPUs with and without BF16 units; questions that force BF16 check its rate themselves."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    roofs = replace(fake.ROOFS, peak={"float32": float32, "bfloat16": bfloat16})
    dtype = torch.bfloat16 if bfloat16 > float32 else torch.float32
    setting = replace(SETTING, dtype=dtype, roofs=roofs)
    usual = [question for question in questions_here().values() if not question.on_request]
    cases = [case for question in usual for case in question.cases(setting)]
    assert sum(case.estimate(setting) for case in cases) < clock.QUICK
