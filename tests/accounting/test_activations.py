"""Bytes that training saves for backward, counted from the config, compared with the storages of autograd."""

import dataclasses
from typing import Any

import pytest
import torch

from dsmini import ModelConfig, Transformer, ops
from dsmini.accounting import activation_bytes
from dsmini.measure.memory import saved_for_backward
from tests.helpers.accounting import DTYPES, fused_attention
from tests.helpers.configs import released

Dtype = Any

TOY: dict[str, dict[str, Any]] = {
    "toy": {},
    "mha": {"attention": "mha"},
    "gqa, normed heads": {"attention": "gqa", "n_kv_heads": 2, "qk_norm": True},
    "mqa": {"attention": "mqa"},
    "normed heads and embedding": {"qk_norm": True, "embed_norm": True},
    "no shared experts": {"n_shared_experts": 0},
    "two depths": {"n_mtp_layers": 2},
    "two depths, before the norm": {"n_mtp_layers": 2, "mtp_input": "pre_norm"},
    "softmax": {"score_func": "softmax", "norm_topk_prob": False},
    "query not compressed": {"q_lora_rank": None},
    "wide values": {"v_head_dim": 64},
    "values as wide as keys": {"v_head_dim": 48},
    "dense": {"n_dense_layers": 3},
}


FUSED = [case for case in TOY if "values" not in case]


def saved(config: ModelConfig, b: int, s: int, dtype: Dtype, kernels: bool = False) -> int:
    model = Transformer(config, compute_dtype=DTYPES[dtype])
    with ops.use("cpu" if kernels else "eager"):
        return saved_for_backward(model, torch.randint(0, config.vocab_size, (b, s + 1)))[1]


def counted(config: ModelConfig, b: int, s: int, dtype: Dtype, kernels: bool = False) -> float:
    return activation_bytes(config, batch_size=b, seq_len=s, dtype=dtype, kernels=kernels).total


def check_fused(config: ModelConfig, b: int, s: int, dtype: Dtype, kernels: bool = False) -> None:
    """Count what is saved exactly where keys are as wide as values. Grouped heads repeat keys and values."""
    width = config.qk_head_dim if config.attention == "mla" else config.qk_nope_head_dim
    config = dataclasses.replace(config, v_head_dim=width)
    positions = b * (config.n_layers * s + sum(s - depth for depth in range(1, config.n_mtp_layers + 1)))
    repeated = positions * (config.n_heads - config.kv_heads) * 2 * width * DTYPES[dtype].itemsize
    with fused_attention():
        want = pytest.approx(saved(config, b, s, dtype, kernels), rel=1e-3)
        assert counted(config, b, s, dtype, kernels) + repeated == want


def check_bound(config: ModelConfig, b: int, s: int, dtype: Dtype, most: float) -> None:
    """Allow the real attention and experts to save more, within reason."""
    assert 1 <= saved(config, b, s, dtype) / counted(config, b, s, dtype) < most


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("precision", ["native", "fp8"])
@pytest.mark.parametrize("case", FUSED)
def test_activations_are_those_saved(case: str, precision: Any, dtype: Dtype) -> None:
    """No number of rows is a width of the model, by which a copy of a weight would be known."""
    check_fused(ModelConfig(n_layers=2, precision=precision, **TOY[case]), 2, 110, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", FUSED)
def test_activations_with_kernels_are_those_saved(case: str, dtype: Dtype) -> None:
    if ops.serving("cpu") != "cpu":
        pytest.skip("no kernels here")
    check_fused(ModelConfig(n_layers=2, **TOY[case]), 2, 110, dtype, kernels=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("precision", ["native", "fp8"])
@pytest.mark.parametrize("case", TOY)
def test_activations_are_a_lower_bound(case: str, precision: Any, dtype: Dtype) -> None:
    check_bound(ModelConfig(n_layers=2, precision=precision, **TOY[case]), 2, 140, dtype, 1.6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("b", "s"), [(4, 255), (1, 255), (3, 63)])
def test_activations_of_the_toy(b: int, s: int, dtype: Dtype) -> None:
    check_bound(ModelConfig(), b, s, dtype, 1.3)
    if b * s < 256:  # fewer visits than 64 for each expert: no row is padding in BF16
        check_fused(ModelConfig(), b, s, dtype)


@pytest.mark.parametrize("precision", ["native", "fp8"])
@pytest.mark.parametrize("b", [1, 4])
def test_activations_at_fp8_sizes(b: int, precision: Any) -> None:
    config = released("fp8", n_layers=2, precision=precision)
    check_bound(config, b, 255, "bfloat16", 1.4)
    check_fused(config, 1, 255, "bfloat16")


@pytest.mark.parametrize("v_head_dim", [32, 48, 64])
@pytest.mark.parametrize("attention", ["mla", "mha"])
@pytest.mark.parametrize("b", [1, 2])
def test_activations_of_flash_attention(b: int, attention: Any, v_head_dim: int) -> None:
    """Beyond 128 tokens in FP32 attention is fused, and queries, keys and values are padded to one width."""
    sizes: dict[str, Any] = {"attention": attention, "qk_nope_head_dim": 32 if attention == "mla" else 48}
    config = ModelConfig(n_layers=2, n_mtp_layers=0, v_head_dim=v_head_dim, **sizes)
    check_bound(config, b, 140, "float32", 1.2)


def test_fused_attention_of_v3_by_hand() -> None:
    """Queries, keys, values and result of 128 heads, and a number for each query."""
    v3 = released("deepseek-v3", n_mtp_layers=0)
    by_part = activation_bytes(v3, batch_size=1, seq_len=4096).by_part
    assert by_part["attention over the context"] == 61 * 4096 * 128 * ((2 * 192 + 2 * 128) * 2 + 4)


def test_a_block_more_is_kept_for_each_layer_unless_recomputed() -> None:
    def total(n_layers: int, recompute: bool) -> float:
        config = ModelConfig(n_layers=n_layers, n_mtp_layers=0)
        return activation_bytes(config, batch_size=2, seq_len=64, recompute=recompute).total

    layer = 2 * 64 * 192 * 2 + 2 * 64 * 17 * 4  # a block's input; scores and their sum
    assert total(5, True) - total(4, True) == layer
    assert total(5, False) - total(4, False) > 10 * layer
    assert total(5, True) < total(5, False)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"batch_size": 0, "seq_len": 4}, "batch_size=0 is not positive"),
        ({"batch_size": 1, "seq_len": 1}, "too short for n_mtp_layers=1"),
        ({"batch_size": 1, "seq_len": 0}, "seq_len=0 is not positive"),
    ],
)
def test_refusals_of_activations(sizes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        activation_bytes(ModelConfig(), **sizes)
