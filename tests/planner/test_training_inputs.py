"""Every input of a training plan acts: a plan made again with another value has the values that its formulas say."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from dsmini import ModelConfig
from dsmini.planner.hardware import Hardware
from dsmini.planner.published.v3_training import published_training
from dsmini.planner.quantities.formula import evaluate, gradient, inputs, walk
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import Anything, Quantity
from dsmini.planner.training.assumptions import Assumptions
from dsmini.planner.training.bubbles import published_bubble
from dsmini.planner.training.layout import Layout
from dsmini.planner.training.training_plan import TrainingPlan, training_plan
from dsmini.planner.training.workload import Workload
from tests.helpers.configs import released
from tests.helpers.plans import H800, V3_LAYOUT, V3_WORKLOAD


@dataclasses.dataclass(frozen=True)
class Case:
    """All that a plan is made from."""

    config: ModelConfig
    layout: Layout
    workload: Workload = V3_WORKLOAD
    hardware: Hardware = H800
    assumptions: Assumptions = dataclasses.field(default_factory=Assumptions.of)

    def plan(self) -> TrainingPlan:
        m = ModelInputs.of(self.config, "a test")
        return training_plan(m, self.hardware, self.layout, self.workload, self.assumptions)

    def changed(self, part: str, **values: Any) -> "Case":
        return dataclasses.replace(self, **{part: dataclasses.replace(getattr(self, part), **values)})


V3 = released("deepseek-v3")
GQA = dataclasses.replace(
    V3,
    attention="gqa",
    n_kv_heads=16,
    qk_norm=True,
    embed_norm=True,
    topk_method="greedy",
    n_expert_groups=1,
    n_limited_groups=1,
)
CASES = {
    "published": Case(V3, V3_LAYOUT),
    "bf16": Case(V3, dataclasses.replace(V3_LAYOUT, precision="bf16", schedule="zb1p", tensor=2, recompute="full")),
    "gqa": Case(GQA, dataclasses.replace(V3_LAYOUT, schedule="1f1b", tensor=2, zero=3, recompute="none")),
    "one process": Case(V3, Layout(precision="fp8", optimizer="muon", recompute="full")),
    "one process, gqa": Case(GQA, Layout(moments="bfloat16")),
}
CONFIG = {
    "vocab_size": 100_000,
    "dim": 6144,
    "inter_dim": 10_000,
    "moe_inter_dim": 1500,
    "n_layers": 57,
    "n_dense_layers": 2,
    "n_heads": 96,
    "n_kv_heads": 32,
    "q_lora_rank": 1000,
    "kv_lora_rank": 600,
    "qk_nope_head_dim": 96,
    "qk_rope_head_dim": 32,
    "v_head_dim": 160,
    "n_routed_experts": 320,
    "n_shared_experts": 2,
    "n_activated_experts": 6,
    "n_expert_groups": 4,
    "n_limited_groups": 2,
    "n_mtp_layers": 2,
}
"""Other values of a model, one at a time."""
LAYOUT = {"gpus": 4096, "pipeline": 32, "expert": 32, "tensor": 4, "micro_batch": 2}
WORKLOAD = ("seq_len", "batch", "tokens")
HARDWARE = ("memory", "memory_bandwidth", "gpus_per_node", "fast_link", "slow_link", "price")
ASSUMED = list(Assumptions.of().figures())


CLUSTER = {"gpus_per_node", "fast_link", "slow_link", "multiprocessors", "communication_multiprocessors"}
GROUPS = {"n_expert_groups", "n_limited_groups"}
LATENT = {"q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"}
EIGHT_BITS = {"fp8_peak", "fp8_efficiency"}
IDLE: dict[str, set[str]] = {
    "published": set(),
    "bf16": EIGHT_BITS,
    "gqa": LATENT,
    "one process": CLUSTER | GROUPS,
    "one process, gqa": CLUSTER | LATENT | EIGHT_BITS,
}
"""Inputs that a case does not depend on."""


def again(figure: Anything, factor: float) -> Anything:
    """Return an input with another value."""
    return Quantity(figure.value * factor, figure.unit, "input", (), (figure.name, figure.title, figure.source))


def changes(case: Case) -> Iterator[tuple[str, float, Case]]:
    """Yield each input's name, another value, and the case that has it."""
    for name, value in CONFIG.items():
        fixed = case.config.topk_method == "greedy" and name.endswith("_groups")  # which has no groups
        if getattr(case.config, name) is not None and not fixed:
            yield name, value, case.changed("config", **{name: value})
    for name, value in LAYOUT.items():
        if getattr(case.layout, name) > 1 or (name == "micro_batch" and case.layout.gpus):
            yield name, value, case.changed("layout", **{name: value})
    for part, names, factor in (("workload", WORKLOAD, 2), ("hardware", HARDWARE, 0.25), ("assumptions", ASSUMED, 2)):
        for name in names:
            other = again(getattr(getattr(case, part), name), factor)
            yield other.name, other.value, case.changed(part, **{name: other})
    for dtype, peak in H800.peaks.items():
        other = again(peak, 1.25)
        yield other.name, other.value, case.changed("hardware", peaks={**H800.peaks, dtype: other})


