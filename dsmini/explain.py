"""python -m dsmini.explain: show which backend runs each operation on this machine, and why no kernel does.

Usage, then examples:

    python -m dsmini.explain [FLAGS]

    python -m dsmini.explain
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from dsmini.console.command import run
from dsmini.console.commandline import parse


@dataclass(frozen=True, kw_only=True)
class ExplainCommand:
    """Show what runs each operation on this machine: kernels, tuned PyTorch, or the equations.

    Kernels in C++ are compiled if this machine has not done so yet. DSMINI_BACKEND and DSMINI_CPU_ISA choose others.
    """

    json: bool = False
    """Print a line of JSON instead: for each operation its backend, and the reason if that is not a kernel."""


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    command = parse(ExplainCommand, "dsmini.explain", args)
    # these three declare all operations
    import dsmini.inference.fused
    import dsmini.nn
    import dsmini.training.muon  # noqa: F401
    from dsmini import ops
    from dsmini.ops import explanation

    if command.json:
        print(json.dumps({name: choice._asdict() for name, choice in explanation.choices("cpu").items()}))
    else:
        ops.explain()
    return 0


if __name__ == "__main__":
    run(main)
