"""Start a run: resolve its config, read its text, make and lock its folder, build or restore its model."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from rich.console import Console

from dsmini import accounting, ops
from dsmini.atomic import remove_leftovers, write_bytes, write_json, write_text
from dsmini.checkpoint.memory import refuse_too_large
from dsmini.checkpoint.run_folder import (
    new_run_folder,
    read_summary,
    refuse_misplaced,
    refuse_taken,
    replace_config,
    sole_trainer,
    tokenizer_file,
)
from dsmini.checkpoint.training_state import Checkpoint, checkpoint_folders
from dsmini.config import RunConfig
from dsmini.console.messages import say
from dsmini.console.progress import Progress, patience
from dsmini.data.corpus import Corpus, load_corpus
from dsmini.data.documents import left_out_in_words, not_utf8_in_words
from dsmini.distributed.drawing import ModelPart, meta_model
from dsmini.distributed.meeting import launched, told
from dsmini.distributed.mesh import Mesh
from dsmini.distributed.replicas import hashed
from dsmini.distributed.world import World, device_of_rank, joined, threads_of_rank
from dsmini.machine import DTYPES, pick_device, pick_dtype
from dsmini.reading import read_bytes, read_table
from dsmini.training.events import read_events
from dsmini.training.origin import INIT, FirstWeights, RunOrigin, absolute, check_resume, differences
from dsmini.training.part_memory import refuse_oversized
from dsmini.training.run import TrainingRun
from dsmini.training.tensorboard import require_tensorboard
from dsmini.training.trainer import Trainer

LONGEST_WAIT = 86400.0
"""Seconds in which all ranks must come to a message. Rank 0 tokenizes alone; a rank that hangs is found otherwise."""


@contextmanager
def started(origin: RunOrigin, config: RunConfig, console: Console) -> Iterator[TrainingRun]:
    """Yield a run that is ready to train, new or resumed, and lock its folder until the block ends.

    Where a launcher started several processes, all of them call it, and each gets its part of the run.

    Args:
        config: config of `origin` with the changes of the command line.

    Raises: ValueError for what the origin does not allow, what is not on this machine, a text that is too short, a
        folder that is taken, processes that do not fit, and a run that has no whole checkpoint, another corpus, or
        nothing left to do.
    """
    config = origin.accept(config)
    config.parallel.check(config.model, config.train, launched()[1])
    if config.train.tensorboard:
        require_tensorboard()
    device = pick_device(device_of_rank(config.train.device))
    if threads := threads_of_rank(config.train.threads):
        torch.set_num_threads(threads)
    with joined(config.parallel.timeout, device, longest_wait=LONGEST_WAIT) as world:
        _refuse_unequal(world, origin, config)
        world.first(lambda: _check_place(origin, config))
        if world.size == 1:  # before each layer of an absurd model is made, even without memory
            least = 4 * accounting.parameters(config.model).total
            refuse_too_large(least, "training this model with such a batch", device)
        part = ModelPart.divided(config.model, Mesh(config.parallel, device))  # without memory yet
        refuse_oversized(config, device, part, world)
        read: list[Corpus] = []
        world.first(lambda: read.append(_read_corpus(config, origin.resume, console)))
        corpus = read[0] if read else _read_corpus(config, origin.resume, console)  # the tokens are in a file now
        config = dataclasses.replace(config, train=world.first(lambda: resolved(config, device).train))
        config = world.first(lambda: _with_folder(origin, absolute(config)))
        with ExitStack() as stack:
            world.first(lambda: stack.enter_context(sole_trainer(config.out or Path())))
            trainer = _new_trainer(origin, config, corpus, device, part, world, console)
            training = TrainingRun(config, trainer, console, world)
            lines = _first_steps(origin, training)
            aside = [f"{f} was put aside: no attempt survived it" for f in training.put_aside]
            for line in [*_introduction(config, corpus), *aside, *lines]:
                say(console, line)
            yield training


def _refuse_unequal(world: World, origin: RunOrigin, config: RunConfig) -> None:
    """Refuse processes that were started with unequal options or configs, or that read unequal weights."""
    if world.size == 1:
        return
    mine = _options(origin)
    first, of_first = world.first(lambda: (config, mine))
    unequal = [
        f"{name} ({mine[name] or 'none'}, not {of_first[name] or 'none'})"
        for name in mine
        if mine[name] != of_first[name]
    ]
    keys = sorted(change.key for change in differences(first, config))
    for rank, words in enumerate(world.gather(", another ".join(unequal) or ", ".join(keys))):
        if words:
            raise told(
                ValueError(
                    f"rank {rank} was started with another {words} than rank 0; start all processes with the same "
                    "command, where they see the same files"
                )
            )


def _options(origin: RunOrigin) -> dict[str, str | None]:
    """Return what a run starts from, by the option that decides it; None for one that is left out."""
    weights = origin.weights
    read = None
    if weights is not None:
        names = meta_model(weights.run.model).state_dict()
        hashes = [(name, hashed(weights.rows(name, slice(1)))) for name in names]  # no rank reads all of them
        read = f"step {weights.step}, hash {sha256(repr(hashes).encode()).hexdigest()[:16]}"
    paths = {name: path and str(path) for name, path in (("--resume", origin.resume), ("--init", origin.init))}
    return paths | {"weights to start from": read}


def _check_place(origin: RunOrigin, config: RunConfig) -> None:
    """Refuse a folder that this run cannot be written to."""
    if not origin.resume:
        refuse_taken(config.out)
    elif not os.access(origin.resume, os.W_OK):
        raise ValueError(
            f"cannot write into {origin.resume}; copy the run to a place that allows it, and resume it there"
        )
    if place := origin.resume or config.out:
        refuse_misplaced(place)


def _with_folder(origin: RunOrigin, config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, out=origin.resume or new_run_folder(config.out, origin.name))


def _new_trainer(
    origin: RunOrigin,
    config: RunConfig,
    corpus: Corpus,
    device: torch.device,
    part: ModelPart,
    world: World,
    console: Console,
) -> Trainer:
    """Give the model, or this rank's part of it, its first values, and make what trains it."""
    torch.manual_seed(config.train.seed)
    part.model.compute_dtype = DTYPES[config.train.dtype]
    rows = None if origin.weights is None else origin.weights.rows
    with patience(console, "making the model"):  # before the Trainer, whose average of the parameters starts from it
        part.fill(device, rows)
    if config.train.optimizer == "muon":  # its kernel may have to be compiled
        with patience(console, "preparing kernels"):
            world.first(lambda: ops.serving(device.type) and None)
    return Trainer(part.model, corpus, config, device, part.mesh)


