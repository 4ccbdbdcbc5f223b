"""Drive the sanitizer build of the CPU kernels with buffers of exact sizes, for tests/kernels/test_cpu_bounds.py.

    python sanitized.py LIBRARY [overflow]

It does not import torch, which takes long under a sanitizer. With `overflow` one call gets a size beyond its buffer.
All functions run in the calls of trial.h; those of tiles also on shapes drawn at random.
"""

import ctypes
import itertools
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels/dsmini_kernels/cpu"))
import trial
from structs import CALLS, LAYOUTS

QUANTIZE, DEQUANTIZE, BOTH = range(3)
SIZES, PACKED = (4, 2, 2), 2
"""Bytes of a number in FP32, BF16 and FP16; the format whose codes are packed."""


def up(a: int, b: int) -> int:
    return -(-a // b)


def memory(address: int, nbytes: int) -> bytes:
    return LAYOUTS["Span"].pack(data=address, bytes=nbytes)


def main(path: str, overflow: bool) -> None:
    trial.main(path)
    library = ctypes.CDLL(path)
    if hasattr(library, "dsmini_tiles"):
        libc = ctypes.CDLL(None)
        libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
        libc.free.argtypes = [ctypes.c_void_p]
        try_tiles(library, libc, overflow)
    print("all calls ran")


def try_tiles(library: ctypes.CDLL, libc: ctypes.CDLL, overflow: bool) -> None:
    """Run operations of tiles on shapes drawn at random."""
    library.dsmini_tiles.argtypes, library.dsmini_tiles.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int64
    choose = random.Random(0)
    shapes = [(1, 1), (1, 63), (2, 130), (127, 9), (129, 576), (5, 2100), (300, 17), (0, 5), (5, 0)]
    tiles = [(1, 128), (128, 1), (128, 128), (3, 5), (1, 1), (2, 16), (9999, 9999), (1, 100)]
    for operation, format, powers, tile in itertools.product(range(3), range(3), range(2), tiles):
        large = [(2100, 2051)] if operation == BOTH and format == powers == 0 and 128 in tile else []  # past the cache
        for r, c in choose.sample(shapes, 4) + large:
            kind, out_kind, batch = choose.randrange(3), choose.randrange(3), choose.choice((1, 1, 3))
            if (r, c) in large:
                out_kind, batch = 0, 1
            code_row = up(c, 8) * 12 if format == PACKED else c
            in_row = code_row if operation == DEQUANTIZE else c * SIZES[kind]
            element = 1 if operation == DEQUANTIZE else SIZES[kind]
            gap = choose.choice((0, 0, 3)) * element  # between rows, not after the last
            in_bytes = max(0, (batch * r - 1) * (in_row + gap) + in_row) if batch * r else 0
            out_bytes = batch * r * (code_row if operation == QUANTIZE else c * SIZES[out_kind])
            scale_bytes = 0 if operation == BOTH else batch * up(r, tile[0]) * up(c, tile[1]) * 4
            ends = np.array([*sorted(choose.choices(range(r + 1), k=3)), r], dtype=np.int64)
            grouped = operation == BOTH and batch == 1 and choose.random() < 0.5
            sizes = (in_bytes, out_bytes, scale_bytes, ends.nbytes)
            buffers = [libc.malloc(max(1, size)) for size in sizes]
            noise = np.frombuffer(choose.randbytes(in_bytes), dtype=np.uint8)
            ctypes.memmove(buffers[0], noise.ctypes.data, in_bytes)
            ctypes.memset(buffers[2], 0x3F, scale_bytes)
            ctypes.memmove(buffers[3], ends.ctypes.data, ends.nbytes)
            told = 4096 if overflow else 0
            columns = c + 64 if overflow else c
            given = (buffers[3], ends.nbytes, len(ends)) if grouped else (0, 0, 0)
            call = CALLS["tiles"].pack(
                **{"operation": operation, "threads": 1, "in_type": kind, "out_type": out_kind},
                **{"format": format, "powers_of_two": powers, "batch": batch, "rows": r, "columns": columns},
                **{"tile_rows": tile[0], "tile_columns": tile[1], "amax_min": 1e-4, "parallel": 0},
                **{"x": memory(buffers[0], in_bytes + told * r), "row_stride": (in_row + gap) // element},
                **{"batch_stride": r * (in_row + gap) // element, "ends": memory(*given[:2]), "groups": given[2]},
                **{"out": memory(buffers[1], out_bytes + told * r)},
                **{"scales": memory(buffers[2], scale_bytes + told * r)},
            )
            error = library.dsmini_tiles(call, len(call))
            assert error == 0, (error, operation, format, tile, r, c)
            for buffer in buffers:
                libc.free(buffer)


if __name__ == "__main__":
    main(sys.argv[1], "overflow" in sys.argv)
