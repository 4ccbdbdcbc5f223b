"""python -m dsmini.selfcheck: a report of one screen, in which a check that fails is a line and ends no other."""

import json
import os
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from dsmini import selfcheck
from dsmini.selfcheck import CHECKS, Outcome
from tests.helpers.commands import ROOT, check_refused, finish, run


@pytest.fixture(autouse=True)
def _found_by_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "kernels"))))


def test_failed_check_is_a_line_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for an instruction set that no CPU has."""
    monkeypatch.setenv("DSMINI_CPU_ISA", "z80")
    done = run("dsmini.selfcheck --only kernels gpu-tests --device cpu", tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and lines[0] == "### dsmini.selfcheck" and len(lines) == 6, done.stdout
    assert lines[3].startswith("- kernels: failed: ValueError: DSMINI_CPU_ISA='z80' is unknown"), lines[3]
    assert lines[4].startswith("- gpu-tests: skipped: no CUDA GPU")
    assert lines[5].startswith("- 0 ok, 1 failed, 1 skipped in ")
    assert "kernels: failed: " in done.stderr and "Traceback" not in done.stdout


def test_a_check_is_a_line_of_json_and_mistakes_are_refused(tmp_path: Path) -> None:
    done = finish("dsmini.selfcheck --only gpu-tests --device cpu --here --json", tmp_path)
    assert json.loads(done.stdout)["state"] == "skipped"
    bad = {"--only kernel": f"unknown check 'kernel'; there are {', '.join(CHECKS)}", "--device abacus": "is unknown"}
    check_refused("dsmini.selfcheck", tmp_path, bad)


@pytest.mark.slow
def test_every_check_passes_on_a_cpu(tmp_path: Path) -> None:
    done = run("dsmini.selfcheck --device cpu", tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(CHECKS) + 4, said
    states = [line.split(": ")[1] for line in done.stdout.splitlines()[3:-1]]
    assert states[1:] == ["ok"] * (len(CHECKS) - 2) + ["skipped"] and states[0] != "failed", said


def test_a_dependency_that_is_too_old_or_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for needs, words in (
        (
            ["einops>=0.7", "torch>=99", "no-such-thing; extra == 'x'"],
            r"^dsmini wants torch>=99, here are einops [\d.]+",
        ),
        (["no-such-thing>=1"], "no-such-thing"),
    ):
        monkeypatch.setattr(selfcheck.metadata, "requires", lambda _, needs=needs: needs)
        with pytest.raises((ValueError, PackageNotFoundError), match=words):
            selfcheck.versions("cpu")


def test_report_outlives_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> str:
        raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", fail)
    lines = selfcheck._report([Outcome("model", "failed", "RuntimeError: CUDA error")], "cpu").splitlines()
    assert "which fails: CUDA error: unspecified launch failure; checked: cpu" in lines[2]
    assert lines[3].startswith("- model: failed: RuntimeError: CUDA error")


def test_words_of_a_library_after_an_outcome_fail_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, stdout="NCCL version 2.27\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    found = selfcheck._apart("processes", "cuda")
    assert (found.state, found.why) == ("failed", "its process ended with status 0 and the words 'NCCL version 2.27'")
