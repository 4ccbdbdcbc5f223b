"""Lookups of a run, made of its text: Engram's ids, which refuse another tokenizer, and V4's tables of experts."""

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
from dsmini.nn.engram import Engram
from dsmini.nn.gate import HashGate, hash_table
from dsmini.text.tokenizer import BPETokenizer, ByteTokenizer, compressed_ids
from dsmini.training import start
from dsmini.training.lookups import make_lookups
from dsmini.training.origin import RunOrigin
from dsmini.training.start import started
from tests.conftest import SMALL
from tests.helpers.configs import V4_MODEL
from tests.helpers.runs import new_run
from tests.helpers.text_folders import save_tokenizer, tokenizers

MODEL: dict[str, Any] = {"engram_layer_ids": (1,), "engram_vocab_size": 50}


def test_texts_compress_as_the_normalizers_of_the_demo_do(tmp_path: Path) -> None:
    """A part of a character has its own name, and a lone space stays one. The library has the normalizers."""
    library, path = tokenizers(), tmp_path / "tokenizer.json"
    plain = save_tokenizer(path)
    tokenizer = BPETokenizer(path)
    n, alone = library.normalizers, "\ue000"
    steps = [n.NFKC(), n.NFD(), n.StripAccents(), n.Lowercase(), n.Replace(library.Regex(r"[ \t\r\n]+"), " ")]
    steps += [n.Replace(library.Regex(r"^ $"), alone), n.Strip(), n.Replace(alone, " ")]
    seen: dict[str, int] = {}
    want = []
    for token in range(400):
        text = plain.decode([token], skip_special_tokens=False)
        key = plain.id_to_token(token) if "\ufffd" in text else n.Sequence(steps).normalize_str(text) or text
        want.append(seen.setdefault(key, len(seen)))
    got = compressed_ids(tokenizer, 400).tolist()
    assert got == want and 256 < max(got) + 1 < 390
    assert np.array_equal(compressed_ids(ByteTokenizer(), 256), np.arange(256))


def test_a_run_makes_ids_and_refuses_those_of_another_tokenizer(tmp_path: Path) -> None:
    training = new_run(tmp_path, model=MODEL)
    (engram,) = (module for module in training.trainer.model.modules() if isinstance(module, Engram))
    config = RunConfig(model=training.trainer.model.config)
    assert torch.equal(engram.compressed, torch.arange(61))
    make_lookups(training.trainer.model, config, training.trainer.corpus, trained=True)
    engram.compressed[60] = 1
    with pytest.raises(ValueError, match=r"tables of n-grams of another tokenizer than bytes; use the one they were"):
        make_lookups(training.trainer.model, config, training.trainer.corpus, trained=True)


V4: dict[str, Any] = SMALL | V4_MODEL


def test_tables_are_made_of_the_training_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One from weights keeps theirs, whatever its text."""
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    sizes: dict[str, Any] = {"vocab_size": 256, "n_hash_layers": 2}
    model = ModelConfig(**V4 | sizes)
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
    config = ModelConfig(**V4 | {"compress_ratios": (0, 8, 8)})
    ParallelConfig(pp=2).check(config, TrainConfig(seq_len=16, grad_accum=2), 2)
