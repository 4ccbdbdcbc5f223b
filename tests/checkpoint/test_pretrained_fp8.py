"""Folders in FP8: dequantized, kept, and saved."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsmini import Transformer, load_pretrained, save_pretrained
from dsmini.numerics import quantize_tiles
from tests.helpers import folders
from tests.helpers.configs import refusal
from tests.helpers.hf_names import to_hf
from tests.helpers.tolerances import relative_error

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


def test_kept_fp8_computes_the_dequantized_logits(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = fp8_folder
    tokens = torch.randint(0, 61, (2, 20))
    kept, exact = load_pretrained(folder, fp8="keep"), load_pretrained(folder, dtype=torch.float32)
    got, want = kept.run(tokens, mtp=True), exact.run(tokens, mtp=True)
    assert relative_error(got.logits, want.logits) < 1e-5
    assert relative_error(got.mtp_logits[0], want.mtp_logits[0]) < 1e-5
    held, dequantised = (sum(t.nbytes for t in m.state_dict().values()) for m in (kept, exact))
    assert held < 0.35 * dequantised


def test_kept_fp8_survives_casts(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    kept = load_pretrained(fp8_folder[0], fp8="keep")
    before = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
    tokens = torch.randint(0, 61, (2, 20))
    for cast in (torch.bfloat16, torch.float64):
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


def test_kept_fp8_refuses_training(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    kept = load_pretrained(fp8_folder[0], fp8="keep")
    tokens = torch.randint(0, 61, (1, 9))
    assert "load the model with fp8='dequantize' to train it" in refusal(kept.train)
    kept.losses(tokens[:, :-1], tokens[:, 1:]).total.backward()  # through codes, as through frozen weights
    assert all(p.grad is None for p in kept.parameters() if p.dtype == torch.float8_e4m3fn)
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
