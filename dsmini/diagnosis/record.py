"""A diagnosis as JSON."""

import dataclasses
from typing import Any

from dsmini.diagnosis.diagnosis import Diagnosis


def record_of(found: Diagnosis) -> dict[str, Any]:
    """Return the verdict, each gain with its prediction, what was not tried and why, and all findings."""
    prediction = found.prediction
    gains = {
        name: {
            "axis": found.work.changes[name].axis.value,
            "measured": g.value,
            "low": g.low,
            "high": g.high,
            "rounds": g.rounds,
            "predicted": None if prediction is None else prediction.gain(name),
        }
        for name, g in found.gains.items()
    }
    return {
        "outcome": found.verdict.outcome.value,
        "axis": None if found.verdict.axis is None else found.verdict.axis.value,
        "named": found.named,
        "sentence": found.sentence,
        "decides": found.verdict.decides,
        "step_seconds": found.measured.seconds,
        "predicted_step_seconds": None if prediction is None else prediction.plain,
        "gains": gains,
        "not_tried": dict(found.not_tried),
        "findings": [dataclasses.asdict(finding) for finding in found.findings],
        "stopped": found.stopped,
    }
