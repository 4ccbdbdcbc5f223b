"""The C++ functions check their arguments before they touch memory, and stay within their buffers."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini_kernels.cpu import build, steps
from dsmini_kernels.cpu.calls import ERRORS, SPAN, span
from dsmini_kernels.cpu.structs import CALLS, LAYOUTS
from dsmini_kernels.cpu.topk import key_rows

HUGE = 2**62
# GCC aligns the stack of detect_stack_use_after_return to 32 bytes, and vectors of AVX-512 want 64
ASAN_OPTIONS = "detect_leaks=0:detect_stack_use_after_return=0"
X, ENDS = torch.zeros(4, 128), torch.tensor([2, 4])
STACK = torch.zeros(3, 4, 6)
MATRICES = [torch.zeros(2, *shape) for shape in ((5, 8), (8, 5), (5, 8))]
HEADS = {
    name: torch.zeros(2, 3, 4, width)
    for name, width in (("q", 5), ("k", 5), ("v_rows", 6), ("y", 6), ("dy", 6), ("dq", 5), ("dk", 5), ("dv", 6))
}
HELD: list[Tensor] = []


def piece(**changes: Any) -> bytes:
    """Return the Span of one piece of Muon's matrices, a stack, with some fields changed."""
    fields = dict.fromkeys("pgm", span(STACK)) | {"count": 3, "rows": 4, "columns": 6, "stacked": 1}
    HELD.append(torch.frombuffer(bytearray(LAYOUTS["MuonPiece"].pack(**fields | changes)), dtype=torch.uint8))
    return span(HELD[-1])


def w1(kind: int) -> bytes:
    """Return the experts' w1 with a weight's type of this number."""
    return LAYOUTS["Matrix"].pack(data=span(MATRICES[0]), type=kind, rows=10, columns=8, stride=32, scales=b"")


def rows(x: Tensor, lent: bytes = b"", further: int = 0) -> bytes:
    """Return Heads in other memory, if some is lent, and further apart."""
    batch, head, row = (4 * stride + further for stride in x.stride()[:3])
    return LAYOUTS["Heads"].pack(data=lent or span(x), batch=batch, head=head, row=row)


def wrong_spans(x: Tensor) -> tuple[bytes, bytes]:
    """Return memory that is a byte too short, and memory without an address."""
    return SPAN.pack(x.data_ptr(), x.nbytes - 1), SPAN.pack(0, x.nbytes)


def wrong_values(x: Any) -> tuple[Any, ...]:
    """Return values that no field takes in place of this one: wrong memory, or a size without enough of it."""
    if isinstance(x, Tensor):
        return wrong_spans(x)
    larger = (x + 1,) if isinstance(x, int) and x > 1 else ()
    return (-1, HUGE, *larger) if isinstance(x, int) else ()


NEAR, ENTRIES, KEY_SIZES = torch.zeros(2, 5, 8), torch.zeros(2, 8, 8), ("type", "count", "batch", "row", "codes")


def entries(**changes: Any) -> bytes:
    """Return seven entries in FP8 of a call, with some fields changed."""
    fields = {"data": span(ENTRIES), "type": 2, "count": 7, "batch": 256, "row": 32, "codes": 6, "tile": 4}
    return LAYOUTS["KeyRows"].pack(**fields | changes)


def matrix(rows: int, columns: int, **changes: Any) -> bytes:
    """Return a matrix in FP32."""
    HELD.append(torch.zeros(rows, columns))
    fields = {"data": span(HELD[-1]), "type": 0, "rows": rows, "columns": columns, "stride": 4 * columns, "scales": b""}
    return LAYOUTS["Matrix"].pack(**fields | changes)


def block_rows(width: int, **changes: Any) -> bytes:
    """Return what a layer stores of blocks: seven rows, and a ring of raw rows for two series of four."""
    HELD.extend([torch.zeros(2, 7, width), torch.zeros(2, 9, 4 * width)])
    fields = {"made": key_rows(HELD[-2], 7)[1], "raw": span(HELD[-1]), "raw_places": 9}
    return LAYOUTS["BlockRows"].pack(**fields | changes)


