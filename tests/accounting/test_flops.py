"""Floating-point operations, counted from the config, against print and against torch's counter."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsmini import ModelConfig, Transformer
from dsmini.accounting import decode_flops_per_token, flops_per_token, parameters, step_flops
from dsmini.nn.mla import attention_work
from tests.helpers.accounting import ATTENTIONS, DTYPES, GROUPED, WHOLE, attention_by, explicit, form_of, sized
from tests.helpers.configs import released
from tests.helpers.strategies import model_configs

V3 = released("deepseek-v3")
V2 = released("deepseek-v2")


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

PLAIN: dict[str, dict[str, Any]] = {
    "mla": {},
    "mla, query not compressed": {"q_lora_rank": None},
    "mha": {"attention": "mha"},
    "gqa": {"attention": "gqa", "n_heads": 6, "n_kv_heads": 2},
    "mqa": {"attention": "mqa"},
    "no shared experts": {"n_shared_experts": 0},
}
SUFFIXES = {
    r"head": "head",
    r"attn\.w\w+": "attention",
    r"attn": "attention and its context",
    r"ffn\.w[123]": "dense feed-forward",
    r"ffn\.gate": "gates",
    r"ffn\.shared_experts": "shared experts",
    r"ffn\.experts": "routed experts",
}
B, S = 2, 13


def measured(config: ModelConfig, training: bool = False, losses: bool = False) -> FlopCounterMode:
    """Return what torch counts in a model of products that it can count.

    It takes grouped_mm and a CPU's flash attention for nothing. In FP64 experts are multiplied one by one; attention
    is made to hold its square of logits.
    """
    model = Transformer(config).double()
    tokens = torch.randint(0, config.vocab_size, (B, S))
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(training), attention_by(explicit, WHOLE):
        result: Tensor = model.losses(tokens, tokens).total if losses else model(tokens).sum()
        if training:
            result.backward()
    return counter


def dense(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"vocab_size": 51, "dim": 46, "inter_dim": 78, "moe_inter_dim": 30, "v_head_dim": 22}
    experts = {"n_routed_experts": 5, "n_activated_experts": 2, "n_expert_groups": 1, "n_limited_groups": 1}
    layers = {"n_layers": 2, "n_dense_layers": 2, "n_mtp_layers": 0}
    return ModelConfig(**{**sizes, **experts, **layers, **changes})


@pytest.mark.parametrize("case", PLAIN)
def test_flops_of_each_module_against_torch(case: str) -> None:
    """Count exactly: torch too does not call the weighted sum of the experts' outputs a matrix product."""
    config = dense(**{"n_dense_layers": 1, "n_shared_experts": 2} | PLAIN[case])
    torchs = Counter[str]()
    for name, counts in measured(config).get_flop_counts().items():
        inner = re.sub(r"^Transformer\.(layers\.\d+\.)?", "", name)
        for pattern, module in SUFFIXES.items():
            if re.fullmatch(pattern, inner):
                torchs[module] += sum(counts.values())
    torchs["attention over the context"] = torchs.pop("attention and its context") - torchs["attention"]
    ours = flops_per_token(config, S, causal=False).by_module
    assert {module: count * B * S for module, count in ours.items()} == torchs - Counter()
    training = flops_per_token(config, S, causal=False, training=True).total * B * S
    # the chunked cross-entropy makes its products at another time, and as many
    assert training == measured(config, True).get_total_flops() == measured(config, True, losses=True).get_total_flops()


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


@pytest.mark.parametrize("context", [65, 128])
@pytest.mark.parametrize("case", ATTENTIONS)
def test_flops_of_decoding_against_torch(case: str, context: int) -> None:
    """Equal where the cache has no more rows than there are tokens; else it may read some that are empty."""
    config = sized(**ATTENTIONS[case])
    model = Transformer(config).double()
    tokens = torch.randint(0, 51, (1, context))

    def ran(rows: int) -> int:
        cache = model.new_cache(1, rows, form=form_of(case))
        model(tokens[:, :-2], cache=cache)
        model(tokens[:, -2:-1], cache=cache)
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, -1:], cache=cache)
        return counter.get_total_flops() - 2 * (config.n_layers - 1) * config.n_activated_experts * config.dim

    least = decode_flops_per_token(config, context=context, form=form_of(case)).total
    assert least == ran(context)
    assert least <= ran(config.max_seq_len)


