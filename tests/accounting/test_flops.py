"""Floating-point operations, counted from the config, against print and against torch's counter."""

from typing import Any

import pytest
import torch
from hypothesis import given
from torch.utils.flop_counter import FlopCounterMode

from dsmini import ModelConfig, Transformer, ops
from dsmini.accounting import decode_flops_per_token, flops_per_token, parameters, step_flops
from dsmini.accounting.flops import is_absorbed
from dsmini.nn.mla import attention_work
from dsmini.training.optim import begin_stage
from tests.helpers.accounting import ATTENTIONS, DTYPES, GROUPED, SHARED, WHOLE, attention_by, explicit, form_of, sized
from tests.helpers.configs import DSA, released
from tests.helpers.configs import V32 as V32_INDEXER
from tests.helpers.strategies import model_configs

V3 = released("deepseek-v3")
V2 = released("deepseek-v2")
V32 = released("deepseek-v3", **V32_INDEXER)
MIXED = "depths with and without experts"
CASES: dict[str, dict[str, Any]] = {
    **ATTENTIONS,
    "no shared experts": {"n_shared_experts": 0},
    MIXED: {"n_dense_layers": 4},
}


# --- a token, as the papers count


@pytest.mark.parametrize(("config", "printed", "exactly"), [(V3, 250, 250.4), (V2, 155, 155.3)], ids=["V3", "V2"])
def test_training_flops_as_printed(config: ModelConfig, printed: float, exactly: float) -> None:
    """GFLOP a token at 4096: "Insights into DeepSeek-V3", table 2. Without MTP, the causal half."""
    counted = flops_per_token(config, 4096, training=True, mtp=False).total / 1e9
    assert counted == pytest.approx(printed, rel=0.005)
    assert round(counted, 1) == exactly
    formula = 6 * parameters(config).active + 3 * config.n_layers * config.n_heads * (192 + 128) * 4096
    assert counted * 1e9 == formula


@pytest.mark.parametrize(("causal", "tflops"), [(True, 385), (False, 432)])
def test_flops_that_the_printed_utilisation_implies(causal: bool, tflops: float) -> None:
    """The same paper, table 4: TFLOPS a GPU, 272.80B tokens a day on 2048 of them."""
    implied = tflops * 1e12 * 2048 * 86400 / 272.80e9
    assert flops_per_token(V3, 4096, causal=causal, training=True, mtp=False).total == pytest.approx(implied, rel=0.01)


# --- a token, against torch


def counted(
    config: ModelConfig, b: int, s: int, dtype: Any = "float32", block: int = WHOLE, stage: Any = None, **how: bool
) -> int:
    """Return what torch counts of a step whose attention makes its square of logits. Args: as of step_flops."""
    model, training = Transformer(config, compute_dtype=DTYPES[dtype]), how.pop("training")
    if stage is not None:
        begin_stage(model, stage)
    tokens = torch.randint(0, config.vocab_size, (b, s))
    counter = FlopCounterMode(display=False, custom_mapping=GROUPED)
    with ops.use("eager"), counter, torch.set_grad_enabled(training), attention_by(explicit, block):
        if training:
            model.losses(tokens, tokens, **how).total.backward()
        else:
            model(tokens)
    return counter.get_total_flops()


STEPS: list[dict[str, bool]] = [
    {"training": training, "recompute": recompute}
    for training, recompute in ((False, False), (True, False), (True, True))
]


@given(config=model_configs())
def test_flops_of_any_model(config: ModelConfig) -> None:
    """Twice the active parameters, and what grows with the context: of which causality leaves a half."""
    full = flops_per_token(config, 17, causal=False, mtp=True).by_module
    half = flops_per_token(config, 17, causal=True, mtp=True).by_module
    grows = ("attention over the context", "scores of the indexer")
    over = {prefix + name for prefix in ("", "mtp ") for name in grows} & set(full)
    active = parameters(config).active_by_module
    assert full == {module: 2 * count for module, count in active.items()} | {module: full[module] for module in over}
    for module, count in full.items():
        k = min(17, config.index_topk or 17) if module.endswith("the context") else 17
        share = (k * k + 2 * k * (17 - k)) / (2 * 17 * 17) if module in over else 1
        assert abs(half[module] - share * count) < config.n_layers + 1  # which are rounded down one by one


# --- decoding


def decoded(config: ModelConfig, context: int, form: Any, rows: int) -> int:
    """Return what torch counts of decoding the last of these tokens, with a cache of this many rows."""
    model, tokens = Transformer(config).double(), torch.randint(0, 51, (1, context))
    cache = model.new_cache(1, rows, form=form)
    with ops.use("eager"):
        for part in (tokens[:, :-2], tokens[:, -2:-1]):
            model(part, cache)
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, -1:], cache)
    return counter.get_total_flops()


@pytest.mark.parametrize("context", [65, 128])
@pytest.mark.parametrize("case", ATTENTIONS)
def test_flops_of_decoding_against_torch(case: str, context: int) -> None:
    """Equal where the cache has no more rows than there are tokens; else it may read some that are empty."""
    config, form = sized(**ATTENTIONS[case]), form_of(case)
    least = decode_flops_per_token(config, context=context).total
    least += 2 * (config.n_layers - 1) * config.n_activated_experts * config.dim  # the sum of experts, as a product
    assert least == decoded(config, context, form, context) <= decoded(config, context, form, config.max_seq_len)


