"""Parameters and bytes that are held, counted from the config: against models that are built, and against print."""

import dataclasses
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from dsmini import ModelConfig, TrainConfig, Transformer, accounting
from dsmini.accounting import (
    cache_bytes,
    decode_flops_per_token,
    fixed_cache_bytes,
    kv_bytes_per_token,
    mha_kv_bytes_per_token,
    mha_twin,
    parameters,
    training_bytes,
    weight_bytes,
)
from dsmini.accounting.memory import rows_read
from dsmini.config.model import SLACK
from dsmini.nn.fp8 import hold_all_fp8
from dsmini.training.optim import begin_stage, optimizer_state, optimizers
from tests.helpers.accounting import DTYPES, SHARED, V4, sized
from tests.helpers.commands import ROOT
from tests.helpers.configs import CONFIGS, DSA, released
from tests.helpers.strategies import model_configs
from tests.helpers.watching import storage_bytes

V3 = released("deepseek-v3")

# --- against models

MODULES = tomllib.loads(Path(__file__).with_name("cases.toml").read_text())["modules"]


def module_of(name: str) -> str:
    inner = re.sub(r"^(layers\.\d+\.|mtp\.\d+\.(block\.)?)", "", name)
    (module,) = [module for pattern, module in MODULES.items() if re.fullmatch(pattern, inner)]
    return f"mtp {module}" if name.startswith("mtp.") else module


def check_parameters(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    counted, built = parameters(config), Counter[str]()
    for name, parameter in model.named_parameters():
        built[module_of(name)] += parameter.numel()
    assert counted.by_module == built and counted.total == built.total()
    assert counted.buffers == sum(b.numel() for b in model.buffers())
    assert counted.mtp == sum(p.numel() for p in model.mtp.parameters()) == counted.total - counted.main


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_parameters_of_the_released_sizes(path: Path) -> None:
    check_parameters(ModelConfig.from_file(path))


V4_PRINTED = {
    # parameters of the released files without MTP, with routing biases; active without the head; FP8 cache of a token
    "deepseek-v4-flash": (284_332_240_471, 12.7387e9, 3514.25, 0.1188e12),
    "deepseek-v4-pro": (1_572_997_201_763, 47.9225e9, 5031.4375, 0.3155e12),
}


@pytest.mark.parametrize("name", V4_PRINTED)
def test_counts_of_v4_are_those_of_its_files_and_report(name: str) -> None:
    """FLOPs at a million tokens are in units of FP8: a product in BF16 counts twice, one in FP4 half."""
    c, (files, active, cache, flops) = released(name), V4_PRINTED[name]
    counted = parameters(c)
    tables = c.n_hash_layers * c.vocab_size * c.n_activated_experts
    of_mtp = c.n_mtp_layers * c.n_routed_experts
    assert counted.main + counted.buffers - tables - of_mtp == files
    assert counted.active - counted.by_module["head"] == pytest.approx(active, rel=1e-5)
    assert kv_bytes_per_token(c, dtype="fp8") == cache
    ratios = c.compress_ratios or ()
    entries = {ratio: ratios.count(ratio) * 2**20 // ratio for ratio in (4, 128)}
    chosen = c.n_layers * 128 * 584 + entries[128] * 584 + entries[4] * 68
    assert rows_read(c, 2**20, "fp8") == chosen + ratios.count(4) * (c.index_topk or 0) * 584
    assert counted.active_by_module["mtp projection"] == (1 + 4) * c.dim**2, "h_proj is multiplied with each stream"
    fp4 = weight_bytes(c, "fp4", mtp=False).by_part
    assert fp4["routed experts"] == counted.by_module["routed experts"] / 2
    of = decode_flops_per_token(c, context=2**20).by_module
    weight = {"attention over the context": 2, "scores of the indexer": 0.5}
    assert sum(n * weight.get(module, 1) for module, n in of.items()) == pytest.approx(flops, rel=1e-3)


def held(model: Transformer) -> int:
    return sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()])


