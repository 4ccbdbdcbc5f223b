"""Start a run: resolve its config, read its text, make and lock its folder, build or restore its model.

One that cannot fit into memory is refused before its model has any.
"""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from dsmini import accounting, ops
from dsmini.atomic import remove_leftovers, write_bytes, write_json, write_text
from dsmini.checkpoint.run_folder import (
    new_run_folder,
    read_summary,
    refuse_taken,
    replace_config,
    sole_trainer,
    tokenizer_file,
)
from dsmini.checkpoint.training_state import checkpoint_folders
from dsmini.config import RunConfig
from dsmini.config.fields import require
from dsmini.console.messages import say
from dsmini.console.progress import Progress, patience
from dsmini.data.corpus import Corpus, load_corpus
from dsmini.data.documents import notes
from dsmini.distributed.heartbeat import watched
from dsmini.distributed.meeting import launched
from dsmini.distributed.mesh import Mesh, divided_model, fill, local
from dsmini.distributed.world import World, joined, own_share
from dsmini.machine import DTYPES, keep_freed_memory, pick_dtype, refuse_too_large
from dsmini.nn import Transformer
from dsmini.reading import read_bytes, read_table
from dsmini.training.origin import INIT, RunOrigin, absolute, check_resume
from dsmini.training.record import read_events, require_tensorboard
from dsmini.training.run import TrainingRun
from dsmini.training.trainer import Trainer

WHAT = "training this model with such a batch"


def refuse_oversized(config: RunConfig, device: torch.device) -> None:
    """Raise ValueError if what one process needs at the end of a forward does not fit into memory."""
    train = config.train
    needed = accounting.training_bytes(
        config.model,
        batch_size=train.batch_size // train.grad_accum,
        seq_len=config.seq_len,
        dtype="float32" if train.dtype == "float32" else "bfloat16",
        optimizer=train.optimizer,
        moments=train.moments,
        recompute=train.recompute,
        dsa_stage=train.dsa_stage,
    )
    refuse_too_large(int(needed.total), WHAT, device)


def refuse_oversized_parts(model: Transformer, device: torch.device, world: World) -> None:
    """Raise ValueError if the parameters and gradients of the ranks of a machine do not fit into its memory.

    On a CPU they share it. Each has a GPU of its own. All ranks call it together.

    Args:
        model: this rank's part; may be on the meta device.
    """
    needed = world.gather(2 * sum(local(p).nbytes for p in model.parameters()))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    first = world.rank // here * here
    world.together(lambda: refuse_too_large(sum(needed[first : first + here]), WHAT, device))


# --- the start


LONGEST_WAIT = 86400.0
"""Seconds in which all ranks must come to a message: rank 0 tokenizes alone. The heartbeat finds a rank that hangs."""


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
    # 1. the config, the machine and the processes fit
    config = origin.accept(config)
    config.parallel.check(config.model, config.train, launched()[1])
    if config.train.tensorboard:
        require_tensorboard()
    device = own_share(config.train.device, config.train.threads)
    keep_freed_memory()
    with joined(config.parallel.timeout, device, longest_wait=LONGEST_WAIT) as world, ExitStack() as stack:
        stack.enter_context(watched(world, config.parallel.timeout, device))
        world.refuse_unequal(_options(origin, config))
        world.first(lambda: None if origin.resume else refuse_taken(config.out))
        if world.size == 1:  # first, for even without memory the layers of an absurd model take long to make
            refuse_oversized(config, device)
        mesh = Mesh(config.parallel, device)
        model = divided_model(config.model, mesh)  # without memory yet
        if world.size > 1:
            refuse_oversized_parts(model, device, world)
        # 2. the text: rank 0 tokenizes it into a file, which the others read
        read: list[Corpus] = []
        world.first(lambda: read.append(_read_corpus(config, origin.resume, console)))
        corpus = read[0] if read else _read_corpus(config, origin.resume, console)
        # 3. the folder
        config = dataclasses.replace(config, train=world.first(lambda: resolved(config, device).train))
        out = world.first(lambda: origin.resume or new_run_folder(config.out, origin.name))
        world.refuse_unshared(out)
        config = dataclasses.replace(absolute(config), out=out)
        world.first(lambda: stack.enter_context(sole_trainer(out)) and None)
        # 4. the model, and its first values or those of the last checkpoint
        torch.manual_seed(config.train.seed)
        model.compute_dtype = DTYPES[config.train.dtype]
        with patience(console, "making the model"):  # before the Trainer, whose average of the parameters starts so
            fill(model, mesh, device, None if origin.weights is None else origin.weights.rows)
        if config.train.optimizer == "muon":  # its kernel may have to be compiled
            world.beat(0, "compiling")
            with patience(console, "preparing kernels"):
                world.first(lambda: ops.serving(device.type) and None)
        training = TrainingRun(config, Trainer(model, corpus, config, device, mesh), console, world)
        lines = _continued(origin, training) if origin.resume else world.first(lambda: _begun(origin, training))
        for line in [*_introduction(config, corpus), *lines]:
            say(console, line)
        yield training


def _options(origin: RunOrigin, config: RunConfig) -> dict[str, object]:
    """Return the options that all processes of a run must be started with."""
    weights = origin.weights
    named = {"--resume": origin.resume, "--init": weights and weights.named, "its step": weights and weights.step}
    parts = {name: of for name, of in dataclasses.asdict(config).items() if isinstance(of, dict)}
    return named | {f"{part}.{key}": value for part, of in parts.items() for key, value in of.items()}


