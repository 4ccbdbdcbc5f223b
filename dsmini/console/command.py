"""Run a command: set its exit status, and report an error in one sentence."""

import errno
import io
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import FrameType
from typing import NoReturn, TypeVar

from dsmini.console.messages import printable
from dsmini.reading import brief

T = TypeVar("T")
NO_MEMORY = re.compile("out of memory|not enough memory|allocate|allocation|overflow")
"""Words of torch's errors for what does not fit: not those of a kernel that reads where it must not."""


def _tell(sentence: str, error: BaseException) -> None:
    if speaks():
        complain(sentence, error)


def run(main: Callable[[Sequence[str]], int], tell: Callable[[str, BaseException], None] = _tell) -> None:
    """Run a command's main and exit with its status: 2 and one sentence for a mistake of the user.

    SIGTERM ends a command as Ctrl-C does, unless the command has a handler of its own.

    Args:
        tell: shows the sentence about an error; by default the first of several processes does.
    """
    _hear_sigterm()
    for out in (sys.stdout, sys.stderr):
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="replace")  # for a character that the terminal cannot show
    warnings.formatwarning = lambda message, *_: f"warning: {printable(str(message))}\n"
    try:
        status = main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        sentence, status = outcome_of(error)
        if sentence is None:
            raise
        if isinstance(error, BrokenPipeError):  # the reader of the output has ended, as in `| head`
            sys.stderr.close()
        if sentence:
            tell(sentence, error)
    leave(status)


def outcome_of(error: BaseException) -> tuple[str | None, int]:
    """Return the sentence about an error that ends a command, and the exit status.

    The sentence is "" where nothing is to be said, and None for an error that only its trace can explain.
    """
    match error:
        case KeyboardInterrupt():
            return "stopped", 130
        case SystemExit():
            return "", error.code if isinstance(error.code, int) else 1
        case BrokenPipeError():
            return "", 1
        case ValueError():
            return str(error), 2
        case ArithmeticError():
            return str(error), 1
        case OSError() if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return f"{brief(str(error.filename))} is not usable as a path: {error.strerror}; use a shorter one", 2
        case OSError():
            return f"{error}; free some space or write elsewhere; what was saved is untouched", 1
        case TypeError() | NotImplementedError() if "MPS" in str(error):
            missing = str(error).partition(". ")[0].rstrip(".")  # a type such as FP8's, or an operation
            return f"Apple's GPU cannot run this: {missing}; use the device cpu", 1
        case MemoryError() | RuntimeError() if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
            first = (str(error).splitlines() or ["no memory is left"])[0]
            return f"too large for this machine: {first}; use a smaller model or batch", 1
        case _:
            return None, 1


def leave(status: int) -> NoReturn:
    """End this process. Among several, threads of connections are alive: Python would now and then abort."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        for out in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                out.flush()
        os._exit(status)
    sys.exit(status)


def _hear_sigterm() -> None:
    """Raise KeyboardInterrupt on SIGTERM, so that what was computed is shown or saved before the end."""

    def stop(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
    if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop)


def interruptible(work: Callable[[], T], seconds: float = math.inf) -> T:
    """Return the result of long work in foreign code that hears no signals.

    It runs in a thread of its own. After a signal, that thread ends with the process.

    Raises: TimeoutError if it takes longer than some seconds; the thread remains.
    """
    result: Future[T] = Future()

    def call() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    try:
        return result.result(min(seconds, threading.TIMEOUT_MAX))
    except TimeoutError:
        if result.done():  # it is the work's own
            raise
        raise TimeoutError(f"it takes longer than {seconds:g} s") from None


def speaks() -> bool:
    """Return True in the one process of a command, of those that a launcher started, which talks to people."""
    return os.environ.get("RANK", "0") == "0"


def complain(sentence: str, error: BaseException | None = None) -> None:
    """Print what is wrong, or that a signal stopped the command."""
    kind = "" if isinstance(error, KeyboardInterrupt) else "error: "
    print(f"{kind}{printable(sentence)}", file=sys.stderr, flush=True)
