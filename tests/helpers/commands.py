"""Run commands from a test as a user does."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = (
    "--model.dim 32 --model.inter-dim 48 --model.moe-inter-dim 16 --model.n-layers 2 --model.n-dense-layers 1 "
    "--model.n-routed-experts 8 --model.max-seq-len 32 --train.batch-size 4 --train.eval-every 2 "
    "--train.eval-tokens 64 --train.sample-tokens 8 --train.threads 1"
)
# runs each command as python -m does, but all in one process, because importing torch takes seconds
RUN_ALL = """
import contextlib, io, json, runpy, shlex, sys, traceback
answers = []
for module, arguments in json.load(sys.stdin):
    sys.argv, said, status = [module, *shlex.split(arguments)], io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
    answers.append((status, said.getvalue()))
print(json.dumps(answers))
"""


def start(command: str, folder: Path, stdin: int | None = None) -> "subprocess.Popen[str]":
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("EXTRA_PATH")]))
    env = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}
    args = [sys.executable, "-m", *shlex.split(command)]
    return subprocess.Popen(
        args, cwd=folder, env=env, text=True, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(command: str, folder: Path, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    process = start(command, folder, None if stdin is None else subprocess.PIPE)
    out, err = process.communicate(stdin, timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run_all(commands: list[tuple[str, str]], folder: Path, columns: int = 200) -> list[tuple[int, str]]:
    """Run commands (module, arguments) in one process and return the status and output of each."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(columns)}
    args = [sys.executable, "-c", RUN_ALL]
    done = subprocess.run(args, cwd=folder, env=env, input=json.dumps(commands), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(status, said) for status, said in json.loads(done.stdout)]