@pytest.mark.parametrize("name", CASES)
def test_plan_made_again_equals_its_formulas(name: str) -> None:
    """Compare every figure of the plan, and see that the change acts on some of them."""
    case = CASES[name]
    before = case.plan().figures()
    for changed, value, other in changes(case):
        after, acts = other.plan().figures(), False
        assert after.keys() == before.keys(), changed
        for key, figure in before.items():
            assert evaluate(figure, {changed: value}) == pytest.approx(after[key].value, rel=1e-12, abs=1e-12), (
                changed,
                key,
            )
            acts = acts or (figure.op != "input" and after[key].value != figure.value)
        assert acts == (changed not in IDLE[name]), changed


MODEL = {
    *("dim", "vocab_size", "inter_dim", "moe_inter_dim", "n_layers", "n_dense_layers", "n_heads", "n_mtp_layers"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts"),
    *("n_shared_experts", "n_activated_experts"),
}
WORK = MODEL - {"n_mtp_layers"}
DEPENDS = {
    "memory_needed": MODEL
    | {"gpus", "pipeline", "expert", "micro_batch", "tensor", "seq_len", "fp8_tile", "fp32_size", "bf16_size"}
    | {"fp8_size", "index_size", "e5m6_group", "e5m6_group_size"},
    "assumed_step_seconds": WORK | {"gpus", "batch", "seq_len", "bf16_peak", "utilization"},
    "dispatch_seconds": {
        *(
            "dim",
            "n_routed_experts",
            "n_activated_experts",
            "n_expert_groups",
            "n_limited_groups",
            "expert",
            "gpus_per_node",
        ),
        *("fast_link", "slow_link", "fp8_size", "fp32_size", "bf16_size", "fp8_tile"),
    },
    "computing_seconds": MODEL
    | {"gpus", "pipeline", "tensor", "micro_batch", "batch", "seq_len", "bf16_peak", "fp8_peak", "bf16_efficiency"}
    | {"fp8_efficiency", "multiprocessors", "communication_multiprocessors"},
}
"""Inputs that the published plan's main figures depend on: no more and no less."""


@pytest.mark.parametrize("name", DEPENDS)
def test_main_figures_depend_on_their_inputs_alone(name: str) -> None:
    assert set(inputs(CASES["published"].plan().figures()[name])) == DEPENDS[name]


def test_time_of_a_step_depends_on_memory_and_links_too() -> None:
    plan = CASES["published"].plan()
    found = set(inputs(plan.step.roof_step))
    assert found >= DEPENDS["computing_seconds"] | DEPENDS["dispatch_seconds"] | {"memory_bandwidth"}
    assert plan.time.cost is not None
    step = found | {"utilization"}
    assert set(inputs(plan.time.step_seconds)) == step
    assert set(inputs(plan.time.days)) == step | {"tokens", "day"}
    assert set(inputs(plan.time.cost)) == step | {"tokens", "hour", "price"}


@pytest.mark.parametrize("name", ["published", "bf16", "one process"])
def test_derivatives_of_figures_are_differences(name: str) -> None:
    """A rounding counts as constant, so a difference to one side may meet a step: one of the two sides must agree."""
    plan = CASES[name].plan()
    for figure in (plan.memory_needed, plan.step.roof_step, plan.time.gpu_hours, plan.model.operations.training_flops):
        slopes = gradient(figure)
        for key, node in inputs(figure).items():
            step = max(abs(node.value), 1) * 1e-7
            sides = [(evaluate(figure, {key: node.value + d}) - figure.value) / d for d in (step, -step)]
            scale = abs(figure.value) / max(abs(node.value), 1)
            assert any(slopes[key] == pytest.approx(side, rel=1e-4, abs=1e-6 * scale) for side in sides), key


def all_figures() -> dict[str, Anything]:
    found: dict[str, Anything] = {}
    m = ModelInputs.of(V3, "a test")
    for part in (published_training(m, H800, V3_WORKLOAD), *(case.plan() for case in CASES.values())):
        found |= part.figures()
    return found


def test_formulas_have_no_numbers_but_structural_ones() -> None:
    """Numbers that can be looked up are inputs with a source; 6 is the 6 N D of training."""
    numbers = {node.value for figure in all_figures().values() for node in walk(figure) if node.op == "number"}
    assert numbers <= {0, 1, 2, 3, 4, 6}


def test_inputs_have_one_meaning_and_a_source() -> None:
    titles: dict[str, set[str]] = {}
    for figure in all_figures().values():
        for node in walk(figure):
            if node.op in ("input", "name"):
                titles.setdefault(node.name, set()).add(node.title)
                assert node.title, node.name
            if node.op == "input":
                assert node.source, node.name
    assert {name: found for name, found in titles.items() if len(found) > 1} == {}


def test_bubble_of_the_report_is_derived_from_its_table() -> None:
    found = inputs(published_bubble().bubble)
    assert {node.source for node in found.values()} >= {"INS, table 4"}
    assert set(found) == {"table_pairs", "table_backward", "table_weights", "table_pipeline", "table_micro_batches"}
