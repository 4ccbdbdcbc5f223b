"""The C++ functions check their arguments before they touch memory, and stay within their buffers."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini_kernels import cpu
from dsmini_kernels.cpu import build, steps
from dsmini_kernels.cpu.calls import ERRORS
from dsmini_kernels.cpu.muon import PIECE

HUGE = 2**62
# GCC aligns the stack of detect_stack_use_after_return to 32 bytes, and vectors of AVX-512 want 64
ASAN_OPTIONS = "detect_leaks=0:detect_stack_use_after_return=0"
X, OUT, ENDS = torch.zeros(4, 128), torch.zeros(4, 128), torch.tensor([2, 4])
STACK = torch.zeros(3, 4, 6)
MATRICES = [torch.zeros(2, *shape) for shape in ((5, 8), (8, 5), (5, 8))]


def called(entry: str, *fields: Any) -> int:
    """Return the C function's answer."""
    call = build.STRUCTS[entry].pack(*fields)
    return build.library().entry(entry)(call, len(call))


def tiles(**changes: Any) -> int:
    """Return the C function's answer for a small valid call with some arguments changed."""
    fields = {
        **{"operation": 2, "threads": 1, "in": 0, "out_type": 0, "format": 0, "powers": 0},
        **{"batch": 1, "rows": 4, "columns": 128, "tile_rows": 1, "tile_columns": 128},
        **{"x": X.data_ptr(), "x_bytes": X.nbytes, "batch_stride": 0, "row_stride": 128},
        **{"out": OUT.data_ptr(), "out_bytes": OUT.nbytes, "scales": 0, "scales_bytes": 0},
        **{"ends": 0, "ends_bytes": 0, "groups": 0, "amax_min": 1e-4, "parallel": 0},
    }
    assert changes.keys() <= fields.keys()
    return called("tiles", *(fields | changes).values())


def muon(threads: int = 1, steps: int = 2, gram: int = 0, pieces: int = 1, **piece: int) -> int:
    """Return the same for Muon's update of a stack of matrices."""
    order = ("p", "p_bytes", "g", "g_bytes", "m", "m_bytes", "count", "rows", "columns")
    fields = dict.fromkeys(order[0:6:2], STACK.data_ptr()) | dict.fromkeys(order[1:6:2], STACK.nbytes)
    fields |= {"count": 3, "rows": 4, "columns": 6} | piece
    table = torch.frombuffer(bytearray(PIECE.pack(*(fields[name] for name in order), 1)), dtype=torch.uint8)
    numbers = torch.ones(2, 3, dtype=torch.float64)
    spans = (table.data_ptr(), table.nbytes, numbers.data_ptr(), numbers.nbytes)
    return called("muon", threads, 0, gram, pieces, steps, *spans, 0.1, 0.9, 0.0)


def experts(sizes: tuple[int, ...] = (3, 8, 5, 2, 2, 0), less: int = 0, index: int = 1, kind: int = 0) -> int:
    """Return the same for experts. The first buffers are `less` bytes too short; `kind` is the type of w1."""
    tensors = (torch.zeros(3, 8), torch.zeros(3, 8), torch.tensor([[0, 1], [0, index], [0, 1]]), torch.zeros(3, 2))
    spans = [number for t in tensors for number in (t.data_ptr(), t.nbytes - less)]
    w1, w2, w3 = map(steps.matrix, MATRICES)
    return called("experts", 1, *sizes, *spans, *w1[:2], kind, *w1[3:], *w2, *w3)


