"""Schedules over a run, against values worked out by hand, and the published recipe against what was published."""

from bisect import bisect_left
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini import RunConfig, TrainConfig
from dsmini.training.schedule import batch_size, bias_speed, learning_rate_share, mtp_weight
from tests.helpers.configs import CONFIGS


def rates(train: TrainConfig) -> list[float]:
    return [learning_rate_share(step, train) for step in range(train.steps)]


def batches(train: TrainConfig) -> list[int]:
    return [batch_size(step, train) for step in range(train.steps)]


# DeepSeek-V3's recipe, copied from the report's section 4.2. Tokens seen when a phase is over:
T, B = 10**12, 10**9
GROWN, CONSTANT, DECAYED, FINAL, ALL = 469 * B, 10 * T, 14300 * B, 14633 * B, 14800 * B
STEP = 15360 * 4096
V3 = RunConfig.from_file(CONFIGS / "deepseek-v3.toml").train


@pytest.fixture(scope="module")
def seen() -> list[int]:
    """Tokens seen before each step of V3's run, and at its end."""
    return list(accumulate((rows * 4096 for rows in batches(V3)), initial=0))


def test_the_published_recipe_sees_as_many_tokens_in_each_phase_as_published(seen: list[int]) -> None:
    """Within 40M tokens, as the file says: a step has 63M, so that the nearest one may be 31M away, and the 469B may
    have moved it a little."""
    shares = (V3.batch_ramp, V3.warmup + V3.constant, V3.bias_until, 1 - V3.last, 1.0)
    for share, tokens in zip(shares, (GROWN, CONSTANT, DECAYED, FINAL, ALL), strict=True):
        assert abs(seen[round(share * V3.steps)] - tokens) < 40e6, tokens
    assert V3.mtp_until == pytest.approx(V3.warmup + V3.constant) and V3.bias_until == pytest.approx(
        1 - V3.final - V3.last
    )


