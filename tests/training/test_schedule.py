"""Schedules as a config writes them, over a run by hand, and the published recipe against the report."""

import tomllib
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini import RunConfig, TrainConfig
from dsmini.config.schedule import Phase, read_phases
from tests.helpers.configs import CONFIGS, V32, released

# DeepSeek-V3's recipe, copied from the report's section 4.2. Tokens seen when a phase is over:
T, B = 10**12, 10**9
GROWN, CONSTANT, DECAYED, FINAL, ALL = 469 * B, 10 * T, 14300 * B, 14633 * B, 14800 * B
STEP = 15360 * 4096
V3 = RunConfig.from_file(CONFIGS / "deepseek-v3.toml").train


@pytest.fixture(scope="module")
def seen() -> list[int]:
    """Return the number of tokens seen before each step of V3's run, and at its end."""
    return list(accumulate((V3.batch_size_at(step) * 4096 for step in range(V3.steps)), initial=0))


def test_published_recipe_sees_the_published_tokens(seen: list[int]) -> None:
    """Within 40M tokens, as the file says: a step has 63M, so that the nearest one may be 31M away, and the 469B may
    have moved it a little."""
    warmup, constant, decay, final, last = (phase.share for phase in read_phases(V3.lr_schedule))
    assert warmup and constant and decay is None and final and last
    until = (V3.batch_ramp, warmup + constant, V3.bias_until, 1 - last, 1.0)
    for share, tokens in zip(until, (GROWN, CONSTANT, DECAYED, FINAL, ALL), strict=True):
        assert abs(seen[round(share * V3.steps)] - tokens) < 40e6, tokens
    assert V3.mtp_until == pytest.approx(warmup + constant) and V3.bias_until == pytest.approx(1 - final - last)


