"""The C++ functions check their arguments before they touch memory, and stay within their buffers."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini_kernels import cpu
from dsmini_kernels.cpu import build
from dsmini_kernels.cpu import tiles as wrapper
from tests.helpers.cpu_kernels import ISAS, LIBRARY

ROOT = Path(__file__).parents[2]


def raw(**changes: Any) -> int:
    """Return the C function's answer for a small valid call with some arguments changed."""
    x, out = torch.zeros(4, 128), torch.zeros(4, 128)
    arguments = {
        **dict.fromkeys(("operation", "threads", "in", "out_type", "format", "powers"), 0),
        **{"batch": 1, "rows": 4, "columns": 128, "tile_rows": 1, "tile_columns": 128},
        **{"x": x.data_ptr(), "x_bytes": x.nbytes, "batch_stride": 0, "row_stride": 128},
        **{"out": out.data_ptr(), "out_bytes": out.nbytes, "scales": 0, "scales_bytes": 0},
        **{"ends": 0, "ends_bytes": 0, "groups": 0, "amax_min": 1e-4, "parallel": 0},
        **{"operation": 2, "threads": 1},
        **changes,
    }
    return LIBRARY.tiles(wrapper.CALL.pack(*arguments.values()), wrapper.CALL.size)


def test_wrong_arguments_are_refused_before_memory_is_touched() -> None:
    assert raw() == 0
    ends = torch.tensor([2, 4])
    good = {"ends": ends.data_ptr(), "ends_bytes": 16, "groups": 2}
    assert raw(**good) == 0
    huge = 2**62
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("malformed", {"operation": 3}),
        ("malformed", {"operation": -1}),
        ("malformed", {"in": 3}),
        ("malformed", {"out_type": -1}),
        ("malformed", {"format": 3}),
        ("malformed", {"threads": 0}),
        ("size", {"rows": -1}),
        ("size", {"columns": huge}),
        ("size", {"tile_rows": 0}),
        ("size", {"batch": -1}),
        ("stride", {"row_stride": -128}),
        ("stride", {"batch_stride": -1}),
        ("beyond", {"x_bytes": 4 * 128 * 4 - 1}),
        ("beyond", {"out_bytes": 4 * 128 * 4 - 1}),
        ("beyond", {"row_stride": 129}),
        ("beyond", {"row_stride": huge}),
        ("beyond", {"rows": 5}),
        ("beyond", {"rows": huge}),
        ("beyond", {"batch": 2}),
        ("beyond", {"batch": huge, "rows": huge}),
        ("beyond", {"x": 0}),
        ("beyond", {"out": 0}),
        ("beyond", {"operation": 0, "scales": 0, "scales_bytes": 16}),
        ("beyond", {"operation": 0, "scales": 16, "scales_bytes": 15}),
        ("beyond", {"operation": 1, "columns": 129}),
        ("ends", {**good, "ends_bytes": 15}),
        ("ends", {**good, "groups": 1}),
        ("ends", {**good, "groups": -1}),
        ("ends", {**good, "operation": 0}),
        ("ends", {**good, "batch": 2}),
    ]
    for word, changes in wrong:
        error = raw(**changes)
        assert error and word in wrapper.ERRORS[error], (changes, error)
    assert LIBRARY.tiles(wrapper.CALL.pack(*range(22), 0.0, 0), wrapper.CALL.size - 8) == 1


def test_error_codes_of_c_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(LIBRARY, tiles=lambda *_: 5)
    monkeypatch.setattr(wrapper, "library", lambda: broken)
    with pytest.raises(RuntimeError, match="beyond their memory"):
        cpu.quantize(torch.randn(3, 4), (1, 128), "ue8m0", "e4m3", 1e-4)


@pytest.mark.parametrize("isa", list(build.ISAS))
def test_sanitizers_find_no_memory_error(isa: str) -> None:
    """Run all operations under AddressSanitizer and UndefinedBehaviorSanitizer, in buffers of exact sizes."""
    if isa not in ISAS:
        pytest.skip(f"this CPU has no {isa}")
    command = build.find_compiler()
    found = subprocess.run([*command, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"{command[0]} has no libasan.so")
    try:
        path = build.find_or_build(isa, sanitize=True)
    except build.BuildError as error:
        pytest.skip(f"no sanitizer build: {error}")
    env = os.environ | {"LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    driver = [sys.executable, str(ROOT / "tests" / "helpers" / "sanitized.py"), str(path), *build.TRIAL_LAYOUTS]
    run = subprocess.run(driver, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout.split()[0]) > 500
    caught = subprocess.run([*driver, "overflow"], capture_output=True, text=True, env=env)
    assert caught.returncode != 0 and "ERROR: AddressSanitizer" in caught.stderr
