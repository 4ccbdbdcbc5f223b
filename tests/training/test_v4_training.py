"""Training of V4: tables from the text, and layouts. test_optim.py has who moves what, test_dsa_stages.py indexers."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from dsmini import DataConfig, ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.config.run import ParallelConfig
from dsmini.diagnosis.diagnosis import training_subject
from dsmini.nn.gate import HashGate, hash_table
from dsmini.training import start
from dsmini.training.origin import RunOrigin
from dsmini.training.start import started
from tests.conftest import SMALL
from tests.helpers.configs import V4_MODEL

MODEL: dict[str, Any] = SMALL | V4_MODEL


def test_tables_are_made_of_the_training_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One from weights keeps theirs, whatever its text."""
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    sizes: dict[str, Any] = {"vocab_size": 256, "n_hash_layers": 2}
    model = ModelConfig(**MODEL | sizes)
    train = TrainConfig(seq_len=16, device="cpu", dtype="float32")
    config = RunConfig(model=model, train=train, data=DataConfig(path=tmp_path / "book.txt"), out=tmp_path / "x")
    with started(RunOrigin(config=config), config, Console(quiet=True)) as training:
        counts = torch.from_numpy(np.bincount(training.trainer.corpus.train, minlength=256))
        first = training.trainer.model
    assert counts.sum() == int(0.9 * 4500)
    diagnosed = training_subject(tmp_path / "x").trainer.model
    for layer, (gate, of_diagnosis) in enumerate(zip(first.gates()[:2], diagnosed.gates(), strict=False)):
        assert isinstance(gate, HashGate) and isinstance(of_diagnosis, HashGate)
        assert torch.equal(of_diagnosis.tid2eid, gate.tid2eid)
        e, k = len(gate.weight), gate.tid2eid.shape[1]
        assert torch.equal(gate.tid2eid, hash_table(counts, e, k, layer))
    state = Transformer(model).state_dict()
    found = start.Found(folder=tmp_path, rows=lambda name, rows: state[name][rows])
    monkeypatch.setattr(start, "_weights", lambda *_: found)
    weights = RunOrigin(config=config, before=config, init=tmp_path)
    again = dataclasses.replace(config, out=tmp_path / "y")
    with started(weights, again, Console(quiet=True)) as training:
        name = "layers.0.ffn.gate.tid2eid"
        assert torch.equal(training.trainer.model.state_dict()[name], state[name])


def test_attention_without_indexers_goes_with_a_pipeline() -> None:
    config = ModelConfig(**MODEL | {"compress_ratios": (0, 8, 8)})
    ParallelConfig(pp=2).check(config, TrainConfig(seq_len=16, grad_accum=2), 2)
