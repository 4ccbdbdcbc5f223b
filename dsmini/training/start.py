"""The start of a run: its config is resolved, its text read, its folder made and held, its model built or restored."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from dsmini import accounting
from dsmini.atomic import write_bytes, write_json, write_text
from dsmini.checkpoint.memory import refuse_too_large
from dsmini.checkpoint.run_folder import (
    new_run_folder,
    read_summary,
    refuse_taken,
    replace_config,
    sole_trainer,
    tokenizer_file,
)
from dsmini.checkpoint.trained_model import model_tensors
from dsmini.checkpoint.training_state import Checkpoint, last_checkpoint
from dsmini.config import RunConfig
from dsmini.console.messages import say
from dsmini.console.progress import Progress
from dsmini.data.corpus import Corpus, load_corpus
from dsmini.machine import DTYPES, pick_device, pick_dtype
from dsmini.nn import Transformer
from dsmini.training.changes import check_resume
from dsmini.training.origin import RunOrigin, absolute
from dsmini.training.run import TrainingRun
from dsmini.training.tensorboard import require_tensorboard
from dsmini.training.trainer import Trainer


@contextmanager
def started(origin: RunOrigin, config: RunConfig, console: Console) -> Iterator[TrainingRun]:
    """Yield a run that is ready to train, new or resumed, and hold its folder meanwhile.

    Args:
        config: that of `origin`, with what the command line changes in it.

    Raises: ValueError for what the origin does not allow, what is not on this machine, a text that is too short, a
        folder that is taken, and a run that has no whole checkpoint, another corpus, or nothing left to do.
    """
    config = origin.accept(config)
    if config.train.tensorboard:
        require_tensorboard()
    device = pick_device(config.train.device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if not origin.resume:
        refuse_taken(config.out)
    _refuse_too_large(config, device)
    corpus = _read_corpus(config, origin.resume, console)
    config = _resolved(config, device)
    out = origin.resume or new_run_folder(config.out, origin.name)
    config = dataclasses.replace(config, out=out)
    with sole_trainer(out):
        torch.manual_seed(config.train.seed)
        model = Transformer(config.model, compute_dtype=DTYPES[config.train.dtype]).to(device)
        if origin.weights is not None:  # before the Trainer, whose average of the parameters starts from them
            model.load_state_dict(model_tensors(origin.weights))
        training = TrainingRun(config, Trainer(model, corpus, config, device), console)
        more = _begin(training, origin.weights) if origin.resume is None else _resume(training)
        for line in [*_introduction(config, corpus), *more]:
            say(console, line)
        yield training


def _refuse_too_large(config: RunConfig, device: torch.device) -> None:
    """Refuse a run whose parameters, optimizer state and smallest activations do not fit into memory."""
    train = config.train
    nbytes = accounting.training_bytes(
        config.model,
        batch_size=train.batch_size // train.grad_accum,
        seq_len=config.seq_len,
        dtype="float32" if train.dtype == "float32" else "bfloat16",
        optimizer=train.optimizer,
        moments=train.moments,
        recompute=train.recompute,
    ).total
    refuse_too_large(int(nbytes), "training this model with such a batch", device)


def _begin(training: TrainingRun, weights: Checkpoint | None) -> list[str]:
    """Write the first files of a new run's folder; return lines about the weights it starts from."""
    config, folder = training.config, training.folder
    write_text(folder / "config.toml", config.to_toml())
    write_json(folder / "corpus.json", training.trainer.corpus.describe())
    if config.data.tokenizer is not None:
        write_bytes(folder / "tokenizer.json", config.data.tokenizer.read_bytes())
    if weights is None:
        return []
    write_json(folder / "init.json", {"checkpoint": str(weights.folder.resolve()), "step": weights.state.step})
    return [f"weights {weights.folder}"]


def _resume(training: TrainingRun) -> list[str]:
    """Restore a run from its last checkpoint; return lines about what it does differently from here on."""
    config, folder, saver = training.config, training.folder, training.saver
    checkpoint = last_checkpoint(folder, saver.parts, saver.fits, partial(say, training.console))
    _check_unfinished(config, checkpoint, training.trainer.corpus)
    old = dataclasses.replace(checkpoint.config, out=folder)  # the folder may have been moved
    changes = check_resume(old, config)
    replace_config(folder, old, config, checkpoint.state.step)
    training.resume(checkpoint)
    return [*changes, f"resuming after step {checkpoint.state.step} of {config.train.steps} from {checkpoint.folder}"]


def _check_unfinished(config: RunConfig, checkpoint: Checkpoint, corpus: Corpus) -> None:
    """Refuse a run that has nothing left to do, or that would go on with another text."""
    out, state, steps = config.out, checkpoint.state, config.train.steps
    assert out is not None
    if state.corpus_sha256 != corpus.sha256:
        raise ValueError(
            f"{out} was trained on a corpus with sha256 {state.corpus_sha256}, {corpus.source} now has "
            f"{corpus.sha256}; restore that text, or name where it is now with --data.path, or start a new run from "
            f"its weights with --init {out}"
        )
    if state.step > steps:
        raise ValueError(f"{out} has done {state.step} steps, train.steps={steps} is fewer; use more")
    if read_summary(out).get("steps") == state.step == steps:
        raise ValueError(f"{out} is finished: {steps} of {steps} steps; to go on raise --train.steps")


def _read_corpus(config: RunConfig, resume: Path | None, console: Console) -> Corpus:
    """Read the run's corpus, tokenised into a folder next to the run unless it is there. A resumed run has its own
    tokenizer."""
    data = dataclasses.replace(config.data, tokenizer=tokenizer_file(resume, config)) if resume else config.data
    cache = (config.out or Path("runs/new")).parent / "corpus"
    with Progress(console, label="the corpus", unit="bytes") as progress:
        return load_corpus(
            data, config.seq_len, config.model.vocab_size, cache, config.train.seed, progress=progress.stage
        )


def _resolved(config: RunConfig, device: torch.device) -> RunConfig:
    """Return the config with what was chosen for it: the device, dtype and threads in use."""
    dtype = str(pick_dtype(config.train.dtype, device)).removeprefix("torch.")
    train = dataclasses.replace(config.train, device=str(device), dtype=dtype, threads=torch.get_num_threads())
    return dataclasses.replace(absolute(config), train=train)


def _introduction(config: RunConfig, corpus: Corpus) -> Sequence[str]:
    """Return in lines what is going to happen."""
    parameters = accounting.parameters(config.model)
    left_out = f", {corpus.skipped} left out: empty or not text" if corpus.skipped else ""
    return [
        f"corpus  {corpus.source}, {corpus.files} files{left_out}",
        f"        {len(corpus.train):,} training tokens, {len(corpus.val):,} held out ({corpus.split})",
        f"        {_tokens_of(config, corpus)}",
        f"        sha256 {corpus.sha256}",
        f"        {corpus.cache}",
        f"model   {parameters.total:,} parameters, {parameters.active:,} active for a token",
        f"run     {config.out}, {config.train.dtype} on {config.train.device}, threads: {config.train.threads}",
    ]


def _tokens_of(config: RunConfig, corpus: Corpus) -> str:
    """Return in words what a token is."""
    kind = "a token is a byte"
    if config.data.tokenizer is not None:
        kind = f"tokens of {config.data.tokenizer}, {corpus.bytes_per_token:.2f} bytes each"
    fim = f"; {corpus.rearranged:,} training documents rearranged for fill-in-the-middle"
    return kind + (fim if config.data.fim_rate else "")
