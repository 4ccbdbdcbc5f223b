"""The changes that a resumed run may make, those that other weights allow, and where each setting comes from."""

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini import DataConfig, ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.config.fields import plain
from dsmini.config.run import ParallelConfig
from dsmini.training.origin import check_init, check_resume
from tests.helpers.configs import DSA, V4_MODEL, refusal

OLD = RunConfig(out=Path("runs/x"))
OTHERS = tomllib.loads(Path(__file__).with_name("other_values.toml").read_text())
BASES: dict[str, Any] = {"toy": {}, "gqa": {"attention": "gqa", "n_kv_heads": 2}, "dsa": DSA, "v4": V4_MODEL}
BASES["engram"] = {"engram_layer_ids": (1, 2)}
OTHER_BITS = "the result is no longer bit-identical to an unstopped run's"
EFFECTS: list[tuple[str, dict[str, Any], str]] = [  # changes, and what follows the lines of the keys
    ("data", dict(path=Path("x"), workers=2), ""),
    ("train", dict(max_skipped=3, max_rewinds=3, save_every=3, keep=3, save_in_background=True, tensorboard=True), ""),
    ("train", dict(eval_every=3, eval_tokens=3, eval_context=9, diagnose=True, sample_tokens=3, sample_prompt="x"), ""),
    ("train", dict(threads=3, dtype="float32", recompute=True, compile=True), OTHER_BITS),
    ("parallel", dict(ep=2, zero=1), OTHER_BITS),
    ("train", dict(steps=9, lr=1.0, batch_size=8, mtp_weight=1.0), "the schedule changes from here on"),
]
REFUSED: dict[str, dict[str, Any]] = {
    "data": dict(val_fraction=0.2, fim_rate=0.5, document_mask=True, tokenizer=Path("x")),
    "train": dict(seed=1, seq_len=99, optimizer="adamw", moments="bfloat16", ema_decay=0.5),
}


def changed(part: str, old: RunConfig = OLD, **changes: Any) -> RunConfig:
    return dataclasses.replace(old, **{part: dataclasses.replace(getattr(old, part), **changes)})


@pytest.mark.parametrize(("part", "changes", "words"), EFFECTS)
def test_what_a_resumed_run_may_change(part: str, changes: dict[str, Any], words: str) -> None:
    lines = check_resume(OLD, changed(part, **changes))
    assert {line.split(": ")[0] for line in lines[: len(changes)]} == {f"{part}.{key}" for key in changes}
    effect = lines[len(changes) :]
    assert len(effect) == bool(words) and all(re.match(f"with another .* {words}$", line) for line in effect)


@pytest.mark.parametrize("part", REFUSED)
def test_every_key_that_makes_it_another_run_is_named(part: str) -> None:
    with pytest.raises(ValueError, match=r"^a run cannot be resumed with another .*--init runs/x$") as error:
        check_resume(OLD, changed(part, changed("train", lr=1.0), **REFUSED[part]))
    assert all(f"{part}.{key} (" in str(error.value) for key in REFUSED[part])
    assert "train.lr" not in str(error.value)


def test_average_and_tokenizer_may_change_but_not_begin_or_end() -> None:
    for part, key, one, other in (("train", "ema_decay", 0.9, 0.99), ("data", "tokenizer", Path("x"), Path("y"))):
        with_one = changed(part, **{key: one})
        assert check_resume(with_one, changed(part, **{key: other}))[0] == f"{part}.{key}: {one} -> {other}"
        with pytest.raises(ValueError, match=rf"{key} \({one} -> none\)"):
            check_resume(with_one, OLD)
    assert check_resume(OLD, OLD) == []


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}


@pytest.mark.parametrize(("base", "key"), [(base, key) for base in BASES for key in OTHERS[base]])
def test_another_model_takes_weights_of_its_shapes_alone(base: str, key: str) -> None:
    value, old = OTHERS[base][key], ModelConfig(**BASES[base])
    new = dataclasses.replace(old, **{key: None if value == "none" else value})
    assert f"model.{key} (" in refusal(check_resume, *(dataclasses.replace(OLD, model=model) for model in (old, new)))
    if shapes(new) == shapes(old):
        check_init(old, new, "runs/x")
    else:
        said = refusal(check_init, old, new, "runs/x")
        assert f"weights of runs/x do not fit model.{key}={plain(getattr(new, key))} (there" in said


def test_a_dense_run_is_not_resumed_as_sparse() -> None:
    sentence = r"^runs/x has no indexers, .* python -m dsmini.convert runs/x OUT --dsa, and start .* --init OUT$"
    with pytest.raises(ValueError, match=sentence):
        check_resume(OLD, dataclasses.replace(OLD, model=ModelConfig(**DSA)))
    with pytest.raises(ValueError, match=sentence):
        check_init(OLD.model, ModelConfig(**DSA), "runs/x")


def test_every_key_of_the_model_is_judged_here() -> None:
    """A new key must be thought about: does it change shapes?"""
    assert {f.name for f in dataclasses.fields(ModelConfig)} == {
        "precision",
        *(key for of in OTHERS.values() for key in of),
    }
    effects = {f.metadata["resume"] for part in (DataConfig, ParallelConfig) for f in dataclasses.fields(part)}
    assert effects <= {"refused", "rounding", "none"}


def test_a_file_changes_a_base(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[model]\nmax_seq_len = 1024\n[train]\nlr = 0.5\n")
    base = RunConfig(model=ModelConfig(dim=64), train=TrainConfig(steps=3), out=Path("y"))
    config = RunConfig.from_file(tmp_path / "x.toml", base)
    assert config == RunConfig(
        model=ModelConfig(dim=64, max_seq_len=1024), train=TrainConfig(steps=3, lr=0.5), out=Path("y")
    )
