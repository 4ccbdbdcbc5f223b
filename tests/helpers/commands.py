"""Run commands from a test as a user does, each in a process of its own.

Importing torch takes three seconds of CPU. A server imports it once per pytest process and forks for every command.
"""

import atexit
import contextlib
import io
import multiprocessing
import os
import runpy
import shlex
import signal
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parents[2]
TINY = (
    "--model.dim 32 --model.inter-dim 48 --model.moe-inter-dim 16 --model.n-layers 2 --model.n-dense-layers 1 "
    "--model.n-routed-experts 8 --model.max-seq-len 32 --train.batch-size 4 --train.eval-every 2 "
    "--train.eval-tokens 64 --train.sample-tokens 8 --train.threads 1"
)
FORKS = multiprocessing.get_context("forkserver")
IMPORTED = "torch torch.optim torch._dynamo safetensors.torch tokenizers tyro rich.progress rich.table jinja2.sandbox"
FORKS.set_forkserver_preload(IMPORTED.split())


class Command:
    """A running command, with the methods of subprocess.Popen that tests use."""

    def __init__(self, arguments: list[str], folder: Path, env: dict[str, str], stdin: int | None) -> None:
        inside = [os.open(os.devnull, os.O_RDONLY), -1, -1]
        self.stdin: TextIO | None = None
        if stdin == subprocess.PIPE:
            os.close(inside[0])
            inside[0], ours = os.pipe()
            self.stdin = os.fdopen(ours, "w", encoding="utf-8")
        out, inside[1] = os.pipe()
        err, inside[2] = os.pipe()
        self.stdout, self.stderr = os.fdopen(out, encoding="utf-8"), os.fdopen(err, encoding="utf-8")
        self.args = arguments
        passed = [reduction.DupFd(number) for number in inside]
        self.process = FORKS.Process(target=_run_module, args=(arguments, folder, env, passed), daemon=True)
        self.process.start()
        for number in inside:
            os.close(number)
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, stdin: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        """Send stdin, then return what the command prints.

        Raises: subprocess.TimeoutExpired, after the command was killed.
        """
        with ThreadPoolExecutor(2) as readers:
            both = [readers.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                if self.stdin is not None:
                    with contextlib.suppress(BrokenPipeError), self.stdin:
                        self.stdin.write(stdin or "")
                out, err = (reader.result(timeout) for reader in both)
                self.wait(timeout)
            except TimeoutError:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
        self.stdout.close()
        self.stderr.close()
        return out, err


def _become(folder: Path, env: dict[str, str], streams: list[int]) -> None:
    """Give this forked process the folder, the environment and the streams of a new one."""
    for standard, number in enumerate(streams):
        os.dup2(number, standard)
        os.close(number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1, errors="backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = [str(folder), str(ROOT), *(path for path in sys.path if path not in (str(ROOT), ""))]


def _run_module(arguments: list[str], folder: Path, env: dict[str, str], passed: list[reduction.DupFd]) -> None:
    """Do what python -m does, to its exit status."""
    _become(folder, env, [each.detach() for each in passed])
    sys.argv = arguments
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()


def _run_modules(commands: list[tuple[str, str]], folder: Path, env: dict[str, str], answers: Connection) -> None:
    _become(folder, env, [os.open(os.devnull, os.O_RDONLY), os.dup(1), os.dup(2)])
    said: list[tuple[int, str]] = []
    for module, arguments in commands:
        sys.argv, output, status = [module, *shlex.split(arguments)], io.StringIO(), 0
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as stop:
                status = stop.code  # type: ignore[assignment]
            except BaseException:
                traceback.print_exc()
        said.append((status, output.getvalue()))
    answers.send(said)


def start(command: str, folder: Path, stdin: int | None = None) -> "Command | subprocess.Popen[str]":
    """Start python -m with this command; EXTRA_PATH names a folder whose sitecustomize.py it runs first."""
    arguments, more = shlex.split(command), os.environ.get("EXTRA_PATH")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), more])), "COLUMNS": "200"}
    if not more:
        return Command(arguments, folder, env, stdin)
    arguments = [sys.executable, "-m", *arguments]
    return subprocess.Popen(
        arguments, cwd=folder, env=env, text=True, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(command: str, folder: Path, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    process = start(command, folder, None if stdin is None else subprocess.PIPE)
    out, err = process.communicate(stdin, timeout=120)
    return subprocess.CompletedProcess(command, process.wait(), out, err)


def place_with_run(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Put book.txt into a folder, and runs/x, a finished run of a tiny model of bytes on it; return what it said."""
    (folder / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    done = run(f"dsmini.train --data.path book.txt --out runs/x --train.steps 5 --json {TINY}", folder)
    assert done.returncode == 0, done.stderr
    return done


def run_all(commands: list[tuple[str, str]], folder: Path, columns: int = 200) -> list[tuple[int, str]]:
    """Run commands (module, arguments) in one process and return the status and output of each."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(columns)}
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_run_modules, args=(commands, folder, env, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()
