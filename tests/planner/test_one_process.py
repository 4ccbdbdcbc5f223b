"""Memory of one process in closed form against dsmini.accounting, which is held to the storages of real training."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini import ModelConfig
from dsmini.accounting import training_bytes
from dsmini.accounting.tensors import tensors
from dsmini.planner.model.parameters import model_figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, TOKENS
from dsmini.planner.training.layout import Layout
from dsmini.planner.training.one_process import OneProcessMemory, one_process_memory
from tests.helpers.configs import CONFIGS, released
from tests.helpers.strategies import model_configs

PARTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "copies": "weights kept for backward",
    "head_gradient": "the head's gradient",
}


def predicted(config: ModelConfig, layout: Layout, seq_len: int) -> OneProcessMemory:
    m = ModelInputs.of(config, "a test")
    model = model_figures(m, TOKENS(seq_len, "seq_len", "Tokens of a sequence", "a test"))
    return one_process_memory(m, model, layout, COUNT(layout.micro_batch, "micro_batch", "Sequences", "a test"))


def check(config: ModelConfig, layout: Layout, seq_len: int) -> None:
    """Compare part by part. Equal but for 4 bytes a tensor in the optimizer, AdamW's counts of steps."""
    config = dataclasses.replace(config, precision="fp8" if layout.precision == "fp8" else "native")
    counted = training_bytes(
        config,
        batch_size=layout.micro_batch,
        seq_len=seq_len,
        dtype="float32" if layout.precision == "fp32" else "bfloat16",
        optimizer=layout.optimizer,
        moments=layout.moments,
        recompute=layout.recompute == "full",
    )
    found = predicted(config, layout, seq_len)
    for ours, theirs in PARTS.items():
        apart = counted.by_part.get(theirs, 0) - getattr(found, ours).value
        if ours == "optimizer":
            assert 0 <= apart <= 4 * len([use for use in tensors(config) if use.parameters])
        else:
            assert apart == 0, ours
    assert found.total.value == pytest.approx(sum(getattr(found, part).value for part in PARTS), rel=1e-12)


LAYOUTS = st.builds(
    Layout,
    micro_batch=st.integers(1, 4),
    recompute=st.sampled_from(["none", "full"]),
    precision=st.sampled_from(["fp32", "bf16", "fp8"]),
    optimizer=st.sampled_from(["adamw", "muon"]),
    moments=st.sampled_from(["float32", "bfloat16"]),
)


@given(config=model_configs(), layout=LAYOUTS, seq_len=st.integers(3, 300))
def test_memory_of_any_model_equals_accounting(config: ModelConfig, layout: Layout, seq_len: int) -> None:
    check(config, layout, seq_len)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_memory_of_each_config_equals_accounting(path: Path, precision: Any, recompute: Any) -> None:
    check(ModelConfig.from_file(path), Layout(precision=precision, recompute=recompute, micro_batch=2), 512)


def test_v3_in_one_process_needs_sixteen_bytes_a_parameter() -> None:
    found = predicted(released("deepseek-v3"), Layout(), 4096)
    state = found.parameters.value + found.gradients.value + found.optimizer.value
    assert state / 682.6e9 == pytest.approx(16, rel=1e-4)
