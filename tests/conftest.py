"""Seed tests from their names, and provide small models in which every part matters."""

import ctypes
import functools
import gc
import os
import re
import signal
import sys
import time
import tomllib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

# Two pytest processes share two cores. A thread that spins while it waits for another takes the core that this one
# needs, and a parallel region of microseconds takes milliseconds. OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch
from hypothesis import settings
from torch import nn

from dsmini import ModelConfig, Transformer, ops
from dsmini.machine import peak_memory

settings.register_profile("dsmini", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("dsmini")
# small tensors gain nothing from a second thread, and on a busy machine the threads wait for each other
torch.set_num_threads(1)

# tests are of the CPU; the virtual Macs of GitHub's CI show a GPU that refuses every allocation
torch.backends.mps.is_available = functools.cache(lambda: False)  # as torch's own, whose __wrapped__ torch 2.15 reads

# Ctrl-C is ignored in background jobs and by some runners of CI, and what ignores it starts children that ignore it
signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent
QUICK = {"nn", "functional", "numerics", "properties", "gradients", "oracle", "test_end_to_end.py"}
"""Folders and files of `pytest -m quick`; their slow tests are left out."""
TOO_LONG = {
    *("test_compiled_equals_eager", "test_the_first_call_of_a_process_compiles_in_one_graph"),
    *("test_the_model_trains_and_generates_alone", "test_no_more_than_a_chunk_of_logits_exists", "test_conversations"),
    *("test_random_models_follow_the_reports", "test_codes_scales_and_values_of_each_tile", "test_the_released_shapes"),
    "test_layers_equal_reference",
}
"""Tests that `pytest -m quick` leaves out too: these few would take a third of its time."""
READ = {"quick": QUICK, "gpu": {"gpu", "kernels", "functional", "nn"}}
"""Folders and files that have tests of a tier: to read all others takes longer than to run these."""
LONGEST = (
    *("training/test_resume.py", "golden/test_golden.py"),
    *("diagnosis/test_training.py", "inference/test_generate_command.py", "planner/test_layouts.py"),
    *("commands/test_commands.py", "nn/test_cache.py", "training/test_record.py"),
)
"""Files that take longest, which come first: a process that began one last would end long after the others."""
CPU = torch.device("cpu")
PEAK_BYTES = peak_memory(CPU) + 1800 * 1024**2
"""Most memory of a process of tests. Imports take 0.25 GB of it with torch for CPUs, 0.65 with torch for CUDA."""
M = TypeVar("M", bound=nn.Module)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return one process per CPU where a folder is run, none for single files: a process starts in three seconds."""
    if config.option.markexpr != "gpu" and any(Path(argument.split("::")[0]).is_dir() for argument in config.args):
        return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4)
    config.option.dist = "no"
    return 0


def pytest_configure(config: pytest.Config) -> None:
    known = {re.split(r"\W", line)[0] for line in config.getini("markers")}
    config.option.loadscopereorder = False  # of pytest-xdist, which would begin with the files of many tests
    expression = config.option.markexpr
    for name in set(re.findall(r"\w+", expression)) - known - {"and", "or", "not", "True", "False"}:
        raise pytest.UsageError(f"-m {expression!r}: no marker {name!r}; use quick, slow, gpu, or '' for all")

    if expression == "gpu":
        config.option.reportchars += "s"  # says why there is none


def pytest_report_header(config: pytest.Config) -> str:
    return f"tests with -m {config.option.markexpr!r}; -m quick, -m slow, -m gpu and -m '' choose others"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what has no tests of the tier that is asked for."""
    read = READ.get(config.option.markexpr)
    return True if read and collection_path.parent == HERE and collection_path.name not in read else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        left_out = item.name.partition("[")[0] in TOO_LONG or any(map(item.get_closest_marker, ("slow", "gpu")))
        if item.path.relative_to(HERE).parts[0] in QUICK and not left_out:
            item.add_marker("quick")
    place = {HERE / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = item.get_closest_marker("memory")
    free = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text()) if sys.platform == "linux" else None
    if needed and free and int(free[1]) * 1024 < needed.args[0] * 1e9:
        pytest.skip(f"needs {needed.args[0]} GB of free memory, here are {int(free[1]) * 1024 / 1e9:.1f} GB")


def require_cpu_kernels() -> None:
    """Skip the test, with the reason, where the C++ kernels do not serve."""
    from dsmini_kernels import cpu

    if ops.serving("cpu") != "cpu":
        pytest.skip(f"no C++ kernels: {cpu.why_not() or f'{ops.VARIABLE} forces others'}")


@pytest.fixture(autouse=True, scope="module")
def _freed_memory() -> Iterator[None]:
    """Give the system what glibc keeps of freed memory, which would add up from file to file."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # forget compiled code
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True)
def _small_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test in which this process grew beyond PEAK_BYTES, unless its marker says how much it needs."""
    before = peak_memory(CPU)
    yield
    allowed = request.node.get_closest_marker("memory") is not None
    assert allowed or not before <= PEAK_BYTES < peak_memory(CPU), (
        f"this test took pytest from {before:,} to {peak_memory(CPU):,} bytes"
    )


MODELS: dict[str, dict[str, Any]] = tomllib.loads((HERE / "helpers" / "models.toml").read_text())
SMALL = MODELS["small"]


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


def randomise(module: M) -> M:
    """Draw matrices that keep the size of their input, norms around 1, and nonzero, mostly negative routing biases."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():  # a table of experts
                continue
            if name.endswith("bias"):
                tensor.uniform_(-0.4, 0.1)
            elif tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(std=tensor.shape[-1] ** -0.5)
    return module


@pytest.fixture(name="randomise")
def _randomise() -> Callable[[M], M]:
    return randomise


@pytest.fixture
def small_config() -> Callable[..., ModelConfig]:
    """Return a config of small odd sizes with these changes."""
    return lambda **changes: ModelConfig(**(SMALL | changes))


@pytest.fixture
def small_model(small_config: Callable[..., ModelConfig]) -> Callable[..., Transformer]:
    """Return a random model of small_config with these changes."""
    return lambda **changes: randomise(Transformer(small_config(**changes)))


class Clock:
    """A clock in place of time.perf_counter that a test moves, with a log of what ran."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.log = 0.0, list[str]()
        patch.setattr(time, "perf_counter", lambda: self.now)

    def pay(self, seconds: float) -> float:
        """Move by these seconds, and return the time."""
        self.now += seconds
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """Return a run that takes these seconds in turn, and repeats the last."""
        left = list(seconds)

        def run() -> None:
            self.log.append(name)
            self.pay(left.pop(0) if len(left) > 1 else left[0])

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN, as torch does under deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(9).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
