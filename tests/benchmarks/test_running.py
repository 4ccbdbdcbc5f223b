"""Run python -m benchmarks with fake questions: what it prints and refuses, how it resumes and keeps time."""

import json
import math
import os
import signal
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results, run
from benchmarks.question import Case, Question, Setting, figure, left_out
from benchmarks.questions import QUESTIONS
from benchmarks.results import figures_of, of_question, read
from dsmini.measure import roofs as measured_roofs
from dsmini.measure.turns import in_turns
from dsmini.report import Figure, plots
from tests.helpers import fake_questions as fake
from tests.helpers.commands import ROOT
from tests.helpers.corpora import lay_out


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


Go = Callable[..., Ran]


@pytest.fixture
def go(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Go:
    """Return what runs the command in this process with --json, by default with all fake questions."""
    monkeypatch.setattr(plots, "svg", lambda *_: "<svg></svg>")
    monkeypatch.setattr(run, "STARTED", time.monotonic())
    monkeypatch.setenv("COLUMNS", "1000")  # no sentence is broken

    def go(*args: str, known: Mapping[str, Question] | None = None, out: str = "out", json: bool = True) -> Ran:
        capsys.readouterr()
        flags = ["--json"] * json
        status = run.main([*args, *flags, "--out", str(tmp_path / out)], known or fake.known(), fake.roofs)
        printed = capsys.readouterr()
        return Ran(status=status, out=printed.out, err=printed.err, folder=tmp_path / out)

    return go


class Watch:
    """Two fake questions, and a record of the first one's measured cases; it calls something once, at a given case."""

    def __init__(self, at: str = "", then: Callable[[], object] = lambda: None) -> None:
        self.seen, self.once = list[str](), {at: then}
        self.known = {"fake_decode": fake.decode(self), "fake_cache": fake.cache()}

    def __call__(self, key: str) -> None:
        self.seen.append(key)
        self.once.pop(key, lambda: None)()


def fail(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: object) -> None:
        raise error

    return raise_it


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def with_cases(question: Question, *cases: Case) -> dict[str, Question]:
    """Return a question with these cases alone, by its name."""
    return {question.name: replace(question, cases=lambda _: list(cases), plots=(), answer=lambda _: "")}


def with_figure(found: Figure) -> dict[str, Question]:
    """Return a question of one case, which gives this figure."""
    return with_cases(fake.cache(), Case(key="a", seconds=1.0, run=lambda: [found]))


def with_value(metric: str, unit: str, value: float) -> dict[str, Question]:
    return with_figure(Figure(question="", case={"seed": 0}, metric=metric, unit=unit, measured=value))


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
    assert (ran.status, ran.answer["failed"], watch.seen[8:]) == (0, [], ["dsmini 512"]), "it is measured again"


def test_what_is_wrong_with_figures_is_told(go: Go) -> None:
    ran = go(known={"fake_cache": fake.cache(measured=70_273)})
    assert ran.status == 1 and "bytes per token is 70,273 bytes, predicted: 70,272 bytes" in ran.err
    assert "≠" in ran.page
    assert go(known=with_value("m", "s", math.nan), out="nan").answer["figures"][0]["measured"] is None


def test_reason_of_what_was_left_out_is_the_answer(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine spoils no times where none were taken, in it and in counts."""
    monkeypatch.setattr(run, "steadiness", lambda roofs, device: 0.5)
    ran = go(known=with_figure(left_out("times_as_long", {}, "bfloat16 products are slow here")))
    assert "left out: bfloat16 products are slow here" in ran.err and "unreliable" not in ran.err
    assert "unreliable" not in go("fake_cache", out="counts").err


def test_question_that_cannot_run_is_left_out_unless_named(go: Go) -> None:
    known = {"fake_decode": replace(fake.decode(), needs="it needs a GPU"), "kv-cache": fake.cache()}
    assert {q["name"]: q["needs"] for q in json.loads(go("--list", known=known).out)}["fake_decode"] == "it needs a GPU"
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


@pytest.mark.parametrize(("share", "is_told"), [(0.95, False), (0.62, True)])
def test_a_busy_machine_is_told(go: Go, monkeypatch: pytest.MonkeyPatch, share: float, is_told: bool) -> None:
    """Probe before and after each case; warn only about questions with times."""
    left = iter([1.0, 1.0, 1.0, share] + [1.0] * 4)
    monkeypatch.setattr(run, "steadiness", lambda roofs, device: next(left))
    ran = go("--quick", known={"fake_decode": fake.decode()})
    assert next(left, None) is None and ran.answer["steadiness"] == {"fake_decode": share}
    words = "Times are unreliable: the machine was busy or throttled, and reached as little as 62 % of the rates"
    assert (words in ran.err) == (words in ran.page) == is_told


def test_compare_names_what_changed_beyond_its_interval(go: Go, tmp_path: Path) -> None:
    go("fake_decode", "fake_cache", out="old")
    old = str(tmp_path / "old" / "results.jsonl")
    known = {"fake_decode": fake.decode(speed=2.0), "fake_cache": fake.cache(measured=70_273)}
    ran = go("--compare", old, known=known, out="new")
    decoded, counted = ran.answer["changed"]
    assert decoded["measured"] == pytest.approx(2.0) and decoded["case"]["context"] == 8192
    assert decoded["low"] == pytest.approx(2 * 0.975 / 1.025) and decoded["high"] == pytest.approx(2 * 1.025 / 0.975)
    assert counted["measured"] == pytest.approx(70_273 / 70_272)
    assert "2 values changed, most of all tokens per s of question fake_decode" in ran.err
    assert "9 are the same or within their intervals, 0 are not in the older file" in ran.err
    ran = go("--compare", old, known={"fake_decode": fake.decode(speed=1.04)}, out="near")
    assert ran.answer["changed"] == [], "intervals of 2.5 % on each side meet"


def test_a_time_of_few_turns_is_no_change(go: Go, tmp_path: Path) -> None:
    """It has no interval, so nobody knows where the true one lies; a count has none either, and is known."""
    for unit, number in (("s", 0), ("tokens/s", 0), ("bytes", 1)):
        place = unit.replace("/", " ")
        go(known=with_value("amount", unit, 1.0), out=f"old {place}")
        old = str(tmp_path / f"old {place}" / "results.jsonl")
        ran = go("--compare", old, known=with_value("amount", unit, 1.3), out=f"new {place}")
        assert len(ran.answer["changed"]) == number, unit


def test_errors_of_products_are_no_times() -> None:
    for metric in ("times_the_error", "kept_ratio"):
        assert not figure(metric, {}, 1.05).is_time


def test_a_change_of_sign_is_a_difference_and_other_settings_are_named(go: Go, tmp_path: Path) -> None:
    go(known=with_value("difference of loss", "nats", -0.02), out="old")
    path = tmp_path / "old" / "results.jsonl"
    path.write_text(path.read_text().replace('"quick": false', '"quick": true'))
    ran = go("--compare", str(path), known=with_value("difference of loss", "nats", 0.02), out="new")
    (changed,) = ran.answer["changed"]
    assert changed["unit"] == "nats" and changed["measured"] == pytest.approx(0.04)
    assert "results.jsonl was measured with another quick: bfloat16 on cpu" in ran.err


def test_rates_of_a_busy_machine_are_said_and_measured_again(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = fake.roofs
    monkeypatch.setattr(fake, "roofs", lambda *args, **more: replace(quiet(*args, **more), disturbed="It was busy"))
    for _ in range(2):
        ran = go("fake_cache", "fake_decode")
        words = "It was busy; the same command measures again."
        assert ran.err.count(words) == ran.page.count(words) == 1, "once, not after each answer"
        assert "already done" not in ran.err
    monkeypatch.setattr(fake, "roofs", quiet)
    assert "It was busy" not in go("fake_cache").err and "already done" in go("fake_cache").err


def test_another_text_is_measured_again(go: Go, tmp_path: Path) -> None:
    text, again = tmp_path / "text.txt", []
    for words in ("one", "two", "two"):
        text.write_text(words)
        again.append("already done" in go("fake_cache", "--text", str(text)).err)
    assert again == [False, False, True]


# --- the command line


REFUSED = tomllib.loads(Path(__file__).with_name("refusals.toml").read_text())


@pytest.mark.parametrize("args", REFUSED)
def test_mistakes_are_refused_in_a_sentence(go: Go, tmp_path: Path, args: str) -> None:
    watch = Watch()
    with pytest.raises(ValueError, match=REFUSED[args]):
        go(*args.split(), known={**fake.known(), **watch.known})
    assert watch.seen == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("out", b"mine", r"cannot be written: .*choose another folder by --out"),
        ("out/results.jsonl", b"{half\n{}\n", "line 1 of .* is not a line of results"),
        ("out/results.jsonl", b'{"key": "a"}\n' * 2, "is not a line of"),
    ],
)
def test_what_holds_something_else_is_refused_and_left(
    go: Go, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    lay_out(tmp_path, {name: content})
    with pytest.raises(ValueError, match=words):
        go()
    assert (tmp_path / name).read_bytes() == content


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
    asked: list[torch.device] = []
    monkeypatch.setattr(measured_roofs, "measure", lambda device, on_part: (asked.append(device), fake.ROOFS)[1])
    monkeypatch.setattr(plots, "svg", lambda *_: None)
    here = ["fake_roofline", "--out", str(tmp_path / "out"), "--device", "cpu"]
    for more, times in (["--quick"], 1), ([], 1), (["--fresh"], 2):
        assert run.main([*here, *more], fake.known()) == 0
        assert asked == [torch.device("cpu")] * times


def test_help_names_the_command_that_one_types(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["--help"], {})
    assert not stop.value.code and "usage: python -m benchmarks [NAME ...]" in capsys.readouterr().out


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
    assert watch.seen[2:4] == ["dsmini 2048"] * 2 and len(watch.seen) == 9 and len(ran.answer["figures"]) == 11
    contexts = [f["case"]["context"] for f in ran.answer["figures"] if f["case"].get("side") == "dsmini"]
    assert contexts == [128, 512, 2048, 8192]
    assert go(known=watch.known).status == 0 and len(watch.seen) == 9


# what happens to the file of results after a run of fake_decode, arguments of the next one, and the cases it measures
Happens = Callable[[Path, pytest.MonkeyPatch], object]
NEXT: dict[str, tuple[Happens | None, str, int]] = {
    "nothing": (None, "", 0),
    "the end of a line is missing": (lambda path, _: path.write_bytes(path.read_bytes()[:-1]), "", 1),
    "half a line is missing": (lambda path, _: path.write_bytes(path.read_bytes()[:-30]), "", 1),
    "fresh": (None, "--fresh", 8),
    "quick": (None, "--quick", 4),
    "another dtype": (None, "--dtype float32", 8),
    "other threads": (None, "--threads 2", 8),
    "other sources": (lambda _, patch: patch.setattr(results, "code", lambda: "other"), "", 8),
    "other versions": (lambda _, patch: patch.setattr(results, "versions", lambda: {"torch": "another"}), "", 8),
    "another backend": (lambda _, patch: patch.setenv("DSMINI_BACKEND", "reference"), "", 8),
}


@pytest.mark.parametrize("case", NEXT)
def test_next_run_measures_what_is_not_done(go: Go, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Check that half a line is passed over, and that figures of another setting are not among the new ones."""
    happens, args, cases = NEXT[case]
    watch = Watch()
    path = go("fake_decode", "--threads", "1", known=watch.known).folder / "results.jsonl"
    if happens is not None:
        happens(path, monkeypatch)
    ran = go("fake_decode", "--threads", "1", *args.split(), known=watch.known)
    assert ran.status == 0 and len(watch.seen) == 8 + cases
    assert cases != 1 or watch.seen[8:] == ["transformers, of the same shape 8192"]
    assert len(ran.answer["figures"]) == (cases if cases > 1 else 8)
    first = json.loads(path.read_text().splitlines()[0])
    assert set(first["run"]["setting"]["versions"]) >= {"dsmini", "torch", "python", "kernels"}
    if case in ("quick", "another dtype"):
        again = go("fake_decode", "--threads", "1", known=watch.known)
        assert len(again.answer["figures"]) == 8, "a page is of the setting that is asked for"
        assert len(watch.seen) == 8 + cases


def test_full_disk_and_unwritable_report_lose_no_figure(go: Go, tmp_path: Path) -> None:
    file, page = tmp_path / "out" / "results.jsonl", tmp_path / "out" / "report.html"
    go("fake_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "append", fail(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            go("fake_decode")
    assert len(of_question(read(file), "fake_cache")) == 3
    page.unlink()
    page.mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        go()
    assert len(figures_of(read(file))) == 15


# --- time: ten times the estimate for a case, two minutes and a half for --quick


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


# estimated seconds of each case of the second question, a case of the first after which this much time is spent, and
# the cases of the questions that are done before the time is over; None where one is done as a whole
LATE: dict[str, tuple[float, str, float, tuple[int | None, ...]]] = {
    "a whole question has no time, and one after it has": (60.0, "", 0.0, (None, 0, None)),
    "the time ends within a question": (3.0, "dsmini 128", run.QUICK + 1, (1, 0, 0)),
    "cases took five times their estimates": (10.0, "transformers, of the same shape 512", 40.0, (None, 0, None)),
}


@pytest.mark.parametrize("case", LATE)
def test_quick_leaves_out_what_has_no_time(go: Go, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    estimate, at, spent, done = LATE[case]
    now = [0.0]
    monkeypatch.setattr(run, "spent", lambda: now[-1])
    cache = with_cases(fake.cache(), *(Case(key=str(i), seconds=estimate, run=lambda: ()) for i in range(3)))
    first = fake.decode(Watch(at, lambda: now.append(spent)))
    known = {"fake_decode": first, **cache, "fake_roofline": fake.roofline()}
    ran = go("--quick", known=known)
    words = [f"{n} of 4 cases done; {run.NO_TIME}" if n else run.NO_TIME for n in done]
    assert ran.status == 0
    assert ran.answer["left_out"] == {name: w for name, w, n in zip(known, words, done, strict=True) if n is not None}
    assert len(ran.answer["figures"]) == sum(4 if n is None else n for n in (done[0], done[2]))
    assert go("fake_cache", known=known, out="all").answer["left_out"] == {}, "without --quick all are measured"


@pytest.mark.parametrize(("float32", "bfloat16"), [(224e9, 940e9), (170e9, 0.3e9)])
def test_quick_has_time_for_four_questions_on_a_usual_cpu(float32: float, bfloat16: float) -> None:
    """Plan for CPUs with and without BF16 units, after a minute for the machine's rates."""
    roofs = replace(fake.ROOFS, peak={"float32": float32, "bfloat16": bfloat16})
    dtype = torch.bfloat16 if bfloat16 > float32 else torch.float32
    setting = Setting(quick=True, device=torch.device("cpu"), dtype=dtype, roofs=roofs)
    first = [QUESTIONS[name] for name in ("kv-cache", "decode", "train", "fp8-error")]
    assert list(QUESTIONS.values())[:4] == first
    assert sum(case.seconds for question in first for case in question.cases(setting)) < run.QUICK - 60
