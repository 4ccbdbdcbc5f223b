"""Memory of the GPUs of a layout: V3's parts by hand, sums over all GPUs, and what each option changes."""

import dataclasses
from typing import Any

import pytest

from dsmini import ModelConfig
from dsmini.accounting import parameters
from dsmini.planner.model.parameters import model_figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.training.activations import Activations
from dsmini.planner.training.layout import Layout, layout_figures
from dsmini.planner.training.memory import GpuMemory, TrainingMemory, state_sizes, training_memory
from dsmini.planner.training.one_process import process_activations
from tests.helpers.configs import released
from tests.helpers.plans import V3_LAYOUT, V3_WORKLOAD

V3 = released("deepseek-v3")


def memory_of(layout: Layout, config: ModelConfig = V3) -> TrainingMemory:
    m = ModelInputs.of(config, "a test")
    return training_memory(m, model_figures(m, V3_WORKLOAD.seq_len), layout, layout_figures(layout, m, V3_WORKLOAD))


def gpu_of(layout: Layout, kind: str, config: ModelConfig = V3) -> GpuMemory:
    (found,) = [gpu for gpu in memory_of(layout, config).gpus if gpu.total.name == f"memory_{kind}"]
    return found


@pytest.mark.parametrize(
    ("precision", "moments", "bytes_"),
    [("bf16", "float32", 18), ("fp8", "bfloat16", 13), ("fp32", "float32", 16), ("bf16", "bfloat16", 14)],
)
def test_training_state_of_a_parameter(precision: Any, moments: Any, bytes_: int) -> None:
    """18 bytes in BF16, 13 as V3 trains; the scales of FP8 add 4 bytes a block of 128x128."""
    found = state_sizes(Layout(precision=precision, moments=moments)).total.value
    assert found == pytest.approx(bytes_ + (4 / 128**2 if precision == "fp8" else 0), rel=1e-12)


def test_v3_activations_of_a_layer_by_hand() -> None:
    act = Activations(m=ModelInputs.of(V3, "a test"), precision="fp8", recompute="selective")
    attention = 2 * 7168 + (1536 + 512 + 64) * 2 + 16384 * 12 // 8 + 128 * 4 + 128 * 4
    gate = 256 * 4 + 4 + 256 * 8 + 8 * 8 + 4
    rows = 8 * (7168 + 56 * 4 + 16 + 2 * (2048 + 16 * 4))
    assert act.moe_layer().value == attention + 2 * 7168 + gate + rows + 2 * (2048 + 16 * 4) == 158_920
    assert act.dense_layer().value == attention + 2 * 7168 + 2 * (18432 + 144 * 4)


def test_v3_memory_of_a_middle_gpu_by_hand() -> None:
    """Two stages of 4 MoE layers, 4 experts of each, 128 * 2 copies of the dense parts and 2 * 2 of the experts."""
    found = gpu_of(V3_LAYOUT, "middle")
    attention = 7168 * 1536 + 1536 * 24576 + 7168 * 576 + 512 * 32768 + 16384 * 7168
    shared, experts = 8 * 3 * 7168 * 2048, 8 * 4 * 3 * 7168 * 2048
    gates, norms = 8 * 256 * 7168, 8 * (2 * 7168 + 1536 + 512)
    matrices, plain = 8 * attention + shared, gates + norms
    assert found.experts.value == experts
    assert found.parameters.value == matrices + plain + experts
    assert found.weights.value == (matrices + experts) * (1 + 4 / 128**2) + 2 * plain
    assert found.gradients.value == 4 * found.parameters.value
    assert found.master.value == found.moments.value == 4 * ((matrices + plain) / 256 + experts / 4)
    assert found.activations.value == 17 * 4 * 158_920 * 4096
    assert found.total.value == pytest.approx(63.5e9, rel=1e-3)


