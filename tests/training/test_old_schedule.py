"""Learning rates of the old keys: phases give the same bits as the formula of version 0.1.0, in every step."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini import RunConfig, TrainConfig
from dsmini.config.old_schedule import OldSchedule
from dsmini.training.schedule import learning_rate_share
from tests.helpers.configs import CONFIGS

GOLDEN = Path(__file__).parents[1] / "golden"
V3 = {"warmup": 0.008326, "constant": 0.674062, "final": 0.022035, "lr_last": 0.0331818, "last": 0.011053}
LONG: dict[str, dict[str, Any]] = {
    "deepseek-v3": {"steps": 240211, **V3},
    "shakespeare": {"steps": 1650, "warmup": 0.02, "decay": "linear", "lr_final": 0.0},
    "toy": {"steps": 1600, "warmup": 0.05},
}
"""The schedules of configs/ in the old keys."""


def old_learning_rate_share(step: int, steps: int, config: OldSchedule) -> float:
    """Return the share as version 0.1.0 computed it, copied from there."""
    up_to_decay = config.warmup + config.constant
    shares = (config.warmup, up_to_decay, 1 - config.final - config.last, 1 - config.last)
    warmup, decay_from, final_from, last_from = (round(share * steps) for share in shares)
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_from:
        return 1.0
    if step >= last_from:
        return config.lr_last
    if step >= final_from:
        return config.lr_final
    progress = (step - decay_from) / max(1, final_from - 1 - decay_from)
    above = 0.5 * (1 + math.cos(math.pi * progress)) if config.decay == "cosine" else 1 - progress
    return config.lr_final + (1 - config.lr_final) * above


def differing_steps(old: OldSchedule, train: TrainConfig) -> list[int]:
    steps = range(train.steps)
    return [i for i in steps if learning_rate_share(i, train) != old_learning_rate_share(i, train.steps, old)]


@pytest.mark.parametrize("name", LONG)
def test_config_file_has_the_old_learning_rates(name: str) -> None:
    train = RunConfig.from_file(CONFIGS / f"{name}.toml").train
    given = dict(LONG[name])
    assert train.steps == given.pop("steps")
    assert train.lr_schedule == OldSchedule(**given).phases()
    assert differing_steps(OldSchedule(**given), train) == []


@pytest.mark.parametrize(
    ("file", "old"),
    {
        "old_run/run/config.toml": OldSchedule(
            warmup=0.1, constant=0.2, decay="linear", lr_final=0.2, final=0.2, lr_last=0.05, last=0.1
        ),
        "configs/schedule.toml": OldSchedule(
            warmup=0.1, constant=0.2, decay="cosine", lr_final=0.2, final=0.15, lr_last=0.05, last=0.15
        ),
    }.items(),
)
def test_file_in_old_keys_has_the_old_learning_rates(file: str, old: OldSchedule) -> None:
    assert differing_steps(old, RunConfig.from_file(GOLDEN / file).train) == []


@st.composite
def old_schedules(draw: st.DrawFn) -> OldSchedule:
    """Schedules with phases of any length. Their shares may add up to 1, or to a float just above it."""
    parts = [draw(st.sampled_from([0.0, 0.05, 0.1, 0.2, 1 / 3, 0.35]) | st.floats(0, 1)) for _ in range(4)]
    whole = sum(parts)
    if whole > 1:
        parts = [part / whole for part in parts]
    return OldSchedule(
        **dict(zip(("warmup", "constant", "final", "last"), parts, strict=True)),
        decay=draw(st.sampled_from(["cosine", "linear"])),
        lr_final=draw(st.sampled_from([0.0, 0.1, 1.0]) | st.floats(0, 1)),
        lr_last=draw(st.sampled_from([0.0, 1 / 30, 1.0]) | st.floats(0, 1)),
    )


@given(old=old_schedules(), steps=st.integers(1, 300))
def test_any_old_schedule_has_the_old_learning_rates(old: OldSchedule, steps: int) -> None:
    assert differing_steps(old, TrainConfig(steps=steps, lr_schedule=old.phases())) == []
