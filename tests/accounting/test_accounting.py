"""Counted from the config alone, against the model that is built, against torch's counter, against print."""

import dataclasses
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsmini import ModelConfig, Transformer
from dsmini.accounting import flops_per_token, kv_bytes_per_token, mha_kv_bytes_per_token, mha_twin, parameters
from dsmini.nn import attention, causal_attention, mla
from tests.helpers.strategies import model_configs

CONFIGS = Path(__file__).parents[2] / "configs"


def released(name: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace(ModelConfig.from_file(CONFIGS / f"{name}.toml"), **changes)


V3 = released("deepseek-v3")
V2 = released("deepseek-v2")

# A parameter's name, without its block's, to the module it is counted in.
MODULES = {
    r"embed\.weight": "embedding",
    r"head\.weight": "head",
    r"eh_proj\.weight": "projection",
    r"([eh]|embed_|attn_|ffn_|attn\.q_|attn\.kv_|attn\.[qk]_head_)?norm\.weight": "norms",
    r"attn\.w\w+\.weight": "attention",
    r"ffn\.w[123]\.weight": "dense feed-forward",
    r"ffn\.gate\.weight": "gates",
    r"ffn\.experts\.w[123]": "routed experts",
    r"ffn\.shared_experts\.w[123]\.weight": "shared experts",
}


def module_of(name: str) -> str:
    inner = re.sub(r"^(layers\.\d+\.|mtp\.\d+\.(block\.)?)", "", name)
    (module,) = [module for pattern, module in MODULES.items() if re.fullmatch(pattern, inner)]
    return f"mtp {module}" if name.startswith("mtp.") else module


def check_against_the_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    counted = parameters(config)
    built = Counter[str]()
    for name, parameter in model.named_parameters():
        built[module_of(name)] += parameter.numel()
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.by_module == built
    assert counted.buffers == sum(b.numel() for b in model.buffers())
    assert counted.mtp == sum(p.numel() for p in model.mtp.parameters())
    assert counted.main == counted.total - counted.mtp


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_parameters_of_the_released_sizes(path: Path) -> None:
    check_against_the_model(ModelConfig.from_file(path))


@pytest.mark.parametrize("kind", ["mla", "mha", "gqa", "mqa"])
@pytest.mark.parametrize("n_shared_experts", [0, 1, 3])
@pytest.mark.parametrize("n_mtp_layers", [0, 2])
@pytest.mark.parametrize("n_dense_layers", [0, 2, 3])
def test_parameters_of_each_kind(kind: Any, n_shared_experts: int, n_mtp_layers: int, n_dense_layers: int) -> None:
    check_against_the_model(
        ModelConfig(
            attention=kind,
            n_kv_heads=2 if kind == "gqa" else None,
            n_layers=3,
            n_dense_layers=n_dense_layers,
            n_shared_experts=n_shared_experts,
            n_mtp_layers=n_mtp_layers,
        )
    )


@given(config=model_configs())
def test_parameters_of_any_model(config: ModelConfig) -> None:
    check_against_the_model(config)


@given(config=model_configs())
def test_active_parameters_of_any_model(config: ModelConfig) -> None:
    """What a token meets: all matrices but the embedding, of the routed experts the chosen."""
    counted, chosen = parameters(config), config.n_activated_experts
    for prefix in ("", "mtp "):
        want = {k: v for k, v in counted.by_module.items() if k.startswith("mtp ") == bool(prefix)}
        for without in ("embedding", "norms"):
            want.pop(prefix + without, None)
        if routed := want.get(prefix + "routed experts"):
            want[prefix + "routed experts"] = routed * chosen // config.n_routed_experts
        if prefix and config.n_mtp_layers:
            want["mtp head"] = config.n_mtp_layers * counted.by_module["head"]
        got = {k: v for k, v in counted.active_by_module.items() if k.startswith("mtp ") == bool(prefix)}
        assert got == want
        if not prefix:
            assert counted.active == sum(want.values())


def test_v3_as_printed() -> None:
    """671B, 37B active; MTP 11.5B of its own, 2.4B active: DeepSeek-V3 report and model card."""
    counted = parameters(V3)
    assert counted.main == 671_026_404_352
    assert parameters(dataclasses.replace(V3, n_mtp_layers=0)).total == counted.main
    assert parameters(dataclasses.replace(V3, n_mtp_layers=0)).buffers == 14_848
    assert counted.buffers == 14_848 + 256
    assert round(counted.active / 1e9, 2) == 36.62
    assert round((counted.active + counted.by_module["embedding"]) / 1e9, 2) == 37.55

    assert round(counted.mtp / 1e9, 3) == 11.610
    assert round((counted.mtp - counted.by_module["mtp projection"]) / 1e9, 3) == 11.507
    assert counted.mtp - counted.by_module["mtp projection"] == pytest.approx(11.5e9, rel=0.005)
    met = sum(n for k, n in counted.active_by_module.items() if k.startswith("mtp ") and k != "mtp projection")
    assert met + counted.by_module["embedding"] == pytest.approx(2.4e9, rel=0.02)


def test_other_models_as_printed() -> None:
    """In units of a billion, from the models' reports; Moonlight's are without embedding and head."""
    v2, lite = parameters(V2), parameters(released("deepseek-v2-lite"))
    kimi, moonlight = parameters(released("kimi-k2")), parameters(released("moonlight"))
    assert (v2.total, v2.active) == pytest.approx((236e9, 21e9), abs=0.5e9)
    assert (lite.total, lite.active) == pytest.approx((15.7e9, 2.4e9), abs=0.06e9)
    assert (kimi.total, kimi.active) == pytest.approx((1026e9, 32e9), abs=0.5e9)
    ends = moonlight.by_module["head"]
    assert (moonlight.total - 2 * ends, moonlight.active - ends) == pytest.approx((15.29e9, 2.24e9), abs=0.005e9)


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


def test_cache_as_printed() -> None:
    """The same paper, table 1, in bytes a token: DeepSeek-V3, Qwen-2.5 72B, LLaMA-3.1 405B."""

    def gqa(n_layers: int, n_heads: int) -> ModelConfig:
        heads: dict[str, Any] = {"qk_nope_head_dim": 128, "v_head_dim": 128, "n_heads": n_heads, "n_kv_heads": 8}
        return ModelConfig(attention="gqa", n_layers=n_layers, **heads)

    assert kv_bytes_per_token(V3) == 70_272
    assert kv_bytes_per_token(gqa(80, 64)) == 327_680
    assert kv_bytes_per_token(gqa(126, 128)) == 516_096
    assert kv_bytes_per_token(V3, bytes_per_number=1) == 70_272 // 2


def test_mla_caches_as_much_as_gqa_of_two_and_a_quarter_groups() -> None:
    """DeepSeek-V2 report, table 1: d_c + d_r = 9/2 d_h numbers a layer."""
    assert kv_bytes_per_token(V2, 1) == 4.5 * 128 * 60
    assert kv_bytes_per_token(V2, 1) == 2.25 * (2 * 128) * 60


@given(model_configs())
def test_cache_of_the_mha_twin_needs_no_twin(config: ModelConfig) -> None:
    if config.qk_nope_head_dim % 2 == 0:
        twin = kv_bytes_per_token(mha_twin(config), 2)
        assert mha_kv_bytes_per_token(config, 2) == twin


def test_cache_against_the_mha_twin() -> None:
    """98.24 % needs heads of 128; against the 192-wide keys that MLA expands to it would be 98.59 %."""
    twin = mha_twin(V3)
    assert twin == dataclasses.replace(V3, attention="mha")
    assert kv_bytes_per_token(twin) == 32768 * 61 * 2
    assert 1 - kv_bytes_per_token(V3) / kv_bytes_per_token(twin) == 1 - 576 / 32768
    assert f"{1 - kv_bytes_per_token(V3) / kv_bytes_per_token(twin):.2%}" == "98.24%"
    wider = kv_bytes_per_token(dataclasses.replace(twin, qk_nope_head_dim=192))
    assert f"{1 - kv_bytes_per_token(V3) / wider:.2%}" == "98.59%"


@pytest.mark.parametrize(("kind", "heads"), [("mha", 6), ("gqa", 3), ("mqa", 1)])
def test_cache_of_the_twins(kind: Any, heads: int) -> None:
    sizes: dict[str, Any] = {"n_heads": 6, "qk_nope_head_dim": 10, "v_head_dim": 7, "n_layers": 5, "n_mtp_layers": 1}
    config = ModelConfig(attention=kind, n_kv_heads=3 if kind == "gqa" else None, **sizes)
    assert kv_bytes_per_token(config, 1) == 5 * heads * (10 + 7)
    assert mha_twin(config) == ModelConfig(attention="mha", **sizes)


ATTENTIONS: dict[str, dict[str, Any]] = {
    "mla": {},
    "mla, query not compressed": {"q_lora_rank": None},
    "mha": {"attention": "mha"},
    "gqa": {"attention": "gqa", "n_heads": 6, "n_kv_heads": 2},
    "mqa": {"attention": "mqa"},
}
B, S = 2, 13


def measured(config: ModelConfig, training: bool = False, losses: bool = False) -> FlopCounterMode:
    """What torch counts in a model of only such products as it can count: it takes grouped_mm and a CPU's flash
    attention for nothing. In FP64 experts are multiplied one by one; attention is made to hold its square of logits."""
    model = Transformer(config).double()
    tokens = torch.randint(0, config.vocab_size, (B, S))
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(training), pytest.MonkeyPatch.context() as patch:
        for module in (attention, mla):
            patch.setattr(module, "causal_attention", partial(causal_attention, method="explicit"))
        result: Tensor = model.losses(tokens, tokens).total if losses else model(tokens).sum()
        if training:
            result.backward()
    return counter


def dense(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"vocab_size": 51, "dim": 46, "inter_dim": 78, "moe_inter_dim": 30, "v_head_dim": 22}
    experts = {"n_routed_experts": 5, "n_activated_experts": 2, "n_expert_groups": 1, "n_limited_groups": 1}
    layers = {"n_layers": 2, "n_dense_layers": 2, "n_mtp_layers": 0}
    return ModelConfig(**{**sizes, **experts, **layers, **changes})


@pytest.mark.parametrize("case", ATTENTIONS)
@pytest.mark.parametrize("training", [False, True])
def test_flops_against_torch(case: str, training: bool) -> None:
    config = dense(**ATTENTIONS[case])
    counted = flops_per_token(config, S, causal=False, training=training)
    assert measured(config, training).get_total_flops() == counted.total * B * S
    if training:  # the chunked cross-entropy makes its products at another time, and as many
        assert measured(config, training, losses=True).get_total_flops() == counted.total * B * S


@pytest.mark.parametrize("case", ATTENTIONS)
def test_flops_of_each_module_against_torch(case: str) -> None:
    config = dense(**ATTENTIONS[case], n_dense_layers=1, n_shared_experts=2)
    suffixes = {
        r"head": "head",
        r"attn\.w\w+": "attention",
        r"attn": "attention and its context",
        r"ffn\.w[123]": "dense feed-forward",
        r"ffn\.gate": "gates",
        r"ffn\.shared_experts": "shared experts",
        r"ffn\.experts": "routed experts",
    }
    torchs = Counter[str]()
    for name, counts in measured(config).get_flop_counts().items():
        inner = re.sub(r"^Transformer\.(layers\.\d+\.)?", "", name)
        for pattern, module in suffixes.items():
            if re.fullmatch(pattern, inner):
                torchs[module] += sum(counts.values())
    torchs["attention over the context"] = torchs.pop("attention and its context") - torchs["attention"]
    ours = flops_per_token(config, S, causal=False).by_module
    assert {module: count * B * S for module, count in ours.items()} == torchs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("n_shared_experts", [0, 2])
def test_flops_of_experts_against_torch(training: bool, n_shared_experts: int) -> None:
    """Exactly: what weighs and adds the experts' outputs is no matrix product to torch either."""
    config = dense(n_dense_layers=1, n_shared_experts=n_shared_experts)
    counted = flops_per_token(config, S, causal=False, training=training)
    assert measured(config, training).get_total_flops() == counted.total * B * S


@pytest.mark.parametrize("n_mtp_layers", [1, 2])
def test_flops_of_multi_token_prediction_against_torch(n_mtp_layers: int) -> None:
    """Depth k runs on S - k positions, and on so many the count is exact."""
    config = dense(n_mtp_layers=n_mtp_layers, n_dense_layers=2 + n_mtp_layers)

    def depths(count: int, seq_len: int) -> int:
        """FLOPs of the first `count` depths over a batch."""
        part = dataclasses.replace(config, n_mtp_layers=count, n_dense_layers=2 + count)
        by_module = flops_per_token(part, seq_len, causal=False, training=True).by_module
        return B * seq_len * sum(flops for module, flops in by_module.items() if module.startswith("mtp "))

    main = flops_per_token(config, S, causal=False, training=True, mtp=False).total * B * S
    mtp = sum(depths(k, S - k) - depths(k - 1, S - k) for k in range(1, n_mtp_layers + 1))
    assert measured(config, training=True, losses=True).get_total_flops() == main + mtp


def test_multi_token_prediction_runs_in_training() -> None:
    config = ModelConfig(n_mtp_layers=2)
    without = dataclasses.replace(config, n_mtp_layers=0)
    for causal in (True, False):
        forward = flops_per_token(config, 64, causal)
        assert forward == flops_per_token(config, 64, causal, mtp=False) == flops_per_token(without, 64, causal)
        training = flops_per_token(config, 64, causal, training=True)
        assert training == flops_per_token(config, 64, causal, training=True, mtp=True)
        assert training.total == 3 * flops_per_token(config, 64, causal, mtp=True).total
        assert training.by_module["mtp head"] == 2 * training.by_module["head"]
        assert flops_per_token(config, 64, causal, training=True, mtp=False).total == 3 * forward.total


@given(config=model_configs())
def test_flops_of_any_model(config: ModelConfig) -> None:
    """Twice the active parameters, and what grows with the context: of which causality leaves a half."""
    full = flops_per_token(config, 17, causal=False, mtp=True).by_module
    half = flops_per_token(config, 17, causal=True, mtp=True).by_module
    over = {"attention over the context", "mtp attention over the context"} & set(full)
    active = parameters(config).active_by_module
    assert full == {module: 2 * count for module, count in active.items()} | {module: full[module] for module in over}
    assert half == {module: count // 2 if module in over else count for module, count in full.items()}


def test_half_the_square_is_what_a_causal_mask_keeps() -> None:
    """But for the diagonal: T (T + 1) / 2 pairs are kept, T^2 / 2 are counted."""
    over, t = "attention over the context", 100
    kept = sum(flops_per_token(dense(), keys, causal=False).by_module[over] for keys in range(1, t + 1))
    assert kept / (t * flops_per_token(dense(), t).by_module[over]) == pytest.approx((t + 1) / t, rel=1e-12)


@pytest.mark.parametrize("seq_len", [0, -3])
def test_a_sequence_has_tokens(seq_len: int) -> None:
    with pytest.raises(ValueError, match=f"seq_len={seq_len} is not positive; use 1 or more"):
        flops_per_token(V3, seq_len)
