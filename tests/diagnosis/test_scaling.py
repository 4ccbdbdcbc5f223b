"""A step on another number of threads, predicted from rates and from a step of another model."""

from types import SimpleNamespace

import pytest
import torch

from dsmini.diagnosis import scaling
from dsmini.diagnosis.scaling import ideal_seconds, seconds_with_threads
from dsmini.measure.forecast import forecast
from dsmini.measure.step_rates import SHAPES
from dsmini.measure.workloads import StepShape
from tests.helpers.questions import invented_rates

BY_CLASS = {"product": 0.10, "pointwise": 0.06, "calls": 0.04}


def test_only_products_scale_with_threads() -> None:
    """Check the worked example: products twice and memory 1.2 times as fast."""
    assert ideal_seconds(BY_CLASS, (1.0, 1.0), (2.0, 1.2)) == pytest.approx(0.05 + 0.05 + 0.04)


@pytest.mark.parametrize(("measured", "want"), [(0.8, 0.170), (0.6, 0.140), (1.0, 0.200), (1.1, 0.215)])
def test_step_of_another_model_says_which_share_is_real(
    measured: float, want: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the worked example, all of the ideal change, none of it, and threads that slow a step down."""
    of_other = SimpleNamespace(by_class={"product": 0.8, "calls": 0.2}, seconds=1.0)
    now = SimpleNamespace(by_class=BY_CLASS, seconds=0.2, shape=SimpleNamespace(work="training", dtype="bfloat16"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(scaling, "matmul_rate", lambda *_: float(len(asked)))
    monkeypatch.setattr(scaling, "read_bandwidth", lambda *_: 1.0 if len(asked) == 1 else 1.2)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(scaling, "forecast", lambda *_: of_other)
    monkeypatch.setattr(scaling, "_measured", lambda *_: {1: 1.0, 2: measured})
    assert seconds_with_threads(now, [1, 2], None) == pytest.approx([0.2, want])  # pyright: ignore[reportArgumentType]


def test_threads_are_put_back_and_a_step_is_measured() -> None:
    config, batch, tokens = SHAPES["prefill"][0]
    before = torch.get_num_threads()
    now = forecast(
        StepShape(work="prefill", config=config, dtype="float32", batch=batch, tokens=tokens), invented_rates()
    )
    same, one = seconds_with_threads(now, [before, 1], invented_rates())
    assert torch.get_num_threads() == before
    assert same == pytest.approx(now.seconds)
    assert 0 < one < 10 * now.seconds