def compressor(width: int, **changes: Any) -> bytes:
    """Return a compressor's weights, from eight numbers."""
    HELD.extend([torch.zeros(4, 2 * width), torch.zeros(width)])
    fields: dict[str, Any] = {"numbers": width, "bias": span(HELD[-2]), "weight": span(HELD[-1]), "epsilon": 0.1}
    fields |= {name: matrix(2 * width, 8) for name in ("wkv", "wgate")}
    return LAYOUTS["CompressorWeights"].pack(**fields | changes)


LATEST = torch.zeros(2, 4, 8)
CALLS_OF: dict[str, Any] = tomllib.loads(Path(__file__).with_name("calls.toml").read_text())
VALID: dict[str, dict[str, Any]] = {
    function: {
        name: torch.zeros(x) if isinstance(x, list) else x.encode() if isinstance(x, str) else x
        for name, x in fields.items()
    }
    for function, fields in CALLS_OF["valid"].items()
}
VALID["muon"] |= {"piece": piece(), "coefficients": torch.ones(2, 3, dtype=torch.float64)}
VALID["experts"] |= {"indices": torch.tensor([[0, 1]] * 3)}
VALID["experts"] |= dict(zip(("w1", "w2", "w3"), map(steps.matrix, MATRICES), strict=True))
VALID["heads_attention"] |= {name: rows(x) for name, x in HEADS.items()}
VALID["entry_attention"] |= {
    **{"near": key_rows(NEAR, 5)[1], "entries": key_rows(ENTRIES, 7)[1], "chosen": torch.tensor([[[0, 6]] * 2] * 2)},
    "masked": torch.zeros(1, 2, 5, dtype=torch.bool),
}
VALID["compressed_attention"] |= {
    **{"starts": torch.tensor([18, 9]), "counts": torch.tensor([2, 1]), "latest": key_rows(LATEST, 4)[1]},
    **{"entries": block_rows(8), "keys": block_rows(4), "wq_a": matrix(4, 8), "wq_b": matrix(16, 4)},
    **{"wkv": matrix(8, 8), "wo_a": matrix(6, 8), "wo_b": matrix(8, 6), "index_wq": matrix(8, 4)},
    **{"index_weights": matrix(2, 8), "compressor": compressor(8), "key_compressor": compressor(4)},
}
GROUPS = {"ends": ENDS, "groups": 2}
MASK = torch.zeros(1, 4, 4, dtype=torch.uint8)
FREE = {
    "tiles": ("threads", "tile_rows", "tile_columns", "batch_stride", "powers_of_two", "parallel", "groups"),
    "sinkhorn": ("iterations",),
    "streams": ("y", "output"),
}
"""Numbers that may be larger, and what this call does not read."""
WRONG: list[tuple[str, str, list[dict[str, Any]]]] = [
    ("tiles", "beyond", [{"operation": 0, "scales": SPAN.pack(*lent)} for lent in ((0, 16), (X.data_ptr(), 15))]),
    ("tiles", "ends", [GROUPS | {"ends": SPAN.pack(ENDS.data_ptr(), 15)}, GROUPS | {"groups": 1}]),
    ("tiles", "ends", [GROUPS | {"groups": -1}, GROUPS | {"operation": 0}, GROUPS | {"batch": 2}]),
    ("muon", "", [{"piece": piece(count=n)} for n in (4, -1, 2**61)]),
    ("muon", "", [{"piece": piece(rows=n)} for n in (0, 5)] + [{"piece": piece(columns=n)} for n in (7, HUGE)]),
    ("muon", "beyond", [{"piece": piece(**{name: bad})} for name in "pgm" for bad in wrong_spans(STACK)]),
    ("experts", "", [{"indices": torch.tensor([[0, 1], [0, bad], [0, 1]])} for bad in (-1, 2)]),
    ("experts", "", [{"w1": w1(kind)} for kind in (-1, *range(2, 7))]),  # no such type, and codes without scales
    ("heads_attention", "beyond", [{name: rows(x, bad)} for name, x in HEADS.items() for bad in wrong_spans(x)]),
    ("heads_attention", "beyond", [{name: rows(x, further=n)} for name, x in HEADS.items() for n in (-HUGE, 1)]),
    ("heads_attention", "", [{"mask": bad, "mask_batch": 1} for bad in wrong_spans(MASK)[:1]]),
    ("heads_attention", "", [{"mask": MASK, "mask_batch": n} for n in (3, -1, 2)]),
    ("entry_attention", "", [{"chosen": torch.tensor([[[0, bad]] * 2] * 2)} for bad in (-2, 7)]),
    ("entry_attention", "beyond", [{"near": key_rows(ENTRIES, 6)[1]}, {"entries": key_rows(ENTRIES, 6)[1]}]),
    ("entry_attention", "beyond", [{"entries": entries(**{name: n})} for name in KEY_SIZES for n in (-1, HUGE)]),
    ("entry_attention", "beyond", [{"entries": entries(**bad)} for bad in ({"row": 11}, {"type": 4}, {"tile": 0})]),
    ("entry_attention", "beyond", [{"entries": entries(data=bad)} for bad in wrong_spans(ENTRIES.view(-1)[:115])]),
    ("compressed_attention", "beyond", [{"starts": torch.tensor([bad, 9])} for bad in (-1, 19, HUGE)]),
    ("compressed_attention", "beyond", [{"counts": torch.tensor([2, bad])} for bad in (-1, 3, HUGE)]),
    ("compressed_attention", "beyond", [{"latest": key_rows(LATEST, 3)[1]}]),
    ("compressed_attention", "beyond", [{"entries": block_rows(8, raw_places=n)} for n in (0, 8, 10)]),
    ("compressed_attention", "size", [{"entries": block_rows(8, raw_places=n)} for n in (-1, HUGE)]),
    ("compressed_attention", "beyond", [{"keys": block_rows(4, made=key_rows(LATEST, 4)[1])}, {"keys": b""}]),
    ("compressed_attention", "beyond", [{"compressor": compressor(8, wkv=matrix(15, 8))}, {"wo_a": matrix(5, 8)}]),
    ("compressed_attention", "beyond", [{"key_compressor": compressor(4, bias=b"")}, {"index_wq": matrix(8, 3)}]),
    ("compressed_attention", "", [{"compressor": b""}, {"index_weights": matrix(2, 8, type=1)}]),
    ("compressed_attention", "", [{"key_compressor": bad} for bad in (b"", compressor(3))]),
    ("compressed_attention", "", [{"groups": 3}, {"rope": 10}, {"bf16": 2}]),
    ("stream_step", "", [{"iterations": 0, "scale": torch.zeros(1)}]),
    ("streams", "beyond", [{"output": wrong_spans(torch.zeros(5, 7))[0]}]),
    *(
        (function, row["word"], changes)
        for row in CALLS_OF["wrong"]
        for function, changes in row.items()
        if function != "word"
    ),
]


