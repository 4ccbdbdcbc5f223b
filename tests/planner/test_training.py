"""Training: what GPUs hold together, steps against the report, and rows against the gate."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from dsmini.accounting import activation_bytes, flops_per_token, parameters
from dsmini.nn import route
from dsmini.planner.exchange import places_hit
from dsmini.planner.pages import lines_of
from dsmini.planner.plan import make_plan
from dsmini.planner.request import Model, PlanRequest
from dsmini.planner.training import PARTS
from tests.helpers.plans import every_of, hardware_of, in_layout, plan_of, run_of, trained_in, values_of
from tests.helpers.published import reference

# --- what GPUs hold


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipe"])
@pytest.mark.parametrize(("tensor", "expert"), [(1, 4), (2, 8)])
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.2"])
def test_gpus_together_hold_the_model(name: str, schedule: Any, tensor: int, expert: int) -> None:
    """Sum over two stages: all parameters, those that tensor parallelism repeats, and a copy of the embedding."""
    made = plan_of(f"{name} gpus=1 batch=1024")
    how: dict[str, Any] = {"gpus": 16, "pipeline": 2, "tensor": tensor, "expert": expert, "schedule": schedule}
    gpus = trained_in(made, **how, zero=0, recompute="none").gpus.values()
    experts = sum(gpu.gpu_experts for gpu in gpus)
    counted = parameters(made.model.config)
    of = counted.by_module
    assert experts * expert == of["routed experts"] + of["mtp routed experts"]
    repeated = sum(n for key, n in of.items() if key.endswith(("norms", "gates", "mtp projection", "indexer")))
    repeated += 62 * 7168 * (1536 + 512 + 64)
    copy = 0 if schedule == "dualpipe" else of["embedding"]
    rest = sum(gpu.gpu_matrices + gpu.gpu_others for gpu in gpus)
    assert rest * tensor == counted.total - experts * expert + copy + (tensor - 1) * repeated


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["deepseek-v3", "toy-v4"])
def test_activations_of_one_stage_are_those_of_one_process(recompute: Any, name: str) -> None:
    """Apart are the shorter sequences of multi-token prediction, RoPE's tables, and states between its depths."""
    made = plan_of(f"{name} gpus=1 batch=8")
    config, length = made.model.config, made.request.seq_len
    assert length is not None
    how: dict[str, Any] = {"gpus": 4, "pipeline": 1, "expert": 1, "micro_batch": 2, "zero": 0, "schedule": "1f1b"}
    four = in_layout(made, **how, recompute=recompute)
    precision = "fp8" if made.request.precision == "fp8" else "native"
    one = dataclasses.replace(config, precision=precision)
    counted = activation_bytes(one, batch_size=2, seq_len=length, dtype="bfloat16", recompute=recompute)
    between = 0 if config.hc_mult > 1 else 2 * length * config.dim * 2 * config.n_mtp_layers  # streams are saved once
    found = four["memory_activations"]
    assert found == pytest.approx(counted.total - between - counted.by_part["rotary tables"], rel=1 / length)


def test_zero_divides_one_part_after_the_other() -> None:
    parts = ("weights", "gradients", "optimizer")

    def held(zero: Any) -> dict[str, float]:
        found = trained_in(plan_of("deepseek-v3"), zero=zero).gpus["middle"]
        return {part: getattr(found, f"memory_{part}") for part in parts}

    for zero, divided in ((1, {"optimizer"}), (2, {"gradients"}), (3, {"weights"})):
        before, after = held(zero - 1), held(zero)
        assert {part for part in parts if after[part] < before[part] / 3} == divided
        assert {part for part in parts if after[part] == before[part]} == set(parts) - divided
    t = trained_in(plan_of("deepseek-v3"), zero=1)  # DualPipe's halves hold the same stages
    gpu = t.gpus["middle"]
    owned = (gpu.gpu_matrices + gpu.gpu_others) / (2 * t.data) + gpu.gpu_experts / (2 * t.expert_data)
    assert gpu.memory_optimizer == pytest.approx(owned * t.state_optimizer)


