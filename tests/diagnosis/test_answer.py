"""The command's answer: when evidence is gathered, for how long, and what the page, the terminal and the JSON have."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dsmini.diagnosis import answer as module
from dsmini.diagnosis.answer import answer
from dsmini.diagnosis.evidence.evidence import to_try
from dsmini.diagnosis.evidence.gather import Gathered
from dsmini.diagnosis.interventions import machine
from dsmini.diagnosis.subject import Subject
from dsmini.report import Section


@pytest.fixture
def asked(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let the small subject answer, without rates, and return the arguments of each call of `gather`."""
    calls: list[Any] = []

    def gather(*args: Any, **named: Any) -> Gathered:
        calls.append((*args, named))
        figures = [to_try("batch_sweep", "batch x 2", "Set it.", [0.2], 1.0, None)]
        return Gathered(sections=[Section(name="batch_sweep", title="?", finding="!", figures=figures)], not_tried={})

    monkeypatch.setattr(machine, "cores", torch.get_num_threads)  # more threads than cores that are free take long
    monkeypatch.setattr(module, "config_of", lambda _: (subject.config, None))
    monkeypatch.setattr(module, "subject_of", lambda *_: subject)
    monkeypatch.setattr(module, "stored_rates", lambda _: None)
    monkeypatch.setattr(module, "load_or_measure_rates", lambda *_, **__: None)
    monkeypatch.setattr(module, "gather", gather)
    return calls


def told(quick: bool, on_part: Any = lambda share, what: None) -> Any:
    return answer(None, quick=quick, rounds=5, command="command", on_part=on_part)


def test_evidence_gets_what_is_left_of_the_time(asked: Sequence[Any]) -> None:
    shares: list[float] = []
    found = told(False, lambda share, _: shares.append(share))
    ((_, _, left, _, named),) = asked
    assert 0 < left < module.TOTAL_SECONDS and named["step"] > 0
    assert shares == sorted(shares) and max(shares) <= module.ROUNDS, "the rest is for evidence"
    record = json.loads(json.dumps(found.record))
    assert record["evidence"]["batch_sweep"][0]["measured"] == 0.8 and record["evidence_not_tried"] == {}
    assert "batch x 2" in found.report.html()
    assert "batch x 2" in found.short.sections[2].finding, "the largest gain is first"


def test_quick_diagnosis_gathers_none(asked: Sequence[Any]) -> None:
    found = told(True)
    assert not asked and found.record["evidence"] == {} and not found.stopped


def test_interrupted_rounds_gather_none(asked: Sequence[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module.diagnose

    def stopping(subject: Subject, plan: Any, *args: Any) -> Any:
        plan.rounds = plan.least = 50

        def on_part(share: float, what: str) -> None:
            if what == "round 7":
                raise KeyboardInterrupt

        return whole(subject, plan, args[0], on_part)

    monkeypatch.setattr(module, "diagnose", stopping)
    found = told(False)
    assert not asked and found.stopped and found.record["stopped"]


def test_interrupted_evidence_keeps_the_verdict(asked: Sequence[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Gathered(not_tried={"threads": "it was interrupted"}, stopped=True)
    monkeypatch.setattr(module, "gather", lambda *_, **__: stopped)
    found = told(False)
    assert found.stopped and not found.record["stopped"] and found.record["outcome"]
    assert "some evidence is missing" in found.report.warnings[0]
