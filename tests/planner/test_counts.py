"""A plan of one GPU counts what dsmini.accounting counts, which real models are held to."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini import ModelConfig, accounting
from dsmini.accounting.memory import TABLES
from dsmini.accounting.tensors import SIZES
from dsmini.planner.figure import Figure
from dsmini.planner.hardware import load_hardware
from dsmini.planner.model import ModelFigures
from dsmini.planner.pages import ten_lines
from dsmini.planner.plan import make_plan
from dsmini.planner.request import Model, PlanRequest
from dsmini.planner.serving import Deployment, Served, Service, ServingMemory
from dsmini.planner.stages import places
from tests.helpers.configs import released
from tests.helpers.plans import every_of, plan_of
from tests.helpers.strategies import model_configs

H800 = load_hardware("h800")


@st.composite
def works(draw: st.DrawFn, config: ModelConfig) -> dict[str, Any]:
    """Draw what one GPU does with a model: its training, the sequences that it serves, and dtypes."""
    length = st.integers(config.n_mtp_layers + 1, config.max_seq_len)
    return {
        "micro_batch": draw(st.integers(1, 4)),
        "recompute": draw(st.sampled_from(["none", "selective", "full"])),
        "precision": draw(st.sampled_from(["fp32", "bf16", "fp8"])),
        "optimizer": draw(st.sampled_from(["adamw", "muon"])),
        "moments": draw(st.sampled_from(["float32", "bfloat16"])),
        **{name: draw(length) for name in ("seq_len", "context", "prompt")},
        "sequences": draw(st.integers(1, 40)),
        "weight_dtype": draw(st.sampled_from(["float32", "bfloat16", "fp8"])),
        "cache_dtype": draw(st.sampled_from(["bfloat16", "fp8"] if config.is_mla else ["bfloat16"])),
    }


def serving_counts(
    config: ModelConfig, *, context: int, prompt: int, sequences: int, weight_dtype: Any, cache_dtype: Any
) -> dict[str, float]:
    """Return what one GPU holds, reads and computes. The expected number of experts is a fraction."""
    n, dtypes = sequences, {"dtype": weight_dtype, "cache_dtype": cache_dtype}
    moved = accounting.decode_bytes_per_token(config, context=context, batch=n, **dtypes)
    read = accounting.prefill_bytes_per_token(config, seq_len=prompt, batch=1, dtype=weight_dtype)
    first = accounting.step_flops(config, batch_size=1, seq_len=prompt, training=False, last_logits=True)
    held = accounting.cache_bytes(config, max_seq_len=context, batch=n, dtype=cache_dtype, mtp=True)
    return {
        "decode weights read": n * (moved.weights - moved.by_part["embedding"]),
        "decode weights": accounting.weight_bytes(config, weight_dtype).total,
        "decode cache": held.total,
        "prefill weights": accounting.weight_bytes(config, weight_dtype, mtp=False).total,
        "decode cache read": n * moved.by_part["cache read"],
        "prefill weights read": prompt * (read.weights - read.by_part["embedding"]),
        "decode flops": n * accounting.decode_flops_per_token(config, context=context).total,
        "prefill flops": first.total,
    }


def serving_planned(service: Service, sequences: int) -> dict[str, float]:
    """Return the same of steps of one GPU, plain ones, and of the memory with drafts."""
    found: dict[str, float] = {}
    for phase, batch, drafts in (("decode", sequences, 1), ("prefill", 1, 0)):
        memory = ServingMemory(service, Deployment(phase=phase, gpus=1, batch=batch, drafts=drafts))
        one = Served(ServingMemory(service, Deployment(phase=phase, gpus=1, batch=batch)))
        experts = service.m.moe_layers * one.experts_read * service.weights.expert_bytes
        over = 2 * one.gpu_tokens * (one.attention_products + one.index_products)
        found |= {
            f"{phase} weights read": one.weights_read + experts,
            f"{phase} weights": memory.gpu_weights,
            f"{phase} flops": one.matrix_flops + one.expert_flops + one.plain_flops + over,
        }
        if phase == "decode":
            found |= {"decode cache": memory.gpu_cache, "decode cache read": one.cache_read}
    return found


@given(config=model_configs(), data=st.data())
def test_one_gpu_with_any_model_is_as_counted(config: ModelConfig, data: st.DataObject) -> None:
    work = data.draw(works(config))
    config = dataclasses.replace(config, precision="fp8" if work["precision"] == "fp8" else "native")
    serving = {name: work[name] for name in ("context", "prompt", "sequences", "weight_dtype", "cache_dtype")}
    served = not (config.is_mla and config.qk_norm)
    request = PlanRequest(gpus=1, batch=12, tokens=1e9, **(work | ({} if served else dict.fromkeys(serving))))
    plan = make_plan(request, Model(config=config, source="a test"), H800)
    found = {name: float(figure) for name, figure in every_of(plan).items()}
    counted = accounting.parameters(config)
    exact = {"parameters_main": counted.main, "mtp_parameters": counted.mtp, "parameters_total": counted.total}
    exact["parameters_active"] = counted.active
    assert {name: found[name] for name in exact} == exact
    assert found["gpu_matrices"] + found["gpu_others"] + found["gpu_experts"] == counted.total
    assert found["memory_gradients"] == accounting.gradient_bytes(config).total
    if work["optimizer"] == "adamw":
        state = (0 if work["precision"] == "fp32" else 4) + 2 * SIZES[work["moments"]]
        assert found["memory_optimizer"] == state * counted.total
    held = accounting.activation_bytes(
        config,
        **{name: work[name] for name in ("seq_len", "recompute")},
        dtype="float32" if work["precision"] == "fp32" else "bfloat16",
        batch_size=work["micro_batch"],
    )
    if not config.n_mtp_layers:  # whose depths have shorter sequences
        assert found["memory_activations"] == pytest.approx(held.total - held.by_part[TABLES], rel=1e-9)
    learning = accounting.flops_per_token(config, work["seq_len"], training=True, mtp=False)
    operations = {
        "training_flops": learning.total,
        "attention_flops": accounting.flops_per_token(config, work["seq_len"]).by_module["attention over the context"],
        "indexer_flops": sum(n for name, n in learning.by_module.items() if name.endswith(" of the indexer")),
    }
    # a mean of chosen keys is not a whole number, and accounting rounds three products a layer down
    rounded = 9 * (config.n_layers + config.n_mtp_layers) if config.attention == "dsa" else 0
    for name, value in operations.items():
        assert found.get(name, 0) == pytest.approx(value, rel=1e-12, abs=rounded), name
    if served:
        assert found["model_bytes"] == accounting.weight_bytes(config, work["weight_dtype"], mtp=False).total
        assert found["kv_cache"] == accounting.kv_bytes_per_token(config, dtype=work["cache_dtype"])
        assert plan.service is not None
        wanted = serving_counts(config, **serving)
        assert serving_planned(plan.service, work["sequences"]) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "fp8"])
@pytest.mark.parametrize("drafts", [0, 1])
def test_serving_of_v4_holds_what_is_counted(drafts: int, cache_dtype: Any) -> None:
    """Window, entries, and the rows of which the next entry is made; with drafts those of multi-token prediction."""
    plan = plan_of(f"toy-v4 cache_dtype={cache_dtype} context=192 weight_dtype=fp4")
    assert plan.service is not None
    memory = ServingMemory(plan.service, Deployment(phase="decode", gpus=1, batch=3, drafts=drafts))
    config, how = plan.model.config, {"max_seq_len": 192, "batch": 3, "dtype": cache_dtype, "mtp": drafts > 0}
    assert memory.gpu_cache == accounting.cache_bytes(config, **how).total
    assert memory.gpu_weights == accounting.weight_bytes(config, "fp4", mtp=drafts > 0).total


def test_tables_of_engram_are_in_the_memory_of_the_host() -> None:
    """A token reads two layers of 16 rows of 16 numbers; no GPU holds the tables, and no step reads them."""
    plan = plan_of("toy-engram weight_dtype=bfloat16")
    found, config = every_of(plan), plan.model.config
    assert found["engram_read"] == 2 * 16 * 16 * 2
    counted = accounting.weight_bytes(config, mtp=False).total
    assert found["engram_bytes"] + plan.served["prefill"].memory.gpu_weights == found["model_bytes"] == counted
    read = accounting.decode_bytes_per_token(config, context=256).by_part
    assert found["engram_read"] == read["engram tables"]
    assert plan.served["prefill"].weights_read < found["model_bytes"] - found["engram_bytes"]
    assert "holds Engram's tables, 4.33389 MB, of which it reads 1.024 kB/token" in " ".join(ten_lines(plan))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_training_of_v4_holds_what_is_counted(recompute: Any) -> None:
    """Compressed attention and several streams, which model_configs does not draw."""
    plan = plan_of(f"toy-v4 gpus=1 batch=8 micro_batch=2 recompute={recompute} n_mtp_layers=0")
    config = dataclasses.replace(plan.model.config, precision=plan.request.precision)
    held = accounting.activation_bytes(config, batch_size=2, seq_len=int(plan.m.seq_len), recompute=recompute)
    assert plan.training.fullest.memory_activations == pytest.approx(held.total - held.by_part[TABLES], rel=1e-9)


def test_gpus_together_compute_what_their_tokens_need() -> None:
    """320 GPUs with 64 sequences each: nothing is computed twice, and nothing is left out."""
    service = plan_of("deepseek-v3").service
    assert service is not None
    d = Deployment(phase="decode", gpus=320, tensor=4, redundant=64, batch=64 * 320)
    one = Served(ServingMemory(service, d))
    counted = accounting.decode_flops_per_token(released("deepseek-v3"), context=4096).total
    over = 2 * one.gpu_tokens * one.attention_products
    assert one.matrix_flops + one.expert_flops + one.plain_flops + over == 64 * counted


@pytest.mark.parametrize("words", ["glm-5.2", "glm-5.2 served", "deepseek-v3.2", "deepseek-v4-flash", "toy-engram"])
def test_parts_of_a_model_are_those_that_are_counted(words: str) -> None:
    """Also where layers differ: an MTP block has an indexer, and neither entries nor an Engram."""
    name, *target = words.split()
    config, s = released(name, **({"indexer_target": target[0]} if target else {})), 4096
    m = ModelFigures(config, Figure("seq_len", s, "token", "", ""), "a test")
    (whole,) = places(config, 1, "1f1b", config.n_layers)

    def passed(recompute: Any) -> float:
        of = m.operations(recompute)
        return sum(n * f for part, n in whole.held.items() for (phase, _), f in of[part].items() if phase != "weights")

    assert passed("none") == pytest.approx(accounting.flops_per_token(config, s, training=True).total, rel=1e-12)
    steps = [accounting.step_flops(config, batch_size=1, seq_len=s, recompute=again).total for again in (False, True)]
    # a plan leaves out that a depth repeats the last product of its shared experts, and that it has a position less
    last = 2 * config.n_shared_experts * config.moe_inter_dim * config.dim * (config.hc_mult == 1)
    assert passed("full") - passed("none") == pytest.approx((steps[1] - steps[0]) / s - last, rel=2 / s)
    experts = whole.held["moe"] * config.n_routed_experts * m.expert_parameters
    assert sum(whole.numbers(m, 1)) + experts == pytest.approx(accounting.parameters(config).total, rel=1e-12)
