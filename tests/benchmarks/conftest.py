"""Runs of python -m benchmarks with fake questions, whose plots are not drawn."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import runner
from benchmarks.questions import Question
from dsmini.report import plots
from tests.helpers import fake_questions as fake


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
