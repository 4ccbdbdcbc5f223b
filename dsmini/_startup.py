"""Ctrl-C while a command starts: importing torch takes seconds, and to be stopped in them is no error to look into.

Imported before all else (hence the name, which sorts first). Once a command runs, command.py sees to it.
"""

import sys
from types import TracebackType


def _stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("stopped", file=sys.stderr)
    sys.exit(130)


if sys.argv[:1] == ["-m"]:  # as it is while python -m looks for the module: no program's that imports dsmini
    sys.excepthook = _stopped
