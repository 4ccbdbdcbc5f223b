"""Calls of python -m benchmarks with fake questions."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import runner
from benchmarks.questions import Question
from tests.helpers import fake_questions as fake

Capture = pytest.CaptureFixture[str]
Known = Mapping[str, Question]


def go(out: Path, *args: str, known: Known | None = None) -> int:
    """Run the command; return its exit status."""
    return runner.main([*args, "--out", str(out)], known or fake.known(), fake.roofs)


def lines(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of results."""
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


class Watch:
    """The cases that were measured, in order. May raise at a case, once."""

    def __init__(self, at: str = "", error: BaseException | None = None) -> None:
        self.seen, self.at, self.error = list[str](), at, error

    def __call__(self, key: str) -> None:
        self.seen.append(key)
        if key == self.at and self.error is not None:
            error, self.error = self.error, None
            raise error

    @property
    def known(self) -> Known:
        """Two of the fake questions, the first of them watched."""
        return {"fake_decode": fake.decode(self), "fake_cache": fake.cache()}
