"""Bytes that training saves for backward, counted from the config, compared with the storages of autograd."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini import ModelConfig, Transformer, ops
from dsmini.accounting import activation_bytes, training_bytes
from dsmini.measure.memory import saved_for_backward
from dsmini.training.optim import begin_stage
from tests.helpers import watching
from tests.helpers.accounting import DTYPES, V4, attention_by, fused, sized
from tests.helpers.configs import DSA, released

KINDS = {"query not compressed": {"q_lora_rank": None}}
KINDS |= tomllib.loads(Path(__file__).with_name("cases.toml").read_text())["activations"]
PRECISIONS: list[Any] = [(p, d) for p in ("native", "fp8") for d in ("bfloat16", "float32")]
FEW = 4 * 220
"""Bytes of a number for each of 220 tokens. Bytes saved once an expert or matrix, up to 824, are left out."""


def small(**changes: Any) -> ModelConfig:
    return sized(n_layers=2, n_routed_experts=8, **changes)


def saved(config: ModelConfig, b: int, s: int, dtype: str, stage: Any = None, recompute: bool = False) -> int:
    """Return the bytes that a forward saves; without a stage indexers pick and do not learn."""
    torch.manual_seed(0)  # the same routing, of which experts save rows
    model = Transformer(config, compute_dtype=DTYPES[dtype])
    if stage is not None:
        begin_stage(model, stage)
    with ops.use("eager"):
        return saved_for_backward(model, torch.randint(0, config.vocab_size, (b, s + 1)), recompute).total


@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS)
@pytest.mark.parametrize("case", KINDS)
def test_activations_are_those_saved(case: str, precision: Any, dtype: Any) -> None:
    """Exact where keys are as wide as values. Grouped heads repeat keys and values.

    No number of rows is a width of the model, by which a copy of a weight would be known.
    """
    config, b, s = small(precision=precision, **KINDS[case]), 2, 110
    width = config.qk_head_dim if config.attention == "mla" else config.qk_nope_head_dim
    config = dataclasses.replace(config, v_head_dim=width)
    positions = b * (config.n_layers * s + sum(s - depth for depth in range(1, config.n_mtp_layers + 1)))
    repeated = positions * (config.n_heads - config.kv_heads) * 2 * width * DTYPES[dtype].itemsize
    with attention_by(fused):
        real = saved(config, b, s, dtype)
    counted = activation_bytes(config, batch_size=b, seq_len=s, dtype=dtype).total
    assert 0 <= real - (counted + repeated) < FEW


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "case", ["mla", "dense", "two depths", "hash layers", "two streams", "four streams, two depths"]
)
def test_full_recomputation_saves_what_goes_into_blocks(case: str, dtype: Any) -> None:
    """With several streams all of them."""
    config, b, s = small(**KINDS[case]), 2, 110
    real = saved(config, b, s, dtype, recompute=True)
    counted = activation_bytes(config, batch_size=b, seq_len=s, dtype=dtype, recompute=True)
    later = counted.by_part["one block, made again"] + counted.by_part["rotary tables"]
    assert 0 <= real - (counted.total - later) < 3 * FEW


@pytest.mark.parametrize(("inter_dim", "larger"), [(8, "moe"), (800, "dense")])
def test_full_recomputation_makes_the_largest_block_again(inter_dim: int, larger: str) -> None:
    """A block is what a model with one more of its kind saves besides."""
    how: dict[str, Any] = {"batch_size": 2, "seq_len": 20}
    few, dense, moe = (
        activation_bytes(sized(inter_dim=inter_dim, n_layers=n, n_dense_layers=d, n_mtp_layers=0), **how).total
        for n, d in ((3, 1), (4, 2), (4, 1))
    )
    blocks = {"dense": dense - few, "moe": moe - few}
    config = sized(inter_dim=inter_dim, n_dense_layers=1, n_mtp_layers=0)
    again = activation_bytes(config, **how, recompute=True).by_part["one block, made again"]
    assert again == max(blocks.values()) == blocks[larger]


TWO = ModelConfig(n_layers=2)
# config, batch, tokens, dtypes, the most that is saved over what is counted
BOUNDS: dict[str, tuple[ModelConfig, int, int, str, float]] = {
    "explicit, mla": (TWO, 2, 140, "bfloat16 float32", 1.6),
    "explicit, mla in FP8": (dataclasses.replace(TWO, precision="fp8"), 2, 140, "bfloat16 float32", 1.6),
    "explicit, gqa": (
        dataclasses.replace(TWO, attention="gqa", n_kv_heads=2, qk_norm=True),
        *(2, 140, "bfloat16 float32", 1.6),
    ),
    "the default": (ModelConfig(), 4, 255, "bfloat16", 1.3),
    "released sizes in FP8": (released("fp8", n_layers=2), 1, 255, "bfloat16", 1.4),
    # beyond 128 tokens in FP32 attention is fused, and queries, keys and values are padded to one width
    **{
        f"flash, values of {v}": (dataclasses.replace(TWO, v_head_dim=v, n_mtp_layers=0), 2, 140, "float32", 1.2)
        for v in (32, 48, 64)
    },
    "compressed": (sized(**V4, max_seq_len=256), 2, 140, "bfloat16 float32", 2.2),
    "compressed, a stream": (sized(**(V4 | {"hc_mult": 1}), max_seq_len=256), 2, 140, "bfloat16 float32", 1.7),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_activations_are_a_lower_bound(case: str) -> None:
    """Allow the real attention and padded experts to save more, within reason."""
    config, b, s, dtypes, most = BOUNDS[case]
    for dtype in dtypes.split():
        counted = activation_bytes(config, batch_size=b, seq_len=s, dtype=dtype).total  # pyright: ignore
        assert 1 <= saved(config, b, s, dtype) / counted < most


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_v4_grow_as_its_latents_and_outputs(dtype: Any) -> None:
    one = sized(**V4 | {"hc_mult": 1}, max_seq_len=256)
    for wider in (dataclasses.replace(one, o_groups=4), dataclasses.replace(one, q_lora_rank=48)):
        counted = [activation_bytes(c, batch_size=2, seq_len=140, dtype=dtype).total for c in (one, wider)]
        real = [saved(c, 2, 140, dtype) for c in (one, wider)]
        assert counted[1] - counted[0] == real[1] - real[0]


@pytest.mark.parametrize(
    ("q_lora_rank", "precision", "dtype"),
    [(20, "native", "bfloat16"), (20, "fp8", "float32"), (None, "fp8", "bfloat16")],
)
def test_activations_of_indexers_are_those_saved(q_lora_rank: int | None, precision: Any, dtype: Any) -> None:
    """Compare the sparse stage with the same model whose indexers do not learn."""
    config = small(n_mtp_layers=2, precision=precision, q_lora_rank=q_lora_rank, **DSA)
    counted = activation_bytes(config, batch_size=2, seq_len=110, dtype=dtype)
    own = sum(amount for name, amount in counted.by_part.items() if name.endswith("indexer"))
    learning = saved(config, 2, 110, dtype, "sparse") - saved(config, 2, 110, dtype)
    assert 0 <= learning - own < FEW


@pytest.mark.parametrize("hc_mult", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("precision", ["native", "fp8"])
def test_all_that_training_keeps(precision: Any, dtype: Any, hc_mult: int) -> None:
    """Count every storage that is not a parameter's: copies of weights and the head's gradient too."""
    config = ModelConfig(n_layers=2, v_head_dim=48, precision=precision, hc_mult=hc_mult)
    model, tokens = Transformer(config, compute_dtype=DTYPES[dtype]), torch.randint(0, 256, (2, 64))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with ops.use("eager"), attention_by(fused), watching.saved_for_backward() as held:
        model.losses(tokens, tokens)
    sizes = sum(watching.storage_bytes([t for t in held if t.untyped_storage().data_ptr() not in own]))
    counted = training_bytes(config, batch_size=2, seq_len=64, dtype=dtype).by_part
    kept = counted["activations"] + counted.get("weights kept for backward", 0) + counted["the head's gradient"]
    assert kept == pytest.approx(sizes, rel=1e-3)


def test_rotary_tables_are_as_wide_as_what_is_rotated() -> None:
    """In V4 a part of each head; qk_nope_head_dim has no meaning there."""
    for more, width in (({}, "qk_rope_head_dim"), (V4, "qk_rope_head_dim"), ({"attention": "mha"}, "qk_nope_head_dim")):
        config = sized(**(more | {"n_mtp_layers": 0}))
        found = activation_bytes(config, batch_size=3, seq_len=20)
        assert found.by_part["rotary tables"] == 4 * getattr(config, width) * 20


def test_copies_of_weights_of_an_indexer_are_saved_as_codes_alone() -> None:
    """Its inputs are detached, so that no product of backward reads its weights. There are four blocks with MTP's."""
    for precision, codes in (("native", 0), ("fp8", 4 * (3 * 32 * 20 + 32 * 40 + 4 * 2))):
        with_indexer, without = (
            training_bytes(sized(**more, precision=precision), batch_size=1, seq_len=20).by_part for more in (DSA, {})
        )
        name = "weights kept for backward"
        assert with_indexer[name] - without[name] == codes
