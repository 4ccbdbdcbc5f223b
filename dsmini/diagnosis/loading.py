"""Make what is diagnosed from what a path names. The folder of a run, or of a model, is only read."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsmini import accounting
from dsmini.checkpoint.load import load_pretrained
from dsmini.checkpoint.run_folder import is_model_folder, read_summary, run_config, tokenizer_file
from dsmini.checkpoint.training_state import checkpoint_folders, last_checkpoint, load_run
from dsmini.config import RunConfig
from dsmini.data.corpus import load_corpus
from dsmini.diagnosis.training import Subject
from dsmini.machine import DTYPES, pick_device, pick_dtype, refuse_too_large
from dsmini.nn import Transformer
from dsmini.training.start import refuse_oversized, resolved
from dsmini.training.trainer import Trainer

MOST_TEXT = 1 << 20
"""Tokens of a text that are looked at in decoding."""


def config_of(path: Path | None) -> RunConfig:
    """Return the config that a path names: a file, or the folder of a run. Raises: ValueError if it is neither."""
    if path is None:
        return RunConfig()
    return run_config(path) if path.is_dir() else RunConfig.from_file(path)


def training_subject(what: Path | None) -> Subject:
    """Make the subject of a config, or of a run, also a finished one, from its last checkpoint.

    Raises: ValueError for a run that is damaged, and a text that is missing or too short.
    """
    config, run = config_of(what), what if what is not None and what.is_dir() else None
    device = _device_of(config)
    refuse_oversized(config, device)
    config = resolved(config, device)
    data, cache = config.data, Path("runs/corpus") if run is None else run.parent / "corpus"
    if run is not None:
        if (run / "summary.json").exists() and not read_summary(run):
            raise ValueError(f"{run}/summary.json is damaged; remove it, or diagnose the config of the run")
        data = dataclasses.replace(data, tokenizer=tokenizer_file(run, config))
    corpus = load_corpus(data, config.seq_len, config.model.vocab_size, cache, config.train.seed)
    torch.manual_seed(config.train.seed)
    model = Transformer(config.model, compute_dtype=DTYPES[config.train.dtype]).to(device)
    trainer = Trainer(model, corpus, config, device)
    if run is not None and checkpoint_folders(run):
        parts = ["model", "optimizer", *([] if trainer.average is None else ["average"])]
        notes: list[str] = []
        checkpoint = last_checkpoint(run, parts, lambda found: trainer.check(found.tensors), notes.append)
        _refuse_damaged(run, notes)
        state, done = checkpoint.state, min(checkpoint.state.step, trainer.config.train.steps - 1)
        rest = {"sequences": state.sequences, "average_updates": state.average_updates}
        trainer.load(checkpoint.tensors, steps_done=done, **rest)
    return Subject(trainer)


def _device_of(config: RunConfig) -> torch.device:
    """Return the device of a run, after its threads are set."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    return pick_device(config.train.device)


def _refuse_damaged(run: Path, notes: Sequence[str]) -> None:
    if notes:
        raise ValueError(f"{run} is damaged: {notes[0]}; resume it once, or name an older copy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodedModel:
    """A model to decode with, and a text to read before."""

    model: Transformer
    trained: bool = False
    """False for random weights."""
    text: Tensor | None = None
    """Token ids to read; None: random ones."""
    source: str = "random tokens"
    """The text in words."""


def decoded_model(what: Path | None) -> DecodedModel:
    """Return the model that a path names, or one of a config with random weights.

    Args:
        what: a config, a run, one of its checkpoints, a DeepSeek or Hugging Face folder, or None for the default run.

    Raises: ValueError for a path that is none of them, a damaged run or folder, and a model larger than memory.
    """
    if what is None or not what.is_dir():
        return DecodedModel(model=_random_model(config_of(what)))
    device = pick_device("auto")
    if not is_model_folder(what):
        return _of_run(what, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a folder without its multi-token prediction, and of slow BF16
        return DecodedModel(model=load_pretrained(what, device=device), trained=True)


def _random_model(config: RunConfig) -> Transformer:
    device = _device_of(config)
    nbytes = accounting.weight_bytes(config.model, "float32").total
    refuse_too_large(int(nbytes), "this model with random weights", device)
    torch.manual_seed(config.train.seed)
    with torch.device(device):
        return Transformer(config.model, compute_dtype=pick_dtype("auto", device)).eval()


def _of_run(run: Path, device: torch.device) -> DecodedModel:
    notes: list[str] = []
    model, config = load_run(run, pick_dtype("auto", device), say=notes.append)
    _refuse_damaged(run, notes)
    folder, text = run if (run / "checkpoints").is_dir() else run.parent.parent, None
    try:
        data = dataclasses.replace(config.data, tokenizer=tokenizer_file(folder, config))
        cache = folder.parent / "corpus"
        corpus = load_corpus(data, config.seq_len, config.model.vocab_size, cache, config.train.seed)
        text = torch.as_tensor(corpus.val[:MOST_TEXT].astype("int64"))
        source = f"held-out part of {corpus.source}"
    except (ValueError, OSError) as error:  # its text may be gone: decoding does not need it
        source = f"random tokens, as the run's text cannot be read: {error}"
    return DecodedModel(model=model.to(device), trained=True, text=text, source=source)