def _first_steps(origin: RunOrigin, training: TrainingRun) -> list[str]:
    """Begin a new run in its folder, or restore one; return lines about what it does differently."""
    world, out = training.world, training.folder
    if origin.resume is None:

        def begin() -> list[str]:
            refuse_taken(out)  # another run may have begun in it since it was looked at
            return _begin(training, origin.weights)

        return world.first(begin)
    if world.first(lambda: bool(checkpoint_folders(out))):
        return _resume(training)
    return world.first(lambda: _restart(training, origin))


def resolved(config: RunConfig, device: torch.device) -> RunConfig:
    """Return the config with the device, dtype and threads that are in use now, and with absolute paths."""
    dtype = str(pick_dtype(config.train.dtype, device)).removeprefix("torch.")
    name = str(device) if launched()[1] == 1 else device.type  # each process has a number of its own
    train = dataclasses.replace(config.train, device=name, dtype=dtype, threads=torch.get_num_threads())
    return dataclasses.replace(absolute(config), train=train)


def _begin(training: TrainingRun, weights: FirstWeights | None) -> list[str]:
    """Write the first files of a new run's folder; return lines about the weights it starts from.

    config.toml is the last: with it the folder is a run, which can be resumed.
    """
    config, folder = training.config, training.folder
    write_json(folder / "corpus.json", training.trainer.corpus.describe())
    if config.data.tokenizer is not None:
        write_bytes(folder / "tokenizer.json", read_bytes(config.data.tokenizer))
    if weights is not None:
        write_json(folder / INIT, weights.describe())
    write_text(folder / "config.toml", config.to_toml())
    return [] if weights is None else [f"weights {weights.folder}"]


def _restart(training: TrainingRun, origin: RunOrigin) -> list[str]:
    """Start a run again that was killed before its first checkpoint; return lines about what it does differently."""
    config, folder = training.config, training.folder
    assert origin.before is not None
    if saved := [event["step"] for event in read_events(folder) if event["event"] == "saved"]:
        raise ValueError(
            f"{folder} has saved {len(saved)} checkpoints, the last after step {saved[-1]}, and they are gone; put one "
            "back into its checkpoints, or start a new run in another folder"
        )
    before = None
    with suppress(ValueError):  # the file is damaged
        before = read_table(folder / "corpus.json").get("sha256")
    if isinstance(before, str):
        _check_corpus(config, before, training.trainer.corpus)
    changes = check_resume(origin.before, config)
    replace_config(folder, origin.before, config, 0)
    return [*changes, f"starting again from step 0 of {config.train.steps}: there is no checkpoint yet"]


