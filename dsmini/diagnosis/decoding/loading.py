"""Loading a model to decode with, as dsmini.generate does. A run or a folder is only read."""

import dataclasses
import warnings
from pathlib import Path

import torch

from dsmini import accounting
from dsmini.checkpoint.load import load_pretrained
from dsmini.checkpoint.memory import refuse_too_large
from dsmini.checkpoint.run_folder import is_model_folder, tokenizer_file
from dsmini.checkpoint.trained_model import load_run
from dsmini.config import RunConfig
from dsmini.data.corpus import load_corpus
from dsmini.diagnosis.decoding.subject import DecodedModel
from dsmini.diagnosis.subject import config_of
from dsmini.machine import pick_device, pick_dtype
from dsmini.nn import Transformer

MOST_TEXT = 1 << 20
"""Tokens of a text that are looked at."""


def decoded_model_of(what: Path | None) -> DecodedModel:
    """Return the model that a path names, or one of a config with random weights.

    Args:
        what: a config, a run, one of its checkpoints, a DeepSeek or Hugging Face folder, or None for the default run.

    Raises: ValueError for a path that is none of them, a damaged run or folder, and a model larger than memory.
    """
    if what is None or not what.is_dir():
        return _random(config_of(what)[0])
    device = pick_device("auto")
    if not is_model_folder(what):
        return _of_run(what, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a folder without its multi-token prediction, and of slow BF16
        model = load_pretrained(what, device=device)
    return DecodedModel(model=model, trained=True, text=None, source="random tokens")


def _random(config: RunConfig) -> DecodedModel:
    device = pick_device(config.train.device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    nbytes = accounting.weight_bytes(config.model, "float32").total
    refuse_too_large(int(nbytes), "this model with random weights", device)
    torch.manual_seed(config.train.seed)
    with torch.device(device):
        model = Transformer(config.model, compute_dtype=pick_dtype("auto", device)).eval()
    return DecodedModel(model=model, trained=False, text=None, source="random tokens")


def _of_run(run: Path, device: torch.device) -> DecodedModel:
    notes: list[str] = []
    model, config = load_run(run, pick_dtype("auto", device), say=notes.append)
    if notes:
        raise ValueError(f"{run} is damaged: {notes[0]}; resume it once, or name an older copy")
    folder = run if (run / "checkpoints").is_dir() else run.parent.parent
    text, source = None, ""
    try:
        data = dataclasses.replace(config.data, tokenizer=tokenizer_file(folder, config))
        cache = folder.parent / "corpus"
        corpus = load_corpus(data, config.seq_len, config.model.vocab_size, cache, config.train.seed)
        text = torch.as_tensor(corpus.val[:MOST_TEXT].astype("int64"))
        source = f"held-out part of {corpus.source}"
    except (ValueError, OSError) as error:  # its text may be gone: decoding does not need it
        source = f"random tokens, as the run's text cannot be read: {error}"
    return DecodedModel(model=model.to(device), trained=True, text=text, source=source)
