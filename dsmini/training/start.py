"""Start a run: resolve its config, read its text, make and lock its folder, build or restore its model.

One that cannot fit into memory is refused before its model has any.
"""

import dataclasses
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dsmini import accounting, ops
from dsmini.atomic import remove_leftovers, write_bytes, write_json, write_text
from dsmini.checkpoint.load import PretrainedTensors
from dsmini.checkpoint.run_folder import (
    is_model_folder,
    lock_run,
    new_run_folder,
    refuse_taken,
    replace_config,
    tokenizer_file,
)
from dsmini.checkpoint.training_state import Checkpoint, checkpoint_folders, model_checkpoint, read_checkpoint
from dsmini.config import RunConfig
from dsmini.config.fields import require
from dsmini.console.messages import say
from dsmini.console.progress import Progress, patience
from dsmini.data.corpus import Corpus, cache_next_to, load_corpus
from dsmini.data.documents import notes
from dsmini.distributed.heartbeat import watched
from dsmini.distributed.meeting import launched, told
from dsmini.distributed.mesh import Mesh, Rows, allocate, divided_model, fill, local
from dsmini.distributed.world import World, joined, own_device
from dsmini.machine import DTYPES, keep_freed_memory, pick_dtype, refuse_too_large
from dsmini.nn import Transformer
from dsmini.reading import is_there, read_bytes, read_table
from dsmini.sources import own_sources
from dsmini.training.lookups import make_lookups
from dsmini.training.optim import LARGEST_BETA_BF16
from dsmini.training.origin import RunOrigin, absolute
from dsmini.training.record import read_events, require_tensorboard
from dsmini.training.run import TrainingRun, newest_checkpoint
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
    # token ids of whole batches, also of those that are prepared meanwhile
    ids = 8 * train.batch_size * (config.seq_len + 1) * (1 + config.data.workers)
    average = 0 if train.ema_decay is None else int(needed.by_part["parameters"])
    refuse_too_large(int(needed.total) + ids + average, WHAT, device)


def refuse_oversized_parts(model: Transformer, device: torch.device, world: World) -> None:
    """Raise ValueError if the parameters and gradients of the ranks of a machine do not fit into its memory.

    On a CPU they share it. Each has a GPU of its own. All ranks call it together.

    Args:
        model: this rank's part; may be on the meta device.
    """
    own, host = 2 * sum(local(p).nbytes for p in model.parameters()), socket.gethostname()
    here = sum(nbytes for nbytes, of in world.gather((own, host)) if of == host)
    world.together(lambda: refuse_too_large(here if device.type == "cpu" else own, WHAT, device))


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
    require(
        config.train.moments == "float32" or max(config.train.beta1, config.train.beta2) <= LARGEST_BETA_BF16,
        f"train.moments='bfloat16' goes with train.beta1 and train.beta2 up to {LARGEST_BETA_BF16}: a step of a larger "
        "one takes away less than half a BF16 step, so moments do not fall; use smaller ones, or "
        "train.moments='float32'",
    )
    device = own_device(config.train.device)
    keep_freed_memory()
    with joined(config.parallel.timeout, device, longest_wait=LONGEST_WAIT) as world, ExitStack() as stack:
        stack.enter_context(watched(world, config.parallel.timeout, device))
        world.share_cores(config.train.threads)
        world.refuse_unequal(_options(origin, config))
        world.refuse_unshared(origin.resume or config.out or Path("runs"))
        # 2. a new run has a free folder, one to continue stopped somewhere
        if origin.resume is None:
            world.first(lambda: refuse_taken(config.out))
        else:
            stack.enter_context(_locked(origin.resume, world))
        origin, found = _found(origin, device, world, console)
        lines = world.first(lambda: origin.describe(config, found.folder, found.step))
        # 3. the model fits into the memory; it has none yet
        if world.size == 1:  # first, for even without memory the layers of an absurd model take long to make
            refuse_oversized(config, device)
        mesh = Mesh(config.parallel, device)
        model = divided_model(config.model, mesh)
        if world.size > 1:
            refuse_oversized_parts(model, device, world)
        # 4. the text: rank 0 tokenizes it into a file, which the others read
        read, mine = partial(_read_corpus, config, origin.resume, console), list[Corpus]()
        world.first(lambda: mine.append(read()))
        corpus = world.together(lambda: mine[0] if mine else read())
        world.refuse_unequal({"text": f"sha256 {corpus.sha256[:12]}"})  # it may have grown since rank 0 read it
        before = None if found.checkpoint is None else found.checkpoint.state.corpus_sha256
        world.first(lambda: _check_corpus(config, origin.resume, before, corpus))
        # 5. the folder
        config = world.first(lambda: resolved(config, device))
        out = origin.resume or world.first(lambda: new_run_folder(config.out, origin.name))
        config = dataclasses.replace(config, out=out)
        if origin.resume is None:
            stack.enter_context(_locked(out, world))
        # 6. the model, with its first values; those of a checkpoint come once its optimizers have room for theirs too
        torch.manual_seed(config.train.seed)
        model.compute_dtype = DTYPES[config.train.dtype]
        with patience(console, "making the model"):
            if found.checkpoint is None:
                fill(model, mesh, device, found.rows)
                make_lookups(model, config, corpus, trained=found.folder is not None, first=world.first)
            else:
                allocate(model, mesh, device)
        rounds = ["quantize"] if config.model.precision == "fp8" else []
        ops.expect(device.type, "trained_attention", "trained_norm", *rounds)
        if config.train.optimizer == "muon":  # its kernel may have to be compiled
            world.beat(0, "compiling")
            with patience(console, "preparing kernels"):
                world.first(lambda: ops.serving(device.type) and None)
        training = TrainingRun(config, Trainer(model, corpus, config, device, mesh), console, world)
        for line in [*_introduction(config, corpus), *lines]:
            say(console, line)
        # 7. the state of the checkpoint, or the first files of a new folder
        if found.checkpoint is not None:
            training.resume(found.checkpoint)
        if origin.resume is None:
            world.first(lambda: _begin(config, corpus, found.folder))
        else:
            world.first(lambda: _continue(config, origin, found.step))
        found = Found()  # the mapped files: they would count as memory, and a checkpoint that is removed as space
        yield training


