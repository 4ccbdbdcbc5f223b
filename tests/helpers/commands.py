"""Run commands from a test: in this process, or in one of their own for what only a process shows.

Importing torch takes two seconds of CPU, so processes are for signals, closed pipes, exit statuses and imports.
"""

import contextlib
import io
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tomllib
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = (
    "--model.dim 32 --model.inter-dim 48 --model.moe-inter-dim 16 --model.n-layers 2 --model.n-dense-layers 1 "
    "--model.n-routed-experts 8 --model.max-seq-len 32 --train.batch-size 4 --train.eval-every 2 "
    "--train.eval-tokens 64 --train.sample-tokens 8 --train.threads 1"
)
OF_A_PROCESS = ("EXTRA_PATH", "WORLD_SIZE")
"""Variables of the environment that concern a whole process: a command that has them gets its own."""


def start(command: str, folder: Path, stdin: int | None = subprocess.DEVNULL) -> "subprocess.Popen[str]":
    """Start python -m with this command; EXTRA_PATH names a folder whose sitecustomize.py it runs first."""
    paths = [str(ROOT), os.environ.get("EXTRA_PATH"), str(ROOT / "kernels")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", *shlex.split(command)],
        cwd=folder, env=env, text=True, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run_apart(command: str, folder: Path, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a command in a process of its own, to its end."""
    with start(command, folder, subprocess.PIPE) as process:
        try:
            out, err = process.communicate(stdin, timeout=120)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run(command: str, folder: Path, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a command, with the words of its process."""
    if any(name in os.environ for name in OF_A_PROCESS):
        return run_apart(command, folder, stdin or "")
    out, err = io.StringIO(), io.StringIO()
    status = call(command, folder, out, err, stdin or "")
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def finish(command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command, which must succeed."""
    done = run(command, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_all(commands: list[tuple[str, str]], folder: Path, columns: int = 200) -> list[tuple[int, str]]:
    """Run commands (module, arguments) in this process; return the status and output of each."""
    said: list[tuple[int, str]] = []
    for module, arguments in commands:
        output = io.StringIO()
        status = call(f"{module} {arguments}", folder, output, output, columns=columns)
        said.append((status, output.getvalue()))
    return said


def call(command: str, folder: Path, out: TextIO, err: TextIO, stdin: str = "", columns: int = 200) -> int:
    """Do in this process what python -m does with this command; return its exit status."""
    module, *arguments = shlex.split(command)
    with _as_its_process(folder, [module, *arguments], out, err, stdin, columns):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except KeyboardInterrupt:
            traceback.print_exc()
            return -signal.SIGINT
        except Exception:
            traceback.print_exc()
            return 1
    return 0


@contextlib.contextmanager
def _as_its_process(
    folder: Path, argv: list[str], out: TextIO, err: TextIO, stdin: str, columns: int
) -> Iterator[None]:
    """Lend this process to a command: folder, streams, warnings, signals and threads, which are put back at the end."""
    threads, terminated = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(sys, "argv", argv)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        patch.setattr(warnings, "showwarning", _show)  # pytest collects them
        warnings.simplefilter("default")
        for unseen in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", unseen)
        warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)  # this process has imported dsmini
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, terminated)
            torch.set_num_threads(threads)


def _show(message: object, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))  # pyright: ignore[reportArgumentType]


def check_refused(module: str, folder: Path, bad: Mapping[str, str] | str = "") -> None:
    """Fail unless each command line ends with status 2 and one line with its sentence, and touches no file.

    Args:
        bad: a part of the sentence for each command line, or a table of refusals.toml; "": that of the command.
    """
    if isinstance(bad, str):
        every = tomllib.loads(Path(__file__).with_name("refusals.toml").read_text(encoding="utf-8"))
        bad = every[bad or module.removeprefix("dsmini.")]

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    before, wrong = files(), []
    for arguments, sentence in bad.items():
        done = run(f"{module} {arguments}", folder)
        is_line = done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        if done.returncode != 2 or sentence not in done.stderr or not is_line:
            wrong.append(f"{module} {arguments}: status {done.returncode}, {done.stderr}")
    assert wrong == [], "\n".join(wrong)
    after = files()
    touched = [path for path in {**before, **after} if after.get(path) != before.get(path)]
    assert touched == [], touched


def let_prices_be_invented(monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
    """Let this machine have invented roofs and prices, whose measurement takes seconds. Args: as of InventedPrices."""
    from dsmini.measure.price import Prices
    from tests.helpers.questions import InventedPrices

    prices = InventedPrices(**given)
    monkeypatch.setattr("dsmini.measure.roofs.load_or_measure", lambda *_, **__: prices.roofs)
    monkeypatch.setattr(Prices, "here", lambda **_: prices)


def place_with_run(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Put book.txt into a folder, and runs/x, a finished run of a tiny model of bytes on it; return what it said."""
    (folder / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    return finish(f"dsmini.train --data.path book.txt --out runs/x --train.steps 5 --json {TINY}", folder)
