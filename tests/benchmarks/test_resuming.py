"""Stop python -m benchmarks in every way: finished cases stay done, and the same command continues."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import display
from dsmini.report.results import ResultsWriter, read
from tests.helpers.benchmark_calls import Capture, Watch, go, lines
from tests.helpers.commands import ROOT


def test_interrupted_run_continues(tmp_path: Path, capsys: Capture) -> None:
    watch = Watch("dsmini 2048", KeyboardInterrupt())
    assert go(tmp_path, known=watch.known) == 130
    out, err = capsys.readouterr()
    assert "Continue with: python -m benchmarks" in err
    answer = json.loads(out)
    assert len(answer["figures"]) == 2 and answer["left"] == {"fake_decode": 6, "fake_cache": 5}
    assert watch.seen == ["dsmini 128", "dsmini 512", "dsmini 2048"]
    assert "6 of 8 cases are still to be measured" in (tmp_path / "report.html").read_text()
    watch.seen.clear()
    assert go(tmp_path, known=watch.known) == 0
    out, err = capsys.readouterr()
    assert "2 of 13 cases are already done" in err
    assert watch.seen[0] == "dsmini 2048" and len(watch.seen) == 6
    answer = json.loads(out)
    assert len(answer["figures"]) == 13
    contexts = [f["case"]["context"] for f in answer["figures"] if f["case"].get("side") == "dsmini"]
    assert contexts == [128, 512, 2048, 8192], "in the order of the cases, not of the runs"
    watch.seen.clear()
    assert go(tmp_path, known=watch.known) == 0
    assert watch.seen == []


def test_interrupt_while_drawing_tells_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real, drawn = display.write_text, list[Path]()

    def write_text(path: Path, text: str) -> None:
        drawn.append(path)
        if len(drawn) == 1:
            raise KeyboardInterrupt
        real(path, text)

    monkeypatch.setattr(display, "write_text", write_text)
    assert go(tmp_path) == 130
    out, err = capsys.readouterr()
    assert "Continue with: python -m benchmarks" in err
    assert len(json.loads(out)["figures"]) == 5 and (tmp_path / "report.html").is_file()


def test_killed_run_leaves_what_is_done(tmp_path: Path) -> None:
    """Kill the process in the middle of the third case, without an exception."""
    script = (
        "import tests.helpers.fake_questions as f, sys, time; from benchmarks import runner;"
        "wait = lambda key: time.sleep(60) if key == 'dsmini 2048' else None;"
        "runner.main(sys.argv[1:], {'fake_decode': f.decode(wait)}, f.roofs)"
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
def test_other_setting_measures_again(tmp_path: Path, change: list[str], capsys: Capture) -> None:
    watch, threads = Watch(), [] if "--threads" in change else ["--threads", "1"]
    go(tmp_path, "fake_decode", "--threads", "1", known=watch.known)
    watch.seen.clear()
    go(tmp_path, "fake_decode", *threads, *change, known=watch.known)
    assert len(watch.seen) == (4 if "--quick" in change else 8)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert len(figures) == len(watch.seen), "those of the other setting are not among them"


def test_a_killed_case_leaves_no_figures(tmp_path: Path, capsys: Capture) -> None:
    """Ignore the figures of a case whose writing was cut off."""
    go(tmp_path, "fake_roofline")
    path = tmp_path / "results.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    figures = [i for i, line in enumerate(whole) if json.loads(line)["kind"] == "figure"]
    path.write_text("".join(whole[: figures[6]]))
    capsys.readouterr()
    assert go(tmp_path, "fake_roofline") == 0
    assert len(json.loads(capsys.readouterr().out)["figures"]) == len(figures) == 10


def test_versions_and_kernels_are_in_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(tmp_path, "fake_cache")
    assert set(lines(tmp_path)[0]["versions"]) >= {"dsmini", "torch", "python", "kernels"}
    monkeypatch.setenv("DSMINI_BACKEND", "reference")
    go(tmp_path, "fake_cache")
    assert lines(tmp_path)[-1 - 5 * 2 - 1]["versions"]["kernels"] == "reference"
    monkeypatch.setattr("dsmini.report.provenance.versions", lambda: {"torch": "another"})
    go(tmp_path, "fake_cache")
    assert len(read(tmp_path / "results.jsonl").by_fingerprint) == 3


def test_changed_sources_measure_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
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


def test_interrupted_fresh_run_ignores_old_figures(tmp_path: Path) -> None:
    watch = Watch()
    go(tmp_path, "fake_decode", known=watch.known)
    watch.at, watch.error = "dsmini 512", KeyboardInterrupt()
    assert go(tmp_path, "fake_decode", "--fresh", known=watch.known) == 130
    watch.seen.clear()
    assert go(tmp_path, "fake_decode", known=watch.known) == 0
    assert len(watch.seen) == 7


def test_unwritable_folder_is_refused_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    watch = Watch()
    with pytest.raises(ValueError, match=r"cannot be written: .*choose another folder by --out"):
        go(tmp_path / "file" / "out", known=watch.known)
    assert watch.seen == []


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_results_that_are_no_file_are_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "results.jsonl")
    watch = Watch()
    for flags in ((), ("--report-only",)):
        with pytest.raises(ValueError, match=r"results\.jsonl: it is a (FIFO|folder), want a regular file"):
            go(tmp_path, *flags, known=watch.known)
    assert watch.seen == []


def test_full_disk_stops_and_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(tmp_path, "fake_cache")
    with monkeypatch.context() as patch:
        patch.setattr("dsmini.report.results.os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            go(tmp_path, "fake_decode")
    assert len(read(tmp_path / "results.jsonl").by_fingerprint) == 1
    assert go(tmp_path, "fake_decode") == 0


def test_unwritable_report_loses_no_figure(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "report.html").mkdir()
    assert go(tmp_path) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)["figures"]) == 5 + 8 + 10
    assert err.count("report.html could not be written: Is a directory; the figures are saved") == 1
    (tmp_path / "report.html").rmdir()
    assert go(tmp_path, "--report-only") == 0


def test_two_runs_do_not_write_into_one_file(tmp_path: Path) -> None:
    with (
        ResultsWriter(tmp_path / "results.jsonl"),
        pytest.raises(ValueError, match="is being written by another run; wait for it"),
    ):
        go(tmp_path)


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_half_a_line_at_the_end_is_passed_over(tmp_path: Path, cut: int) -> None:
    watch, path = Watch(), tmp_path / "results.jsonl"
    go(tmp_path, "fake_decode", known=watch.known)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])  # a cut of 1 removes only the end of line
    assert go(tmp_path, "--report-only", known=watch.known) == 0
    watch.seen.clear()
    assert go(tmp_path, "fake_decode", known=watch.known) == 0
    assert watch.seen == ([] if cut == 1 else ["transformers, of the same shape 8192"])
    assert all(lines(tmp_path)), "every line is whole again"


def test_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    go(tmp_path, "fake_cache")
    path = tmp_path / "results.jsonl"
    text = path.read_text().splitlines(keepends=True)
    for damage, said in (
        ("{half\n", "line 3 of .* is not JSON: '{half'"),
        ('{"kind": "figure"}\n', "is not a line of"),
    ):
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
