"""Try a compiled library in a process of its own: python trial.py LIBRARY STRUCT

A compiler may have been told to write for another CPU. The first such instruction ends a process, so it is this one.
Every operation runs on every instruction set, with all types, formats and kinds of tiles. Imports neither torch nor
this package: it takes a few hundredths of a second.
"""

import ctypes
import itertools
import sys
from struct import Struct

ROWS, COLUMNS = 3, 130
QUANTIZE, DEQUANTIZE, QUANTIZE_DEQUANTIZE = range(3)
SIZES = (4, 2, 2)
PACKED = 2
TILES = ((1, 128), (128, 1), (3, 5))
VALUES = [(-1.0) ** i * 2.0 ** (i % 5 - 3) for i in range(ROWS * COLUMNS)]
"""Numbers that all formats hold."""


def main(path: str, layout: str) -> None:
    library, struct = ctypes.CDLL(path), Struct(layout)
    library.dsmini_isa.argtypes, library.dsmini_isa.restype = [ctypes.c_int64], ctypes.c_int64
    library.dsmini_tiles.argtypes, library.dsmini_tiles.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int64
    x, scales = (ctypes.c_float * len(VALUES))(*VALUES), (ctypes.c_float * len(VALUES))(*[1.0] * len(VALUES))
    out = (ctypes.c_float * len(VALUES))()
    isas = [isa for isa in (1, 2, 3) if library.dsmini_isa(isa)]
    every = itertools.product(isas, range(3), range(3), range(2), range(3), range(3), TILES)
    for isa, operation, format, powers, in_type, out_type, tile in every:
        tiles = -(-ROWS // tile[0]) * -(-COLUMNS // tile[1])
        codes = COLUMNS if format != PACKED else -(-COLUMNS // 8) * 12
        in_row = codes if operation == DEQUANTIZE else COLUMNS
        out_bytes = ROWS * codes if operation == QUANTIZE else ROWS * COLUMNS * SIZES[out_type]
        scales_at = (0, 0) if operation == QUANTIZE_DEQUANTIZE else (ctypes.addressof(scales), 4 * tiles)
        call = (operation, isa, 1, in_type, out_type, format, powers, 1, ROWS, COLUMNS, *tile)
        pointers = (ctypes.addressof(x), ctypes.sizeof(x), 0, in_row, ctypes.addressof(out), out_bytes, *scales_at)
        error = library.dsmini_tiles(struct.pack(*call, *pointers, 0, 0, 0, 1e-4, 0), struct.size)
        if error:
            sys.exit(f"a call ended with error {error}")
        if operation == QUANTIZE_DEQUANTIZE and in_type == out_type == 0:
            check(list(out))


def check(values: list[float]) -> None:
    if any(abs(got - want) > 1e-6 for got, want in zip(values, VALUES, strict=True)):
        sys.exit("it computes wrong values")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (OSError, AttributeError) as error:
        sys.exit(f"it cannot be loaded: {error}")
