"""Run a command: set its exit status, and report an error in one sentence."""

import errno
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TypeVar

from dsmini.console.printable import printable
from dsmini.reading import brief

T = TypeVar("T")


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run a command's main and exit with its status: 2 and one sentence for a mistake of the user.

    SIGTERM ends a command as Ctrl-C does, unless the command has a handler of its own.
    """
    _hear_sigterm()
    for out in (sys.stdout, sys.stderr):
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="replace")  # for a character that the terminal cannot show
    with_place = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: printable(with_place(*args, **kwargs))
    try:
        status = main(sys.argv[1:])
    except ValueError as error:
        _complain(str(error))
        status = 2
    except ArithmeticError as error:
        _complain(str(error))
        status = 1
    except BrokenPipeError:  # the reader of the output has ended, as in `| head`
        sys.stderr.close()
        status = 1
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            _complain(f"{brief(str(error.filename))} is not usable as a path: {error.strerror}; use a shorter one")
            sys.exit(2)
        _complain(f"{error}; free some space or write elsewhere; what was saved is untouched")
        status = 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("memory|alloc|overflow", str(error)):
            raise
        first = (str(error).splitlines() or ["no memory is left"])[0]
        _complain(f"too large for this machine: {first}; use a smaller model or batch")
        status = 1
    except KeyboardInterrupt:
        if speaks():
            print("stopped", file=sys.stderr)
        status = 130
    sys.exit(status)


def _hear_sigterm() -> None:
    """Raise KeyboardInterrupt on SIGTERM, so that what was computed is shown or saved before the end."""

    def stop(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
    if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop)


def interruptible(work: Callable[[], T]) -> T:
    """Return the result of long work in foreign code that hears no signals.

    It runs in a thread of its own. After a signal, that thread ends with the process.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]
    return results[0]


def speaks() -> bool:
    """Return True in the one process of a command, of those that a launcher started, which talks to people."""
    return os.environ.get("RANK", "0") == "0"


def _complain(sentence: str) -> None:
    if speaks():
        print(f"error: {printable(sentence)}", file=sys.stderr)
