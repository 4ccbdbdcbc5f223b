"""Run compilers for a limited time."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence

Done = subprocess.CompletedProcess[str]


def run_together(commands: Sequence[list[str]], seconds: float) -> list[Done]:
    """Run the commands at the same time; return how each ended, with its output and errors as one text.

    After the time limit, and when this process is interrupted, all of them are killed with what they started.

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


def _start(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,  # of its own: a script that is killed alone leaves the compiler that it started
    )


def _finish(process: "subprocess.Popen[str]", deadline: float, seconds: float) -> Done:
    try:
        output, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise subprocess.TimeoutExpired(process.args, seconds) from None
    return Done(process.args, process.returncode, output)


def _kill(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