@given(config=model_configs())
def test_the_form_counted_is_the_one_the_layer_takes(config: ModelConfig) -> None:
    """Once a few tokens are cached."""
    counted = decode_flops_per_token(config, context=config.max_seq_len)
    if not config.is_mla or config.qk_norm:
        assert counted == decode_flops_per_token(config, context=config.max_seq_len, form="expanded")
        return
    form = attention_work(Transformer(config).layers[0].attn, 1, 64).cheaper  # pyright: ignore
    assert form == "absorbed"
    assert counted == decode_flops_per_token(config, context=config.max_seq_len, form=form)


def test_absorbing_v3_is_cheaper_from_the_second_token_on() -> None:
    absorbed, expanded = (decode_flops_per_token(V3, context=4096, form=form) for form in ("absorbed", "expanded"))
    assert decode_flops_per_token(V3, context=4096) == absorbed
    assert absorbed.total == 2 * parameters(V3).active + 61 * 2 * 4096 * 128 * (2 * 512 + 64)
    assert expanded.total > 10 * absorbed.total
    assert expanded.by_module["expanding the cache"] == 61 * 2 * 4096 * 512 * 128 * 256


# --- a step


def run_flops(
    config: ModelConfig, b: int, s: int, dtype: str, training: bool, recompute: bool = False, block: int = WHOLE
) -> int:
    """Return what torch counts of a step whose attention makes its logits."""
    model = Transformer(config, compute_dtype=DTYPES[dtype])
    tokens = torch.randint(0, 51, (b, s))
    counter = FlopCounterMode(display=False, custom_mapping=GROUPED)
    with counter, torch.set_grad_enabled(training), attention_by(explicit, block):
        if training:
            model.losses(tokens, tokens, recompute=recompute).total.backward()
        else:
            model(tokens)
    return counter.get_total_flops()


MIXED = "depths with and without experts"
STEPS = ["absorbed", "query not compressed", "mha", "gqa", "no shared experts", MIXED]
PRECISIONS = [("float32", "native"), ("bfloat16", "native"), ("bfloat16", "fp8")]
RARE = [pytest.param(case, *how, marks=pytest.mark.slow) for how in PRECISIONS[1:] for case in STEPS[1:]]


@pytest.mark.parametrize(
    ("case", "dtype", "precision"),
    [*((case, *PRECISIONS[0]) for case in STEPS), *((STEPS[0], *how) for how in PRECISIONS[1:]), *RARE],
)
def test_flops_of_a_step_against_torch(case: str, dtype: str, precision: Any) -> None:
    """All queries at once, no padded experts, two depths, of which the mixed case has one dense."""
    others: dict[str, dict[str, Any]] = {"no shared experts": {"n_shared_experts": 0}, MIXED: {"n_dense_layers": 4}}
    config = sized(**(ATTENTIONS | others)[case], n_mtp_layers=2, precision=precision)
    for training, recompute in ((False, False), (True, False), (True, True)):
        how: dict[str, Any] = {"training": training, "recompute": recompute}
        counted = step_flops(config, batch_size=2, seq_len=30, causal=False, **how)
        assert counted.total == run_flops(config, 2, 30, dtype, **how)


@pytest.mark.parametrize("precision", ["native", pytest.param("fp8", marks=pytest.mark.slow)])
def test_flops_of_a_step_are_a_lower_bound(precision: Any) -> None:
    """Two blocks of queries see parts of the square, and experts are padded in BF16."""
    config = sized(n_routed_experts=4, n_mtp_layers=2, precision=precision)
    for training, recompute in ((False, False), (True, False), (True, True)):
        how: dict[str, Any] = {"training": training, "recompute": recompute}
        least = step_flops(config, batch_size=2, seq_len=140, **how).total
        assert least < run_flops(config, 2, 140, "bfloat16", **how, block=70) < 1.5 * least