def check_counts(config: ModelConfig, rows: int = 3) -> None:
    """Compare parameters, weights in each dtype, and the storage of caches with what is built."""
    check_parameters(config)
    model, is_latent = Transformer(config).eval(), config.is_mla or config.attention == "compressed"
    assert weight_bytes(config, "float32").total == held(model)
    for name in ("float32", "bfloat16", *(["fp8"] if is_latent else [])):
        for mtp in {False, config.n_mtp_layers > 0}:
            made = model.new_cache(2, rows, DTYPES.get(name, "fp8"), mtp=mtp)  # pyright: ignore[reportArgumentType]
            counted = cache_bytes(config, max_seq_len=rows, batch=2, dtype=name, mtp=mtp)  # pyright: ignore[reportArgumentType]
            assert counted.by_part["cache"] == made.nbytes
            assert counted.by_part.get("mtp cache", 0) == made.mtp_nbytes
            a_token = kv_bytes_per_token(config, dtype=name)  # pyright: ignore[reportArgumentType]
            # V4's is a sum of fractions
            assert made.nbytes_per_token == (pytest.approx(a_token) if config.compress_ratios else a_token)
            assert made.nbytes == sum(storage_bytes([stored.data for stored in made.rows]))
            if rows >= SLACK + max(config.window_size or 0, *(config.compress_ratios or (0, 0))):
                assert made.fixed_nbytes == fixed_cache_bytes(config, name)  # pyright: ignore[reportArgumentType]
    assert weight_bytes(config, "bfloat16").total == held(model.to(torch.bfloat16))
    eight, counted = hold_all_fp8(model), weight_bytes(config, "fp8")
    assert counted.total == held(eight)
    assert counted.by_part["scales"] == sum(b.nbytes for name, b in eight.named_buffers() if name.endswith("scale"))


@settings(max_examples=30)
@given(config=model_configs())
def test_counts_of_any_model_are_those_of_what_is_built(config: ModelConfig) -> None:
    check_counts(config)


V4_KINDS = [{}, {"hc_mult": 1, "topk_method": "greedy", "n_hash_layers": 0}]
OTHERS = {f"v4 {changes}": (sized(**(V4 | changes), max_seq_len=256), 200) for changes in V4_KINDS}
OTHERS |= {"ragged blocks": (ModelConfig(dim=192, kv_lora_rank=130, moe_inter_dim=129), 3), "fp8": (released("fp8"), 3)}


@pytest.mark.parametrize("name", OTHERS)
def test_counts_are_those_of_what_is_built(name: str) -> None:
    """Tensor for tensor: V4 with each kind of layer, and weights whose blocks are not whole."""
    check_counts(*OTHERS[name])


