"""Laws of plans: figures are what their explanations say, what dsmini.accounting counts, and agree with each other."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini import ModelConfig
from dsmini.accounting import (
    decode_bytes_per_token,
    decode_flops_per_token,
    expected_experts,
    flops_per_token,
    kv_bytes_per_token,
    mha_kv_bytes_per_token,
    parameters,
    prefill_bytes_per_token,
    step_flops,
    training_bytes,
    weight_bytes,
)
from dsmini.accounting.tensors import tensors
from dsmini.planner.binding import AXES, Resource, Vocabulary
from dsmini.planner.hardware import known_hardware, load_hardware
from dsmini.planner.pages.sections import COMPARED, HEADLINES, sections
from dsmini.planner.quantities.explanation import named
from dsmini.planner.record import plan_record
from dsmini.planner.request import PlanRequest
from dsmini.planner.setup import Model, setup
from dsmini.planner.training.layout import Layout
from dsmini.planner.varied_axis import read_axis
from dsmini.planner.vary import changed, vary
from dsmini.planner.whole import whole_plan
from tests.helpers.configs import CONFIGS, released
from tests.helpers.plans import Formulas, figures_of, of_layout, plan_of, setup_of, values_of
from tests.helpers.strategies import model_configs

H800 = load_hardware("h800")
V3_LAYOUT = "gpus=2048 pipeline=16 expert=64 moments=bfloat16"
BF16 = f"{V3_LAYOUT} tensor=2 zero=1 schedule=zb1p precision=bf16 recompute=full"
GQA = "attention=gqa n_kv_heads=16 qk_norm=True embed_norm=True topk_method=greedy n_expert_groups=1 n_limited_groups=1"
SIZES = "vocab_size=100000 dim=6144 inter_dim=10000 moe_inter_dim=1500 n_layers=57 n_dense_layers=2 n_heads=96"
SIZES += " qk_nope_head_dim=96 v_head_dim=160 n_shared_experts=2 n_activated_experts=6"
LATENT, DRAFTS = "q_lora_rank=1000 kv_lora_rank=600 qk_rope_head_dim=32", "n_mtp_layers=2 drafts=2 acceptance=0.7"
GROUPS = "n_routed_experts=576 n_expert_groups=16 n_limited_groups=3"
WORK = "seq_len=200 batch=30720 tokens=7e12 context=200 sequences=50 prompt=100"
WORK += " failures_per_node_day=0.0001 restart_time=200 checkpoint_halt=20"
CLUSTER = "gpus=4096 pipeline=32 expert=32 micro_batch=2"
CASES = {
    "deepseek-v3": f"{SIZES} {LATENT} {DRAFTS} {GROUPS} {WORK} {CLUSTER}",
    "deepseek-v3 context=3000": f"{WORK} {CLUSTER} context=120000",
    f"deepseek-v3 {BF16} utilization=0.5": f"{SIZES} {LATENT} {DRAFTS} {GROUPS} {WORK} {CLUSTER} utilization=0.3",
    f"deepseek-v3 {GQA} {V3_LAYOUT} tensor=2 zero=3 schedule=1f1b precision=fp8": (
        f"{SIZES} {DRAFTS} {WORK} {CLUSTER} n_kv_heads=32 n_routed_experts=320"
    ),
    f"deepseek-v3.2 {V3_LAYOUT} tensor=1 batch=15360 decode_gpus=64 prefill_gpus=64": (
        f"{SIZES} {LATENT} {DRAFTS} {WORK} {CLUSTER} n_routed_experts=320 index_topk=512 index_n_heads=32"
    ),
    "toy": f"{SIZES} {LATENT} {DRAFTS} {WORK} n_routed_experts=32",
    "toy-mha precision=fp32": f"{SIZES} {DRAFTS} {WORK}",
}
"""Plans, and other values of their inputs."""
MACHINE = "memory*0.25 memory_bandwidth*0.25 gpus_per_node*2 fast_link*0.2 slow_link*0.1 price*2 power*3"
MACHINE += " float32*1.5 bfloat16*1.25 fp8*0.75"


@functools.cache
def formulas_of(words: str) -> Formulas:
    return Formulas(plan_of(words).all.values())


def inputs_of(words: str) -> dict[str, float]:
    return {name: figure.value for name, figure in figures_of(words).items() if figure.op == "input"}


# --- explanations


@pytest.mark.parametrize("words", CASES)
def test_explained_formulas_give_the_figures(words: str) -> None:
    assert formulas_of(words).values(inputs_of(words)) == pytest.approx(values_of(words), rel=1e-12)


@pytest.mark.parametrize("words", CASES)
def test_explained_formulas_predict_a_plan_of_other_inputs(words: str) -> None:
    """No figure depends on anything that its explanation does not name, and every change acts on some figure."""
    changes = {axis.name: axis.values[0] for axis in map(read_axis, CASES[words].split())}
    other = changed(setup_of(words), PlanRequest(), changes)
    other = dataclasses.replace(other, hardware=setup_of(f"toy gpus=1 {MACHINE}").hardware)
    found = {name: figure.value for name, figure in named(whole_plan(other).all.values()).items()}
    before, formulas = figures_of(words), formulas_of(words)
    both = {name for name in found.keys() & before.keys() if before[name].op != "input"}
    # V4 is compared with DeepSeek-V3 alone, and an indexer may never pay
    apart = {name for name in found.keys() ^ before.keys() if not name.startswith(("pro_", "flash_", "v41_"))}
    assert apart <= {"v32_crossover", "fp4_size", "fp4_cost", "e8m0_size", "v32_activated"}
    inputs = {name: value for name, value in found.items() if name not in both}
    predicted = formulas.values(inputs, both)
    assert {name: predicted[name] for name in both} == pytest.approx({name: found[name] for name in both}, rel=1e-12)
    acting = {name for name in inputs if name in before and inputs[name] != before[name].value}
    assert acting <= {need for step in formulas.steps.values() for need in step.needs}
    assert changes.keys() <= acting


@pytest.mark.parametrize("words", CASES)
def test_figures_have_titles_sources_and_no_numbers_of_their_own(words: str) -> None:
    """Numbers of a formula are structural ones, 6 N D's, and the seconds of a day."""
    for name, figure in figures_of(words).items():
        assert name.isidentifier() and name == name.lower() and figure.title[:1].isupper(), figure
        assert figure.source or figure.op != "input", figure
    for step in formulas_of(words).steps.values():
        numbers = set(re.findall(r"(?<![\w.])\d[\d.,]*(?: h)?", step.formula))
        assert {number.rstrip(",") for number in numbers} <= {"0", "1", "2", "3", "4", "6", "24 h"}, step.formula