def _locked(run: Path, world: World) -> AbstractContextManager[Any]:
    """Lock a run's folder for all processes, on rank 0."""
    return world.together(lambda: lock_run(run) if world.rank == 0 else nullcontext())


def _options(origin: RunOrigin, config: RunConfig) -> dict[str, object]:
    """Return the options that all processes of a run must be started with."""
    parts = {name: of for name, of in dataclasses.asdict(config).items() if isinstance(of, dict)}
    keys = {f"{part}.{key}": value for part, of in parts.items() for key, value in of.items()}
    return {"--resume": origin.resume, "--init": origin.init, **keys}


def _read_corpus(config: RunConfig, resume: Path | None, console: Console) -> Corpus:
    """Read the run's corpus, tokenized once into a folder next to the run. A resumed run has its own tokenizer."""
    data = dataclasses.replace(config.data, tokenizer=tokenizer_file(resume, config)) if resume else config.data
    cache = cache_next_to(config.out)
    with Progress(console, label="the corpus", unit="bytes") as progress:
        return load_corpus(
            data, config.seq_len, config.model.vocab_size, cache, config.train.seed, progress=progress.stage
        )


def resolved(config: RunConfig, device: torch.device) -> RunConfig:
    """Return the config with the device, dtype and threads that are in use now, and with absolute paths."""
    dtype = str(pick_dtype(config.train.dtype, device)).removeprefix("torch.")
    # a number that was not asked for is of this start: the run may continue with more processes
    name = config.train.device if launched()[1] == 1 and ":" in config.train.device else device.type
    threads = torch.get_num_threads() if launched()[1] == 1 else config.train.threads
    train = dataclasses.replace(config.train, device=name, dtype=dtype, threads=threads)
    return dataclasses.replace(absolute(config), train=train)


def _begin(config: RunConfig, corpus: Corpus, weights: Path | None) -> None:
    """Write the first files of a new run's folder. config.toml is the last: with it the folder can be resumed."""
    folder = config.out
    assert folder is not None
    refuse_taken(folder)  # another run may have begun in it since it was looked at
    write_json(folder / "corpus.json", corpus.describe() | {"sources": own_sources()})
    if config.data.tokenizer is not None:
        write_bytes(folder / "tokenizer.json", read_bytes(config.data.tokenizer))
    if weights is not None:
        write_json(folder / "init.json", {"folder": str(weights.resolve())})
    write_text(folder / "config.toml", config.to_toml())


# --- what it starts from


@dataclass(frozen=True, kw_only=True)
class Found:
    """Weights that a run starts from, in files that are read where they are used; none for a model that is drawn."""

    folder: Path | None = None
    """The checkpoint, or the model's folder."""
    rows: Rows | None = None
    """Reads rows of a tensor of the weights. None with a checkpoint, which is read whole."""
    checkpoint: Checkpoint | None = None
    """The last whole one of the run to continue. None before its first one, and for other weights."""

    @property
    def step(self) -> int:
        """Number of steps that the run to continue has done."""
        return 0 if self.checkpoint is None else self.checkpoint.state.step


