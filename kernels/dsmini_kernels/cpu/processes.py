"""Run compilers for a limited time, with limited output."""

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence

Done = subprocess.CompletedProcess[str]
LONGEST = 1_000_000
"""Maximum number of bytes that a program may print."""


def run_together(commands: Sequence[list[str]], seconds: float) -> list[Done]:
    """Run the commands at the same time; return how each ended, with its output and errors as one text.

    After the time limit, and when this process is interrupted, all of them are killed with what they started. One that
    prints without end is killed too, and counts as failed.

    Raises: subprocess.TimeoutExpired after this many seconds.
    """
    deadline, running = time.monotonic() + seconds, []
    try:
        for command in commands:
            running.append(_start(command))
        return [_finish(process, deadline, seconds) for process in running]
    except BaseException as error:
        for process in running:
            _kill(process)
        if isinstance(error, OSError):  # the program cannot be run
            return [Done(command, -1, str(error)) for command in commands]
        raise


def _start(command: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,  # of its own: a script that is killed alone leaves the compiler that it started
    )


def _finish(process: "subprocess.Popen[bytes]", deadline: float, seconds: float) -> Done:
    assert process.stdout is not None
    output = bytearray()
    try:
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            while ready.select(max(0.0, deadline - time.monotonic())):
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    break
                output += chunk
                if len(output) > LONGEST:
                    _kill(process)
                    return Done(process.args, -1, f"it prints more than {LONGEST:,} bytes")
            else:
                raise subprocess.TimeoutExpired(process.args, seconds)
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise subprocess.TimeoutExpired(process.args, seconds) from None
    process.stdout.close()
    return Done(process.args, process.returncode, output.decode(errors="replace"))


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