def test_a_name_means_one_thing_in_all_plans() -> None:
    titles: dict[str, set[str]] = {}
    for words in (words for words in CASES if "v3.2" not in words):  # whose norms have an indexer's weights with them
        for name, figure in figures_of(words).items():
            titles.setdefault(name, set()).add(figure.title)
    assert {name: found for name, found in titles.items() if len(found) > 1} == {}


def test_every_figure_is_in_one_section() -> None:
    """And each headline is in V3's plan or in one of a single process, so that no name is misspelt."""
    plan = plan_of("deepseek-v3")
    found = [name for section in plan.sections.values() for name in section]
    assert len(found) == len(set(found)) == len(plan.all) > 300
    assert list(plan.sections) == ["model", "training", "inference", "attention", "reliability"]
    known = plan.all.keys() | plan_of("toy").all.keys()
    assert {name for names in HEADLINES.values() for name in names} | set(COMPARED) <= known


def test_record_has_every_figure_in_base_units() -> None:
    plan = plan_of("deepseek-v3")
    record = plan_record(plan)
    figures = {name: figure for section in record["figures"].values() for name, figure in section.items()}
    assert {name: figure["value"] for name, figure in figures.items()} == {n: f.value for n, f in plan.all.items()}
    units = {figure["unit"] for figure in figures.values()}
    assert units == {"", "B", "FLOP", "s", "token", "$", "J", "1/s"} | {
        *("B/token", "FLOP/token", "s/token", "$/token", "B/s", "FLOP/s", "token/s"),
    }