# tokens seen (in one case: steps done): learning rate, sequences in the batch, bias speed, MTP weight
V3_BY_HAND = {
    "step 0": (1.1e-7, 3072, 0.001, 0.3),
    "step 999": (1.1e-4, 3072 + 12288 * 999 // 12426, 0.001, 0.3),
    "step 1999": (2.2e-4, 3072 + 12288 * 1999 // 12426, 0.001, 0.3),
    "step 6213": (2.2e-4, 9216, 0.001, 0.3),
    GROWN + STEP: (2.2e-4, 15360, 0.001, 0.3),
    5 * T: (2.2e-4, 15360, 0.001, 0.3),
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
def test_the_published_recipe_has_the_published_values(seen: list[int], moment: str | int) -> None:
    step = int(moment.removeprefix("step ")) if isinstance(moment, str) else bisect_left(seen, moment)
    lr, rows, speed, weight = V3_BY_HAND[moment]
    # a step further down the cosine is at most pi / 2 / 68,346 of its height: 5e-9, which is 2.3e-4 of the lowest rate
    assert V3.lr * learning_rate_share(step, V3) == pytest.approx(lr, rel=2.3e-4, abs=0)
    assert batch_size(step, V3) == rows
    assert bias_speed(step, V3) == speed
    assert mtp_weight(step, V3) == weight


def test_the_published_recipe_has_the_published_constants() -> None:
    assert (V3.optimizer, V3.beta1, V3.beta2, V3.weight_decay, V3.grad_clip) == ("adamw", 0.9, 0.95, 0.1, 1.0)
    assert (V3.moments, V3.balance_alpha, V3.seq_len) == ("bfloat16", 1e-4, 4096)
    run = RunConfig.from_file(CONFIGS / "deepseek-v3.toml")
    assert run.data.fim_rate == 0.1 and not run.data.document_mask
    assert run.model.n_mtp_layers == 1 and run.model.norm_eps == 1e-6


def test_a_short_run_keeps_the_published_shape() -> None:
    """V3's shares on 1000 steps: every phase is there, at its share of them."""
    short = TrainConfig(**{name: getattr(V3, name) for name in V3.__slots__} | {"steps": 1000})
    found = rates(short)
    assert found[7] == found[681] == 1.0 > found[683]
    assert found[966] == pytest.approx(0.1) == found[988] and found[989] == found[999] == V3.lr_last


def test_the_learning_rate_rises_to_the_peak_and_falls_to_its_final_share() -> None:
    train = TrainConfig(steps=101, warmup=0.1, lr=2.0, lr_final=0.1)
    by_hand = {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 55: 1.1, 100: 0.2}
    for step, want in by_hand.items():
        assert 2.0 * learning_rate_share(step, train) == pytest.approx(want), step
    down = rates(train)[10:]
    assert down == sorted(down, reverse=True)


@pytest.mark.parametrize(
    ("shares", "want"),
    {
        "all": ({"constant": 0.2, "final": 0.2, "last": 0.1}, [0.5, 1, 1, 1, 1, 0.7, 0.4, 0.4, 0.4, 0.05]),
        "warm-up only": ({"warmup": 1.0}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        "no warm-up": ({"warmup": 0.0, "constant": 0.9, "last": 0.1}, [1] * 9 + [0.05]),
        "no decay": ({"constant": 0.5, "final": 0.3}, [0.5, 1, 1, 1, 1, 1, 1, 0.4, 0.4, 0.4]),
        "no decay, no constant": ({"final": 0.5, "last": 0.3}, [0.5, 1] + [0.4] * 5 + [0.05] * 3),
        "a decay of one step": ({"constant": 0.7}, [0.5] + [1] * 9),
        "the last only": ({"warmup": 0.0, "last": 1.0}, [0.05] * 10),
    }.values(),
)
def test_phases_of_any_length_by_hand(shares: dict[str, float], want: list[float]) -> None:
    train = TrainConfig(**{"steps": 10, "warmup": 0.2, "decay": "linear", "lr_final": 0.4, "lr_last": 0.05} | shares)  # pyright: ignore[reportArgumentType]
    assert rates(train) == pytest.approx(want)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_a_learning_rate(steps: int) -> None:
    assert all(0 < rate <= 1 for rate in rates(TrainConfig(steps=steps)))
    assert rates(TrainConfig(steps=steps))[0] == 1.0


@st.composite
def recipes(draw: st.DrawFn) -> TrainConfig:
    """Runs of 1 to 300 steps with phases of any length, none and all of the steps among them."""
    cuts = sorted(draw(st.lists(st.sampled_from([0.0, 0.05, 0.1, 1 / 3, 0.5, 0.7, 1.0]), min_size=4, max_size=4)))
    accum = draw(st.integers(1, 5))
    small, more = draw(st.integers(1, 9)), draw(st.integers(0, 60))
    return TrainConfig(
        steps=draw(st.integers(1, 300)),
        warmup=cuts[0],
        constant=cuts[1] - cuts[0],
        final=cuts[3] - cuts[2],
        last=1 - cuts[3],
        lr_final=draw(st.sampled_from([0.0, 0.1, 1.0])),
        lr_last=0.03,
        decay=draw(st.sampled_from(["cosine", "linear"])),
        grad_accum=accum,
        batch_start=small * accum,
        batch_size=(small + more) * accum,
        batch_ramp=draw(st.sampled_from([0.01, 0.3, 1 / 3, 1.0])),
        bias_until=draw(st.sampled_from([0.0, 0.5, 1.0])),
        mtp_until=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )


@given(train=recipes())
def test_a_learning_rate_rises_stays_and_falls_in_phases_of_their_lengths(train: TrainConfig) -> None:
    found = rates(train)
    warmup = round(train.warmup * train.steps)
    assert found[:warmup] == sorted(set(found[:warmup])) and all(0 < rate <= 1 for rate in found[:warmup])
    assert warmup == 0 or found[warmup - 1] == 1.0
    last = sum(rate == 0.03 for rate in found[warmup:])
    assert abs(last - train.last * train.steps) <= 1
    middle = found[warmup : train.steps - last]
    assert middle == sorted(middle, reverse=True) and all(train.lr_final <= rate <= 1 for rate in middle)
    at_peak = sum(rate == 1.0 for rate in middle)
    assert train.lr_final == 1 or at_peak >= train.constant * train.steps - 1
    at_final = sum(rate == pytest.approx(train.lr_final) for rate in middle)
    assert at_final >= train.final * train.steps - 1


@given(train=recipes())
def test_a_growing_batch_is_the_nearest_multiple_below_the_line(train: TrainConfig) -> None:
    found, ramp = batches(train), round(train.batch_ramp * train.steps)
    assert train.batch_start is not None
    assert found == sorted(found) and all(rows % train.grad_accum == 0 for rows in found)
    assert found[ramp:] == [train.batch_size] * (train.steps - ramp)
    for step, rows in enumerate(found[:ramp]):
        below = (train.batch_size - train.batch_start) * step - (rows - train.batch_start) * ramp  # times ramp
        assert 0 <= below < train.grad_accum * ramp
    if ramp:
        assert found[0] == train.batch_start


@given(train=recipes())
def test_bias_speed_and_mtp_weight_change_once_at_their_share(train: TrainConfig) -> None:
    for function, until, values in (
        (bias_speed, train.bias_until, (train.bias_speed, 0.0)),
        (mtp_weight, train.mtp_until, (train.mtp_weight, train.mtp_weight_after)),
    ):
        found = [function(step, train) for step in range(train.steps)]
        assert set(found) <= set(values) and sum(a != b for a, b in pairwise(found)) <= 1
        assert abs(found.count(values[0]) - until * train.steps) <= 0.5


@pytest.mark.parametrize("wrong", [{"batch_start": 2}, {"batch_ramp": 0.5}])
def test_a_batch_that_grows_needs_a_start_and_a_share(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="go together"):
        TrainConfig(**wrong)  # pyright: ignore[reportArgumentType]
