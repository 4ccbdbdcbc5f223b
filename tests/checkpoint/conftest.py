"""Small models' folders: plain, in several files, in FP8, with an indexer, and of DeepSeek's inference code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dsmini import Transformer
from tests.helpers import folders
from tests.helpers.configs import DSA
from tests.helpers.inference_layouts import BUILT, INFERENCE, inference_layout
from tests.helpers.runs import new_run

Build = Callable[..., Transformer]


OPTIONS: dict[str, Any] = {"ema_decay": 0.9, "steps": 4, "eval_every": 100}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of a few steps on bytes, with checkpoints after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    assert new_run(folder, **OPTIONS).train()
    return folder


@pytest.fixture
def write(tmp_path: Path, small_model: Build) -> Callable[..., Path]:
    """Return a function that writes the folder of a small model with these changes."""

    def written(name: str, shards: int = 1, **changes: object) -> Path:
        model = small_model(**changes)
        return folders.write(tmp_path / name, folders.tensors_of(model), folders.config_json(model.config), shards)

    return written


@pytest.fixture
def folder(write: Callable[..., Path]) -> Path:
    return write("good")


@pytest.fixture
def sharded(write: Callable[..., Path]) -> Path:
    return write("sharded", shards=3)


@pytest.fixture
def sparse(write: Callable[..., Path]) -> Path:
    return write("sparse", **DSA)


@pytest.fixture
def ranks(tmp_path: Path, small_model: Build) -> Path:
    return inference_layout(tmp_path / "ranks", folders.tensors_of(small_model(**BUILT)), INFERENCE, 2, "config.json")


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
def fp8(fp8_folder: tuple[Path, dict[str, Tensor]]) -> Path:
    return fp8_folder[0]