# --- counts


@st.composite
def works(draw: st.DrawFn, config: ModelConfig) -> dict[str, Any]:
    """Draw what one GPU does with a model: its training, the sequences that it serves, and dtypes."""
    length = st.integers(config.n_mtp_layers + 1, config.max_seq_len)
    return {
        "layout": Layout(
            micro_batch=draw(st.integers(1, 4)),
            recompute=draw(st.sampled_from(["none", "full"])),
            precision=draw(st.sampled_from(["fp32", "bf16", "fp8"])),
            optimizer=draw(st.sampled_from(["adamw", "muon"])),
            moments=draw(st.sampled_from(["float32", "bfloat16"])),
        ),
        **{name: draw(length) for name in ("seq_len", "context", "prompt")},
        "sequences": draw(st.integers(1, 40)),
        "weight_dtype": draw(st.sampled_from(["float32", "bfloat16", "fp8"])),
        "cache_dtype": draw(st.sampled_from(["bfloat16", "fp8"] if config.is_mla else ["bfloat16"])),
    }


PROCESS = {
    "process_parameters": "parameters",
    "process_gradients": "gradients",
    "process_activations": "activations",
    "process_copies": "weights kept for backward",
    "process_head_gradient": "the head's gradient",
}


def check_counts(config: ModelConfig, layout: Layout, seq_len: int, **serving: Any) -> None:
    """Compare the plan of one GPU with dsmini.accounting, which real models are held to."""
    config = dataclasses.replace(config, precision="fp8" if layout.precision == "fp8" else "native")
    served = not (config.is_mla and config.qk_norm)
    one = {"decode_gpus": 1, "prefill_gpus": 1, **serving} if served else {}
    request = PlanRequest(gpus=1, seq_len=seq_len, batch=12, tokens=1e9, **one)
    made = setup(request, Model(config=config, source="a test"), H800)
    found = {name: f.value for name, f in whole_plan(made.with_layout(layout, "a test")).all.items()}
    process = training(config, layout, seq_len)
    wanted = _model_counts(config) | {ours: process.get(theirs, 0) for ours, theirs in PROCESS.items()}
    exact = {name for name, value in wanted.items() if isinstance(value, int)}
    if served:
        wanted |= _serving_counts(config, **serving)
        for stage in ("decode", "prefill"):
            found[f"{stage}_flops"] = found[f"{stage}_matrix_flops"] + found[f"{stage}_other_flops"]
    assert {name: found.get(name, 0) for name in exact} == {name: wanted[name] for name in exact}
    assert {name: found.get(name, 0) for name in wanted} == pytest.approx(wanted, rel=1e-12)
    few = 4 * sum(use.times for use in tensors(config) if use.parameters)  # AdamW's counts of steps
    assert 0 <= process["optimizer"] - found["process_optimizer"] <= few
    assert found["process_memory"] == sum(found[part] for part in (*PROCESS, "process_optimizer"))
    # a mean of chosen keys is not a whole number, and accounting rounds three products a layer down
    rounded = 9 * (config.n_layers + config.n_mtp_layers) if config.attention == "dsa" else 0
    for name, value in _operations(config, seq_len).items():
        assert found.get(name, 0) == pytest.approx(value, rel=1e-12, abs=rounded), name