STAGES = [({}, "sparse"), ({"attention": "gqa", "n_kv_heads": 1}, "sparse"), (DSA, "sparse"), (DSA, "warmup")]
STAGES += [(V4, "sparse"), ({"hc_mult": 2}, "sparse"), (SHARED, "sparse"), (SHARED, "warmup")]
STAGE_NAMES = ["mla", "gqa", "dsa", "warm-up of dsa", "v4", "streams", "shared", "warm-up of shared"]


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("attention", "stage"), STAGES, ids=STAGE_NAMES)
def test_bytes_of_gradients_and_optimizer_are_those_of_a_step(
    attention: dict[str, Any], stage: Any, optimizer: Any, moments: Any
) -> None:
    config = sized(**attention)
    model, tokens = Transformer(config), torch.randint(0, 51, (2, 20))
    begin_stage(model, stage)
    model.losses(tokens, tokens).total.backward()
    for parameter in model.parameters():  # an expert may have no visitor, and then no gradient
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    used = optimizers(model, TrainConfig(optimizer=optimizer, moments=moments))
    for one in used:
        one.step()
    counted = training_bytes(
        config, batch_size=2, seq_len=20, optimizer=optimizer, moments=moments, dsa_stage=stage
    ).by_part
    assert counted["optimizer"] == sum(t.nbytes for t in optimizer_state(used, model.named_parameters()).values())
    assert counted["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    heads = 1 + config.n_mtp_layers if stage == "sparse" else 0
    assert counted.get("the head's gradient", 0) == heads * 4 * 51 * 40


# --- against print


def test_v3_as_printed() -> None:
    """671B, 37B active; MTP 11.5B of its own, 2.4B active: DeepSeek-V3 report and model card."""
    counted, main = parameters(V3), parameters(dataclasses.replace(V3, n_mtp_layers=0))
    assert counted.main == main.total == 671_026_404_352
    assert (main.buffers, counted.buffers) == (14_848, 14_848 + 256)
    embedding, own = counted.by_module["embedding"], counted.mtp - counted.by_module["mtp projection"]
    met = sum(n for k, n in counted.active_by_module.items() if k.startswith("mtp ") and k != "mtp projection")
    found = [counted.active, counted.active + embedding, counted.mtp, own, met + embedding]
    assert [round(n / 1e9, 2) for n in found] == [36.62, 37.55, 11.61, 11.51, 2.44]


def test_other_models_as_printed() -> None:
    """Billions of parameters, from the models' reports. Moonlight's are without embedding and head."""
    names = ("deepseek-v2", "deepseek-v2-lite", "kimi-k2", "moonlight")
    v2, lite, kimi, moonlight = (parameters(released(name)) for name in names)
    assert (v2.total, v2.active) == pytest.approx((236e9, 21e9), abs=0.5e9)
    assert (lite.total, lite.active) == pytest.approx((15.7e9, 2.4e9), abs=0.06e9)
    assert (kimi.total, kimi.active) == pytest.approx((1026e9, 32e9), abs=0.5e9)
    ends = moonlight.by_module["head"]
    assert (moonlight.total - 2 * ends, moonlight.active - ends) == pytest.approx((15.29e9, 2.24e9), abs=0.005e9)


def test_cache_as_printed() -> None:
    """Bytes a token: V3 (INS, table 1); V2 as 2.25 groups of GQA (V2, table 1). The planner's figures have GQA's."""
    assert kv_bytes_per_token(V3) == 70_272 == 2 * kv_bytes_per_token(V3, bytes_per_number=1)
    assert kv_bytes_per_token(released("deepseek-v2"), 1) == 4.5 * 128 * 60 == 2.25 * (2 * 128) * 60


def test_cache_against_the_mha_twin() -> None:
    """98.24 % needs heads of 128; against the 192-wide keys that MLA expands to it would be 98.59 %."""
    baseline = mha_twin(V3)
    assert baseline == dataclasses.replace(V3, attention="mha")
    assert kv_bytes_per_token(baseline) == 32768 * 61 * 2
    wider = dataclasses.replace(baseline, qk_nope_head_dim=192)
    shares = [1 - kv_bytes_per_token(V3) / kv_bytes_per_token(other) for other in (baseline, wider)]
    assert [f"{share:.2%}" for share in shares] == ["98.24%", "98.59%"] and shares[0] == 1 - 576 / 32768


@given(model_configs())
def test_cache_of_the_mha_twin_needs_no_twin(config: ModelConfig) -> None:
    if config.qk_nope_head_dim % 2 == 0:
        assert mha_kv_bytes_per_token(config, 2) == kv_bytes_per_token(mha_twin(config), 2)


# --- refusals

NAMED = {"TOY": ModelConfig(), "SMALL": sized(), "MHA": sized(attention="mha"), "V3": released("deepseek-v3")}
REFUSED = tomllib.loads((ROOT / "tests/helpers/refusals.toml").read_text())["accounting"]


@pytest.mark.parametrize("call", REFUSED)
def test_refusals_say_what_to_use(call: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its words are compared)
        eval(call, vars(accounting) | NAMED)
    assert REFUSED[call] in str(error.value)
