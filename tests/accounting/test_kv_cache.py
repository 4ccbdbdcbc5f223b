"""Bytes of the cache, counted from the config, against print and against the storage of caches that are made."""

import dataclasses
from typing import Any

from hypothesis import given, settings

from dsmini import ModelConfig, Transformer
from dsmini.accounting import cache_bytes, kv_bytes_per_token, mha_kv_bytes_per_token, mha_twin
from tests.helpers.accounting import DTYPES
from tests.helpers.configs import released
from tests.helpers.strategies import model_configs

V3 = released("deepseek-v3")
V2 = released("deepseek-v2")


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
        baseline = kv_bytes_per_token(mha_twin(config), 2)
        assert mha_kv_bytes_per_token(config, 2) == baseline


def test_cache_against_the_mha_twin() -> None:
    """98.24 % needs heads of 128; against the 192-wide keys that MLA expands to it would be 98.59 %."""
    baseline = mha_twin(V3)
    assert baseline == dataclasses.replace(V3, attention="mha")
    assert kv_bytes_per_token(baseline) == 32768 * 61 * 2
    assert 1 - kv_bytes_per_token(V3) / kv_bytes_per_token(baseline) == 1 - 576 / 32768
    assert f"{1 - kv_bytes_per_token(V3) / kv_bytes_per_token(baseline):.2%}" == "98.24%"
    wider = kv_bytes_per_token(dataclasses.replace(baseline, qk_nope_head_dim=192))
    assert f"{1 - kv_bytes_per_token(V3) / wider:.2%}" == "98.59%"


@settings(max_examples=30)
@given(config=model_configs())
def test_bytes_of_the_cache_are_those_of_its_storage(config: ModelConfig) -> None:
    model = Transformer(config)
    names: list[Any] = ["float32", "bfloat16", *(["fp8"] if config.attention == "mla" else [])]
    for name in names:
        for mtp in {False, config.n_mtp_layers > 0}:
            made = model.new_cache(2, 3, DTYPES.get(name, "fp8"), mtp=mtp)
            counted = cache_bytes(config, max_seq_len=3, batch=2, dtype=name, mtp=mtp)
            assert counted.by_part["cache"] == made.nbytes
            assert counted.by_part.get("mtp cache", 0) == made.mtp_nbytes
            assert made.nbytes_per_token == kv_bytes_per_token(config, dtype=name)