def training(config: ModelConfig, layout: Layout, seq_len: int) -> dict[str, int]:
    return dict(
        training_bytes(
            config,
            batch_size=layout.micro_batch,
            seq_len=seq_len,
            dtype="float32" if layout.precision == "fp32" else "bfloat16",
            optimizer=layout.optimizer,
            moments=layout.moments,
            recompute=layout.recompute == "full",
        ).by_part
    )


def _model_counts(config: ModelConfig) -> dict[str, float]:
    """Return what a model is: parameters by module."""
    counted = parameters(config)
    of, layers = counted.by_module, config.n_layers
    dense = sum(not config.is_moe(i) for i in range(layers))
    moe = layers - dense
    modules = {
        "attention_parameters": (of["attention"] + of.get("indexer", 0)) // layers,
        "norm_parameters": (of["norms"] - config.dim * (2 if config.embed_norm else 1)) // layers,
    }
    if dense:
        modules["dense_parameters"] = of["dense feed-forward"] // dense
    if moe:
        modules["gate_parameters"] = of["gates"] // moe
        modules["expert_parameters"] = of["routed experts"] // (moe * config.n_routed_experts)
        modules["shared_parameters"] = of.get("shared experts", 0) // moe
    return {
        **modules,
        "dense_layers": dense,
        "moe_layers": moe,
        "vocabulary_parameters": of["embedding"],
        "parameters_main": counted.main,
        "mtp_parameters": counted.mtp,
        "parameters_total": counted.total,
        "parameters_active": counted.active,
        "routing_biases": counted.buffers,
        "mtp_projection_parameters": of.get("mtp projection", 0),
        "mtp_active": sum(n for module, n in counted.active_by_module.items() if module.startswith("mtp ")),
    }


def _operations(config: ModelConfig, seq_len: int) -> dict[str, float]:
    learning = flops_per_token(config, seq_len, training=True, mtp=False)
    return {
        "forward_flops": flops_per_token(config, seq_len).total,
        "training_flops": learning.total,
        "training_flops_mtp": flops_per_token(config, seq_len, training=True).total,
        "training_flops_full_square": flops_per_token(config, seq_len, causal=False, training=True, mtp=False).total,
        "attention_flops": flops_per_token(config, seq_len).by_module["attention over the context"],
        "indexer_flops": sum(n for name, n in learning.by_module.items() if name.endswith(" of the indexer")),
    }


def _serving_counts(
    config: ModelConfig, *, context: int, prompt: int, sequences: int, weight_dtype: Any, cache_dtype: Any
) -> dict[str, float]:
    """Return what one GPU holds, reads and computes. The expected number of experts is a fraction."""
    n, dtypes = sequences, {"dtype": weight_dtype, "cache_dtype": cache_dtype}
    moved = decode_bytes_per_token(config, context=context, batch=n, **dtypes)
    read = prefill_bytes_per_token(config, seq_len=prompt, batch=1, dtype=weight_dtype)
    first = step_flops(config, batch_size=1, seq_len=prompt, training=False, last_logits=True)
    return {
        "model_bytes": weight_bytes(config, weight_dtype, mtp=False).total,
        "active_products": parameters(config).active,
        "kv_cache": kv_bytes_per_token(config, dtype=cache_dtype),
        "mha_kv_cache": mha_kv_bytes_per_token(config, 2),
        "decode_experts_read": expected_experts(config, n),
        "decode_weights_read": n * (moved.weights - moved.by_part["embedding"]),
        "decode_cache_read": n * moved.by_part["cache read"],
        "prefill_weights_read": prompt * (read.weights - read.by_part["embedding"]),
        "decode_flops": n * decode_flops_per_token(config, context=context).total,
        "prefill_flops": first.total,
    }