def _resume(training: TrainingRun) -> list[str]:
    """Restore a run from its last checkpoint; return lines about what it does differently from here on."""
    config, folder = training.config, training.folder
    world = training.world
    with patience(training.console, "reading the checkpoint"):
        checkpoint = training.newest_checkpoint(partial(say, training.console))
    world.first(lambda: remove_leftovers(checkpoint.folder.parent))  # of a save that was killed
    _check_corpus(config, checkpoint.state.corpus_sha256, training.trainer.corpus)
    _check_unfinished(config, checkpoint)
    old = dataclasses.replace(checkpoint.config, out=folder)  # the folder may have been moved
    changes = check_resume(old, config)
    training.resume(checkpoint)
    world.first(lambda: replace_config(folder, old, config, checkpoint.state.step))
    return [*changes, f"resuming after step {checkpoint.state.step} of {config.train.steps} from {checkpoint.folder}"]


def _check_corpus(config: RunConfig, before: str, corpus: Corpus) -> None:
    """Refuse a run that would continue with another text."""
    if before != corpus.sha256:
        raise ValueError(
            f"{config.out} was trained on a corpus with sha256 {before}, {corpus.source} now has "
            f"{corpus.sha256}; restore that text, or name where it is now with --data.path, or start a new run from "
            f"its weights with --init {config.out}"
        )


def _check_unfinished(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Refuse a run that has nothing left to do."""
    out, state, steps = config.out, checkpoint.state, config.train.steps
    assert out is not None
    if state.step > steps:
        raise ValueError(f"{out} has done {state.step} steps, train.steps={steps} is fewer; use more")
    if read_summary(out).get("steps") == state.step == steps:
        raise ValueError(f"{out} is finished: {steps} of {steps} steps; to continue raise --train.steps")


def _read_corpus(config: RunConfig, resume: Path | None, console: Console) -> Corpus:
    """Read the run's corpus, tokenized once into a folder next to the run. A resumed run has its own tokenizer."""
    data = dataclasses.replace(config.data, tokenizer=tokenizer_file(resume, config)) if resume else config.data
    cache = (config.out or Path("runs/new")).parent / "corpus"
    with Progress(console, label="the corpus", unit="bytes") as progress:
        return load_corpus(
            data, config.seq_len, config.model.vocab_size, cache, config.train.seed, progress=progress.stage
        )


def _introduction(config: RunConfig, corpus: Corpus) -> Sequence[str]:
    """Return lines about what will be trained, on what, and where."""
    parameters = accounting.parameters(config.model)
    return [
        f"corpus  {corpus.source}, {corpus.files} files",
        *(f"        {note}" for note in _notes(config, corpus)),
        f"        {len(corpus.train):,} training tokens, {len(corpus.val):,} held out ({corpus.split})",
        f"        {_tokens_of(config, corpus)}",
        f"        sha256 {corpus.sha256}",
        f"        {corpus.cache}",
        f"model   {parameters.total:,} parameters, {parameters.active:,} active for a token",
        f"run     {config.out}, {config.train.dtype} on {config.train.device}, threads: {config.train.threads}",
    ]


def _notes(config: RunConfig, corpus: Corpus) -> list[str]:
    """Return lines about the files that are not text, or not UTF-8."""
    where = f"{config.out}/corpus.json"
    left_out = [left_out_in_words(corpus.left_out, where)] if corpus.left_out else []
    as_bytes = config.data.tokenizer is None
    return left_out + ([not_utf8_in_words(corpus.not_utf8, where, as_bytes)] if corpus.not_utf8 else [])


def _tokens_of(config: RunConfig, corpus: Corpus) -> str:
    """Return in words what a token is."""
    kind = "a token is a byte"
    if config.data.tokenizer is not None:
        kind = f"tokens of {config.data.tokenizer}, {corpus.bytes_per_token:.2f} bytes each"
    fim = f"; {corpus.rearranged:,} training documents rearranged for fill-in-the-middle"
    return kind + (fim if config.data.fim_rate else "")
