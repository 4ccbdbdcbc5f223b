"""Run python -m benchmarks with fake questions: what it prints and refuses, how it resumes and keeps time."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results, run
from benchmarks.question import Case, Question, Setting, left_out, seconds_of_products
from benchmarks.questions import QUESTIONS
from benchmarks.results import figures_of, of_question, read
from dsmini.measure import roofs as measured_roofs
from dsmini.measure.roofs import Roofs
from dsmini.measure.turns import in_turns
from dsmini.report import Figure, plots
from tests.helpers import fake_questions as fake
from tests.helpers.commands import ROOT


@dataclass(frozen=True, kw_only=True)
class Ran:
    """Outcome of a run."""

    status: int
    out: str
    err: str
    folder: Path

    @property
    def answer(self) -> dict[str, Any]:
        """The line of the standard output, which is all of it."""
        (line,) = self.out.splitlines()
        return json.loads(line, parse_constant=pytest.fail)

    @property
    def page(self) -> str:
        return (self.folder / "report.html").read_text()


class Watch:
    """Record of the measured cases in order, which calls something once, at a given case."""

    def __init__(self, at: str = "", then: Callable[[], object] = lambda: None) -> None:
        self.seen, self.at, self.then = list[str](), at, then

    def __call__(self, key: str) -> None:
        self.seen.append(key)
        if key == self.at:
            self.at = ""
            self.then()

    @property
    def known(self) -> Mapping[str, Question]:
        """Two fake questions, of which the first is watched, from now on."""
        self.seen = []
        return {"fake_decode": fake.decode(self), "fake_cache": fake.cache()}


def fail(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: object) -> None:
        raise error

    return raise_it


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


SETTING = Setting(quick=False, device=torch.device("cpu"), dtype=torch.bfloat16, roofs=fake.ROOFS)
Go = Callable[..., Ran]


@pytest.fixture
def go(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Go:
    """Return what runs the command in this process with --json, by default with all fake questions."""
    monkeypatch.setattr(plots, "svg", lambda *_: "<svg></svg>")
    monkeypatch.setattr(run, "STARTED", time.monotonic())

    def go(*args: str, known: Mapping[str, Question] | None = None, out: str = "out", json: bool = True) -> Ran:
        capsys.readouterr()
        flags = ["--json"] * json
        status = run.main([*args, *flags, "--out", str(tmp_path / out)], known or fake.known(), fake.roofs)
        printed = capsys.readouterr()
        return Ran(status=status, out=printed.out, err=printed.err, folder=tmp_path / out)

    return go


# --- what is shown


def test_json_is_one_line_and_all_there_is(go: Go) -> None:
    ran = go()
    assert ran.status == 0 and len(ran.answer["figures"]) == 3 + 8 + 4 and ran.answer["failed"] == []
    assert {"commit", "versions", "device", "dtype", "threads", "quick", "machine", "date"} <= set(ran.answer)
    assert ran.answer["dtype"] == "bfloat16", "the faster one by the roofs"
    first = ran.answer["figures"][0]
    assert first["case"] == {"attention": "MLA"} and first["measured"] == first["predicted"] == 70_272
    assert first["question"] == "fake_cache"
    assert "MLA stores 70,272 bytes" in ran.err and ran.page and not list(ran.folder.glob("*.partial"))
    assert go(known={"fake_decode": fake.decode(print)}, out="loud").answer, "what a case prints is not on stdout"


def test_without_json_there_are_words_alone(go: Go) -> None:
    ran = go("fake_decode", json=False)
    assert "{" not in ran.out and "tokens/s" in ran.out
    answer, table = (ran.out.index(words) for words in ("At context 8,192 it decodes", "95 % interval"))
    assert answer < table, "the answer stands above its table"
    assert "95 % interval" not in go(json=False).out, "tables are asked for by name"


def test_failing_case_is_told_and_the_others_run(go: Go) -> None:
    watch = Watch("dsmini 512", fail(RuntimeError("no such kernel")))
    ran = go(known=watch.known)
    assert ran.status == 1 and len(watch.seen) == 8 and len(ran.answer["figures"]) == 10
    assert "fake_decode dsmini 512 failed: RuntimeError: no such kernel" in ran.err
    error = {"question": "fake_decode", "case": "dsmini 512", "error": "RuntimeError: no such kernel"}
    assert ran.answer["failed"] == [error] and "Traceback" in ran.page
    ran = go(known=watch.known)
    assert (ran.status, ran.answer["failed"], watch.seen) == (0, [], ["dsmini 512"]), "it is measured again"


def test_what_is_wrong_with_figures_is_told(go: Go) -> None:
    ran = go(known={"fake_cache": fake.cache(measured=70_273)})
    assert ran.status == 1 and "bytes per token is 70,273 bytes, predicted: 70,272 bytes" in ran.err
    assert "≠" in ran.page
    figure = Figure(question="", case={}, metric="m", unit="s", measured=math.nan)
    nan = replace(fake.cache(), cases=lambda _: [Case(key="a", seconds=1.0, run=lambda: [figure])], plots=())
    assert go(known={"fake_cache": nan}, out="nan").answer["figures"][0]["measured"] is None


def test_reason_of_what_was_left_out_is_the_answer(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine spoils no times where none were taken."""
    monkeypatch.setattr(run, "steadiness", lambda roofs, device: 0.5)
    slow = left_out("times_as_long", {}, "bfloat16 products are slow here")
    none = replace(fake.cache(), cases=lambda _: [Case(key="a", seconds=1.0, run=lambda: [slow])], plots=())
    ran = go(known={"fake_cache": replace(none, answer=lambda figures: "")})
    assert "left out: bfloat16 products are slow here" in ran.err and "unreliable" not in ran.err