@given(config=model_configs(), data=st.data())
def test_one_gpu_with_any_model_is_as_counted(config: ModelConfig, data: st.DataObject) -> None:
    check_counts(config, **data.draw(works(config)))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_one_gpu_with_each_config_is_as_counted(path: Path) -> None:
    config = ModelConfig.from_file(path)
    length = min(512, config.max_seq_len)
    dtypes = {"weight_dtype": "bfloat16", "cache_dtype": "fp8" if config.is_mla else "bfloat16"}
    layout = Layout(precision="fp8", micro_batch=2)
    check_counts(config, layout, length, context=length, prompt=length, sequences=3, **dtypes)


# --- parts and wholes

SERVED = ["deepseek-v3", "deepseek-v3 context=32768 drafts=3", "deepseek-v2-lite decode_gpus=4", "toy-mha @laptop"]
TRAINED = ["deepseek-v3", "deepseek-v3 slow_link*0.05", "deepseek-v2-lite", "toy", "toy @laptop"]
RESOURCES = {
    "memory_time": "memory traffic",
    "compute_time": "compute",
    "slow_link_time": "links between nodes",
    "fast_link_time": "links within a node",
}
TRAINING = {
    "computing": "compute",
    "links_between": "links between nodes",
    "links_within": "links within a node",
    "bubble": "latency",
    "update": "memory traffic",
}


@pytest.mark.parametrize("words", SERVED)
def test_a_step_takes_as_long_as_its_slowest_part(words: str) -> None:
    found, binds = values_of(words), plan_record(plan_of(words))["binds"]
    for stage in ("decode", "prefill", *(["verify", "draft"] if "verify_step_time" in found else [])):
        times = {word: found[key] for part, word in RESOURCES.items() if (key := f"{stage}_{part}") in found}
        *_, second, first = sorted(times.values())
        assert found[f"{stage}_step_time"] == first
        assert found[f"{stage}_step_in_turn"] == pytest.approx(sum(times.values()))
        assert found[f"{stage}_binding_ratio"] == pytest.approx(first / second)
        assert stage not in binds or times[binds[stage]] == first
    assert found["decode_time_per_token"] == found["decode_step_time"] == 1 / found["decode_tokens_per_second"]
    assert found["prefill_time_to_first_token"] == found["prefill_step_time"]


@pytest.mark.parametrize("words", TRAINED)
def test_what_binds_training_gains_most_if_it_takes_no_time(words: str) -> None:
    found = values_of(words)
    without = {name: found[f"step_without_{part}"] for part, name in TRAINING.items()}
    assert plan_record(plan_of(words))["binds"]["training"] == min(without, key=lambda name: without[name])
    assert found["training_binding_ratio"] == pytest.approx(found["roof_step_seconds"] / min(without.values()))
    parts = ("computing", "dispatching", "reducing", "bubble", "exchange", "update")
    assert found["roof_step_seconds"] == pytest.approx(sum(found[f"{part}_seconds"] for part in parts))
    assert found["step_seconds"] == max(found["roof_step_seconds"], found["assumed_step_seconds"])


FASTER = {
    "computing": "bfloat16*{} fp8*{}",
    "links_between": "slow_link*{}",
    "links_within": "fast_link*{}",
    "update": "memory_bandwidth*{}",
}


@pytest.mark.parametrize("part", FASTER)
def test_step_without_a_part_is_the_limit_of_faster_machines(part: str) -> None:
    """So a verdict is what twice the rate never gains: other parts bind then."""
    words = f"deepseek-v3 {V3_LAYOUT} expert=8 tensor=2 zero=1 schedule=dualpipe recompute=selective precision=fp8"
    found, without = values_of(words)["roof_step_seconds"], values_of(words)[f"step_without_{part}"]
    twice, fast = (
        values_of(f"{words} {FASTER[part].format(rate, rate)}")["roof_step_seconds"] for rate in ("2", "1e9")
    )
    assert found > twice > without and fast == pytest.approx(without, rel=1e-6)


