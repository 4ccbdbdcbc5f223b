"""Models that are trained a little, on the default corpus: where random weights would not do."""

from pathlib import Path

import torch

from benchmarks.question import Setting
from dsmini import RunConfig, Transformer
from dsmini.data.corpus import load_corpus
from dsmini.training.trainer import Trainer

CORPUS = Path("runs/corpus")


def trainer(config: RunConfig, setting: Setting, steps: int = 0) -> Trainer:
    """Return a trainer of this run on the setting's device, in its dtype, after this many steps."""
    corpus = load_corpus(config.data, config.seq_len, config.model.vocab_size, CORPUS)
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = Transformer(config.model, compute_dtype=setting.dtype)
    made = Trainer(model, corpus, config, setting.device)
    for _ in range(steps):
        made.step()
    return made