def _found(origin: RunOrigin, device: torch.device, world: World, console: Console) -> tuple[RunOrigin, Found]:
    """Find what a run starts from; of one to continue, return the config of its last checkpoint too.

    Raises: ValueError for a run whose checkpoints are gone or damaged, and for weights that cannot be read.
    """
    run, before, say_it = origin.resume, origin.before, partial(say, console)
    if run is None:
        return origin, Found() if origin.init is None else _weights(origin.init, world, say_it)
    assert before is not None
    if world.first(lambda: bool(checkpoint_folders(run))):
        with patience(console, "reading the checkpoint"):
            last = newest_checkpoint(before, world, say_it, device)
        before = dataclasses.replace(last.config, out=run)  # it may have been moved
        return dataclasses.replace(origin, before=before), Found(folder=last.folder, checkpoint=last)
    world.first(lambda: _refuse_lost_checkpoints(run))
    if not is_there(run / "init.json"):
        return origin, Found()
    table = read_table(run / "init.json")
    try:
        return origin, _weights(Path(str(table.get("checkpoint", table.get("folder")))), world, say_it)
    except ValueError as error:
        words = f"{run} has no checkpoint, and the weights it started from cannot be read: {error}"
        raise told(ValueError(words)) from None


def _weights(path: Path, world: World, say: Callable[[str], None]) -> Found:
    """Find the weights of a run, a checkpoint or a model's folder. Rank 0 checks them, and all read them."""
    if is_model_folder(path):
        there = world.together(lambda: PretrainedTensors(path))
        world.first(there.check)
        return Found(folder=path, rows=there.rows)
    folder = world.first(lambda: model_checkpoint(path, say=say).folder)
    return Found(folder=folder, rows=world.together(lambda: read_checkpoint(folder, ["model"], verified=True)).rows)


def _refuse_lost_checkpoints(run: Path) -> None:
    """Raise ValueError for a run without a checkpoint that had one."""
    if saved := [event["step"] for event in read_events(run) if event["event"] == "saved"]:
        raise ValueError(
            f"{run} has saved {len(saved)} checkpoints, the last after step {saved[-1]}, and they are gone; put one "
            "back into its checkpoints, or start a new run in another folder"
        )


def _check_corpus(config: RunConfig, resume: Path | None, before: str | None, corpus: Corpus) -> None:
    """Raise ValueError for another corpus than before, and for one that is too short for train.eval_context.

    Args:
        before: hash of the corpus until the checkpoint of a run to continue; None without one.
    """
    context = config.train.eval_context
    require(
        context is None or len(corpus.windows(context)) > 0,
        f"train.eval_context={context} is longer than the {len(corpus.val):,} held-out tokens; use less or more text",
    )
    if before is None and resume is not None:
        with suppress(ValueError):  # the file is damaged
            before = read_table(resume / "corpus.json").get("sha256")
    require(
        before in (None, corpus.sha256),
        f"{config.out} was trained on a corpus with sha256 {before}, {corpus.source} now has {corpus.sha256}; restore "
        "that text, or name where it is now with --data.path, or start a new run from its weights with --init "
        f"{config.out}",
    )


def _continue(config: RunConfig, origin: RunOrigin, step: int) -> None:
    """Store the config that holds from here on, and remove what a save left that was killed."""
    assert config.out is not None
    assert origin.before is not None
    remove_leftovers(config.out / "checkpoints")
    own_sources()  # as they are now, for the summary
    replace_config(config.out, origin.before, config, step)


def _introduction(config: RunConfig, corpus: Corpus) -> list[str]:
    """Return lines about what will be trained, on what, and where."""
    parameters, where = accounting.parameters(config.model), f"{config.out}/corpus.json"
    tokenizer = config.data.tokenizer
    kind = f"tokens of {tokenizer}, {corpus.bytes_per_token:.2f} bytes each" if tokenizer else "a token is a byte"
    if config.data.fim_rate:
        kind += f"; {corpus.rearranged:,} training documents rearranged for fill-in-the-middle"
    about = notes(corpus.left_out, corpus.not_utf8, where, tokenizer is None)
    about.append(f"{len(corpus.train):,} training tokens, {len(corpus.val):,} held out ({corpus.split})")
    mtp = f" ({parameters.mtp:,} of them for multi-token prediction)" if parameters.mtp else ""
    return [
        f"corpus  {corpus.source}, {corpus.files:,} file{'s' * (corpus.files != 1)}",
        *(f"        {line}" for line in [*about, kind, f"sha256 {corpus.sha256}", corpus.cache]),
        f"model   {parameters.total:,} parameters{mtp}, {parameters.active:,} active for a token",
        f"run     {config.out}, {config.train.dtype} on {config.train.device}, threads: {torch.get_num_threads()}",
    ]