@given(config=model_configs())
def test_the_form_counted_is_the_one_the_layer_takes(config: ModelConfig) -> None:
    """Once a few tokens are cached."""
    if is_absorbed(config):
        assert attention_work(Transformer(config).layers[0].attn, 1, 64).cheaper == "absorbed"  # pyright: ignore


# --- a step


KINDS = ["absorbed", "query not compressed", "mha", "gqa", "no shared experts", MIXED]
PRECISIONS = [("float32", "native"), ("bfloat16", "native"), ("bfloat16", "fp8")]
RARE = [pytest.param(case, *how, marks=pytest.mark.slow) for how in PRECISIONS[1:] for case in KINDS[1:]]


@pytest.mark.parametrize(
    ("case", "dtype", "precision"),
    [*((case, *PRECISIONS[0]) for case in KINDS), *((KINDS[0], *how) for how in PRECISIONS[1:]), *RARE],
)
def test_flops_of_a_step_against_torch(case: str, dtype: str, precision: Any) -> None:
    """All queries at once, no padded experts, two depths, of which the mixed case has one dense."""
    config = sized(**CASES[case], n_mtp_layers=2, precision=precision)
    for how in STEPS:
        ours = step_flops(config, batch_size=2, seq_len=30, causal=False, **how)
        assert ours.total == counted(config, 2, 30, dtype, **how)


@pytest.mark.parametrize("precision", ["native", pytest.param("fp8", marks=pytest.mark.slow)])
def test_flops_of_a_step_are_a_lower_bound(precision: Any) -> None:
    """Two blocks of queries see parts of the square, and experts are padded in BF16."""
    config = sized(n_routed_experts=4, n_mtp_layers=2, precision=precision)
    for how in STEPS:
        least = step_flops(config, batch_size=2, seq_len=140, **how).total
        assert least < counted(config, 2, 140, "bfloat16", 70, **how) < 1.5 * least


def test_blocks_of_several_residual_streams_are_made_again_to_their_end() -> None:
    """The streams read the last product. Their own end is after the last block, in a depth of MTP inside of it."""
    config = sized(hc_mult=4, n_mtp_layers=1)
    once, again = (step_flops(config, batch_size=2, seq_len=30, recompute=r).by_module for r in (False, True))
    name, row = "hyper-connections", 4 * config.dim
    connections = 2 * (2 + 4) * 4 * row
    assert again[name] - once[name] == 2 * 30 * 2 * config.n_layers * connections
    assert again[f"mtp {name}"] - once[f"mtp {name}"] == 2 * 29 * 2 * (connections + 4 * row)
    assert all(again[name] == 4 / 3 * once[name] for name in ("dense feed-forward", "shared experts", "attention"))


# --- indexers


@pytest.mark.parametrize("context", [5, 8, 9, 100])
def test_operations_of_decoding_against_torch(context: int) -> None:
    """But for the weighted sum over the indexer's heads, which the papers leave out. Up to k keys it is not asked."""
    config, heads = sized(**DSA, n_mtp_layers=0, n_dense_layers=3), DSA["index_n_heads"]
    least = decode_flops_per_token(config, context=context).total
    sums = 2 * 3 * heads * context
    unused = 2 * 3 * heads * (32 * (context + 20) + 40)  # queries, their weights and scores where there is no choice
    ran = decoded(config, context, "absorbed", context)
    assert ran == (least + sums if context > 8 else least - unused)


@pytest.mark.parametrize("target", ["own", "served"])
def test_operations_of_shared_choices_against_torch(target: str) -> None:
    """One of three layers has no indexer. It computes a loss only where the indexer learns from it."""
    config = sized(**SHARED | {"indexer_target": target, "n_mtp_layers": 1, "n_routed_experts": 4})
    ours = step_flops(config, batch_size=2, seq_len=60, causal=False, dsa_stage="sparse")
    main, losses = 2, 2 if target == "own" else 3
    sums = 2 * 2 * SHARED["index_n_heads"] * (main * 60**2 + 59**2 + 3 * (losses * 60**2 + 59**2))
    assert counted(config, 2, 60, stage="sparse", training=True) == ours.total + sums


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize(
    ("q_lora_rank", "recompute"),
    [(20, True), (None, False), *(pytest.param(*rare, marks=pytest.mark.slow) for rare in ((20, False), (None, True)))],
)
def test_operations_of_a_training_step_against_torch(stage: Any, q_lora_rank: int | None, recompute: bool) -> None:
    """But for the weighted sums over the indexer's heads: picks, the loss, and two for its gradients."""
    config = sized(**DSA, n_mtp_layers=2, q_lora_rank=q_lora_rank, n_routed_experts=4)
    ours = step_flops(config, batch_size=2, seq_len=60, causal=False, recompute=recompute, dsa_stage=stage)
    sums = 2 * 2 * DSA["index_n_heads"] * (3 * 60**2 + 59**2 + 58**2) * 4 * (1 + recompute)
    assert counted(config, 2, 60, stage=stage, training=True, recompute=recompute) == ours.total + sums


def test_the_loss_of_an_indexer_compares_all_keys_or_the_picked_ones() -> None:
    """By hand: V3.2 at 4096 tokens, with the target's logits of all keys in both stages."""
    all_, picked = 4096 * 4096 / 2, 2048 * 2048 / 2 + 2048 * 2048
    for stage, compared in (("warmup", all_), ("sparse", picked)):
        ours = flops_per_token(V32, 4096, training=True, mtp=False, dsa_stage=stage).by_module
        loss = 2 * (3 * 64 * 128 * compared + 128 * 192 * all_)
        assert ours["loss of the indexer"] == 61 * loss / 4096
