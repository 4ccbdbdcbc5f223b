"""python -m dsmini.diagnose: which of Data, Algorithm and Machine binds a training run, proved by experiment."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from dsmini.atomic import write_json, write_text
from dsmini.console.command import run
from dsmini.console.commandline import Help, parse
from dsmini.console.messages import say
from dsmini.console.progress import Progress


@dataclass(frozen=True, kw_only=True)
class DiagnoseCommand:
    """Find which of Data, Algorithm and Machine binds a training run, proved by experiment on this machine.

    WHAT is a config, such as configs/toy.toml, or the folder of an unfinished run, which is only read. Each prediction
    is made before its experiment. Plain steps and steps with one thing made free take turns.
    """

    what: Annotated[Path | None, tyro.conf.Positional] = None
    """Config or run to diagnose; left out: the default run of dsmini.train."""
    quick: bool = False
    """Look for half a minute instead of three, at the verdict alone; predict only from stored rates."""
    rounds: int | None = None
    """Number of rounds, instead of as many as fit into the time."""
    out: Path | None = None
    """Folder for diagnosis.html, a page to read offline, and diagnosis.json."""
    json: bool = False
    """Print the diagnosis as a line of JSON, and everything else on the standard error."""

    def __post_init__(self) -> None:
        if self.rounds is not None and not 5 <= self.rounds <= 1000:
            raise ValueError(f"--rounds {self.rounds} is not from 5 to 1000; use for example 20")


HELP = Help(
    usage="[FILE.toml | RUN] [FLAGS]",
    examples=("                        # the default run", "configs/toy.toml --quick", "runs/toy-001 --out diagnosis"),
    main=("quick", "rounds", "out", "json"),
)


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    command = parse(DiagnoseCommand, "diagnose", args, help=HELP)
    from dsmini import ops
    from dsmini.diagnosis.answer import answer

    ops.check_forced()
    console = Console(stderr=command.json)
    with Progress(console, 1.0, "diagnosing", delay=0.5, refresh_per_second=1) as bar:
        found = answer(
            command.what,
            quick=command.quick,
            rounds=command.rounds,
            command=shlex.join(["python", "-m", "dsmini.diagnose", *args]),
            on_part=lambda share, what: _show(bar, share, what),
        )
    found.short.show(console)
    if command.out is not None:
        try:
            command.out.mkdir(parents=True, exist_ok=True)
            write_text(command.out / "diagnosis.html", found.report.html())
            write_json(command.out / "diagnosis.json", found.record)
        except OSError as error:
            raise ValueError(
                f"--out {command.out} cannot be written: {error.strerror}; choose another folder"
            ) from None
        say(console, f"written  {command.out / 'diagnosis.html'}")
    if command.json:
        print(json.dumps(found.record))
    return 130 if found.stopped else 0


def _show(bar: Progress, share: float, what: str) -> None:
    bar.label = what
    bar.update(share)


if __name__ == "__main__":
    run(main)