# --- rows of experts


@pytest.mark.parametrize(
    ("groups", "limited", "method"), [(8, 4, "noaux_tc"), (8, 3, "group_limited_greedy"), (1, 1, "greedy")]
)
def test_places_are_those_that_the_gate_reaches(groups: int, limited: int, method: Any) -> None:
    """Random logits through the model's own gate; free choices by a formula, limited ones within half a percent."""
    e, k, n = 64, 6, 20_000
    how: dict[str, Any] = {"n_activated_experts": k, "n_expert_groups": groups, "n_limited_groups": limited}
    indices = route(torch.randn(n, e), torch.zeros(e) if method == "noaux_tc" else None, **how).indices
    for places in (4, 8, 32):
        there = torch.zeros(n, places).scatter(1, indices * places // e, 1.0).sum(1)
        ours = places_hit(e, k, groups, limited, 2 if method == "noaux_tc" else 1, places)
        assert ours == pytest.approx(float(there.mean()), abs=0.006 * places)


def test_rows_of_both_passes_have_the_scales_of_fp8() -> None:
    found = values_of("deepseek-v3")
    assert found["dispatch_row"] == found["decode_dispatch_row"] == found["prefill_dispatch_row"] == 7168 + 4 * 56
    assert found["decode_bound_combine_row"] == 7168 + 4 * 56, "as narrow as rows go"
    assert found["combine_row"] == 14_336 == values_of("deepseek-v3 weight_dtype=bfloat16")["decode_dispatch_row"]
    passed = found["dispatch_seconds"] * found["micro_batch_tokens"] * 4
    assert found["chunk_dispatch"] == pytest.approx(passed), "four MoE layers in the fullest stages"


def test_efficiencies_give_the_printed_runs() -> None:
    """Llama 3's 43 % of a whole step, with all-reduces and the bubble of 8 interleaved stages; V3's 143.8 ms."""
    model = Model(config=reference("llama-3.1-405b"), source="a test")
    sizes: dict[str, Any] = {"gpus": 8192, "pipeline": 16, "tensor": 8, "zero": 1}
    plan = make_plan(PlanRequest(**sizes, batch=2048, seq_len=8192), model, hardware_of("h100"))
    s = {name: float(figure) for name, figure in every_of(plan).items()}
    whole = (s["computing_seconds"] + s["reducing_seconds"]) * (1 + 15 / (8 * s["micro_batches"]))
    assert s["training_flops"] * 2048 * 8192 / whole / (8192 * 989.4e12) == pytest.approx(0.43, rel=0.01)
    v3 = values_of("deepseek-v3")
    assert v3["chunk_forward"] + v3["chunk_backward"] == pytest.approx(13.95 / (120 - 23), rel=0.002)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.2", "deepseek-v2-lite n_mtp_layers=1"])
def test_time_of_computing_follows_the_count_of_operations(name: str) -> None:
    """Where one rate serves all products, and backward repeats nothing; an indexer's inputs have no gradient."""
    plan = plan_of(f"{name} gpus=1 batch=8")
    found = in_layout(plan, recompute="none", precision="bf16", moments="float32", zero=0)
    computed = (found["chunk_forward"] + found["chunk_backward"]) / found["micro_batch_tokens"] * found["plain_rate"]
    counted = flops_per_token(plan.model.config, int(plan.m.seq_len), training=True).total
    assert computed == pytest.approx(counted, rel=1e-9)


def test_selective_recomputation_makes_up_projections_again() -> None:
    for words, made_again in (("toy", 2 * 96 * 4 * 48 + 2 * 64 * 4 * 64), ("toy-v4", 2 * 96 * 4 * 64)):
        m = plan_of(words).m
        none, selective = (m.operations(recompute)["moe"]["backward", "fp8"] for recompute in ("none", "selective"))
        assert selective - none == made_again, words


def test_gpus_that_share_heads_divide_v4s_output_projections() -> None:
    m = plan_of("toy-v4").m
    (whole, other), (shared, others) = (m.local(tensor) for tensor in (1, 2))
    c = m.config
    grouped = (c.o_lora_rank or 0) * c.n_heads * (c.head_dim or 0)
    last = (c.o_groups or 0) * (c.o_lora_rank or 0) * c.dim
    queries = c.n_heads * (c.head_dim or 0) * (c.q_lora_rank or 0)
    feed_forward = 3 * c.dim * c.n_shared_experts * c.moe_inter_dim
    assert other["moe"] - others["moe"] == grouped / 2
    assert whole["moe"] - shared["moe"] == (last + queries + feed_forward) / 2


# --- stages

SPLIT = ["deepseek-v3", "deepseek-v3 schedule=1f1b", "deepseek-v2-lite gpus=64 pipeline=4 expert=8 precision=bf16"]


@pytest.mark.parametrize("words", SPLIT)
def test_slowest_stage_has_its_own_layers_and_the_head(words: str) -> None:
    """By the operations of each kind of layer at the rates of the plan, worked out here."""
    plan = plan_of(words)
    c, r, found = plan.model.config, plan.training.layout, every_of(plan)
    n = plan.m.numbers
    over = c.n_heads * (c.qk_head_dim + c.v_head_dim) * plan.m.seq_len / found["plain_rate"]
    gate = 2 * n("gates") / found["plain_rate"]
    experts = c.n_activated_experts * n("routed experts") + n("shared experts")
    dense = 2 * (n("attention") + n("dense feed-forward")) / found["fp8_rate"] + over
    moe = 2 * (n("attention") + experts) / found["fp8_rate"] + over + gate
    head = 2 * n("embedding") / found["plain_rate"]
    mtp = c.n_mtp_layers * (moe + head + 2 * n("projection") / found["plain_rate"])

    def slowest(last: int) -> float:
        rest = [(c.n_layers - last) // (r.pipeline - 1)] * (r.pipeline - 1)
        rest = [n + (i < (c.n_layers - last) % (r.pipeline - 1)) for i, n in enumerate(rest)]
        kinds = [dense] * c.n_dense_layers + [moe] * (c.n_layers - c.n_dense_layers)
        starts = [sum(rest[:i]) for i in range(r.pipeline)]
        stages = [sum(kinds[start : start + n]) for start, n in zip(starts, [*rest, last], strict=True)]
        stages[-1] += head + mtp
        if r.schedule == "dualpipe":
            stages = [(a + b) / 2 for a, b in zip(stages, reversed(stages), strict=True)]
        return max(stages)

    assert r.pipeline > 2 and found["chunk_forward"] / found["micro_batch_tokens"] == pytest.approx(
        min(slowest(last) for last in range(c.n_layers // r.pipeline + 1)), rel=0.02
    )


def test_gradients_stay_in_a_node_with_the_gpus_that_hold_the_same() -> None:
    """Eight GPUs of a stage are one node; with DualPipe the other copy is at the other end of the pipeline."""
    plan = plan_of("deepseek-v3 gpus=1 batch=1024")
    how: dict[str, Any] = {"gpus": 128, "pipeline": 16, "expert": 8, "zero": 1, "recompute": "full"}
    inside, across = (in_layout(plan, **how, schedule=schedule) for schedule in ("1f1b", "dualpipe"))
    for found, rate in ((inside, 0.8 * 200e9), (across, 0.8 * 50e9)):
        sent = found["sent_gradients"] + found["sent_weights"]
        assert found["state_seconds"] == pytest.approx(sent / rate)


def test_experts_of_64_gpus_share_one_domain_of_72() -> None:
    for expert in (32, 64):
        found = values_of(f"deepseek-v3 @gb200-nvl72 expert={expert} gpus=1024")
        assert (found["expert_nodes"], found["expert_in_node"], found["slow_row_bytes"]) == (1, expert, 0)


def test_hardware_is_compared_on_the_same_basis() -> None:
    """An H100 is an H800 with another NVLink: all else takes as long."""
    h800, h100 = (values_of(f"deepseek-v3 @{name}") for name in ("h800", "h100"))
    assert h100["computing_seconds"] == h800["computing_seconds"]
    assert h100["slow_row_seconds"] == h800["slow_row_seconds"]
    assert h100["fast_row_seconds"] == pytest.approx(h800["fast_row_seconds"] * 200 / 450)
    shares = [values_of(f"deepseek-v3 @{name}") for name in ("h800", "b200")]
    reached = [s["plain_rate"] / s["peak_bfloat16"] for s in shares]
    assert reached[0] == pytest.approx(reached[1]), "every GPU gives the same share of its units to rows"


# --- the step

TRAINED = ["deepseek-v3", "deepseek-v3 slow_link*0.05", "deepseek-v2-lite", "toy", "toy @laptop"]


@pytest.mark.parametrize("words", TRAINED)
def test_parts_of_a_step_add_up_and_the_longest_binds(words: str) -> None:
    found, plan = values_of(words), plan_of(words)
    assert found["step_seconds"] == found["parts_seconds"] == pytest.approx(sum(found[part] for part in PARTS))
    assert plan.longest("training") == [PARTS[part] for part in sorted(PARTS, key=lambda part: -found[part])]
    longest = max(found[part] for part in PARTS)
    assert f"{100 * longest / found['step_seconds']:.0f} % of a step" in lines_of(plan)["training"][-1]


FASTER = {
    "computing_seconds": "bfloat16*{} fp8*{}",
    "dispatching_seconds": "slow_link*{} fast_link*{}",
    "exchange_seconds": "slow_link*{}",
    "reducing_seconds": "fast_link*{}",
    "update_seconds": "memory_bandwidth*{}",
}


@pytest.mark.parametrize("part", FASTER)
def test_part_of_a_step_shrinks_with_its_machine(part: str) -> None:
    words = "deepseek-v3 gpus=2048 pipeline=16 expert=8 tensor=2 zero=1 schedule=dualpipe recompute=selective"
    words += " precision=fp8 micro_batch=1"
    before = values_of(words)
    after = values_of(f"{words} {FASTER[part].format(2, 2)}")
    assert 0 < after[part] == pytest.approx(before[part] / 2) and after["step_seconds"] < before["step_seconds"]


MACHINES = [("", 1, "none"), ("fast_link*0.05", 1, "full"), ("fast_link*0.3", 2, "none")]
"""Links, GPUs that share matrices, and recomputation, by which the times of chunks differ."""


@pytest.mark.parametrize(("machine", "tensor", "recompute"), MACHINES)
@pytest.mark.parametrize(("stages", "micro_batches"), [(4, 8), (8, 20), (16, 120)])
@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipe"])
def test_pipeline_works_and_waits_as_the_report_says(
    schedule: Any, stages: int, micro_batches: int, machine: str, tensor: int, recompute: Any
) -> None:
    """Compare with table 2 of the V3 report: forward, backward, its W, and both of them that hide each other's rows.

    A GPU of DualPipe hides the rows of all micro-batches but one for each stage.
    """
    made = plan_of(f"deepseek-v3 {machine} gpus=1 batch={8 * micro_batches}")
    sizes: dict[str, Any] = {"gpus": 8 * tensor * stages, "pipeline": stages, "expert": 8, "tensor": tensor, "zero": 0}
    s = in_layout(made, **sizes, schedule=schedule, recompute=recompute)
    sent, w = s["chunk_dispatch"] + s["chunk_tensor"], s["chunk_weights"]
    f, b = s["chunk_forward"] + sent, s["chunk_backward"] + sent
    both = max(s["chunk_forward"] + s["chunk_backward"], 2 * s["chunk_dispatch"]) + 2 * s["chunk_tensor"]
    waits = {"1f1b": (stages - 1) * (f + b), "zb1p": (stages - 1) * (f + b - 2 * w)}
    waits["dualpipe"] = (stages / 2 - 1) * (both + b - 3 * w)
    hidden = micro_batches - stages if schedule == "dualpipe" else 0
    works = sum(s[part] for part in ("computing_seconds", "dispatching_seconds", "reducing_seconds"))
    assert works == pytest.approx(hidden * both + (micro_batches - hidden) * (f + b))
    assert s["bubble_seconds"] == pytest.approx(waits[schedule]) and w > 0


# --- failures: the share of the time that trains, against runs with random failures

SIMULATED = 0.004
"""Relative standard error of 100,000 failures: 1 / sqrt(100,000) for an exponential time, and less for a ratio of two
sums that go together."""


def trained(mean: float, write: float, interval: float, seed: int) -> float:
    """Return the share of the time that trains in a run with 100,000 random failures, in restarts and writes too.

    Each time between two failures is drawn from an exponential distribution. It begins with the restart, and then
    trains and writes in turns. The work since the last complete checkpoint is lost.
    """
    time = np.random.default_rng(seed).exponential(mean, 100_000)
    work = np.floor(np.maximum(time - 300, 0.0) / (interval + write)) * interval
    return float(work.sum() / time.sum())


@pytest.mark.parametrize(
    ("gpus", "write"), [(1024, 10), (1024, 300), (16_384, 300), (131_072, 10), (131_072, 300), (1_000_000, 10)]
)
def test_share_of_the_time_agrees_with_a_simulation(gpus: int, write: float) -> None:
    made = run_of(plan_of("toy"), gpus, restart_time=300, checkpoint_halt=write)
    found, interval = made.effective_share or 0, made.checkpoint_interval
    # rare cycles count for more: one in 1 / found failures completes any
    simulated = trained(made.mean_time_to_failure, write, interval, gpus)
    assert found == pytest.approx(simulated, rel=4 * SIMULATED / math.sqrt(found))


# --- parts of a sequence


def test_parts_of_a_sequence_plan_the_extension_of_v4_to_a_million_tokens() -> None:
    """72 sequences on 1,152 GPUs of 141 GB: no GPU has a whole one."""
    plan = plan_of("deepseek-v4-flash @h200 seq_len=1048576 batch=72 gpus=1152")
    r, found = plan.training.layout, every_of(plan)
    assert plan.training.fits and r.context_parallel > 1 and r.gpus == 1152
    assert r.pipeline * r.data * r.tensor * r.context_parallel == 1152 and 72 % r.data == 0
    assert found["micro_batch_tokens"] == 1048576 / r.tensor / r.context_parallel
    gathered = 1048576 * (1 - 1 / r.context_parallel) * found["key_bytes"]
    assert found["gathered_keys"] == pytest.approx(gathered) and found["reducing_seconds"] > 0


def test_parts_of_a_sequence_hold_the_same_matrices() -> None:
    """Two parts are two holders more for ZeRO, and half of the tokens each."""
    plan = plan_of("deepseek-v3 gpus=1 batch=1024")
    how: dict[str, Any] = {"gpus": 128, "pipeline": 1, "expert": 8, "zero": 1, "recompute": "full"}
    one, two = (in_layout(plan, **how, schedule="1f1b", context_parallel=n) for n in (1, 2))
    assert one["memory_optimizer"] == two["memory_optimizer"] and one["data"] == 2 * two["data"]
    assert two["micro_batch_tokens"] == one["micro_batch_tokens"] / 2
    assert two["computing_seconds"] == pytest.approx(one["computing_seconds"])
