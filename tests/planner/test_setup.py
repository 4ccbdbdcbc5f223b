"""Setups: what a request leaves open is taken from the file's recipe, the hardware or DeepSeek-V3's run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dsmini.planner.hardware import load_hardware
from dsmini.planner.request import PlanRequest
from dsmini.planner.setup import Model, Setup, setup
from tests.helpers.configs import CONFIGS, refusal
from tests.helpers.released_configs import HF_V3


def made(name: str = "deepseek-v3", hardware: str = "h800", **chosen: Any) -> Setup:
    return setup(PlanRequest(**chosen), Model.from_file(CONFIGS / f"{name}.toml"), load_hardware(hardware))


def test_workload_is_the_recipe_of_the_file() -> None:
    """The recipe gives V3's 14.8T tokens: 12,426 steps of 9216 sequences on average, and 227,785 of 15360."""
    w = made().workload
    assert (w.seq_len.value, w.batch.value) == (4096, 15360)
    assert w.tokens.value == pytest.approx((12_426 * 9216 + 227_785 * 15_360) * 4096, rel=1e-6)
    assert "[train]" in w.tokens.source
    toy = made("toy").workload
    assert (toy.seq_len.value, toy.batch.value, toy.tokens.value) == (256, 4, 1600 * 4 * 256)


def test_workload_without_a_recipe_is_v3s() -> None:
    w = made("deepseek-v2-lite").workload
    assert (w.seq_len.value, w.batch.value, w.tokens.value) == (4096, 15360, 14.8e12)
    assert w.tokens.source.startswith("as DeepSeek-V3")


def test_command_line_comes_before_the_file() -> None:
    w = made(batch=7680, tokens=1e12).workload
    assert (w.seq_len.value, w.batch.value, w.tokens.value) == (4096, 7680, 1e12)
    assert w.batch.source.startswith("the command line")
    s = made(utilization=0.2, price=3, failures_per_node_day=0.01, restart_time=60, checkpoint_halt=1)
    assert s.assumptions.utilization.value == 0.2
    assert s.hardware.price is not None and s.hardware.price.value == pytest.approx(3 / 3600)
    assert s.failures.failures_per_node_day.value == 0.01
    assert (s.failures.restart_time.value, s.failures.write_time.value) == (60, 1)


def test_links_are_those_that_are_reached() -> None:
    s = made()
    assert s.hardware.slow_link is not None and s.hardware.slow_link.value == 40e9
    assert s.hardware.fast_link is not None and s.hardware.fast_link.value == 160e9


@pytest.mark.parametrize(
    ("name", "hardware", "precision"),
    [
        ("deepseek-v3", "h800", "fp8"),
        ("deepseek-v2", "h800", "bf16"),
        ("fp8", "h800", "fp8"),
        ("deepseek-v3", "a100-pcie", "bf16"),
        ("toy", "laptop", "fp32"),
    ],
)
def test_precision_left_open(name: str, hardware: str, precision: str) -> None:
    s = made(name, hardware)
    assert s.layout.layout.precision == precision
    weights = {"fp8": "fp8", "bf16": "bfloat16", "fp32": "float32"}[precision]
    assert s.serving is not None and s.serving.decode.deployment.weight_dtype == weights


def test_optimizer_and_moments_of_the_recipe() -> None:
    assert made("toy").layout.layout.optimizer == "muon"
    assert made("deepseek-v3", gpus=4096, pipeline=8).layout.layout.moments == "bfloat16"


def test_sequences_left_open_fit() -> None:
    s = made()
    assert s.serving is not None
    assert s.serving.workload.sequences.value == 30, "61 sequences in two micro-batches"
    longer = made(context=32768).serving
    assert longer is not None and longer.workload.sequences.value == 3
    short = made(context=256).serving
    assert short is not None and short.workload.sequences.value == 32, "no more than that"


def test_attention_that_cannot_serve_is_told() -> None:
    s = made("shakespeare")
    assert s.serving is None and "qk_norm=True" in s.unserved
    assert "qk_norm=True" in refusal(made, "shakespeare", context=64)


@pytest.mark.parametrize("field", ["context", "prompt", "seq_len"])
def test_length_beyond_the_model_is_refused(field: str) -> None:
    said = refusal(made, "toy", **{field: 257})
    assert said.startswith(f"{field}=257 is longer than") and "256" in said and "shorten it" in said


def test_name_is_of_the_file_or_of_its_folder(tmp_path: Path) -> None:
    assert Model.from_file(CONFIGS / "toy.toml").name == "toy"
    (tmp_path / "My-Model").mkdir()
    path = tmp_path / "My-Model" / "config.json"
    path.write_text(json.dumps(HF_V3))
    model = Model.from_file(path)
    assert model.name == "My-Model" and model.run is None
    found = setup(PlanRequest(), model, load_hardware("h800"))
    assert found.layout.how == "as DeepSeek-V3 was trained", "by its sizes, whatever its file"


def test_layout_can_be_replaced() -> None:
    s = made("toy")
    layout = dataclasses.replace(s.layout.layout, recompute="full")
    assert s.with_layout(layout, "a test").layout.layout.recompute == "full"
