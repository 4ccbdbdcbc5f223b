"""llama.cpp and ik_llama.cpp, if some Python has them: our weights in a GGUF file, run in a process of its own."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peer_models.llamacpp_model import write_gguf
from dsmini import Transformer

PACKAGES = {"llama.cpp": "llama_cpp", "ik_llama.cpp": "ik_llama_cpp"}
WORKER = Path(__file__).with_name("llama_worker.py")


@functools.cache
def engines(pythons: Sequence[Path]) -> dict[str, str]:
    """Return the Python that runs each engine, by its name: this one, or the first of `pythons` that has it.

    Raises: ValueError for a Python that does not run, or that has none of them, and if gguf is missing here, which
        writes the file.
    """
    if not find_spec("gguf"):
        if pythons:
            raise ValueError("--peer-python needs gguf in this Python, to write the file: pip install gguf")
        return {}
    found = {name: sys.executable for name, package in PACKAGES.items() if find_spec(package)}
    for python in pythons:
        code = f"from importlib.util import find_spec; print(*[p for p in {[*PACKAGES.values()]} if find_spec(p)])"
        try:
            how = {"env": _environment(str(python)), "capture_output": True, "text": True, "timeout": 60, "check": True}
            said = subprocess.run([python, "-c", code], **how).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise ValueError(f"--peer-python {python} cannot be run: {error}") from None
        there = {name: str(python) for name, package in PACKAGES.items() if package in said.split()}
        if not there:
            wanted = "llama-cpp-python or ik-llama-cpp-python"
            raise ValueError(f"--peer-python {python} has no engine; install {wanted} there, or name another Python")
        found = there | found
    return found


def _environment(python: str) -> dict[str, str]:
    """Return the environment for a Python: PYTHONPATH is meant for this one."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or python == sys.executable}


class Engine:
    """A model of ours that an engine runs.

    Args:
        kind: type of the matrices: BF16, F32 or Q8_0.
        room: tokens that the cache has room for.
        at_once: tokens of a prompt that are read together.
    """

    def __init__(self, name: str, python: str, model: Transformer, kind: str, room: int, at_once: int) -> None:
        self.name = name
        sizes = map(str, (room, at_once, torch.get_num_threads()))
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, kind)
            command = [python, str(WORKER), PACKAGES[name], str(path), *sizes]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said, "text": True}
            self.process = subprocess.Popen(command, env=_environment(python), **pipes)
            if self._answer() != "ready":
                said.seek(0)
                last = [line for line in said.read().splitlines() if line.strip()][-1:]
                raise RuntimeError(f"{name} does not run: {''.join(last) or 'it ended'}")

    def __del__(self) -> None:
        process = getattr(self, "process", None)
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()

    def fill(self, tokens: Tensor, room: int) -> None:
        self._ask([])
        self._ask(tokens[0].tolist())

    def start(self, room: int) -> None:
        self._ask([])

    def feed(self, tokens: Tensor) -> float:
        return self._ask(tokens[0].tolist())

    def _ask(self, tokens: list[int]) -> float:
        assert self.process.stdin is not None
        try:
            print(json.dumps(tokens), file=self.process.stdin, flush=True)
            return float(self._answer())
        except (OSError, ValueError):
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}") from None

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()
