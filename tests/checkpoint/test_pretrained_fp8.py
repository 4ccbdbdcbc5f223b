"""Folders in FP8: dequantized, kept, and saved."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import Experts, Linear, Transformer, load_pretrained, save_pretrained
from dsmini.checkpoint.run_folder import is_model_folder
from dsmini.checkpoint.trained_model import find_initial_weights
from dsmini.functional import experts as functional_experts
from dsmini.nn import Projection
from dsmini.numerics import quantize_tiles
from tests.helpers import folders
from tests.helpers.configs import refusal
from tests.helpers.hf_names import to_hf
from tests.helpers.tolerances import BF16_UNIT, relative_error, rounding

Build = Callable[..., Transformer]


def test_ragged_fp8_dequantizes_block_by_block(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    folder, meant = fp8_folder
    exact = load_pretrained(folder, dtype=torch.float32)
    assert not folders.different(meant, to_hf(exact))
    short = load_pretrained(folder)
    assert not folders.different(
        {name: t.bfloat16() if folders.is_matrix(name) else t for name, t in meant.items()},
        to_hf(short),
    )


@pytest.mark.parametrize(
    ("fp8", "stored", "memory"),
    [
        ("dequantize", "is stored in FP8 and dequantized to bfloat16", "at twice the memory"),
        ("keep", "keeps FP8 weights and has the others in bfloat16", "at twice the memory of the others"),
    ],
)
def test_fp8_folder_warns_of_slow_bf16_by_what_is_held(
    tmp_path: Path, fp8_model: Build, monkeypatch: pytest.MonkeyPatch, fp8: Any, stored: str, memory: str
) -> None:
    model = fp8_model()
    tensors, _ = folders.in_fp8(folders.tensors_of(model, torch.bfloat16))
    raw = folders.config_json(model.config, quantization_config=folders.QUANTIZED)
    folder = folders.write(tmp_path / "fp8", tensors, raw)
    monkeypatch.setattr("dsmini.checkpoint.load.slow_bf16", lambda _: True)
    with pytest.warns(UserWarning, match=f"{stored}, which this CPU .*, {memory}$"):
        load_pretrained(folder, fp8=fp8)


def test_kept_fp8_computes_the_dequantized_logits(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = fp8_folder
    tokens = torch.randint(0, 61, (2, 20))
    kept, exact = load_pretrained(folder, fp8="keep"), load_pretrained(folder, dtype=torch.float32)
    got, want = kept.run(tokens, mtp=True), exact.run(tokens, mtp=True)
    assert relative_error(got.logits, want.logits) < 1e-5
    assert relative_error(got.mtp_logits[0], want.mtp_logits[0]) < 1e-5
    held, dequantised = (sum(t.nbytes for t in m.state_dict().values()) for m in (kept, exact))
    assert held < 0.35 * dequantised


def test_kept_fp8_survives_casts_and_moves(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    kept = load_pretrained(fp8_folder[0], fp8="keep")
    before = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
    tokens = torch.randint(0, 61, (2, 20))
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        model = copy.deepcopy(kept).to(cast)
        after = model.state_dict()
        fp8 = [name for name, tensor in before.items() if tensor.dtype == folders.FP8 or "scale" in name]
        assert len(fp8) > 20
        assert not folders.different({n: before[n] for n in fp8}, {n: after[n] for n in fp8})
        assert model.head.weight.dtype == cast
        if cast != torch.float64:
            still = {name for name in after if "norm" in name or ".gate." in name}
            assert not folders.different({n: before[n] for n in still}, {n: after[n] for n in still})
        model(tokens)
    moved = copy.deepcopy(kept).to("meta")
    assert {n: (t.dtype, t.device.type) for n, t in moved.state_dict().items()} == {
        n: (t.dtype, "meta") for n, t in before.items()
    }
    cast = copy.deepcopy(kept).to(torch.bfloat16)
    want = load_pretrained(fp8_folder[0], dtype=torch.bfloat16)
    assert relative_error(cast(tokens), want(tokens)) < rounding(BF16_UNIT, chained=30)


def test_only_chosen_experts_are_dequantized(
    fp8_folder: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = load_pretrained(fp8_folder[0], fp8="keep")
    taken: list[int] = []
    plain = functional_experts.matrix_of
    monkeypatch.setattr(functional_experts, "matrix_of", lambda w, i: taken.append(i) or plain(w, i))
    out = kept.run(torch.randint(0, 61, (1, 1)))
    assert sorted(set(taken)) == out.routing[0].indices.flatten().sort().values.tolist()
    assert len(taken) == 3 * kept.config.n_activated_experts  # w1, w2 and w3


def test_kept_fp8_refuses_training(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    kept = load_pretrained(fp8_folder[0], fp8="keep")
    tokens = torch.randint(0, 61, (1, 9))
    assert "load the model with fp8='dequantize' to train it" in refusal(kept.train)
    loss = kept.losses(tokens[:, :-1], tokens[:, 1:]).total
    assert "load the model with fp8='dequantize' to train it" in refusal(loss.backward)
    trained = load_pretrained(fp8_folder[0]).train()
    trained.losses(tokens[:, :-1], tokens[:, 1:]).total.backward()
    assert all(parameter.grad is not None for parameter in trained.layers[0].parameters())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu])
def test_kept_fp8_is_saved_bit_by_bit(
    tmp_path: Path, fp8_folder: tuple[Path, dict[str, Tensor]], scale_dtype: torch.dtype
) -> None:
    folder = fp8_folder[0]
    raw = folders.config_of(folder)
    tensors = folders.read(folder)
    if scale_dtype != torch.float32:
        raw["quantization_config"] |= {"scale_fmt": "ue8m0"}
        tensors = {n: t.to(scale_dtype) if n.endswith("_scale_inv") else t for n, t in tensors.items()}
        folder = folders.write(tmp_path / "ue8m0", tensors, raw)
    save_pretrained(load_pretrained(folder, fp8="keep"), tmp_path / "b", shard_size="100KB")
    assert not folders.different(tensors, folders.read(tmp_path / "b"))
    assert folders.config_of(tmp_path / "b") == raw
    save_pretrained(load_pretrained(folder, fp8="keep"), tmp_path / "c", dtype=torch.bfloat16)
    save_pretrained(load_pretrained(folder), tmp_path / "d")
    save_pretrained(load_pretrained(folder), tmp_path / "e", fp8=True)
    assert folders.config_of(tmp_path / "e")["quantization_config"] == folders.QUANTIZED
    for path in (tmp_path / "c", tmp_path / "d"):
        written = folders.read(path)
        assert "quantization_config" not in folders.config_of(path)
        assert written.keys() == {name for name in tensors if not name.endswith("_scale_inv")}
        assert {t.dtype for n, t in written.items() if folders.is_matrix(n)} == {torch.bfloat16}


def test_save_in_fp8_quantizes_matrices_alone(tmp_path: Path, fp8_model: Build) -> None:
    model = fp8_model()
    save_pretrained(model, tmp_path / "a", fp8=True, shard_size="200KB")
    written, plain = folders.read(tmp_path / "a"), folders.tensors_of(model)
    codes = {name for name, tensor in written.items() if tensor.dtype == folders.FP8}
    assert codes == {name for name in plain if folders.is_matrix(name)}
    for name in codes:
        want = quantize_tiles(plain[name], (128, 128), "fp32", "e4m3", 2.0**-100)
        assert torch.equal(written[name].float(), want[0].float())
        assert torch.equal(written[name.replace(".weight", ".weight_scale_inv")], want[1])
    rest = {name: t for name, t in written.items() if name not in codes and not name.endswith("_scale_inv")}
    assert not folders.different(rest, {name: t for name, t in plain.items() if name not in codes})
    assert folders.config_of(tmp_path / "a")["quantization_config"] == folders.QUANTIZED
    again = load_pretrained(tmp_path / "a", fp8="keep")
    save_pretrained(again, tmp_path / "b", fp8=True)
    assert not folders.different(written, folders.read(tmp_path / "b"))


def test_dense_weights_and_experts_of_kept_fp8(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    """Other forms of attention and of the experts take their weights from these."""
    folder, meant = fp8_folder
    kept = load_pretrained(folder, fp8="keep")
    linear, experts = kept.layers[1].get_submodule("attn.wkv_b"), kept.layers[1].get_submodule("ffn.experts")
    assert isinstance(linear, Projection)
    assert isinstance(experts, Experts)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(linear.dense(dtype), meant["model.layers.1.self_attn.kv_b_proj.weight"].to(dtype))
        for got, name in zip(experts.expert(5, dtype), ("gate_proj", "down_proj", "up_proj"), strict=True):
            assert torch.equal(got, meant[f"model.layers.1.mlp.experts.5.{name}.weight"].to(dtype))
    plain = Linear(3, 4)
    assert torch.equal(plain.dense(torch.bfloat16), plain.weight.bfloat16())


def test_weights_of_a_folder_start_a_run(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    folder, meant = fp8_folder
    assert is_model_folder(folder)
    start = find_initial_weights(folder)
    assert start.tokenizer is None
    model = Transformer(start.tensors.config)
    tensors = {name: start.tensors.rows(name) for name in model.state_dict()}
    model.load_state_dict(tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert torch.equal(model.layers[0].get_parameter("ffn.w1.weight"), meant["model.layers.0.mlp.gate_proj.weight"])
    (folder / "tokenizer.json").write_text("{}")
    assert find_initial_weights(folder).tokenizer == folder / "tokenizer.json"
    (folder / "config.toml").write_text("")
    assert not is_model_folder(folder)
