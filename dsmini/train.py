"""python -m dsmini.train: train a model on a text and show what it learned.

Usage, then examples:

    python -m dsmini.train [FILE.toml] [FLAGS]

    python -m dsmini.train                  # a small model, about 7 minutes
    python -m dsmini.train --data.path book.txt --train.optimizer muon
    python -m dsmini.train configs/toy-mha.toml --model.n-layers 6
    python -m dsmini.train --out runs/mine --resume auto --train.tensorboard
    torchrun --nproc-per-node 4 -m dsmini.train --parallel.ep 2
"""

import dataclasses
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dsmini.atomic import write_json, write_text
from dsmini.config import RunConfig
from dsmini.console.command import run, speaks
from dsmini.console.commandline import parse, take_folder
from dsmini.console.messages import say
from dsmini.distributed.failure import tell
from dsmini.distributed.meeting import launcher
from dsmini.reading import find_config
from dsmini.training.origin import RunOrigin, find_origin, resume_automatically

if TYPE_CHECKING:  # training loads torch, so it is imported where it is used: --help is instant
    from dsmini.training.run import TrainingRun


@dataclass(frozen=True, kw_only=True)
class TrainCommand(RunConfig):
    """Train a DeepSeek-style transformer on a text, and see what it learned to write.

    Without arguments: a small model and the source code of Python's standard library. That takes about 7 minutes on two
    cores of a CPU with AVX2.
    A config may come first, a file or the name of one: python -m dsmini.train toy-dense --train.steps 200. Every field
    below can be set, here or in that file: [train] steps = 200.
    Several processes divide a run: torchrun --nproc-per-node 4 -m dsmini.train --parallel.ep 2. See docs/training.md.
    """

    resume: Path | None = None
    """Continue this run, such as runs/toy-001, or auto. It continues from its last checkpoint; its config holds, and
    flags change it. auto: the run in --out if one has begun there, else it begins there: for launchers that start the
    command again."""
    init: Path | None = None
    """Start from a DeepSeek or Hugging Face folder or a run, or one of its checkpoints. The new run has its weights,
    model and tokenizer, and the usual recipe. FP8 weights are dequantized."""
    json: bool = False
    """Print the final figures as a line of JSON, and all else to the standard error."""


MAIN = (
    "data.path",
    "out",
    "model.dim",
    "train.steps",
    "train.batch_size",
    "train.optimizer",
    "train.lr",
    "train.compile",
    "train.device",
    "parallel.pp",
    "parallel.ep",
    "resume",
    "init",
)
"""Fields that --help lists."""


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    origin, command, auto = _read(args)
    if auto and origin.is_finished(command.train.steps):
        say(Console(stderr=True, quiet=not speaks()), f"{origin.resume} is finished")
        return 0

    from dsmini import ops
    from dsmini.diagnosis.contention import OtherPrograms
    from dsmini.diagnosis.watch import RunWatch
    from dsmini.training.outputs import next_command, print_summary
    from dsmini.training.start import started

    ops.check_forced()
    console = Console(stderr=command.json, quiet=not speaks())
    with started(origin, RunConfig(**_fields(command)), console) as training:
        device = training.trainer.device
        if training.config.train.diagnose:
            training.watch = RunWatch(device).see
        elif device.type == "cpu" and training.world.size == 1:
            training.remark = OtherPrograms().see
        folder = training.folder
        complete = training.train()
        if not speaks():
            return _status(complete)
        results = _results(training, complete)
        if results is None:
            say(console, f"stopped after step {training.trainer.steps_done}; saved in {folder}")
            say(console, f"Continue with: {launcher()} -m dsmini.train --resume {shlex.quote(str(folder))}")
            return _status(complete=False)
    summary, sample = results
    print_summary(console, summary)
    say(console, f"\nContinue with: {next_command(training)}")
    if command.json:
        print(json.dumps({**summary, "sample": sample}))
    return 0


def _status(complete: bool) -> int:
    """Return the exit status of a run that came to its end, or was stopped and saved.

    torchrun starts all processes again after any status but 0.
    """
    return 0 if complete or "TORCHELASTIC_RUN_ID" in os.environ else 130


def _results(training: "TrainingRun", complete: bool) -> tuple[dict[str, Any], str] | None:
    """Draw a run; measure and sample a complete one, and return its summary and sample.

    Return None for a run that a signal stopped, here or before. All its steps are saved; a resumed run does the rest.
    """
    from dsmini.training.outputs import summarise, write_sample

    try:
        training.plot()
        if not complete:
            return None
        summary, sample = summarise(training), write_sample(training)
        write_text(training.folder / "sample.txt", sample)
        write_json(training.folder / "summary.json", summary)  # the last file: with it the run is complete
    except KeyboardInterrupt:
        return None
    return summary, sample


def _read(args: Sequence[str]) -> tuple[RunOrigin, TrainCommand, bool]:
    """Read a command line [FILE.toml] [--resume RUN | --init RUN_OR_FOLDER] [--KEY VALUE ...].

    Returns: its origin, all values, and whether it says --resume auto.
    """
    file, rest = None, list(args)
    if rest and rest[0] and not rest[0].startswith("-"):
        file = find_config(Path(rest.pop(0)))
    if file is not None and file.is_dir():
        uses = f"--resume {file} continues a run, and --init {file} starts one from its weights"
        raise ValueError(f"{file} is a folder, want the file of a config; {uses}")
    resume, rest = take_folder(rest, "--resume")
    init, rest = take_folder(rest, "--init")
    auto = resume == Path("auto")
    if auto:
        resume, rest = resume_automatically(rest)
        init = None if resume else init  # it has begun from those weights
    elif resume and not init and any(word.partition("=")[0] == "--out" for word in rest):
        raise ValueError(f"--resume {resume} stays in its folder; leave --out away, or start a new run with --init")
    origin = find_origin(file, resume, init)
    if auto and resume:  # the file may name another folder, as a run's config.toml does
        origin = dataclasses.replace(origin, config=dataclasses.replace(origin.config, out=resume))
    default = TrainCommand(**_fields(origin.config), resume=resume, init=init)
    return origin, parse(TrainCommand, "dsmini.train", rest, main=MAIN, default=default), auto


def _fields(config: RunConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)}


if __name__ == "__main__":
    run(main, tell)
