"""Plans of models with DeepSeek Sparse Attention, against the counts of dsmini.accounting."""

from pathlib import Path
from typing import Any

import pytest

from dsmini.accounting import decode_bytes_per_token, decode_flops_per_token, step_flops
from dsmini.planner.model.attention_savings import attention_savings
from dsmini.planner.model.sparse_attention import SparseSizes, sparse_attention
from dsmini.planner.quantities.quantity import TOKENS
from dsmini.planner.request import PlanRequest
from dsmini.planner.serving.decoding import decode_plan
from dsmini.planner.serving.deployment import deployment, serving_workload
from dsmini.planner.serving.prefill import prefill_plan
from dsmini.planner.setup import Model, setup
from tests.helpers.configs import CONFIGS, refusal, released, written
from tests.helpers.serving_plans import V3, h800, model_of


def test_a_sparse_model_has_the_figures_of_v3_with_its_indexer() -> None:
    """Of decoding at 128K, V3.2's own config and V3's with V3.2's sizes say the same, but for the norms of indexers."""
    context = TOKENS(128 * 1024, "context", "Context", "a test")
    own = attention_savings(model_of(released("deepseek-v3.2")), context)
    assert own is not None and own.pro is None
    twin = sparse_attention(model_of(V3), SparseSizes.published(), context)
    figures, wanted = own.sparse.figures(), twin.figures()
    assert figures.keys() == wanted.keys()
    for name in figures.keys() - {"v32_token_flops"}:
        assert figures[name].value == wanted[name].value, name
    assert wanted["v32_token_flops"].value - figures["v32_token_flops"].value == 2 * 61 * 256


@pytest.mark.parametrize("name", ["deepseek-v3.2", "toy-dsa"])
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_decoding_of_a_sparse_model_equals_the_counts(name: str, dtype: Any) -> None:
    """Operations of a step, and cache that it reads, on one GPU, below and above index_topk."""
    config, memory = released(name), h800(memory=1e15)
    for context in (config.index_topk, 3 * config.index_topk):
        workload = serving_workload(sequences=1, context=context)
        made = deployment("decode", weight_dtype="bfloat16", cache_dtype=dtype)
        times = decode_plan(model_of(config), memory, workload, made).times
        counted = decode_flops_per_token(config, context=context)
        assert times.matrix_flops.value + times.other_flops.value == pytest.approx(counted.total, rel=1e-12)
        moved = decode_bytes_per_token(config, context=context, cache_dtype=dtype).by_part["cache read"]
        assert times.cache_read is not None and times.cache_read.value == pytest.approx(moved, rel=1e-12)


@pytest.mark.parametrize("name", ["deepseek-v3.2", "toy-dsa"])
@pytest.mark.parametrize("prompt", [50, 256])
def test_prompts_of_a_sparse_model_equal_the_counts(name: str, prompt: int) -> None:
    config = released(name)
    made = deployment("prefill", weight_dtype="bfloat16")
    workload = serving_workload(prompts=1, prompt=prompt)
    times = prefill_plan(model_of(config), h800(memory=1e15), workload, made).times
    counted = step_flops(config, batch_size=1, seq_len=prompt, training=False, last_logits=True)
    assert times.matrix_flops.value + times.other_flops.value == pytest.approx(counted.total, rel=1e-12)


def test_the_warm_up_has_no_plan(tmp_path: Path) -> None:
    text = (CONFIGS / "toy-dsa.toml").read_text().replace('dsa_stage = "sparse"', 'dsa_stage = "warmup"')
    model = Model.from_file(written(tmp_path, text, "x.toml"))
    said = refusal(setup, PlanRequest(hardware="h800"), model, h800())
    assert said.endswith("x.toml has train.dsa_stage='warmup', which has no plan; use dsa_stage='sparse'")
