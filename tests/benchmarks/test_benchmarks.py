"""What python -m benchmarks does, with questions that measure nothing: it goes on, it fails, it compares, it tells."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import runner
from benchmarks.question import Figure, Question
from dsmini.measure.calibration import steadiness
from dsmini.report import page, provenance, terminal, units
from dsmini.report.comparison import compare
from dsmini.report.results import Writer, read
from tests.helpers import fake_questions as fake
from tests.helpers.commands import ROOT

Capture = pytest.CaptureFixture[str]
Known = Mapping[str, Callable[[], Question]]


def go(out: Path, *args: str, known: Known | None = None) -> int:
    return runner.main([*args, "--out", str(out)], known or fake.known(), fake.roofs)


def figure(measured: float, **given: Any) -> Figure:
    """Measured several times, to the same value."""
    usual: dict[str, Any] = {"question": "q", "case": {"n": 1}, "metric": "time", "unit": "s", "better": "lower"}
    return Figure(**{**usual, "low": measured, "high": measured, **given}, measured=measured)


ONCE: dict[str, Any] = {"low": None, "high": None}


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


class Watch:
    """What was measured, in order; may raise at a case, once."""

    def __init__(self, at: str = "", error: BaseException | None = None) -> None:
        self.seen, self.at, self.error = list[str](), at, error

    def __call__(self, key: str) -> None:
        self.seen.append(key)
        if key == self.at and self.error is not None:
            error, self.error = self.error, None
            raise error

    @property
    def known(self) -> Known:
        return {"fake_decode": lambda: fake.decode(self), "fake_cache": fake.cache}


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
    assert "MLA keeps 70,272 bytes" in err and "transformers, of the same shape, context 8,192" in err
    assert (tmp_path / "report.html").is_file()
    assert not list(tmp_path.glob("*.partial"))


def test_what_a_case_prints_is_not_on_stdout(tmp_path: Path, capsys: Capture) -> None:
    assert go(tmp_path, known={"fake_decode": lambda: fake.decode(print)}) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "\ndsmini 128\n" in err


def test_interrupted_run_goes_on_where_it_was(tmp_path: Path, capsys: Capture) -> None:
    watch = Watch("dsmini 2048", KeyboardInterrupt())
    assert go(tmp_path, known=watch.known) == 130
    out, err = capsys.readouterr()
    assert "Go on with: python -m benchmarks" in err
    answer = json.loads(out)
    assert len(answer["figures"]) == 2 and answer["left"] == {"fake_decode": 6, "fake_cache": 5}
    assert watch.seen == ["dsmini 128", "dsmini 512", "dsmini 2048"]
    assert "6 of 8 cases are still to be measured" in (tmp_path / "report.html").read_text()
    watch.seen.clear()
    assert go(tmp_path, known=watch.known) == 0
    out, err = capsys.readouterr()
    assert "2 of 13 cases are done already" in err
    assert watch.seen[0] == "dsmini 2048" and len(watch.seen) == 6
    answer = json.loads(out)
    assert len(answer["figures"]) == 13
    contexts = [f["case"]["context"] for f in answer["figures"] if f["case"].get("side") == "dsmini"]
    assert contexts == [128, 512, 2048, 8192], "in the order of the cases, not of the runs"
    watch.seen.clear()
    assert go(tmp_path, known=watch.known) == 0
    assert watch.seen == []


def test_a_run_interrupted_while_its_page_is_drawn_tells_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real, drawn = page.write_report, list[Path]()

    def write_report(path: Path, *args: Any) -> None:
        drawn.append(path)
        if len(drawn) == 1:
            raise KeyboardInterrupt
        real(path, *args)

    monkeypatch.setattr(page, "write_report", write_report)
    assert go(tmp_path) == 130
    out, err = capsys.readouterr()
    assert "Go on with: python -m benchmarks" in err
    assert len(json.loads(out)["figures"]) == 5 and (tmp_path / "report.html").is_file()


def test_killed_run_leaves_what_is_done(tmp_path: Path) -> None:
    """Not by an exception: the process dies in the middle of the third case."""
    script = (
        "import tests.helpers.fake_questions as f, sys, time; from benchmarks import runner;"
        "wait = lambda key: time.sleep(60) if key == 'dsmini 2048' else None;"
        "runner.main(sys.argv[1:], {'fake_decode': lambda: f.decode(wait)}, f.roofs)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    process = subprocess.Popen([sys.executable, "-c", script, "--out", str(tmp_path)], env=env, cwd=ROOT)
    path = tmp_path / "results.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text().count('"done"') == 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    watch = Watch()
    assert go(tmp_path, "fake_decode", "--threads", str(lines(tmp_path)[0]["threads"]), known=watch.known) == 0
    assert len(watch.seen) == 6


@pytest.mark.parametrize("change", [["--quick"], ["--dtype", "float32"], ["--threads", "2"], ["--fresh"]])
def test_other_setting_measures_anew(tmp_path: Path, change: list[str], capsys: Capture) -> None:
    watch, threads = Watch(), [] if "--threads" in change else ["--threads", "1"]
    go(tmp_path, "fake_decode", "--threads", "1", known=watch.known)
    watch.seen.clear()
    go(tmp_path, "fake_decode", *threads, *change, known=watch.known)
    assert len(watch.seen) == (4 if "--quick" in change else 8)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert len(figures) == len(watch.seen), "those of the other setting are not among them"


def test_a_killed_case_leaves_no_figures(tmp_path: Path, capsys: Capture) -> None:
    """Of one that was being written when the disk was full or the process was killed."""
    go(tmp_path, "fake_roofline")
    path = tmp_path / "results.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    figures = [i for i, line in enumerate(whole) if json.loads(line)["kind"] == "figure"]
    path.write_text("".join(whole[: figures[6]]))
    capsys.readouterr()
    assert go(tmp_path, "fake_roofline") == 0
    assert len(json.loads(capsys.readouterr().out)["figures"]) == len(figures) == 10


def test_what_figures_depend_on_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dsmini/a.py", "dsmini/measure/a.py", "benchmarks/questions/a.py", "configs/a.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    (tmp_path / "dsmini" / "report").mkdir()
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    seen = {provenance.code()}
    for path in sorted(tmp_path.rglob("a.*")):
        path.write_text("2")
        seen.add(provenance.code())
    assert len(seen) == 5
    (tmp_path / "dsmini" / "report" / "page.py").write_text("3")
    (tmp_path / "benchmarks" / "runner.py").write_text("3")
    assert provenance.code() in seen, "what shows figures changes none"


def test_versions_and_kernels_are_part_of_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(tmp_path, "fake_cache")
    assert set(lines(tmp_path)[0]["versions"]) >= {"dsmini", "torch", "python", "kernels"}
    monkeypatch.setenv("DSMINI_BACKEND", "reference")
    assert provenance.versions()["kernels"] == "reference"
    monkeypatch.setattr("dsmini.report.provenance.versions", lambda: {"torch": "another"})
    go(tmp_path, "fake_cache")
    assert len(read(tmp_path / "results.jsonl").by_fingerprint) == 2


def test_estimates_are_of_the_last_run_that_was_as_quick(tmp_path: Path) -> None:
    for seconds, quick in ((7.0, []), (1.0, ["--quick"]), (9.0, [])):
        go(tmp_path, "fake_decode", "--fresh", *quick)
        text = (tmp_path / "results.jsonl").read_text().splitlines()
        last = json.loads(text[-1]) | {"seconds": seconds}
        (tmp_path / "results.jsonl").write_text("\n".join([*text[:-1], json.dumps(last)]) + "\n")
    results = read(tmp_path / "results.jsonl")
    key = "transformers, of the same shape 8192"
    assert results.seconds("fake_decode", key, quick=False) == 9.0
    assert results.seconds("fake_decode", key, quick=True) is None


def test_changed_sources_measure_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    watch = Watch()
    go(tmp_path, "fake_decode", known=watch.known)
    monkeypatch.setattr("dsmini.report.provenance.code", lambda: "other")
    go(tmp_path, "fake_cache", known=watch.known)
    assert len(watch.seen) == 8
    page = (tmp_path / "report.html").read_text()
    assert "Measured by an earlier run than the rest" in page, "a question that was not measured again is still shown"
    go(tmp_path, known=watch.known)
    assert len(watch.seen) == 16
    assert "Measured by an earlier run than the rest" not in (tmp_path / "report.html").read_text()


def test_interrupted_fresh_run_does_not_fall_back_on_old_figures(tmp_path: Path) -> None:
    watch = Watch()
    go(tmp_path, "fake_decode", known=watch.known)
    watch.at, watch.error = "dsmini 512", KeyboardInterrupt()
    assert go(tmp_path, "fake_decode", "--fresh", known=watch.known) == 130
    watch.seen.clear()
    assert go(tmp_path, "fake_decode", known=watch.known) == 0
    assert len(watch.seen) == 7


def test_failing_case_is_told_and_the_others_go_on(tmp_path: Path, capsys: Capture) -> None:
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


def test_a_count_that_is_not_as_predicted_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    assert go(tmp_path, known={"fake_cache": lambda: fake.cache(measured=70_273)}) == 1
    err = capsys.readouterr().err
    assert "bytes per token is 70,273 bytes, predicted were 70,272 bytes" in err
    assert "≠" in (tmp_path / "report.html").read_text()


def test_a_question_that_cannot_say_or_draw_takes_no_other_down(tmp_path: Path, capsys: Capture) -> None:
    def broken() -> Question:
        def fail(figures: list[Figure]) -> Any:
            raise KeyError("8192")

        return replace(fake.decode(), finding=fail, plots=fail)

    assert go(tmp_path, known={"fake_decode": broken, "fake_cache": fake.cache}) == 0
    assert "No finding yet: KeyError: '8192'" in capsys.readouterr().err
    assert "MLA keeps" in (tmp_path / "report.html").read_text()


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
    assert go(tmp_path, "kv_cache", known={"kv-cache": fake.cache}) == 0


def test_question_that_cannot_run_is_left_out_unless_named(tmp_path: Path, capsys: Capture) -> None:
    def missing() -> Question:
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")

    needy = replace(fake.decode(), needs="it needs a GPU")
    known: Known = {"fake_decode": lambda: needy, "other": missing, "fake_cache": fake.cache}
    assert runner.main(["--list"], known, fake.roofs) == 0
    listed = capsys.readouterr().out
    assert "cannot run here: it needs a GPU" in listed and "it needs nowhere, which is not installed" in listed
    assert go(tmp_path, known=known) == 0
    assert "fake_decode is left out: it needs a GPU" in capsys.readouterr().err
    for name in ("fake_decode", "other"):
        with pytest.raises(ValueError, match=f"{name} cannot run here: it needs"):
            go(tmp_path, name, known=known)


def test_folder_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    watch = Watch()
    with pytest.raises(ValueError, match=r"cannot be written: .*choose another folder by --out"):
        go(tmp_path / "file" / "out", known=watch.known)
    assert watch.seen == []


def test_full_disk_stops_and_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(tmp_path, "fake_cache")
    with monkeypatch.context() as patch:
        patch.setattr("dsmini.report.results.os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            go(tmp_path, "fake_decode")
    assert len(read(tmp_path / "results.jsonl").by_fingerprint) == 1
    assert go(tmp_path, "fake_decode") == 0


def test_report_that_cannot_be_written_takes_no_figure_with_it(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "report.html").mkdir()
    assert go(tmp_path) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)["figures"]) == 5 + 8 + 10
    assert err.count("report.html could not be written: Is a directory; the figures are kept") == 1
    (tmp_path / "report.html").rmdir()
    assert go(tmp_path, "--report-only") == 0


def test_two_runs_do_not_write_into_one_file(tmp_path: Path) -> None:
    with (
        Writer(tmp_path / "results.jsonl"),
        pytest.raises(ValueError, match="is being written by another run; wait for it"),
    ):
        go(tmp_path)


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_half_a_line_at_the_end_is_passed_over(tmp_path: Path, cut: int) -> None:
    watch, path = Watch(), tmp_path / "results.jsonl"
    go(tmp_path, "fake_decode", known=watch.known)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])  # of 1: the line is whole, its end is missing
    assert go(tmp_path, "--report-only", known=watch.known) == 0
    watch.seen.clear()
    assert go(tmp_path, "fake_decode", known=watch.known) == 0
    assert watch.seen == ([] if cut == 1 else ["transformers, of the same shape 8192"])
    assert all(lines(tmp_path)), "every line is whole again"


def test_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    go(tmp_path, "fake_cache")
    path = tmp_path / "results.jsonl"
    text = path.read_text().splitlines(keepends=True)
    for damage, said in (("{half\n", "line 3 of .* is not JSON: '{half'"), ('{"kind": "figure"}\n', "is no line of")):
        path.write_text("".join([*text[:2], damage, *text[2:]]))
        with pytest.raises(ValueError, match=said):
            go(tmp_path)


def test_rates_of_an_older_version_are_left_out(tmp_path: Path) -> None:
    go(tmp_path, "fake_cache")
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text().replace('"costs"', '"rates"'))
    assert go(tmp_path, "--report-only") == 0
    page = (tmp_path / "report.html").read_text()
    assert "70,272 bytes" in page and "copying memory" not in page


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


def test_last_line_tells_whose_figures_are_not_the_latest_runs(tmp_path: Path, capsys: Capture) -> None:
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
        ([1.0, 1.0, 1.0, 0.62] + [1.0] * 4, "in dsmini 512 it gave as little as 62% of the rates"),
        ([0.7] * 8, "in 4 of 4 cases it gave as little as 70%"),
        ([1.5] * 8, "faster than when its rates were measured, up to 1.50 times"),
    ],
)
def test_a_busy_machine_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, shares: list[float], said: str | None
) -> None:
    """Asked before and after each case; told where times are taken."""
    left = iter(shares)
    monkeypatch.setattr("benchmarks.session.steadiness", lambda roofs, device: next(left))
    go(tmp_path, "--quick", known={"fake_decode": fake.decode})
    assert next(left, None) is None
    out, err = capsys.readouterr()
    page = (tmp_path / "report.html").read_text()
    if said:
        assert said in err and said in page
    else:
        assert "the rates that predictions rest on" not in err + page
    lowest = min(min(shares[i : i + 2]) for i in range(0, 8, 2))
    assert json.loads(out)["steadiness"] == {"fake_decode": lowest}

    monkeypatch.setattr("benchmarks.session.steadiness", lambda roofs, device: 0.5)
    go(tmp_path / "counts", known={"fake_cache": fake.cache})
    assert "machine was busy" not in capsys.readouterr().err, "no time was taken"


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
    go(tmp_path / "old", known={"fake_decode": fake.decode})
    capsys.readouterr()
    old = str(tmp_path / "old" / "results.jsonl")
    go(tmp_path / "new", "--compare", old, known={"fake_decode": lambda: fake.decode(speed=speed)})
    err = capsys.readouterr().err
    assert err.count(f" {verdict}") == (8 if verdict else 0)
    assert f"{0 if verdict else 8} of 8 figures are unchanged" in err
    assert 'id="changes"' in (tmp_path / "new" / "report.html").read_text()


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (figure(1.0), figure(1.04), "unchanged"),
        (figure(1.0), figure(1.06), "worse"),
        (figure(1.06), figure(1.0), "better"),
        (figure(1.0, better="higher", unit="tokens/s"), figure(1.2, better="higher", unit="tokens/s"), "better"),
        (figure(1.0, unit="x"), figure(0.954, unit="x"), "unchanged"),
        (figure(1.0, unit="x"), figure(0.952, unit="x"), "better"),  # 5 % of the smaller
        (figure(1.0, **ONCE), figure(1.4, **ONCE), "unchanged"),
        (figure(1.0, **ONCE), figure(1.6, **ONCE), "worse"),
        (figure(1000, unit="bytes", **ONCE), figure(1040, unit="bytes", **ONCE), "unchanged"),
        (figure(1.0, case={"n": 1, "calls": 3}), figure(1.0, case={"n": 1, "calls": 4}), "unchanged"),
        (figure(1.0, low=0.9, high=1.3), figure(1.4, low=1.2, high=1.5), "unchanged"),
        (figure(1.0, low=0.9, high=1.1), figure(1.4, low=1.2, high=1.5), "worse"),
        (figure(1.0, low=1.0, high=1.01), figure(1.03, low=1.02, high=1.04), "unchanged"),
        (figure(1000, unit="bytes", exact=True), figure(1001, unit="bytes", exact=True), "worse"),
        (figure(1000, unit="bytes", exact=True), figure(1000, unit="bytes", exact=True), "unchanged"),
        (figure(1.0, unit="nats"), figure(1.02, unit="nats"), "worse"),
        (figure(1.0, unit="nats", better=None), figure(1.02, unit="nats", better=None), "changed"),
        (figure(0.0, unit="nats"), figure(0.5, unit="nats"), "worse"),
    ],
)
def test_noise_is_no_change(old: Figure, new: Figure, verdict: str) -> None:
    (change,) = compare([old], [new])
    assert change.verdict == verdict


def test_changes_come_by_size_and_tell_new_from_gone() -> None:
    names = [{"n": n} for n in range(6)]
    old = [figure(v, case=case) for v, case in zip((1.0, 1.0, 1.0, 1.0, 1.0), names[:5], strict=True)]
    new = [figure(v, case=case) for v, case in zip((1.01, 1.5, 0.4, 1.2, 1.0), [*names[:4], names[5]], strict=True)]
    found = [(change.name.case["n"], change.verdict) for change in compare(old, new)]
    assert found == [(2, "better"), (1, "worse"), (3, "worse"), (4, "gone"), (5, "new"), (0, "unchanged")]


def test_time_left_learns_from_what_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    clock = terminal.Clock([10.0] * 10)
    assert clock.left() == 100
    clock.begin(10.0)
    now[0] = 4.0
    assert clock.left() == 96
    clock.end(20.0)  # twice the estimate
    assert 140 < clock.left() < 180
    for _ in range(9):
        clock.begin(10.0)
        clock.end(20.0)
    assert clock.left() == pytest.approx(0)


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (1310720, "bytes", "1.25 MiB"),
        (640, "bytes/token", "640 bytes/token"),
        (38.2e9, "bytes/s", "38.2 GB/s"),
        (1.03e14, "FLOP/s", "103 TFLOP/s"),
        (0.00471, "s", "4.71 ms"),
        (3e-7, "s", "300 ns"),
        (6363.4, "tokens/s", "6,363 tokens/s"),
        (0.4567, "", "0.457"),
        (2.4e-6, "", "2.40e-06"),
        (0.0, "s", "0 s"),
        (None, "s", units.NOTHING),
    ],
)
def test_units_are_peoples(value: float | None, unit: str, said: str) -> None:
    assert units.human(value, unit) == said


def test_exact_counts_are_shown_whole() -> None:
    assert units.human(671_026_404_352, "", exact=True) == "671,026,404,352"


def test_what_is_not_finite_is_null(tmp_path: Path, capsys: Capture) -> None:
    def nan() -> Question:
        question = fake.cache()
        case = replace(question.cases(None)[0], run=lambda: [figure(float("nan"), question="fake_cache")])  # type: ignore
        return replace(question, cases=lambda setting: [case], plots=lambda figures: [])

    assert go(tmp_path, known={"fake_cache": nan}) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["figures"][0]["measured"] is None


def test_questions_keep_the_contract() -> None:
    """All of questions/, named after their module, and complete."""
    modules = {path.stem for path in (ROOT / "benchmarks" / "questions").glob("*.py")} - {"__init__"}
    known = runner.questions_here()
    assert {name.replace("-", "_") for name in known} == modules
    for name, load in known.items():
        question = load()
        assert question.name == name
        assert question.title and question.about