def answer(function: str, changes: dict[str, Any]) -> int:
    """Return the C function's answer for a valid call with some fields changed."""
    fields = {name: span(x) if isinstance(x, Tensor) else x for name, x in (VALID[function] | changes).items()}
    call = CALLS[function].pack(**fields)
    return build.library().entry(function)(call, len(call))


@pytest.mark.usefixtures("library")
def test_wrong_calls_are_refused_before_memory_is_touched() -> None:
    for function, fields in VALID.items():
        assert answer(function, {}) == 0
        for name, x in fields.items():
            for bad in () if name in FREE.get(function, ()) else wrong_values(x):
                assert answer(function, {name: bad}) != 0, (function, name, bad)
    for function, word, wrong in WRONG:
        for changes in wrong:
            error = answer(function, changes)
            assert error and word in ERRORS[error], (function, changes, error)
    assert answer("entry_attention", {"entries": entries()}) == 0
    assert answer("tiles", GROUPS) == answer("heads_attention", {"mask": MASK, "mask_batch": 1, "causal": 0}) == 0


def test_calls_of_another_size_are_refused(library: build.Library) -> None:
    for name, layout in CALLS.items():
        assert ERRORS[library.entry(name)(bytes(layout.size), layout.size - 8)] == "the call is malformed", name


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
    driver = [sys.executable, str(Path(__file__).with_name("sanitized.py")), str(path)]
    run = subprocess.run(driver, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == "all calls ran\n"
    if part != "rounding":
        return
    caught = subprocess.run([*driver, "overflow"], capture_output=True, text=True, env=env)
    assert caught.returncode != 0 and "ERROR: AddressSanitizer" in caught.stderr
