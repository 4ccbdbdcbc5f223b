"""--init with a DeepSeek or Hugging Face folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dsmini import ModelConfig, Transformer, load_pretrained, save_pretrained
from dsmini.checkpoint.trained_model import load_run
from dsmini.text.tokenizer import byte_tokenizer_json
from dsmini.training.origin import find_origin
from tests.conftest import SMALL
from tests.helpers.commands import run_all

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
    assert origin.weights is not None and origin.config.model == want.config and origin.name == form
    for name, tensor in want.state_dict().items():
        got = origin.weights.rows(name, slice(None))
        assert got.dtype == torch.float32 and torch.equal(got, tensor), name
        assert torch.equal(origin.weights.rows(name, slice(1, 3)), tensor[1:3]), name


def test_a_run_starts_from_a_folder_and_may_extend_its_context(place: Path) -> None:
    longer = "--model.max-seq-len 128 --model.original-seq-len 32 --model.rope-factor 4 --train.seq-len 128"
    train = f"--init fp8 --data.path book.txt --train.steps 2 --train.batch-size 2 {longer} {STILL}"
    again = "--resume runs/fp8-001"
    ((status, said),) = run_all([("dsmini.train", train)], place)
    assert status == 0, said
    assert "weights fp8" in said
    model, config = load_run(place / "runs/fp8-001")
    assert config.model.extended and config.seq_len == 128
    assert json.loads((place / "runs/fp8-001/init.json").read_text()) == {"folder": str((place / "fp8").resolve())}
    before = load_pretrained(place / "fp8", torch.float32).state_dict()
    after = model.state_dict()
    assert all(torch.allclose(after[name], before[name], rtol=0, atol=1e-6) for name in before)
    shutil.rmtree(place / "runs/fp8-001/checkpoints")  # as if killed before the first one
    (place / "runs/fp8-001/events.jsonl").unlink()
    (place / "runs/fp8-001/summary.json").unlink()
    ((status, said),) = run_all([("dsmini.train", again)], place)
    assert status == 0 and "starting again from step 0 of 2" in said, said
    model, _ = load_run(place / "runs/fp8-001")
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())


def test_the_tokenizer_of_a_folder_is_used(place: Path) -> None:
    shutil.copytree(place / "float32", place / "own")
    (place / "own/tokenizer.json").write_text(byte_tokenizer_json())
    assert find_origin(None, None, place / "own", say=pytest.fail).config.data.tokenizer is None
    (place / "own/tokenizer.json").write_text(
        byte_tokenizer_json().replace('"version"', '"truncation": null, "version"')
    )
    origin = find_origin(None, None, place / "own", say=pytest.fail)
    assert origin.config.data.tokenizer == place / "own/tokenizer.json"


def test_a_long_context_is_not_the_default_length(place: Path) -> None:
    path = place / "bfloat16/config.json"
    config = json.loads(path.read_text())
    short = find_origin(None, None, place / "bfloat16", say=pytest.fail).config
    assert short.seq_len == config["max_position_embeddings"]
    path.write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    long = find_origin(None, None, place / "bfloat16", say=pytest.fail).config
    path.write_text(json.dumps(config))
    assert (long.model.max_seq_len, long.seq_len) == (100_000, 512)


def test_a_bad_folder_gets_the_sentence_of_load_pretrained(place: Path) -> None:
    shutil.copytree(place / "float32", place / "bad")
    config = json.loads((place / "bad/config.json").read_text())
    (place / "bad/config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(ValueError, match="does not hold the model that its config describes") as refused:
        load_pretrained(place / "bad", torch.float32)
    (place / "nothing").mkdir()
    commands = ["--init bad", "--init nothing", "--init float32 --model.dim 64"]
    answers = run_all([("dsmini.train", arguments) for arguments in commands], place)
    assert [status for status, _ in answers] == [2, 2, 2], answers
    assert str(refused.value).replace(str(place / "bad"), "bad")[:200] in answers[0][1]
    assert "nothing has neither the config.toml of a training run nor" in answers[1][1]
    assert "the weights of float32 do not fit model.dim=64 (there 24)" in answers[2][1]
