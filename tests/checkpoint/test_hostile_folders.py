"""Folders that would take all memory or time, or hold what no model means: refused before anything is built."""

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, RunConfig, Transformer, load_pretrained
from dsmini.checkpoint.initial_weights import find_initial_weights
from dsmini.checkpoint.memory import free_bytes, refuse_too_large
from dsmini.checkpoint.run_folder import is_model_folder, new_run_folder, read_summary, sole_trainer
from dsmini.text.text_side import read_text_side
from dsmini.training.record import read_records
from tests.helpers import folders
from tests.helpers.configs import refusal

CPU = torch.device("cpu")


def with_config(folder: Path, **changes: Any) -> str:
    """Return what loading says of a folder whose config.json is changed."""
    folders.write(folder, folders.read(folder), folders.config_of(folder) | changes)
    return refusal(load_pretrained, folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_nextn_predict_layers": 10**18}, f"config.json: n_mtp_layers={10**18} is too large; use 10,000 or less"),
        ({"n_shared_experts": 10**18}, f"config.json: n_shared_experts={10**18} is too large; use 2,147,483,647 or"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1}, "make a matrix of 4,611,686,014,132,420,609 numbers"),
        ({"num_hidden_layers": 9000}, "tensors for the 9000 layers of its config"),
        ({"n_routed_experts": 2**20}, "experts of its config; use the model's own"),
        ({"eos_token_id": 10**30}, f"eos_token_id in {{folder}}/config.json is {10**30}, but the model has 61 tokens"),
        ({"eos_token_id": [3, 61]}, "is [3, 61], but the model has 61 tokens; want ids below that"),
        ({"rms_norm_eps": 1e22}, "norm_eps=1e+22 is too large; use 1 or less"),
        ({"rope_theta": 10**40}, "rope_theta=1e+40 is too large; use 1e+30 or less"),
        ({"rope_scaling": {"type": ["yarn"]}}, "has rope type [['yarn']], which dsmini cannot honour"),
    ],
)
def test_counts_and_sizes_are_checked_before_a_model_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr("dsmini.checkpoint.pretrained.Transformer", lambda *_: pytest.fail("a model was made"))
    assert sentence.format(folder=folder) in with_config(folder, **changes)


def test_ranks_are_counted_before_their_names_are_made(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model0-mp1000000000.safetensors")
    assert refusal(load_pretrained, folder) == (
        f"{folder} has 1 files of 1,000,000,000 ranks, by their names; fetch what is missing"
    )


def test_model_larger_than_the_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_pretrained(folder)
    need = sum(tensor.nbytes for tensor in model.state_dict().values())
    monkeypatch.setattr("dsmini.checkpoint.memory.free_bytes", lambda device: need)
    load_pretrained(folder)
    monkeypatch.setattr("dsmini.checkpoint.memory.free_bytes", lambda device: need - 1)
    monkeypatch.setattr("dsmini.checkpoint.pretrained._allocate", lambda *_: pytest.fail("memory was taken"))
    assert refusal(load_pretrained, folder) == (
        f"the model of {folder} needs {need:,} bytes of memory, and this machine has {need - 1:,} left on cpu; use a "
        "smaller model or a shorter dtype"
    )


def test_free_memory_is_at_most_what_there_is() -> None:
    free = free_bytes(CPU)
    assert free is not None
    assert 2**20 < free < 2**50
    refuse_too_large(2**20, "it", CPU)
    assert "it needs 1,125,899,906,842,624 bytes of memory" in refusal(refuse_too_large, 2**50, "it", CPU)


def test_limit_on_virtual_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda what: (taken + 2**24, taken + 2**24))
    free = free_bytes(CPU)
    assert free is not None
    assert abs(free - 2**24) < 2**23


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("fp8", ["keep", "dequantize"])
def test_fp8_scale_that_is_not_above_0_is_refused(
    fp8_folder: tuple[Path, dict[str, Tensor]], value: float, fp8: Any
) -> None:
    folder, tensors = fp8_folder[0], folders.read(fp8_folder[0])
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    tensors[name][-1, 0] = value
    folders.write(folder, tensors, folders.config_of(folder), shards=3)
    said = refusal(load_pretrained, folder, fp8=fp8)
    assert said == f"{folder}: {name} has the FP8 scale {value}; want finite ones above 0: fetch the file again"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_selection_bias_that_is_not_finite_is_refused(folder: Path, value: float) -> None:
    tensors = folders.read(folder)
    name = next(name for name in tensors if name.endswith("e_score_correction_bias"))
    tensors[name][-1] = value
    folders.write(folder, tensors, folders.config_of(folder))
    said = refusal(load_pretrained, folder)
    assert said == f"{folder}: {name} has the selection bias {value}; want finite ones: fetch the file again"


def test_end_token_that_the_model_lacks_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 61]}')
    said = refusal(read_text_side, folder, tokenizer="bytes")
    assert said.startswith(f"eos_token_id in {folder}/generation_config.json is [1, 61], but the model has 61 tokens")


def test_hostile_names_of_tensors_are_escaped(folder: Path) -> None:
    name = "\x1b]0;title\x07\x1b[31m"
    tensors = folders.read(folder) | {name: torch.ones(1)}
    folders.write(folder, tensors, folders.config_of(folder))
    assert f"it has tensors that belong nowhere: {name!r};" in refusal(load_pretrained, folder)


def test_summary_that_is_not_a_table_counts_as_absent(tmp_path: Path) -> None:
    assert read_summary(tmp_path) == {}
    for text in ("[]", "null", "3", "{", "[" * 100_000, '{"steps": NaN}', "\xff"):
        (tmp_path / "summary.json").write_text(text)
        assert read_summary(tmp_path) == {}


def test_damaged_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("[" * 100_000 + "\n{}\nnull\n" + '{"step": ' + "9" * 5000 + "}\n")
    assert read_records(tmp_path) == []


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_lock_and_metrics_that_are_not_files_are_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / ".lock")
    make(tmp_path / "metrics.jsonl")
    assert refusal(sole_trainer(tmp_path).__enter__).startswith(f"cannot write {tmp_path / '.lock'}: ")
    assert refusal(read_records, tmp_path).startswith(f"cannot read {tmp_path / 'metrics.jsonl'}: it is a ")


def test_hostile_paths_of_a_config_are_refused_by_key(tmp_path: Path) -> None:
    for text, sentence in (
        ('out = "a\\u0000b"', "x.toml: out='a\\x00b' holds a NUL character"),
        ('[data]\npath = "a\\u0000b"', "x.toml: data.path='a\\x00b' holds a NUL character"),
        (f'[data]\ntokenizer = "{"a" * 5000}"', "x.toml: data.tokenizer='aaa"),
    ):
        (tmp_path / "x.toml").write_text(text)
        assert refusal(RunConfig.from_file, tmp_path / "x.toml").startswith(sentence)
    assert "is too long for a path" in refusal(load_pretrained, "a" * 5000)
    assert "is too long for a path" in refusal(new_run_folder, None, "a" * 300)


@pytest.mark.parametrize("value", [10**400, -(10**400), 2**1024])
def test_whole_number_beyond_a_float_is_refused(value: int) -> None:
    assert "rope_theta=a number of hundreds of digits is not a finite number" in refusal(ModelConfig, rope_theta=value)


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
