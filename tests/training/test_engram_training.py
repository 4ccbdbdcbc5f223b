"""Engram in a run: the ids that texts of tokens compress to, and weights that refuse another tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsmini import RunConfig
from dsmini.nn.engram import Engram
from dsmini.text.tokenizer import BPETokenizer, ByteTokenizer, compressed_ids
from dsmini.training.lookups import make_lookups
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
