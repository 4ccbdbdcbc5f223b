"""python -m dsmini.vectors: write tiny models with all that they compute, to test another engine by.

Usage, then examples:

    python -m dsmini.vectors OUT [FLAGS]

    python -m dsmini.vectors vectors
    python -m dsmini.vectors vectors --config v4
    python -m dsmini.vectors vectors && python vectors/v4/check.py mine.safetensors

Each generation gets a folder: a random model in the official layout, inputs, and what the plain equations of nn/ make
of them, tensor by tensor in the order of computation. A checker goes with it, which needs numpy and safetensors alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from dsmini.atomic import new_folder
from dsmini.config.fields import require
from dsmini.console.command import run
from dsmini.console.commandline import parse
from dsmini.console.messages import say
from dsmini.console.progress import Progress
from dsmini.reading import brief


@dataclass(frozen=True, kw_only=True)
class VectorsCommand:
    """Write vectors to test another engine by: tiny models, inputs, and all tensors that they compute, in FP32.

    OUT gets a folder for each generation, with a checker that needs numpy and safetensors alone: it names the first
    tensor, in the order of computation, in which an engine differs. docs/vectors.md says how to use it.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to write, which must be new or empty."""
    config: tuple[str, ...] = ()
    """Generations, of v3, v3.2, v4 and glm-5.2; left out: all."""


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    command = parse(VectorsCommand, "dsmini.vectors", args)
    # what loads torch is imported after --help
    from dsmini.checkpoint.save import refuse_filled
    from dsmini.checkpoint.vectors import GENERATIONS, write

    wanted = command.config or GENERATIONS
    unknown = [name for name in wanted if name not in GENERATIONS]
    require(not unknown, f"--config {brief((unknown or [''])[0])} is unknown; use {', '.join(GENERATIONS)}")
    require(len(set(wanted)) == len(wanted), f"--config {brief(' '.join(wanted))} names a generation twice")
    refuse_filled(command.out)
    console = Console(stderr=True)
    with new_folder(command.out) as folder, Progress(console, len(wanted), "writing vectors") as progress:
        for done, name in enumerate(wanted, 1):
            nbytes = write(folder / name, name)
            progress.update(done, name)
            say(console, f"{command.out / name}: {nbytes:,} bytes")
    first = command.out / wanted[0]
    print(f"Check an engine's tensors with: python {first / 'check.py'} mine.safetensors")
    return 0


if __name__ == "__main__":
    run(main)