def heads(
    sizes: tuple[int, ...] = (2, 3, 3, 4, 4, 5, 6, 0, 1, 1),
    short: int = -1,
    null: int = -1,
    stride: int = 0,
    mask: int = 0,
) -> int:
    """Return the same for attention of heads. Array number `short` is a byte too short, `null` is none."""
    b, h, groups, s, t, d, v, *_ = (2, 3, 3, 4, 4, 5, 6)
    shapes = ((h, s, d), (groups, t, d), (groups, t, v), (h, s, v), (h, s, v), (h, s, d), (h, t, d), (h, t, v))
    arrays = [*(torch.zeros(b, *shape) for shape in shapes), torch.zeros(b, h, s), torch.zeros(1, s, t)]
    spans = [(0 if i == null else x.data_ptr(), x.nbytes - (i == short)) for i, x in enumerate(arrays)]
    strides = [tuple(4 * n + stride for n in x.stride()[:3]) for x in arrays[:8]]
    rows = [number for span, of in zip(spans, strides, strict=False) for number in (*span, *of)]
    hidden = (spans[9][0], spans[9][1] // 4, mask) if mask else (0, 0, 0)
    return called("heads_attention", 1, *sizes, *rows, *spans[8], *hidden, 0.1)


def norm(sizes: tuple[int, ...] = (3, 8, 0, 1), short: int = -1, null: int = -1, stride: int = 40) -> int:
    """Return the same for RMSNorm in training, whose rows lie 40 bytes apart."""
    arrays = [torch.zeros(n) for n in (28, 8, 3, 24, 24, 8)]
    x, *others = [(0 if i == null else t.data_ptr(), t.nbytes - (i == short)) for i, t in enumerate(arrays)]
    return called("trained_norm", 1, *sizes, *x, stride, *(number for span in others for number in span), 0.1)


GROUPS = {"ends": ENDS.data_ptr(), "ends_bytes": 16, "groups": 2}
WRONG: list[tuple[Callable[..., int], str, list[dict[str, Any]]]] = [
    (tiles, "malformed", [{"operation": 3}, {"operation": -1}, {"in": 3}, {"out_type": -1}, {"format": 3}]),
    (tiles, "malformed", [{"threads": 0}]),
    (tiles, "size", [{"rows": -1}, {"columns": HUGE}, {"tile_rows": 0}, {"batch": -1}]),
    (tiles, "stride", [{"row_stride": -128}, {"batch_stride": -1}]),
    (tiles, "beyond", [{"x_bytes": X.nbytes - 1}, {"out_bytes": X.nbytes - 1}, {"x": 0}, {"out": 0}, {"rows": 5}]),
    (tiles, "beyond", [{"row_stride": 129}, {"row_stride": HUGE}, {"rows": HUGE}, {"batch": HUGE, "rows": HUGE}]),
    (tiles, "beyond", [{"batch": 2}, {"operation": 1, "columns": 129}]),
    (tiles, "beyond", [{"operation": 0, "scales": at, "scales_bytes": size} for at, size in ((0, 16), (16, 15))]),
    (tiles, "ends", [GROUPS | {"ends_bytes": 15}, GROUPS | {"groups": 1}, GROUPS | {"groups": -1}]),
    (tiles, "ends", [GROUPS | {"operation": 0}, GROUPS | {"batch": 2}]),
    (muon, "", [{"threads": 0}, {"gram": 2}, {"steps": 0}, {"steps": 3}, {"steps": -1}, {"pieces": 2}, {"pieces": -1}]),
    (muon, "", [{"count": 4}, {"count": -1}, {"count": 2**61}, {"rows": 0}, {"rows": 5}, {"columns": 7}]),
    (muon, "", [{"columns": HUGE}, *({name: 0} for name in "pgm"), *({f"{n}_bytes": STACK.nbytes - 1} for n in "pgm")]),
    (experts, "", [{"less": 1}, {"index": -1}, {"index": 2}]),
    (
        experts,
        "",
        [{"kind": 4}, {"kind": -1}, {"kind": 3}, {"kind": 2}],
    ),  # a type that there is not, and codes without scales
    (experts, "", [{"sizes": sizes} for sizes in ((4, 8, 5, 2, 2, 0), (3, 9, 5, 2, 2, 0), (3, 8, 6, 2, 2, 0))]),
    (experts, "", [{"sizes": sizes} for sizes in ((3, 8, 5, 3, 2, 0), (3, 8, 5, 2, 3, 0), (-1, 8, 5, 2, 2, 0))]),
    (experts, "", [{"sizes": sizes} for sizes in ((3, 0, 5, 2, 2, 0), (3, 8, 5, 2, 0, 0), (HUGE, 8, 5, 2, 2, 0))]),
    (experts, "", [{"sizes": (3, 8, 5, 2, 2, 2)}]),
    (
        heads,
        "",
        [{"short": i} for i in range(9)] + [{"null": i} for i in range(9)] + [{"stride": -HUGE}, {"stride": 1}],
    ),
    (heads, "", [{"short": 9, "mask": 1}, {"mask": 3}, {"mask": -1}, {"mask": 2}]),
    (heads, "", [{"sizes": sizes} for sizes in ((3, 3, 3, 4, 4, 5, 6, 0, 1, 1), (2, 4, 4, 4, 4, 5, 6, 0, 1, 1))]),
    (heads, "", [{"sizes": sizes} for sizes in ((2, 3, 1, 4, 4, 5, 6, 0, 1, 1), (2, 3, 2, 4, 4, 5, 6, 0, 0, 1))]),
    (heads, "", [{"sizes": sizes} for sizes in ((2, 3, 3, 5, 4, 5, 6, 0, 1, 1), (2, 3, 3, 4, 5, 5, 6, 0, 1, 1))]),
    (heads, "", [{"sizes": sizes} for sizes in ((2, 3, 3, 4, 4, 6, 6, 0, 1, 1), (2, 3, 3, 4, 4, 5, 7, 0, 1, 1))]),
    (heads, "", [{"sizes": sizes} for sizes in ((2, 3, 3, 4, 4, 0, 6, 0, 1, 1), (2, HUGE, 3, 4, 4, 5, 6, 0, 1, 1))]),
    (heads, "", [{"sizes": sizes} for sizes in ((2, 3, 3, 4, 4, 5, 6, 1, 1, 1), (2, 3, 3, 4, 4, 5, 6, 0, 2, 1))]),
    (heads, "", [{"sizes": (2, 3, 3, 4, 4, 5, 6, 0, 1, 2)}]),
    (norm, "beyond", [{"short": i} for i in range(6)] + [{"null": i} for i in range(6)]),
    (norm, "beyond", [{"stride": stride} for stride in (-40, 28, 41, HUGE)]),
    (norm, "beyond", [{"sizes": sizes} for sizes in ((4, 8, 0, 1), (3, 9, 0, 1), (HUGE // 2**23, 8, 0, 0))]),
    (
        norm,
        "",
        [{"sizes": sizes} for sizes in ((0, 8, 0, 1), (3, 0, 0, 1), (HUGE, 8, 0, 1), (3, 8, 2, 1), (3, 8, 0, 2))],
    ),
]


@pytest.mark.usefixtures("library")
def test_wrong_calls_are_refused_before_memory_is_touched() -> None:
    for call, word, wrong in WRONG:
        assert call() == 0
        for changes in wrong:
            error = call(**changes)
            assert error and word in ERRORS[error], (call.__name__, changes, error)
    assert tiles(**GROUPS) == 0


def test_calls_of_another_size_are_refused(library: build.Library) -> None:
    for name, struct in build.STRUCTS.items():
        assert ERRORS[library.entry(name)(bytes(struct.size), struct.size - 8)] == "the call is malformed", name


@pytest.mark.usefixtures("library")
def test_error_codes_of_c_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.library().entries, "tiles", lambda *_: 5)
    with pytest.raises(RuntimeError, match="beyond their memory"):
        cpu.quantize(torch.randn(3, 4), (1, 128), "ue8m0", "e4m3", 1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a fresh cache: the sources are compiled with sanitizers first
@pytest.mark.parametrize("part", list(build.SOURCES))
@pytest.mark.parametrize("isa", list(build.ISAS))
def test_sanitizers_find_no_memory_error(isa: str, part: str, library: build.Library) -> None:
    """Run all operations under AddressSanitizer and UndefinedBehaviorSanitizer, in buffers of exact sizes."""
    if isa not in build.isas_here():
        pytest.skip(f"this CPU has no {isa}")
    command = build.find_compiler()
    found = subprocess.run([*command, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"{command[0]} has no libasan.so")
    try:
        path = build.find_or_build(isa, part, sanitize=True)
    except build.BuildError as error:
        pytest.skip(f"no sanitizer build: {error}")
    env = os.environ | {"LD_PRELOAD": found, "ASAN_OPTIONS": ASAN_OPTIONS, "OMP_NUM_THREADS": "1"}
    driver = [sys.executable, str(Path(__file__).with_name("sanitized.py")), str(path), *build.trial_arguments(part)]
    run = subprocess.run(driver, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout.split()[0]) > 150
    if part != "training":
        return
    caught = subprocess.run([*driver, "overflow"], capture_output=True, text=True, env=env)
    assert caught.returncode != 0 and "ERROR: AddressSanitizer" in caught.stderr
