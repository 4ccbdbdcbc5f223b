"""Inputs of plans for tests: models, hardware as published, and the check that every input of a figure acts."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from dsmini import ModelConfig
from dsmini.planner.hardware import Hardware
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.formula import evaluate, gradient, inputs, walk
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import BYTES, BYTES_PER_SECOND, COUNT, FLOPS_PER_SECOND, Anything, Quantity
from dsmini.planner.serving.deployment import Deployment, ServingWorkload, serving_workload
from tests.helpers.configs import CONFIGS, released

DTYPES: list[Any] = ["float32", "bfloat16", "fp8"]
ALL = [released(path.stem) for path in sorted(CONFIGS.glob("*.toml"))]
V3 = released("deepseek-v3")
CHANGES: dict[str, Any] = {
    "vocab_size": 100_000,
    "dim": 5000,
    "inter_dim": 10_000,
    "moe_inter_dim": 1000,
    "n_layers": 50,
    "n_dense_layers": 2,
    "n_heads": 96,
    "q_lora_rank": 1000,
    "kv_lora_rank": 400,
    "qk_nope_head_dim": 96,
    "qk_rope_head_dim": 48,
    "v_head_dim": 100,
    "n_routed_experts": 576,
    "n_shared_experts": 2,
    "n_activated_experts": 10,
    "n_expert_groups": 16,
    "n_limited_groups": 3,
}
"""Another valid value for each number of a ModelConfig that a figure of V3 may depend on."""
SMALL_NUMBERS = {0, 1, 2, 3, 4}
"""Numbers that a formula may contain without a name."""


def model_of(config: ModelConfig) -> ModelInputs:
    return ModelInputs.of(config, "a test")


def h800(**changes: float) -> Hardware:
    """Return an H800 with the nominal 50 GB/s between nodes, as section 2.3.2 of INS counts."""
    numbers = {
        "bf16_peak": 989e12,
        "fp8_peak": 1979e12,
        "memory": 80e9,
        "memory_bandwidth": 3.35e12,
        "gpus_per_node": 8,
        "fast_link": 160e9,
        "slow_link": 50e9,
        **changes,
    }
    return _hardware("h800", numbers)


def gb200(**changes: float) -> Hardware:
    """Return a GPU of GB200 NVL72, all 72 of which one fast link of 900 GB/s connects."""
    numbers = {
        "bf16_peak": 2500e12,
        "fp8_peak": 5000e12,
        "memory": 186e9,
        "memory_bandwidth": 8e12,
        "gpus_per_node": 72,
        "fast_link": 900e9,
        "slow_link": 50e9,
        **changes,
    }
    return _hardware("gb200", numbers)


def _hardware(name: str, numbers: Mapping[str, float]) -> Hardware:
    def rate(key: str) -> Any:
        return BYTES_PER_SECOND(numbers[key], key, key, "a test")

    return Hardware(
        name=name,
        title=name,
        peaks={
            "bfloat16": FLOPS_PER_SECOND(numbers["bf16_peak"], "bf16_peak", "BF16 peak", "a test"),
            "fp8": FLOPS_PER_SECOND(numbers["fp8_peak"], "fp8_peak", "FP8 peak", "a test"),
        },
        memory=BYTES(numbers["memory"], "memory", "Memory", "a test"),
        memory_bandwidth=rate("memory_bandwidth"),
        gpus_per_node=COUNT(numbers["gpus_per_node"], "gpus_per_node", "GPUs of a node", "a test"),
        fast_link=rate("fast_link"),
        slow_link=rate("slow_link"),
        link_latency=None,
        price=None,
        power=None,
    )


def check_inputs_act(build: Callable[..., Figures], changes: Mapping[str, Any], least: int) -> None:
    """Check that a figure's formula gives what a plan from changed inputs gives, for each changed input.

    Args:
        build: makes the plan, from one changed input by name or from none.
        least: how many of the changes some figure must depend on.
    """
    plan = build().figures()
    acting = set()
    for name, value in changes.items():
        again = build(**{name: value}).figures()
        assert again.keys() == plan.keys()
        for key, figure in plan.items():
            predicted = evaluate(figure, {name: value})
            assert predicted == pytest.approx(again[key].value, rel=1e-12), f"{key} with another {name}"
            if name in inputs(figure):
                acting.add(name)
            else:
                assert again[key].value == figure.value, f"{key} depends on {name}, which is not in its formula"
    assert len(acting) >= least, f"only {sorted(acting)} act"


def check_gradients(figures: Iterable[Anything]) -> None:
    """Check every derivative against a difference: of the two sides that one where no rounding to a whole jumps."""
    step = 1e-6
    for figure in figures:
        for name, slope in gradient(figure).items():
            old = inputs(figure)[name].value
            sides = [(evaluate(figure, {name: old * (1 + e)}) - figure.value) / e for e in (step, -step) if old]
            assert math.isfinite(slope)
            # a difference is off by curvature, some steps, and by the rounding of two values over the step
            scale = max(abs(figure.value), abs(slope * old))
            near = [side == pytest.approx(slope * old, abs=scale * 1e-3) for side in sides]
            assert any(near) or not sides, f"{figure} by {name}: {slope * old}, but differences {sides}"


def check_numbers_are_small(figures: Iterable[Anything]) -> None:
    """Check that the formulas of figures contain no number without a name but small structural ones."""
    for figure in figures:
        odd = {node.value for node in walk(figure) if node.op == "number"} - SMALL_NUMBERS
        assert not odd, f"{figure} contains {odd}"


def check_sources(figures: Iterable[Anything]) -> None:
    """Check that every named figure and every input has a title and a source, and a name in snake_case."""
    for figure in figures:
        for node in walk(figure):
            if node.op in ("input", "name"):
                assert node.name == node.name.lower() and node.name.isidentifier(), node
                assert node.title and node.source, node


def changed(config: ModelConfig, name: str, value: Any) -> ModelConfig:
    return dataclasses.replace(config, **{name: value})


SETTINGS: dict[str, float] = {
    "bf16_peak": 500e12,
    "fp8_peak": 900e12,
    "memory": 141e9,
    "memory_bandwidth": 2e12,
    "gpus_per_node": 16,
    "fast_link": 90e9,
    "slow_link": 20e9,
}
"""Another value for each number of h800."""
DEPLOYED: dict[str, float] = {
    "tensor_parallel": 2,
    "expert_parallel": 16,
    "redundant_experts": 64,
    "micro_batches": 3,
    "imbalance": 1.5,
    "dispatch_number": 2,
    "combine_number": 3,
}
"""Another value for each number of a Deployment, by field; replaced one by one in a plan of tests."""
SERVED: dict[str, float] = {
    "sequences": 50,
    "context": 3000,
    "prompts": 3,
    "prompt": 1000,
    "drafts": 2,
    "acceptance": 0.7,
}
"""Another value for each number of a ServingWorkload."""


def with_numbers(made: Any, values: Mapping[str, float]) -> Any:
    """Return a dataclass of inputs with other values of some of them, by the names of the inputs."""
    fields = {}
    for field in dataclasses.fields(made):
        old = getattr(made, field.name)
        if isinstance(old, Quantity) and old.name in values:
            fields[field.name] = Quantity(values[old.name], old.unit, "input", (), (old.name, old.title, old.source))
    return dataclasses.replace(made, **fields)


def planner_of(
    plan: Callable[..., Figures], made: Deployment, workload: ServingWorkload | None = None
) -> Callable[..., Figures]:
    """Return what makes V3's plan on h800 again, with inputs that are changed by name."""

    def build(**change: Any) -> Figures:
        sizes = {name: value for name, value in change.items() if name in CHANGES}
        rates = {name: value for name, value in change.items() if name in SETTINGS}
        return plan(
            model_of(dataclasses.replace(V3, **sizes)),
            h800(**rates),
            with_numbers(workload or serving_workload(), change),
            with_numbers(made, change),
        )

    return build


def all_changes(made: Deployment, **other: float) -> dict[str, Any]:
    """Return the changes of a config, hardware, a workload and this deployment, with other values for some."""
    deployed = {f"{made.stage}_{name}": value for name, value in DEPLOYED.items()}
    return {**CHANGES, **SETTINGS, **SERVED, **deployed, **other}