def test_question_that_cannot_run_is_left_out_unless_named(go: Go) -> None:
    known = {"fake_decode": replace(fake.decode(), needs="it needs a GPU"), "kv-cache": fake.cache()}
    assert "cannot run here: it needs a GPU" in go("--list", known=known).err
    ran = go(known=known)
    assert ran.status == 0 and "left out: fake_decode (it needs a GPU)" in ran.err
    with pytest.raises(ValueError, match="fake_decode cannot run here: it needs"):
        go("fake_decode", known=known)
    assert go("kv_cache", known=known).status == 0, "names may be written with underscores"


def test_question_that_was_not_measured_again_is_still_shown(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "Measured earlier than the rest"
    go("fake_decode")
    monkeypatch.setattr(results, "code", lambda: "other")
    assert words in go("fake_cache").page
    assert words not in go("fake_decode", "fake_cache").page


@pytest.mark.parametrize(("share", "said"), [(0.95, False), (0.62, True)])
def test_a_busy_machine_is_told(go: Go, monkeypatch: pytest.MonkeyPatch, share: float, said: bool) -> None:
    """Probe before and after each case; warn only about questions with times."""
    left = iter([1.0, 1.0, 1.0, share] + [1.0] * 4)
    monkeypatch.setattr(run, "steadiness", lambda roofs, device: next(left))
    ran = go("--quick", known={"fake_decode": fake.decode()})
    assert next(left, None) is None and ran.answer["steadiness"] == {"fake_decode": share}
    words = "Times are unreliable: the machine was busy or throttled, and reached as little as 62 % of the rates"
    assert (words in " ".join(ran.err.split())) == (words in ran.page) == said
    monkeypatch.setattr(run, "steadiness", lambda roofs, device: 0.5)
    assert "unreliable" not in go(known={"fake_cache": fake.cache()}, out="counts").err, "no time was taken"


def test_compare_names_what_changed_beyond_its_interval(go: Go, tmp_path: Path) -> None:
    go("fake_decode", "fake_cache", out="old")

    def decode(speed: float) -> Question:
        """Return the question with other values at context 8,192."""
        cases = fake.decode().cases
        first = [case for case in cases(SETTING) if case.key == "dsmini 8192"]

        def faster() -> list[Figure]:
            (f,) = first[0].run()
            assert f.measured is not None and f.low is not None and f.high is not None
            return [replace(f, measured=speed * f.measured, low=speed * f.low, high=speed * f.high)]

        others = [case for case in cases(SETTING) if case.key != "dsmini 8192"]
        return replace(fake.decode(), cases=lambda s: [*others, replace(first[0], run=faster)])

    old = str(tmp_path / "old" / "results.jsonl")
    cached = fake.cache(measured=70_273)
    ran = go("--compare", old, known={"fake_decode": decode(2.0), "fake_cache": cached}, out="new")
    decoded, counted = ran.answer["changed"]
    assert decoded["measured"] == pytest.approx(2.0) and decoded["case"]["context"] == 8192 and decoded["unit"] == "x"
    assert decoded["low"] == pytest.approx(2 * 0.975 / 1.025) and decoded["high"] == pytest.approx(2 * 1.025 / 0.975)
    assert counted["measured"] == pytest.approx(70_273 / 70_272) and counted["question"] == "fake_cache"
    assert "2 values changed, most of all tokens per s of question fake_decode" in " ".join(ran.err.split())
    assert "9 are the same or within their intervals, 0 are not in the older file" in " ".join(ran.err.split())
    ran = go("--compare", old, known={"fake_decode": decode(1.04)}, out="near")
    assert ran.answer["changed"] == [], "intervals of 2.5 % on each side meet"


# --- the command line


def of_results(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return what makes the file of results something else."""

    def prepare(folder: Path) -> None:
        folder.mkdir()
        make(folder / "results.jsonl")

    return prepare


def nothing(folder: Path) -> None:
    """Leave the folder of the results out."""


REFUSED: list[tuple[Callable[[Path], object], str, str]] = [
    (nothing, "fake_dekode", "unknown question 'fake_dekode'; there are fake_cache, fake_decode, fake_roofline"),
    (nothing, "--threads 100000", "use 1 to 1024"),
    (nothing, "--device abacus", "device 'abacus' is unknown"),
    (nothing, "--text nowhere.txt", "--text: there is no file nowhere.txt"),
    (nothing, "--compare nowhere", "--compare: there is no file nowhere"),
    (lambda folder: folder.write_text(""), "", r"cannot be written: .*choose another folder by --out"),
    (of_results(os.mkfifo), "", r"results\.jsonl: it is a FIFO, want a regular file"),
    (of_results(lambda path: path.write_text("{half\n{}\n")), "", "line 1 of .* is not a line of results"),
    (of_results(lambda path: path.write_text('{"key": "a"}\n' * 2)), "", "is not a line of"),
]


@pytest.mark.parametrize(("prepare", "args", "words"), REFUSED)
def test_mistakes_are_refused_in_a_sentence(go: Go, tmp_path: Path, prepare: Any, args: str, words: str) -> None:
    prepare(tmp_path / "out")
    watch = Watch()
    with pytest.raises(ValueError, match=words):
        go(*args.split(), known={**fake.known(), **watch.known})
    assert watch.seen == [] and (tmp_path / "out").exists() == (prepare is not nothing)


def test_questions_keep_the_contract() -> None:
    """Every question has a title and an explanation, and every command of the pages is known."""
    for name, question in QUESTIONS.items():
        assert question.name == name and question.title.endswith("?") and question.about
    for text in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for line in text.read_text().splitlines():
            for words in line.split("python -m benchmarks ")[1:]:
                name = words.split("`")[0].split()[0]
                assert name.startswith("-") or name in QUESTIONS, (text, name)


def test_rates_are_measured_as_the_command_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the real load_or_measure, with only its measurement replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[object] = []

    def measure(device: torch.device, on_part: Callable[[float, str], None]) -> Roofs:
        on_part(0.5, "products")
        asked.append(device)
        return fake.ROOFS

    monkeypatch.setattr(measured_roofs, "measure", measure)
    monkeypatch.setattr(plots, "svg", lambda *_: None)
    here = ["fake_roofline", "--out", str(tmp_path / "out"), "--device", "cpu"]
    for more, times in (["--quick"], 1), ([], 1), (["--fresh"], 2):
        assert run.main([*here, *more], fake.known()) == 0
        assert len(asked) == times
    assert asked[0] == torch.device("cpu")
    assert (tmp_path / "dsmini" / "roofs.json").is_file()


# --- resuming: stopped in every way, finished cases stay done, and the same command continues


def test_some_cases_are_measured_alone(go: Go) -> None:
    watch = Watch()
    assert go("--cases", "dsmini 2048", known=watch.known).status == 0 and watch.seen == ["dsmini 2048"]
    with pytest.raises(ValueError, match=r"--cases 'narrow' is in no case's name"):
        go("--cases", "narrow", known=watch.known)


def test_interrupted_run_continues(go: Go) -> None:
    watch = Watch("dsmini 2048", press_ctrl_c)
    ran = go(known=watch.known)
    assert ran.status == 130 and "the same command" in ran.err and len(ran.answer["figures"]) == 2
    ran = go(known=watch.known)
    assert ran.status == 0 and "2 of 11 cases are already done" in ran.err
    assert watch.seen[0] == "dsmini 2048" and len(watch.seen) == 6 and len(ran.answer["figures"]) == 11
    contexts = [f["case"]["context"] for f in ran.answer["figures"] if f["case"].get("side") == "dsmini"]
    assert contexts == [128, 512, 2048, 8192]
    assert go(known=watch.known).status == 0 and watch.seen == []


Happens = Callable[[Path, pytest.MonkeyPatch], object]


def cut(count: int) -> Happens:
    """Return what removes the last bytes of the results."""
    return lambda path, patch: path.write_bytes(path.read_bytes()[:-count])


def patched(name: str, value: object) -> Happens:
    return lambda path, patch: patch.setattr(results, name, lambda: value)


# what happens after a run of fake_decode, arguments of the next one, and the number of cases that it measures
NEXT: dict[str, tuple[Happens, str, int]] = {
    "nothing": (lambda path, patch: None, "", 0),
    "the end of a line is missing": (cut(1), "", 1),
    "half a line is missing": (cut(30), "", 1),
    "fresh": (lambda path, patch: None, "--fresh", 8),
    "quick": (lambda path, patch: None, "--quick", 4),
    "another dtype": (lambda path, patch: None, "--dtype float32", 8),
    "other threads": (lambda path, patch: None, "--threads 2", 8),
    "other sources": (patched("code", "other"), "", 8),
    "other versions": (patched("versions", {"torch": "another"}), "", 8),
    "another backend": (lambda path, patch: patch.setenv("DSMINI_BACKEND", "reference"), "", 8),
}


@pytest.mark.parametrize("case", NEXT)
def test_next_run_measures_what_is_not_done(go: Go, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Check that half a line is passed over, and that figures of another setting are not among the new ones."""
    happens, args, cases = NEXT[case]
    watch = Watch()
    path = go("fake_decode", "--threads", "1", known=watch.known).folder / "results.jsonl"
    happens(path, monkeypatch)
    ran = go("fake_decode", "--threads", "1", *args.split(), known=watch.known)
    assert ran.status == 0 and len(watch.seen) == cases
    assert cases != 1 or watch.seen == ["transformers, of the same shape 8192"]
    assert len(ran.answer["figures"]) == (cases if cases > 1 else 8)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert set(lines[0]["run"]["setting"]["versions"]) >= {"dsmini", "torch", "python", "kernels"}
    if case in ("quick", "another dtype"):
        again = go("fake_decode", "--threads", "1", known=watch.known)
        assert len(again.answer["figures"]) == 8 and watch.seen == [], "a page is of the setting that is asked for"


def test_full_disk_and_unwritable_report_lose_no_figure(go: Go, tmp_path: Path) -> None:
    go("fake_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "append", fail(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            go("fake_decode")
    assert len(of_question(read(tmp_path / "out" / "results.jsonl"), "fake_cache")) == 3
    (tmp_path / "out" / "report.html").unlink()
    (tmp_path / "out" / "report.html").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        go()
    assert len(figures_of(read(tmp_path / "out" / "results.jsonl"))) == 15


# --- time: ten times the estimate for a case, two minutes and a half for --quick


def test_products_take_longer_on_a_slow_machine() -> None:
    fast = Setting(quick=True, device=torch.device("cpu"), dtype=torch.bfloat16, roofs=fake.ROOFS)
    slow = replace(fast, roofs=replace(fake.ROOFS, peak={"float32": 170e9, "bfloat16": 0.3e9}))
    seconds = [seconds_of_products(9e9, dtype, s) for dtype in (torch.bfloat16, torch.float32) for s in (fast, slow)]
    assert seconds == pytest.approx([0.02, 60.0, 0.12, 18 / 170])


def test_a_case_that_takes_too_long_ends_before_its_next_turn(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LEAST", 0.1)
    monkeypatch.setattr(run, "TIMES", 0.01)

    def turns(setting: Setting) -> list[Figure]:
        in_turns({"slow": lambda: time.sleep(0.01)}, **{**setting.turns, "seconds": 60.0, "count": 1000})
        return []

    slow = replace(fake.decode(), cases=lambda s: [Case(key="a", seconds=2.0, run=lambda: turns(s))])
    ran = go(known={"fake_decode": slow, "fake_cache": fake.cache()})
    said = "stopped after 100 ms; its estimate was 2 s"
    assert ran.status == 1 and f"fake_decode a failed: {said}" in ran.err
    assert ran.answer["failed"] == [{"question": "fake_decode", "case": "a", "error": said}]
    assert len(ran.answer["figures"]) == 3, "the others run"
    ran = go("--quick", known={"fake_decode": slow, "fake_cache": fake.cache()}, out="quick")
    assert ran.status == 0 and ran.answer["left_out"] == {"fake_decode": f"0 of 1 cases done; {run.NO_TIME}"}


def test_quick_leaves_out_whole_questions_in_one_line(go: Go) -> None:
    cache, decode = fake.cache(), fake.decode()
    slow = replace(cache, cases=lambda s: [replace(c, seconds=60.0) for c in cache.cases(s)])
    ran = go("--quick", known={"fake_cache": slow, "fake_decode": decode})
    assert ran.status == 0 and len(ran.answer["figures"]) == 4, "a question after it has time"
    assert ran.err.count("left out") == 1 and f"left out: fake_cache ({run.NO_TIME})" in ran.err
    assert len(go("fake_cache", known={"fake_cache": slow}).answer["figures"]) == 3, "without --quick all are measured"


def test_quick_ends_when_its_time_is_over(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of a question that was measured stay, and the other questions are left out."""
    now = [0.0]
    monkeypatch.setattr(run, "spent", lambda: now[0])
    question = fake.decode(Watch("dsmini 128", lambda: now.__setitem__(0, run.QUICK + 1)))
    late = replace(fake.cache(), cases=lambda s: [replace(c, seconds=3.0) for c in fake.cache().cases(s)])
    ran = go("--quick", known={"fake_decode": question, "fake_cache": late})
    assert ran.status == 0 and len(ran.answer["figures"]) == 1
    told = {"fake_decode": f"1 of 4 cases done; {run.NO_TIME}", "fake_cache": run.NO_TIME}
    assert ran.answer["left_out"] == told


def test_quick_expects_of_the_rest_what_was_slow_before(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first question took five times its estimate, so the second would take 100 seconds more than are left."""
    now = [0.0]
    monkeypatch.setattr(run, "spent", lambda: now[0])
    watch = fake.decode(Watch("transformers, of the same shape 512", lambda: now.__setitem__(0, 40.0)))
    cases = [Case(key=str(i), seconds=10.0, run=lambda: ()) for i in range(4)]
    known = {"fake_decode": watch, "fake_cache": replace(fake.cache(), cases=lambda s: cases)}
    assert go("--quick", known=known).answer["left_out"] == {"fake_cache": run.NO_TIME}


@pytest.mark.parametrize(("float32", "bfloat16"), [(224e9, 940e9), (170e9, 0.3e9)])
def test_quick_has_time_for_four_questions_on_a_usual_cpu(float32: float, bfloat16: float) -> None:
    """Plan for CPUs with and without BF16 units, after a minute for the machine's rates."""
    roofs = replace(fake.ROOFS, peak={"float32": float32, "bfloat16": bfloat16})
    dtype = torch.bfloat16 if bfloat16 > float32 else torch.float32
    setting = Setting(quick=True, device=torch.device("cpu"), dtype=dtype, roofs=roofs)
    first = [QUESTIONS[name] for name in ("kv-cache", "decode", "train", "fp8-error")]
    assert list(QUESTIONS.values())[:4] == first
    assert sum(case.seconds for question in first for case in question.cases(setting)) < run.QUICK - 60


def test_help_names_the_command_that_one_types(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["--help"], {})
    assert not stop.value.code and "usage: python -m benchmarks [NAME ...]" in capsys.readouterr().out