def test_gpus_together_compute_what_their_tokens_need() -> None:
    """320 GPUs with 60 sequences each: nothing is computed twice, and nothing is left out."""
    found = values_of("deepseek-v3")
    counted = decode_flops_per_token(released("deepseek-v3"), context=4096).total
    assert found["decode_matrix_flops"] + found["decode_other_flops"] == 60 * counted


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipe"])
@pytest.mark.parametrize(("tensor", "expert"), [(1, 4), (2, 8)])
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.2"])
def test_gpus_together_hold_the_model(name: str, schedule: Any, tensor: int, expert: int) -> None:
    """Sum over two stages: all parameters, those that tensor parallelism repeats, and a copy of the embedding."""
    made = setup_of(f"{name} gpus=1 batch=1024")
    layout = Layout(gpus=16, pipeline=2, tensor=tensor, expert=expert, schedule=schedule)
    found = {key: figure.value for key, figure in of_layout(made, layout).items()}
    kinds = [kind for kind in ("first", "last") if f"parameters_{kind}" in found]
    experts = sum(found[f"expert_parameters_{kind}"] for kind in kinds)
    counted = parameters(made.m.config)
    of = counted.by_module
    assert experts * expert == of["routed experts"] + of["mtp routed experts"]
    repeated = sum(n for key, n in of.items() if key.endswith(("norms", "gates", "mtp projection", "indexer")))
    repeated += 62 * 7168 * (1536 + 512 + 64)
    copy = 0 if schedule == "dualpipe" else of["embedding"]
    rest = sum(found[f"parameters_{kind}"] for kind in kinds) - experts
    assert rest * tensor == counted.total - experts * expert + copy + (tensor - 1) * repeated


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["deepseek-v3", "toy", "toy-dense"])
def test_activations_of_one_stage_are_those_of_one_process(recompute: Any, name: str) -> None:
    """Apart are the shorter sequences of multi-token prediction, RoPE's tables, and states between its depths."""
    made = setup_of(f"{name} gpus=1 batch=8")
    config, length = made.m.config, made.workload.seq_len.value
    one, four = (of_layout(made, Layout(gpus=gpus, recompute=recompute, micro_batch=2)) for gpus in (1, 4))
    between = 2 * length * config.dim * 2 * config.n_mtp_layers
    tables = length * 4 * config.qk_rope_head_dim * (1 + config.n_mtp_layers)
    found = four["memory_activations_only"].value + four["memory_working_only"].value
    assert found == pytest.approx(one["process_activations"].value - between - tables, rel=1 / length)


def test_zero_divides_one_part_after_the_other() -> None:
    made = setup_of("deepseek-v3")
    parts = ("weights", "gradients", "master", "moments", "activations")

    def held(zero: Any) -> dict[str, float]:
        figures = of_layout(made, dataclasses.replace(made.layout.layout, zero=zero))
        return {part: figures[f"memory_{part}_middle"].value for part in parts}

    for zero, divided in ((1, {"master", "moments"}), (2, {"gradients"}), (3, {"weights"})):
        before, after = held(zero - 1), held(zero)
        assert {part for part in parts if after[part] < before[part] / 3} == divided
        assert {part for part in parts if after[part] == before[part]} == set(parts) - divided


def test_resources_have_a_word_in_each_vocabulary() -> None:
    """The article asks who owns the limit, the textbook which term of the iron law is largest."""
    words = {
        "WAITING": ("Data", "Data"),
        "MEMORY": ("Machine", "Data"),
        "LINKS_BETWEEN": ("Machine", "Machine"),
        "LINKS_WITHIN": ("Machine", "Machine"),
        "COMPUTE": ("Algorithm", "Machine"),
        "LATENCY": ("Machine", "Algorithm"),
    }
    found = {resource.name: tuple(AXES[way][resource].value for way in Vocabulary) for resource in Resource}
    assert found == words


# --- variations