# tokens seen (in one case: steps done): learning rate, sequences in the batch, bias speed, MTP weight
V3_BY_HAND = {
    "step 0": (1.1e-7, 3072, 0.001, 0.3),
    "step 1999": (2.2e-4, 3072 + 12288 * 1999 // 12426, 0.001, 0.3),
    "step 6213": (2.2e-4, 9216, 0.001, 0.3),
    GROWN + STEP: (2.2e-4, 15360, 0.001, 0.3),
    CONSTANT - 2 * STEP: (2.2e-4, 15360, 0.001, 0.3),
    CONSTANT + 2 * STEP: (2.2e-4, 15360, 0.001, 0.1),
    CONSTANT + 1075 * B: (2.2e-5 + 1.98e-4 * (2 + 2**0.5) / 4, 15360, 0.001, 0.1),  # a quarter of the cosine
    CONSTANT + 2150 * B: (1.21e-4, 15360, 0.001, 0.1),  # half of it
    DECAYED - 2 * STEP: (2.2e-5, 15360, 0.001, 0.1),
    DECAYED + 2 * STEP: (2.2e-5, 15360, 0.0, 0.1),
    FINAL - 2 * STEP: (2.2e-5, 15360, 0.0, 0.1),
    FINAL + 2 * STEP: (7.3e-6, 15360, 0.0, 0.1),
    ALL - 2 * STEP: (7.3e-6, 15360, 0.0, 0.1),
}


@pytest.mark.parametrize("moment", V3_BY_HAND, ids=str)
def test_published_recipe_has_the_published_values(seen: list[int], moment: str | int) -> None:
    step = int(moment.removeprefix("step ")) if isinstance(moment, str) else bisect_left(seen, moment)
    lr, rows, speed, weight = V3_BY_HAND[moment]
    # a step further down the cosine is at most pi / 2 / 68,346 of its height: 5e-9, which is 2.3e-4 of the lowest rate
    assert V3.lr * V3.rate_share_at(step) == pytest.approx(lr, rel=2.3e-4, abs=0)
    assert V3.batch_size_at(step) == rows
    assert V3.bias_speed_at(step) == speed
    assert V3.mtp_weight_at(step) == weight


def test_published_recipe_has_the_published_constants() -> None:
    assert (V3.optimizer, V3.beta1, V3.beta2, V3.weight_decay, V3.grad_clip) == ("adamw", 0.9, 0.95, 0.1, 1.0)
    assert (V3.moments, V3.balance_alpha, V3.seq_len) == ("bfloat16", 1e-4, 4096)
    run = RunConfig.from_file(CONFIGS / "deepseek-v3.toml")
    assert run.data.fim_rate == 0.1 and not run.data.document_mask
    assert run.model.n_mtp_layers == 1 and run.model.norm_eps == 1e-6


def test_v32_is_v3_with_indexers_and_its_printed_stage() -> None:
    """V3.2's report, section 2.1.1: two stages of 2.1B and 943.7B tokens, at constant learning rates."""
    run = RunConfig.from_file(CONFIGS / "deepseek-v3.2.toml")
    train, sequence = run.train, 128 * 1024
    assert run.model == released("deepseek-v3", **V32)
    assert (train.dsa_stage, train.steps, train.batch_size, train.seq_len) == ("sparse", 15000, 480, sequence)
    assert round(train.steps * train.batch_size * sequence / 1e8) == 9437
    assert {train.lr * train.rate_share_at(step) for step in (0, 7000, 14999)} == {7.3e-6}
    alike = ("optimizer", "beta2", "weight_decay", "moments")
    assert [getattr(train, name) for name in alike] == [getattr(V3, name) for name in alike]
    flags = ["--train.dsa-stage warmup", "--train.steps 1000", "--train.batch-size 16", "--train.lr 1e-3"]
    assert " ".join(flags) in (CONFIGS / "deepseek-v3.2.toml").read_text()
    assert round(1000 * 16 * sequence / 1e8) == 21


BY_HAND = tomllib.loads(Path(__file__).with_name("schedules.toml").read_text())


@pytest.mark.parametrize("schedule", BY_HAND)
def test_phases_of_any_length_by_hand(schedule: str) -> None:
    train = TrainConfig(steps=10, lr_schedule=(schedule,))
    assert [train.rate_share_at(step) for step in range(10)] == pytest.approx(BY_HAND[schedule])


@given(
    steps=st.integers(1, 300),
    accum=st.integers(1, 5),
    parts=st.integers(1, 3),
    small=st.integers(1, 9),
    more=st.integers(0, 60),
    share=st.sampled_from([0.01, 0.3, 1 / 3, 1.0]),
)
def test_batch_is_the_nearest_multiple_below(
    steps: int, accum: int, parts: int, small: int, more: int, share: float
) -> None:
    """Each part of the batch has a multiple of grad_accum."""
    unit = accum * parts
    start, size, ramp = small * unit, (small + more) * unit, round(share * steps)
    train = TrainConfig(steps=steps, grad_accum=accum, batch_start=start, batch_size=size, batch_ramp=share)
    found = [train.batch_size_at(step, parts) for step in range(steps)]
    assert found == sorted(found) and all(rows % unit == 0 for rows in found)
    assert found[ramp:] == [size] * (steps - ramp) and (ramp == 0 or found[0] == start)
    for step, rows in enumerate(found[:ramp]):
        assert 0 <= (size - start) * step - (rows - start) * ramp < unit * ramp  # both times ramp


# phases as a config writes them


def test_phases_are_read_however_split() -> None:
    phases = Phase(kind="warmup", share=0.1, level=None), Phase(kind="cosine", share=None, level=0.2)
    split = ("warmup", "0.1", "cosine", "to", "0.2")
    joined = ("warmup 0.1, cosine to 0.2",), ("  warmup   .1 ,", "cosine to 2e-1"), ("warmup 0.1", "cosine to 0.2")
    for texts in (split, *joined):
        assert read_phases(texts) == phases
        for either in (texts, list(texts)):  # a TOML array is a list
            train = TrainConfig(lr_schedule=either)  # pyright: ignore[reportArgumentType]
            assert train.lr_schedule == ("warmup 0.1", "cosine to 0.2")


@given(
    st.sampled_from(["warmup", "constant", "linear", "cosine"]),
    st.sampled_from([None, 1.0]),
    st.none() | st.floats(0, 1),
)
def test_each_phase_is_read_as_written(kind: Any, share: float | None, level: float | None) -> None:
    level = 0.5 if level is None and kind in ("linear", "cosine") else None if kind == "warmup" else level
    phase = Phase(kind=kind, share=share, level=level)
    assert read_phases((str(phase),)) == (phase,)


@pytest.mark.parametrize(
    "text", ["warmup", "constant 1", "constant at 0.03", "constant 1 at 0.03", "cosine 1 to 0", "linear to 1e-05"]
)
def test_phase_is_written_in_its_short_words(text: str) -> None:
    assert str(*read_phases((text,))) == text