def test_v3_fits_as_published_and_not_without_its_savings() -> None:
    """V3 trains in 80 GB without tensor parallelism (section 3.2.3); FP8 rows and recomputation are why it fits."""
    assert memory_of(V3_LAYOUT).memory_needed.value < 80e9
    for change in ({"precision": "bf16"}, {"recompute": "none"}, {"zero": 0}):
        assert memory_of(dataclasses.replace(V3_LAYOUT, **change)).memory_needed.value > 80e9, change


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipe"])
@pytest.mark.parametrize(("tensor", "expert"), [(1, 1), (1, 4), (2, 8)])
@pytest.mark.parametrize("config", [V3, released("deepseek-v3.2")], ids=["v3", "v3.2"])
def test_all_gpus_hold_the_model(config: ModelConfig, schedule: Any, tensor: int, expert: int) -> None:
    """Sum over two stages: all parameters, those that tensor parallelism repeats, and a copy of the embedding."""
    layout = Layout(gpus=16, pipeline=2, tensor=tensor, expert=expert, schedule=schedule)
    counted, m = parameters(config), ModelInputs.of(config, "a test")
    held = memory_of(layout, config).gpus
    experts = sum(gpu.experts.value for gpu in held) * expert
    rest = sum(gpu.parameters.value - gpu.experts.value for gpu in held) * tensor
    routed = counted.by_module["routed experts"] + counted.by_module["mtp routed experts"]
    assert experts == routed
    repeated = [
        n for name, n in counted.by_module.items() if name.endswith(("norms", "gates", "mtp projection", "indexer"))
    ]
    whole = sum(repeated) + 62 * 7168 * (1536 + 512 + 64)
    copy = 0 if schedule == "dualpipe" else counted.by_module["embedding"]
    assert rest == counted.total - routed + copy + (tensor - 1) * whole
    assert m.n_layers.value + 1 == 62


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["deepseek-v3", "toy", "toy-dense"])
def test_activations_of_one_stage_are_those_of_one_process(recompute: Any, name: str) -> None:
    """Apart are the shorter sequences of multi-token prediction, RoPE's tables, and states between its depths."""
    layout, config = Layout(gpus=4, recompute=recompute, micro_batch=2), released(name)
    m = ModelInputs.of(config, "a test")
    model, sizes = model_figures(m, V3_WORKLOAD.seq_len), layout_figures(layout, m, V3_WORKLOAD)
    one = process_activations(m, model, layout, sizes.micro_batch).value
    found = gpu_of(layout, "only", config)
    between = 2 * 4096 * config.dim * 2 * config.n_mtp_layers
    tables = 4096 * 4 * config.qk_rope_head_dim * (1 + config.n_mtp_layers)
    assert found.activations.value + found.working.value == pytest.approx(one - between - tables, rel=1 / 4096)


def test_micro_batches_in_flight_as_printed() -> None:
    """1F1B and ZB1P hold PP micro-batches, DualPipe PP + 1 (V3, table 2): of equal stages, 16 * 4, 16 * 4, 17 * 4."""
    even = dataclasses.replace(V3, n_layers=64, n_dense_layers=0, n_mtp_layers=0)
    layer = 158_920 * 4096
    one, zero, dual = (
        gpu_of(dataclasses.replace(V3_LAYOUT, schedule=s), "first", even).activations.value
        for s in ("1f1b", "zb1p", "dualpipe")
    )
    assert one == zero == 16 * (4 * layer + 8 * 4096)
    assert dual == 17 * 4 * layer + 16 * 8 * 4096 + 4096 * (2 * 7168 * 2)  # the head's on top
    assert gpu_of(dataclasses.replace(V3_LAYOUT, schedule="1f1b"), "middle", even).activations.value == 15 * 4 * layer
    assert gpu_of(dataclasses.replace(V3_LAYOUT, schedule="zb1p"), "last", even).activations.value > 16 * 4 * layer


def test_zero_divides_one_part_after_the_other() -> None:
    parts = ("weights", "gradients", "master", "moments", "activations")
    before = gpu_of(dataclasses.replace(V3_LAYOUT, zero=0), "middle")
    for zero, divided in ((1, {"master", "moments"}), (2, {"gradients"}), (3, {"weights"})):
        changes: dict[str, Any] = {"zero": zero}
        after = gpu_of(dataclasses.replace(V3_LAYOUT, **changes), "middle")
        assert {p for p in parts if getattr(after, p).value < getattr(before, p).value / 3} == divided
        assert {p for p in parts if getattr(after, p).value == getattr(before, p).value} == set(parts) - divided
        before = after
