"""How a run starts: anew, from another run's weights (--init), or where it stopped (--resume)."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from dsmini.atomic import write_bytes, write_json, write_text
from dsmini.checkpoint.run_folder import read_summary, replace_config, run_config, tokenizer_file
from dsmini.checkpoint.trained_model import model_checkpoint, model_tensors
from dsmini.checkpoint.training_state import Checkpoint, last_checkpoint
from dsmini.config import RunConfig
from dsmini.config.old_schedule import without_old_flags
from dsmini.console import Help, parse, take_file
from dsmini.data.corpus import Corpus
from dsmini.measure.machine import DTYPES
from dsmini.nn import Transformer
from dsmini.training.changes import check_init, check_resume
from dsmini.training.run import TrainingRun
from dsmini.training.trainer import Trainer

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a command line asks for."""

    config: RunConfig
    """Not resolved yet: "auto" may be in it, and no folder."""
    name: str
    """Of a new run's folder, runs/NAME-001."""
    resume: Path | None
    """The run to go on with."""
    weights: Checkpoint | None
    """The checkpoint whose weights a new run starts from."""


def read_start(kind: type[C], args: Sequence[str], page: Help) -> tuple[C, Start]:
    """Read a command line [FILE.toml] [--resume RUN | --init RUN_OR_CHECKPOINT] [--KEY VALUE ...].

    What is left out, the file has; what it leaves out, the run that is named; and else the defaults.

    Raises: ValueError for what cannot go together, and for what a resumed run or other weights do not allow.
    """
    file, rest = take_file(args)
    resume, init = _option(rest, "--resume"), _option(rest, "--init")
    if resume and init:
        raise ValueError("--resume goes on with a run, --init starts a new one from its weights; use one of them")
    if resume and _option(rest, "--out"):
        raise ValueError(f"--resume {resume} stays in its folder; leave --out away, or start a new run with --init")
    if resume and resume.resolve().parent.name == "checkpoints":
        run = resume.resolve().parent.parent
        raise ValueError(
            f"{resume} is a checkpoint, a run goes on from its last one: use --resume {run}, or start a new run from "
            f"this one's weights with --init {resume}"
        )
    weights, old, name = None, RunConfig(), "toy"
    if resume:
        old = dataclasses.replace(run_config(resume), out=resume)
    elif init:
        weights = model_checkpoint(init, say=lambda line: print(line, file=sys.stderr))
        old = RunConfig(model=weights.config.model, data=weights.config.data)
        name = re.sub(r"-\d+$", "", weights.folder.resolve().parent.parent.name)
    base = old if file is None else RunConfig.from_file(file, old)
    rest = without_old_flags(rest, base.train.lr_schedule)
    command = parse(kind, "train", rest, None if base == RunConfig() else kind(**_fields(base)), page)
    config = RunConfig(**_fields(command))
    if resume:
        config = _as_before(config, old)
        check_resume(old, config)
        _check_tokenizer(resume, old, config)
    elif init:
        check_init(old.model, config.model, str(init))
    name = name if file is None else file.stem
    return command, Start(config=config, name=name, resume=resume, weights=weights)


def begin(
    start: Start, config: RunConfig, corpus: Corpus, device: torch.device, console: Console, introduction: list[str]
) -> TrainingRun:
    """The run, ready to train; its folder says with what.

    Args:
        config: resolved, with its folder, which this process holds.
        introduction: lines to show once all is well.

    Raises: ValueError for a run that has no whole checkpoint, another corpus, or nothing left to do.
    """
    assert config.out is not None

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    torch.manual_seed(config.train.seed)
    model = Transformer(config.model, compute_dtype=DTYPES[config.train.dtype]).to(device)
    if start.weights is not None:
        model.load_state_dict(model_tensors(start.weights))
    training = TrainingRun(config, Trainer(model, corpus, config, device), console)
    if start.resume is None:
        _keep(config, corpus, start.weights)
        if start.weights is not None:
            introduction = [*introduction, f"weights {start.weights.folder}"]
    else:
        checkpoint = last_checkpoint(config.out, training.parts, training.fits, say)
        _check_unfinished(config, checkpoint, corpus)
        old = dataclasses.replace(checkpoint.config, out=config.out)  # the folder may have been moved
        changes = check_resume(old, config)
        replace_config(config.out, old, config, checkpoint.state.step)
        training.resume(checkpoint)
        where = f"resuming after step {checkpoint.state.step} of {config.train.steps} from {checkpoint.folder}"
        introduction = [*introduction, *changes, where]
    for line in introduction:
        say(line)
    return training


def _keep(config: RunConfig, corpus: Corpus, weights: Checkpoint | None) -> None:
    assert config.out is not None
    write_text(config.out / "config.toml", config.to_toml())
    write_json(config.out / "corpus.json", corpus.describe())
    if config.data.tokenizer is not None:
        write_bytes(config.out / "tokenizer.json", config.data.tokenizer.read_bytes())
    if weights is not None:
        write_json(config.out / "init.json", {"checkpoint": str(weights.folder.resolve()), "step": weights.state.step})


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


def _check_tokenizer(run: Path, old: RunConfig, config: RunConfig) -> None:
    """Refuse another tokenizer than the run's own, which is the one that is used."""
    own, given = tokenizer_file(run, config), config.data.tokenizer
    if own is None or given is None or given == old.data.tokenizer:
        return
    if not given.is_file():
        raise ValueError(f"there is no file {given}; leave --data.tokenizer out: {own} is used")
    if given.read_bytes() != own.read_bytes():
        raise ValueError(
            f"{run} was trained with {own}, {given} is another tokenizer; leave --data.tokenizer out, "
            "or start a new run"
        )


def _as_before(config: RunConfig, old: RunConfig) -> RunConfig:
    """ "auto" means for a resumed run what it has used so far; paths are compared whole."""
    t, before = config.train, old.train
    train = dataclasses.replace(
        t,
        device=before.device if t.device == "auto" else t.device,
        dtype=before.dtype if t.dtype == "auto" else t.dtype,
        threads=t.threads or before.threads,
    )
    path, tokenizer = (given and given.resolve() for given in (config.data.path, config.data.tokenizer))
    data = dataclasses.replace(config.data, path=path, tokenizer=tokenizer)
    return dataclasses.replace(config, train=train, data=data)


def _fields(config: RunConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)}


def _option(args: Sequence[str], name: str) -> Path | None:
    """The folder of an option, looked up before the others can be read: their defaults hang on it."""
    for i, word in enumerate(args):
        if word.startswith(f"{name}="):
            return Path(word.removeprefix(f"{name}="))
        if word == name:
            following = args[i + 1 : i + 2]
            if not following or following[0].startswith("-"):
                got = following[0] if following else "nothing"
                raise ValueError(f"{name} needs a folder, got {got}; use {name} runs/toy-001")
            return Path(following[0])
    return None