UP, DOWN = "grows", "falls"
VARIED: list[tuple[str, str, Any]] = [
    # values of one thing, a figure, and its values, factors to the plan's own, or the direction
    ("kv_lora_rank=128,256,512", "kv_cache", [192 * 122 / 70_272, 320 * 122 / 70_272, 1]),
    ("gpus=4096", "assumed_step_seconds", [0.5]),
    ("tokens=7.4e12", "training_days", [0.5]),
    ("price=4", "training_cost", [2]),
    ("utilization=0.7788", "assumed_step_seconds", [0.5]),
    ("context=8192,16384", "decode_gpu_cache", [2, 4]),
    ("sequences=15", "decode_gpu_cache", [0.5]),
    ("cache_dtype=fp8", "kv_cache", [656 / 1152]),
    ("failures_per_node_day=0.013", "mean_time_to_failure", [0.5]),
    ("context=1000,8000", "decode_tokens_per_second", DOWN),
    ("sequences=8,24", "decode_tokens_per_second", DOWN),
    ("sequences=8,24", "decode_gpu_tokens_per_second", UP),
    ("acceptance=0.5,0.9", "speculation_gain", UP),
    ("failures_per_node_day=0.001,0.1", "effective_share_at_any_rate", DOWN),
    ("restart_time=100,1000", "effective_share_at_any_rate", DOWN),
    ("checkpoint_halt=1,100", "elapsed_time", UP),
    ("seq_len=2048,4096", "training_flops", UP),
    ("pipeline=16,8", "memory_needed", UP),
    ("hardware=h800,b200", "training_days", DOWN),
]
OWN = "kv_lora_rank=512 hardware=h800 gpus=2048 batch=15360 context=4096 sequences=30 price=2"
OWN += " cache_dtype=bfloat16 weight_dtype=fp8 precision=fp8 drafts=1"


@pytest.mark.parametrize(("axis", "figure", "wanted"), VARIED)
def test_variation_moves_a_figure_as_it_must(axis: str, figure: str, wanted: Any) -> None:
    made = setup_of("deepseek-v3")
    found = vary(made, PlanRequest(), [read_axis(axis)], (figure,))
    values = [plan.all[figure].value for plan in found.plans.values()]
    assert len(values) == len(found.axes[0].values) and found.names == (figure,)
    if isinstance(wanted, list):
        assert values == pytest.approx([factor * values_of("deepseek-v3")[figure] for factor in wanted], rel=1e-4)
    else:
        assert values == sorted(set(values), reverse=wanted == DOWN)
    assert {plan.setup.layout.how for plan in found.plans.values()} == {made.layout.how}


@pytest.mark.parametrize("axis", OWN.split())
def test_variation_by_the_plans_own_value_changes_nothing(axis: str) -> None:
    found = vary(setup_of("deepseek-v3"), PlanRequest(), [read_axis(axis)])
    (plan,) = found.plans.values()
    assert {name: f.value for name, f in plan.all.items()} == pytest.approx(
        {name: f.value for name, f in plan_of("deepseek-v3").all.items()}, rel=1e-12
    )


# --- all models and machines

MODELS = ["deepseek-v3", "deepseek-v2-lite", "toy", "toy-dense", "toy-mha", "shakespeare"]
QUICK = {("deepseek-v3", "a100-pcie"), ("deepseek-v3", "laptop"), ("deepseek-v2-lite", "gb200-nvl72")}


@pytest.mark.parametrize(
    ("name", "hardware"),
    [
        pytest.param(name, hardware, marks=[] if name == "toy" or (name, hardware) in QUICK else pytest.mark.slow)
        for name in MODELS
        for hardware in known_hardware()
    ],
)
def test_every_model_is_planned_on_every_machine(name: str, hardware: str) -> None:
    plan = plan_of(f"{name} @{hardware}")
    found = {section.name: section for section in sections(plan)}
    for section in found.values():
        assert section.finding.endswith(".") and "None" not in section.finding, section.finding
    assert plan.training.fits == ("reliability" in found) != ("It does not fit: no " in found["training"].finding)
