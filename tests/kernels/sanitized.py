"""Drive the sanitizer build of the CPU kernels with buffers of exact sizes, for tests/kernels/test_cpu_bounds.py.

    python sanitized.py LIBRARY ENTRY=LAYOUT ... [overflow]

It does not import torch, which takes long under a sanitizer. With `overflow` one call gets a size beyond its buffer.
"""

import ctypes
import itertools
import random
import sys
from pathlib import Path
from struct import Struct

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels/dsmini_kernels/cpu"))
import trial
from trial import DEQUANTIZE, PACKED, QUANTIZE, SIZES
from trial import QUANTIZE_DEQUANTIZE as BOTH


def up(a: int, b: int) -> int:
    return -(-a // b)


def main(path: str, layouts: list[str], overflow: bool) -> None:
    library, structs = ctypes.CDLL(path), trial.structs_of(layouts)
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    count = try_tiles(library, libc, structs["tiles"], overflow) if "tiles" in structs else 0
    print(f"{count + steps(library, libc, structs)} calls")


def try_tiles(library: ctypes.CDLL, libc: ctypes.CDLL, call: Struct, overflow: bool) -> int:
    """Run operations of tiles on shapes drawn at random; return the number of calls."""
    library.dsmini_tiles.argtypes, library.dsmini_tiles.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int64
    choose = random.Random(0)
    shapes = [(1, 1), (1, 63), (2, 130), (127, 9), (129, 576), (5, 2100), (300, 17), (0, 5), (5, 0)]
    tiles = [(1, 128), (128, 1), (128, 128), (3, 5), (1, 1), (2, 16), (9999, 9999), (1, 100)]
    count = 0
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
            error = library.dsmini_tiles(
                call.pack(
                    *(operation, 1, kind, out_kind, format, powers, batch, r, columns, *tile),
                    *(buffers[0], in_bytes + told * r, r * (in_row + gap) // element, (in_row + gap) // element),
                    *(buffers[1], out_bytes + told * r, buffers[2], scale_bytes + told * r),
                    *((buffers[3], ends.nbytes, len(ends)) if grouped else (0, 0, 0)),
                    *(1e-4, 0),
                ),
                call.size,
            )
            assert error == 0, (error, operation, format, tile, r, c)
            for buffer in buffers:
                libc.free(buffer)
            count += 1
    return count


def steps(library: ctypes.CDLL, libc: ctypes.CDLL, structs: dict[str, Struct]) -> int:
    """Run the calls of trial.py in buffers of exact sizes; return their number."""
    count, buffers = 0, []

    def memory(size: int) -> int:
        buffers.append(libc.malloc(size))
        ctypes.memset(buffers[-1], 0, size)
        return buffers[-1]

    for name, fields in trial.step_calls(memory):
        if name not in structs:
            continue
        struct = structs[name]
        entry = getattr(library, f"dsmini_{name}")
        entry.argtypes, entry.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int64
        assert entry(struct.pack(*fields), struct.size) == 0, (name, fields)
        while buffers:
            libc.free(buffers.pop())
        count += 1
    return count


if __name__ == "__main__":
    main(sys.argv[1], [word for word in sys.argv[2:] if word != "overflow"], "overflow" in sys.argv)
