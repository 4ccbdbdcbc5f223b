"""Cases have estimates, and end at ten times them. --quick ends after two minutes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import clock
from benchmarks.case import Case, Setting
from benchmarks.questions import questions_here
from dsmini.report.results import read
from tests.helpers import fake_questions as fake
from tests.helpers.benchmark_calls import Capture, go
from tests.helpers.commands import ROOT


def test_estimates_are_of_the_last_run_as_quick(tmp_path: Path) -> None:
    for seconds, quick in ((7.0, []), (1.0, ["--quick"]), (9.0, [])):
        go(tmp_path, "fake_decode", "--fresh", *quick)
        text = (tmp_path / "results.jsonl").read_text().splitlines()
        last = json.loads(text[-1]) | {"seconds": seconds}
        (tmp_path / "results.jsonl").write_text("\n".join([*text[:-1], json.dumps(last)]) + "\n")
    results = read(tmp_path / "results.jsonl")
    key = "transformers, of the same shape 8192"
    assert results.seconds("fake_decode", key, quick=False) == 9.0
    assert results.seconds("fake_decode", key, quick=True) is None


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


SETTING = Setting(quick=True, device=torch.device("cpu"), dtype=torch.bfloat16, roofs=fake.ROOFS)


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


def test_a_case_that_takes_too_long_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(clock, "LEAST", 0.3)
    monkeypatch.setattr(clock, "TIMES", 0.01)

    def swallow(key: str) -> None:
        while key == "dsmini 512":
            try:
                time.sleep(60)
            except Exception:
                continue

    start = time.monotonic()
    assert go(tmp_path, known={"fake_decode": fake.decode(swallow)}) == 1
    assert time.monotonic() - start < 30
    out, err = capsys.readouterr()
    said = "stopped after 0 s; its estimate was 2.00 s"
    assert f"fake_decode dsmini 512 failed: {said}" in err
    answer = json.loads(out)
    assert len(answer["figures"]) == 7, "the others go on"
    assert answer["failed"] == [{"question": "fake_decode", "case": "dsmini 512", "error": said}]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert go(tmp_path, known={"fake_decode": fake.decode()}) == 0, "it is tried again"


def test_one_endless_call_into_torch_is_stopped(tmp_path: Path) -> None:
    """No signal interrupts it: the command begins again without the case, and measures the others."""
    script = (
        "import sys, torch, tests.helpers.fake_questions as f; from benchmarks import clock, runner;"
        "clock.LEAST = clock.GRACE = 0.2; clock.TIMES = 0;"
        "sum = lambda key: torch.ones(1).expand(10**13).sum() if key == 'dsmini 512' else None;"
        "sys.exit(runner.main(sys.argv[1:], {'fake_decode': f.decode(sum)}, f.roofs))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", script, "--fresh", "--out", str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    assert [failed["case"] for failed in answer["failed"]] == ["dsmini 512"]
    assert len(answer["figures"]) == 7
    assert "1 of 8 cases are done already" in done.stderr


def test_quick_leaves_out_the_longest_and_says_why(tmp_path: Path, capsys: Capture) -> None:
    question, long = fake.cache(), {"MQA": 500.0, "GQA of 8": 100.0, "MLA": 40.0}
    slow = replace(question, cases=lambda s: [replace(c, seconds=long.get(c.key, 1.0)) for c in question.cases(s)])
    assert go(tmp_path, "--quick", known={"fake_cache": slow}) == 0
    out, err = capsys.readouterr()
    why = {"MQA": "it takes about 8 min here", "GQA of 8": "it takes about 2 min here"}
    for key, reason in why.items():
        assert f"fake_cache {key} is left out: {reason}, and --quick has two minutes for all" in err
        assert f"{key} was left out: {reason}" in (tmp_path / "report.html").read_text()
    answer = json.loads(out)
    assert answer["left_out"]["fake_cache"].keys() == why.keys()
    assert answer["left"] == {} and len(answer["figures"]) == 3
    assert go(tmp_path, known={"fake_cache": slow}) == 0
    assert len(json.loads(capsys.readouterr().out)["figures"]) == 5, "without --quick all are measured"


def test_quick_ends_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(clock, "QUICK", 1.0)

    question = fake.decode(lambda key: time.sleep(1.0) if key == "dsmini 512" else None)
    cases = [replace(case, seconds=0.2) for case in question.cases(SETTING)]
    late = replace(question, cases=lambda setting: cases)
    assert go(tmp_path, "--quick", known={"fake_decode": late}) == 0
    out, err = capsys.readouterr()
    assert err.count("is left out: the two minutes of --quick are over") == 2
    assert json.loads(out)["left"] == {"fake_decode": 2}, "the same command measures them"


@pytest.mark.parametrize(("float32", "bfloat16"), [(224e9, 940e9), (170e9, 0.3e9)])
def test_quick_leaves_nothing_out_on_a_usual_cpu(float32: float, bfloat16: float) -> None:
    """With BF16 units and without; questions that force BF16 see to its rate themselves."""
    roofs = replace(fake.ROOFS, peak={"float32": float32, "bfloat16": bfloat16})
    dtype = torch.bfloat16 if bfloat16 > float32 else torch.float32
    setting = replace(SETTING, dtype=dtype, roofs=roofs)
    usual = [question for question in questions_here().values() if not question.on_request]
    cases = [case for question in usual for case in question.cases(setting)]
    assert sum(case.estimate(setting) for case in cases) < clock.QUICK
