"""Bytes that are held, counted from the config, against storages of models, optimizers and caches that are built."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given

from dsmini import ModelConfig, TrainConfig, Transformer, quantize
from dsmini.accounting import (
    Bytes,
    activation_bytes,
    cache_bytes,
    gradient_bytes,
    kv_bytes_per_token,
    optimizer_bytes,
    training_bytes,
    weight_bytes,
)
from dsmini.accounting import flops as work
from dsmini.checkpoint.slots import fp8_weights
from dsmini.measure.saved import saved_for_backward
from dsmini.nn import attention, cache, fp8
from dsmini.numerics import WEIGHT_TILE
from dsmini.training.optim import optimizers, remembered
from tests.helpers.configs import released
from tests.helpers.strategies import model_configs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Dtype = Any


def hold_fp8(model: Transformer) -> Transformer:
    """With all that may be FP8 held so."""
    for module, name in fp8_weights(model.eval()).values():
        q = quantize(getattr(module, name).detach().float(), WEIGHT_TILE, scale="fp32")
        fp8.hold_fp8(module, name, q.codes, q.scales)
    return model


def bytes_of(model: Transformer) -> int:
    return sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()])


# --- weights


@given(config=model_configs())
def test_bytes_of_weights_are_those_of_a_model(config: ModelConfig) -> None:
    model = Transformer(config)
    assert weight_bytes(config, "float32").total == bytes_of(model)
    assert weight_bytes(config, "bfloat16").total == bytes_of(model.to(torch.bfloat16))
    assert weight_bytes(config, "fp8").total == bytes_of(hold_fp8(model))


@pytest.mark.parametrize("config", [ModelConfig(dim=192, kv_lora_rank=130, moe_inter_dim=129), released("fp8")])
def test_bytes_of_weights_with_ragged_blocks(config: ModelConfig) -> None:
    model = hold_fp8(Transformer(config).to(torch.bfloat16))
    counted = weight_bytes(config, "fp8")
    assert counted.total == bytes_of(model)
    scales = {name: buffer for name, buffer in model.named_buffers() if name.endswith("scale")}
    assert counted.by_part["scales"] == sum(scale.nbytes for scale in scales.values())


def test_bytes_of_weights_without_multi_token_prediction() -> None:
    for dtype in ("float32", "bfloat16", "fp8"):
        without = weight_bytes(ModelConfig(n_mtp_layers=0), dtype)
        assert weight_bytes(ModelConfig(n_mtp_layers=2), dtype, mtp=False) == without


def test_bytes_of_v3_by_hand() -> None:
    """V3's codes are one byte; what is never FP8 is two, or four."""
    v3 = released("deepseek-v3", n_mtp_layers=0)
    ends, gates, norms = 2 * 129280 * 7168, 58 * 256 * 7168, 61 * (2 * 7168 + 1536 + 512) + 7168
    codes = 671_026_404_352 - ends - gates - norms
    attention = 12 * 56 + 192 * 12 + 5 * 56 + 256 * 4 + 56 * 128  # blocks of a layer: facts of the released folder
    scales = 61 * attention + 3 * 3 * 144 * 56 + 58 * 257 * 3 * 16 * 56
    counted = weight_bytes(v3, "fp8")
    assert counted.by_part["scales"] == 4 * scales
    assert counted.total == codes + 4 * scales + 2 * ends + 4 * (gates + norms + 14_848)
    assert weight_bytes(v3, "float32").total == 4 * (671_026_404_352 + 14_848)


# --- gradients and optimizers


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_bytes_of_the_optimizer_are_those_it_remembers(
    small_config: Any, optimizer: Any, moments: Any, attention: str
) -> None:
    config = small_config(attention=attention, n_kv_heads=1 if attention == "gqa" else None)
    model = Transformer(config)
    tokens = torch.randint(0, config.vocab_size, (2, 20))
    model.losses(tokens, tokens).total.backward()
    for parameter in model.parameters():  # an expert may have no visitor, and then no gradient
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    used = optimizers(model, TrainConfig(optimizer=optimizer, moments=moments))
    for one in used:
        one.step()
    state = remembered(used, model.named_parameters())
    assert optimizer_bytes(config, optimizer, moments).total == sum(t.nbytes for t in state.values())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradient_bytes(config).total == sum(g.nbytes for g in grads)


# --- kept for backward

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


def kept(config: ModelConfig, b: int, s: int, dtype: str) -> int:
    model = Transformer(config, compute_dtype=DTYPES[dtype])
    return saved_for_backward(model, torch.randint(0, config.vocab_size, (b, s + 1)))[1]


def close(config: ModelConfig, b: int, s: int, dtype: Dtype, rel: float = 1e-3) -> None:
    counted = activation_bytes(config, batch_size=b, seq_len=s, dtype=dtype)
    assert counted.total == pytest.approx(kept(config, b, s, dtype), rel=rel)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("precision", ["native", "fp8"])
@pytest.mark.parametrize("case", TOY)
def test_activations_are_those_kept(case: str, precision: Any, dtype: Dtype) -> None:
    """No number of rows is a width of the model, by which a copy of a weight would be known."""
    close(ModelConfig(n_layers=2, precision=precision, **TOY[case]), 2, 140, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("b", "s"), [(4, 255), (1, 255), (3, 63)])
def test_activations_of_the_toy(b: int, s: int, dtype: Dtype) -> None:
    close(ModelConfig(), b, s, dtype)


@pytest.mark.parametrize("precision", ["native", "fp8"])
@pytest.mark.parametrize("b", [1, 4])
def test_activations_at_fp8_sizes(b: int, precision: Any) -> None:
    close(released("fp8", n_layers=2, precision=precision), b, 255, "bfloat16")


