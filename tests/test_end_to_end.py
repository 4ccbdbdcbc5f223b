"""One run from a text to a folder for transformers: train, resume, generate, convert, and load it again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dsmini
from dsmini.checkpoint.training_state import load_run
from tests.helpers import folders
from tests.helpers.commands import TINY, finish

TEXT = "The quick brown fox jumps over the lazy dog. " * 100


def finished(command: str, folder: Path) -> Any:
    """Run a command, which must succeed; return what it printed as JSON."""
    return json.loads(finish(f"dsmini.{command} --json", folder).stdout)


def losses(run_folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def test_run_is_trained_resumed_written_with_and_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch alone runs: kernels take half a minute to compile, and have tests of their own."""
    monkeypatch.setenv("DSMINI_BACKEND", "eager")
    (tmp_path / "book.txt").write_text(TEXT)
    summary = finished(f"train --data.path book.txt --out x --train.steps 20 {TINY} --train.eval-every 20", tmp_path)
    loss = losses(tmp_path / "x")
    assert len(loss) == summary["steps"] == 20 and loss[-1] < loss[0] - 1
    summary = finished("train --resume x --train.steps 24", tmp_path)
    resumed = losses(tmp_path / "x")
    assert len(resumed) == summary["steps"] == 24 and resumed[:20] == loss and max(resumed[20:]) < loss[0] - 1

    asked = "--prompt 'The quick' --max-new-tokens 10 --temperature 0 --dtype float32"
    written = finished(f"generate x {asked}", tmp_path)
    assert written["text"].startswith("The quick") and written["new_tokens"] == 10
    done = finish("dsmini.convert x folder --json", tmp_path)
    assert "will list the tensors of model.layers.2 as unexpected and load the others" in done.stderr

    ours, _ = load_run(tmp_path / "x")
    theirs = dsmini.load_pretrained(tmp_path / "folder", torch.float32)
    figures, stored = json.loads(done.stdout), folders.read(tmp_path / "folder")
    assert figures["files"] == ["model.safetensors"]
    assert figures["bytes_written"] == sum(tensor.nbytes for tensor in stored.values())
    assert theirs.config.n_mtp_layers == 1 and folders.config_of(tmp_path / "folder")["eos_token_id"] == 0
    tokens = torch.tensor([list(TEXT[:32].encode())])
    with torch.no_grad():
        assert torch.equal(theirs.eval()(tokens), ours.eval()(tokens))

    assert finished(f"generate folder {asked} --eos ignore", tmp_path)["text"] == written["text"]
