"""python -m dsmini.diagnose: is data, the algorithm or the machine the bottleneck? Predicted, then measured.

Usage, then examples:

    python -m dsmini.diagnose [FILE.toml | RUN] [FLAGS]

    python -m dsmini.diagnose                         # training by the default run
    python -m dsmini.diagnose configs/toy.toml --quick
    python -m dsmini.diagnose runs/toy-001 --out diagnosis
    python -m dsmini.diagnose runs/toy-001 --work decode --context 128 --batch 4
"""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from dsmini.atomic import check_folder, write_json, write_text
from dsmini.console.command import run
from dsmini.console.commandline import parse
from dsmini.console.messages import say
from dsmini.console.progress import Progress
from dsmini.reading import find_config

if TYPE_CHECKING:  # it loads torch: --help is instant
    from dsmini.diagnosis.pages import Diagnosis

FILES = ("diagnosis.html", "diagnosis.json")
MOST_BATCH = 1024
"""Largest number of sequences that are decoded together."""


@dataclass(frozen=True, kw_only=True)
class DiagnoseCommand:
    """Find the bottleneck of training or decoding on this machine: data, the algorithm, or the machine.

    WHAT is a config, such as configs/toy.toml, or the folder of a run, which is only read. One cost at a time is
    removed: the gain is predicted first, then measured, as plain and changed steps take turns.
    """

    what: Annotated[Path | None, tyro.conf.Positional] = None
    """Config or run to diagnose; left out: the default run of dsmini.train. A run is taken from its last checkpoint.
    Decoding also takes a checkpoint, and a DeepSeek or Hugging Face folder."""
    work: Literal["train", "decode"] = "train"
    """Diagnose steps of training, or of decoding."""
    context: int | None = None
    """Tokens in the cache of each sequence, for --work decode; left out: three quarters of the model's context, 4096 at
    most."""
    batch: int | None = None
    """Sequences that are decoded together, for --work decode; left out: 1."""
    quick: bool = False
    """Look for less than a minute instead of three, at the verdict alone. Predict for at most 20 s."""
    fresh: bool = False
    """Measure this machine's rates and prices again, in place of those that are stored."""
    rounds: int | None = None
    """Number of rounds, instead of as many as fit into the time. A verdict on 4 changes needs 7, on 8 changes 8."""
    only: tuple[str, ...] = ()
    """Names of the changes to try, such as replay dense_active; left out: all that apply."""
    out: Path | None = None
    """Folder for diagnosis.html, a page to read offline, and diagnosis.json."""
    json: bool = False
    """Print the diagnosis as a line of JSON, and everything else on the standard error."""

    def __post_init__(self) -> None:
        if self.rounds is not None and not 5 <= self.rounds <= 1000:
            raise ValueError(f"--rounds {self.rounds} is not from 5 to 1000; use for example 20")
        for flag, value in (("--context", self.context), ("--batch", self.batch)):
            if value is not None and self.work != "decode":
                raise ValueError(f"{flag} {value} is for decoding; add --work decode, or leave it out")
        if self.batch is not None and not 1 <= self.batch <= MOST_BATCH:
            raise ValueError(f"--batch {self.batch} is not from 1 to {MOST_BATCH}; use for example 8")


MAIN = ("work", "context", "batch", "quick", "fresh", "rounds", "only", "out", "json")
"""Fields that --help lists."""


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    command = parse(DiagnoseCommand, "dsmini.diagnose", args, main=MAIN)
    from dsmini import ops

    ops.check_forced()
    if command.what is not None:
        command = dataclasses.replace(command, what=find_config(command.what))
    console = Console(stderr=command.json)
    if command.out is not None:  # before minutes are spent
        check_folder(command.out, FILES)
    with Progress(console, 1.0, "diagnosing", delay=0.5, refresh_per_second=1) as bar:
        found = _answer(command, bar)
    from dsmini.diagnosis.pages import record_of, report_of, short_report_of

    short_report_of(found).show(console)
    record = record_of(found)
    if command.json:
        print(json.dumps(record))
    if command.out is not None:
        line = shlex.join(["python", "-m", "dsmini.diagnose", *args])
        page, data = (command.out / name for name in FILES)
        write_json(data, record)
        write_text(page, report_of(found, line).html())
        say(console, f"written  {page}")
    return 130 if found.stopped else 0


def _answer(command: DiagnoseCommand, bar: Progress) -> "Diagnosis":
    """Diagnose what the command asks for."""
    from dsmini.diagnosis.diagnosis import answer

    def on_part(share: float, what: str, left: float) -> None:
        bar.label = what
        bar.update(share, left=left)

    asked = {name: value for name, value in vars(command).items() if name not in ("out", "json")}
    return answer(**asked, on_part=on_part)


if __name__ == "__main__":
    run(main)