def _read_corpus(config: RunConfig, resume: Path | None, console: Console) -> Corpus:
    """Read the run's corpus, tokenized once into a folder next to the run. A resumed run has its own tokenizer."""
    data = dataclasses.replace(config.data, tokenizer=tokenizer_file(resume, config)) if resume else config.data
    cache = (config.out or Path("runs/new")).parent / "corpus"
    with Progress(console, label="the corpus", unit="bytes") as progress:
        return load_corpus(
            data, config.seq_len, config.model.vocab_size, cache, config.train.seed, progress=progress.stage
        )


def resolved(config: RunConfig, device: torch.device) -> RunConfig:
    """Return the config with the device, dtype and threads that are in use now, and with absolute paths."""
    dtype = str(pick_dtype(config.train.dtype, device)).removeprefix("torch.")
    # a number that was not asked for is of this start: the run may continue with more processes
    name = config.train.device if launched()[1] == 1 and ":" in config.train.device else device.type
    train = dataclasses.replace(config.train, device=name, dtype=dtype, threads=torch.get_num_threads())
    return dataclasses.replace(absolute(config), train=train)


def _begun(origin: RunOrigin, training: TrainingRun) -> list[str]:
    """Write the first files of a new run's folder; return lines about the weights it starts from.

    config.toml is the last: with it the folder is a run, which can be resumed.
    """
    config, folder, weights = training.config, training.folder, origin.weights
    refuse_taken(folder)  # another run may have begun in it since it was looked at
    write_json(folder / "corpus.json", training.trainer.corpus.describe())
    if config.data.tokenizer is not None:
        write_bytes(folder / "tokenizer.json", read_bytes(config.data.tokenizer))
    if weights is not None:
        write_json(folder / INIT, weights.describe())
    write_text(folder / "config.toml", config.to_toml())
    return [] if weights is None else [f"weights {weights.folder}"]


def _continued(origin: RunOrigin, training: TrainingRun) -> list[str]:
    """Restore a run from its last checkpoint, or start it again where it was killed before its first one.

    Return lines about what it does differently from here on.
    """
    config, folder, world, corpus = training.config, training.folder, training.world, training.trainer.corpus
    steps, checkpoint = config.train.steps, None
    if world.first(lambda: bool(checkpoint_folders(folder))):
        with patience(training.console, "reading the checkpoint"):
            checkpoint = training.newest_checkpoint(partial(say, training.console))
        world.first(lambda: remove_leftovers(checkpoint.folder.parent))  # of a save that was killed
        step, trained_on = checkpoint.state.step, checkpoint.state.corpus_sha256
        old = dataclasses.replace(checkpoint.config, out=folder)  # the folder may have been moved
        how = f"resuming after step {step} of {steps} from {checkpoint.folder}"
    else:
        assert origin.before is not None
        step, old, trained_on = 0, origin.before, world.first(lambda: _corpus_before(folder))
        how = f"starting again from step 0 of {steps}: there is no checkpoint yet"
    require(
        trained_on in (None, corpus.sha256),
        f"{folder} was trained on a corpus with sha256 {trained_on}, {corpus.source} now has {corpus.sha256}; restore "
        "that text, or name where it is now with --data.path, or start a new run from its weights with --init "
        f"{folder}",
    )
    require(step <= steps, f"{folder} has done {step} steps, train.steps={steps} is fewer; use more")
    finished = checkpoint is not None and read_summary(folder).get("steps") == step == steps
    require(not finished, f"{folder} is finished: {step} of {steps} steps; to continue raise --train.steps")
    changes = check_resume(old, config)
    if checkpoint is not None:
        training.resume(checkpoint)
    world.first(lambda: replace_config(folder, old, config, step))
    return [*changes, how]


def _corpus_before(folder: Path) -> str | None:
    """Return the hash of the corpus of a run that never had a checkpoint, if it is known.

    Raises: ValueError for a run that had one.
    """
    if saved := [event["step"] for event in read_events(folder) if event["event"] == "saved"]:
        raise ValueError(
            f"{folder} has saved {len(saved)} checkpoints, the last after step {saved[-1]}, and they are gone; put one "
            "back into its checkpoints, or start a new run in another folder"
        )
    before = None
    with suppress(ValueError):  # the file is damaged
        before = read_table(folder / "corpus.json").get("sha256")
    return before if isinstance(before, str) else None


def _introduction(config: RunConfig, corpus: Corpus) -> list[str]:
    """Return lines about what will be trained, on what, and where."""
    parameters, where = accounting.parameters(config.model), f"{config.out}/corpus.json"
    tokenizer = config.data.tokenizer
    kind = f"tokens of {tokenizer}, {corpus.bytes_per_token:.2f} bytes each" if tokenizer else "a token is a byte"
    if config.data.fim_rate:
        kind += f"; {corpus.rearranged:,} training documents rearranged for fill-in-the-middle"
    about = notes(corpus.left_out, corpus.not_utf8, where, tokenizer is None)
    about.append(f"{len(corpus.train):,} training tokens, {len(corpus.val):,} held out ({corpus.split})")
    return [
        f"corpus  {corpus.source}, {corpus.files:,} file{'s' * (corpus.files != 1)}",
        *(f"        {line}" for line in [*about, kind, f"sha256 {corpus.sha256}", corpus.cache]),
        f"model   {parameters.total:,} parameters, {parameters.active:,} active for a token",
        f"run     {config.out}, {config.train.dtype} on {config.train.device}, threads: {config.train.threads}",
    ]