@pytest.mark.parametrize("v_head_dim", [32, 48, 64])
@pytest.mark.parametrize("attention", ["mla", "mha"])
@pytest.mark.parametrize("b", [1, 2])
def test_activations_of_flash_attention(b: int, attention: Any, v_head_dim: int) -> None:
    """Beyond 128 tokens in FP32 no logits are kept, and queries, keys and values are padded to one width."""
    sizes: dict[str, Any] = {"attention": attention, "qk_nope_head_dim": 32 if attention == "mla" else 48}
    close(ModelConfig(n_layers=2, n_mtp_layers=0, v_head_dim=v_head_dim, **sizes), b, 140, "float32")


def test_a_block_more_is_kept_for_each_layer_unless_recomputed() -> None:
    def total(n_layers: int, recompute: bool) -> float:
        config = ModelConfig(n_layers=n_layers, n_mtp_layers=0)
        return activation_bytes(config, batch_size=2, seq_len=64, recompute=recompute).total

    layer = 2 * 64 * 192 * 2 + 2 * 64 * 17 * 4  # a block's input; scores and their sum
    assert total(5, True) - total(4, True) == layer
    assert total(5, False) - total(4, False) > 10 * layer
    assert total(5, True) < total(5, False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("precision", ["native", "fp8"])
def test_all_that_training_keeps(precision: Any, dtype: Dtype) -> None:
    """With the copies of weights and the head's gradient: every storage that is no parameter's."""
    config = ModelConfig(n_layers=2, precision=precision)
    model, held = Transformer(config, compute_dtype=DTYPES[dtype]), dict[int, torch.Tensor]()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens = torch.randint(0, 256, (2, 64))

    def pack(t: torch.Tensor) -> torch.Tensor:
        t = t.detach()  # a graph that is held from within itself is never freed
        if (pointer := t.untyped_storage().data_ptr()) not in own:
            held[pointer] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.losses(tokens, tokens)
    sizes = sum(t.untyped_storage().nbytes() for t in held.values())
    counted = training_bytes(config, batch_size=2, seq_len=64, dtype=dtype).by_part
    kept = counted["activations"] + counted["weights kept for backward"] + counted["the head's gradient"]
    assert kept == pytest.approx(sizes, rel=1e-3)


def test_training_state_of_v3_by_parameter() -> None:
    """FP32 parameter, gradient and two moments 16 bytes, with BF16 moments 12 (report, section 3.3.3); Muon 12."""
    v3 = released("deepseek-v3")
    sizes: dict[str, Any] = {"batch_size": 1, "seq_len": 64}

    def state(**how: Any) -> float:
        by_part = training_bytes(v3, **sizes, **how).by_part
        return sum(by_part[name] for name in ("parameters", "gradients", "optimizer")) / (671.026e9 + 11.61e9)

    assert state() == pytest.approx(16, rel=1e-4)
    assert state(moments="bfloat16") == pytest.approx(12, rel=1e-4)
    assert state(optimizer="muon") == pytest.approx(12, rel=2e-3)


# --- the cache


@given(config=model_configs())
def test_bytes_of_the_cache_are_those_of_its_storage(config: ModelConfig) -> None:
    model = Transformer(config)
    names: list[Any] = ["float32", "bfloat16", *(["fp8"] if config.attention == "mla" else [])]
    for name in names:
        for mtp in {False, config.n_mtp_layers > 0}:
            made = model.new_cache(2, 3, DTYPES.get(name, "fp8"), mtp=mtp)
            counted = cache_bytes(config, max_seq_len=3, batch=2, dtype=name, mtp=mtp)
            assert counted.by_part["cache"] == made.nbytes
            assert counted.by_part.get("mtp cache", 0) == made.lane_nbytes
            assert made.nbytes_per_token == kv_bytes_per_token(config, dtype=name)


def test_fp8_cache_of_v3() -> None:
    """656 bytes a token and layer: the layout of V3.2."""
    assert kv_bytes_per_token(released("deepseek-v3"), dtype="fp8") == 656 * 61
    assert kv_bytes_per_token(released("deepseek-v3"), dtype="bfloat16") == 70_272


# --- what is refused, and how it looks


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            functools.partial(weight_bytes, ModelConfig(), "int8"),
            "dtype='int8' is unknown; use float32, bfloat16 or fp8",
        ),
        (functools.partial(optimizer_bytes, ModelConfig(), "sgd"), "use adamw or muon"),
        (functools.partial(kv_bytes_per_token, ModelConfig(attention="mha"), dtype="fp8"), "use bfloat16"),
        (functools.partial(activation_bytes, ModelConfig(), batch_size=0, seq_len=4), "batch_size=0 is not positive"),
        (functools.partial(activation_bytes, ModelConfig(), batch_size=1, seq_len=1), "too short for n_mtp_layers=1"),
    ],
)
def test_refusals_of_memory(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_bytes_read_as_a_table() -> None:
    table = Bytes.of([("weights", 3 * 2**20), ("cache", 512), ("nothing", 0), ("weights", 2**20)])
    assert table == Bytes(total=4 * 2**20 + 512, by_part={"weights": 4 * 2**20, "cache": 512})
    assert str(table).splitlines() == [
        "weights     4.00 MiB   99.99%",
        "cache          512 B    0.01%",
        "total       4.00 MiB  100.00%",
    ]
    assert str(Bytes.of([])).startswith("total")


def test_the_thresholds_are_those_of_the_layers() -> None:
    assert work.EXPLICIT == {"float32": attention.EXPLICIT_UP_TO, "bfloat16": attention.EXPLICIT_UP_TO_BF16}
    assert (work.QUERIES, work.ROWS) == (attention.BLOCK, cache.ALIGN)
