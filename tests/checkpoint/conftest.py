"""Small models' folders: plain, in several files, and in FP8."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from dsmini import Transformer
from tests.helpers import folders

Build = Callable[..., Transformer]


@pytest.fixture
def folder(tmp_path: Path, small_model: Build) -> Path:
    model = small_model()
    return folders.write(tmp_path / "good", folders.tensors_of(model), folders.config_json(model.config))


@pytest.fixture
def fp8_model(small_model: Build) -> Build:
    """Return a model with ragged blocks in every matrix: 576 rows in one, as the released kv_a_proj_with_mqa."""
    sizes = {"dim": 136, "inter_dim": 200, "moe_inter_dim": 130, "kv_lora_rank": 560, "qk_rope_head_dim": 16}
    return lambda **changes: small_model(**(sizes | {"n_mtp_layers": 1} | changes))


@pytest.fixture
def fp8_folder(tmp_path: Path, fp8_model: Build) -> tuple[Path, dict[str, Tensor]]:
    """Write a folder in FP8; return it and the dequantized tensors."""
    model = fp8_model()
    tensors, meant = folders.in_fp8(folders.tensors_of(model))
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 2)
    raw = folders.config_json(model.config, quantization_config=folders.QUANTIZED)
    return folders.write(tmp_path / "fp8", tensors, raw, shards=3), meant


@pytest.fixture
def sharded(tmp_path: Path, small_model: Build) -> Path:
    model = small_model()
    return folders.write(tmp_path / "sharded", folders.tensors_of(model), folders.config_json(model.config), shards=3)
