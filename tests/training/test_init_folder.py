"""--init with a DeepSeek or Hugging Face folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dsmini import ModelConfig, RunConfig, Transformer, load_pretrained, save_pretrained
from dsmini.checkpoint.training_state import load_run
from dsmini.text.tokenizer import byte_tokenizer_json
from dsmini.training.origin import find_origin
from tests.conftest import SMALL
from tests.helpers.commands import check_refused, finish

FORMS = ("float32", "bfloat16", "fp8")
STILL = "--train.optimizer adamw --train.lr 1e-9 --train.gate-lr 1e-9 --train.bias-speed 0 --train.sample-tokens 0"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a text, and one model stored in three forms."""
    folder = tmp_path_factory.mktemp("folders")
    (folder / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    for form in FORMS:
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**{**SMALL, "vocab_size": 256}))
        save_pretrained(model.bfloat16() if form != "float32" else model, folder / form, fp8=form == "fp8")
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_origin_is_the_loaded_model_in_float32(place: Path, form: str) -> None:
    origin = find_origin(None, None, place / form, say=pytest.fail)
    want = load_pretrained(place / form, torch.float32)
    assert origin.rows is not None and origin.config.model == want.config and origin.name == form
    for name, tensor in want.state_dict().items():
        got = origin.rows(name, slice(None))
        assert got.dtype == torch.float32 and torch.equal(got, tensor), name
        assert torch.equal(origin.rows(name, slice(1, 3)), tensor[1:3]), name


def test_a_run_starts_from_a_folder_and_may_extend_its_context(place: Path) -> None:
    longer = "--model.max-seq-len 128 --model.original-seq-len 32 --model.rope-factor 4 --train.seq-len 128"
    train = f"--init fp8 --data.path book.txt --train.steps 2 --train.batch-size 2 {longer} {STILL}"
    assert "weights fp8" in finish(f"dsmini.train {train}", place).stdout
    model, config = load_run(place / "runs/fp8-001")
    assert config.model.extended and config.seq_len == 128
    assert json.loads((place / "runs/fp8-001/init.json").read_text()) == {"folder": str((place / "fp8").resolve())}
    before, after = load_pretrained(place / "fp8", torch.float32).state_dict(), model.state_dict()
    assert all(torch.allclose(after[name], before[name], rtol=0, atol=1e-6) for name in before)
    shutil.rmtree(place / "runs/fp8-001/checkpoints")  # as if killed before the first one
    (place / "runs/fp8-001/events.jsonl").unlink()
    (place / "runs/fp8-001/summary.json").unlink()
    assert "starting again from step 0 of 2" in finish("dsmini.train --resume runs/fp8-001", place).stdout
    model, _ = load_run(place / "runs/fp8-001")
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())


def test_tokenizer_and_length_of_a_folder_are_used(place: Path) -> None:
    own = place / "own"
    shutil.copytree(place / "float32", own)
    config = json.loads((own / "config.json").read_text())
    (own / "tokenizer.json").write_text(byte_tokenizer_json())

    def begun() -> RunConfig:
        origin = find_origin(None, None, own, say=pytest.fail)
        return origin.accept(origin.config)

    found = begun()
    assert found.data.tokenizer is None and found.seq_len == config["max_position_embeddings"]
    (own / "tokenizer.json").write_text(byte_tokenizer_json().replace('"version"', '"truncation": null, "version"'))
    (own / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    long = begun()
    assert (long.data.tokenizer, long.model.max_seq_len, long.seq_len) == (own / "tokenizer.json", 100_000, 512)


def test_a_bad_folder_gets_the_sentence_of_load_pretrained(place: Path) -> None:
    shutil.copytree(place / "float32", place / "bad")
    config = json.loads((place / "bad/config.json").read_text())
    (place / "bad/config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    check_refused("dsmini.train", place, {"--init bad": "bad does not hold the model that its config describes"})
