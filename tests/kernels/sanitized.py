"""Drive the sanitizer build of the CPU kernels with buffers of exact sizes, for tests/kernels/test_cpu_bounds.py.

    python sanitized.py LIBRARY [overflow]

It does not import torch, which takes long under a sanitizer. All functions run in the calls of trial.h. With `overflow`
one more call gets a size beyond its buffer.
"""

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels/dsmini_kernels/cpu"))
import trial
from structs import CALLS, LAYOUTS

COLUMNS = 1024


def run_beyond_memory(library: ctypes.CDLL) -> None:
    """Round a row of COLUMNS numbers, of which the memory holds 16."""
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    x, out = (LAYOUTS["Span"].pack(data=libc.malloc(64), bytes=4 * COLUMNS) for _ in range(2))
    call = CALLS["tiles"].pack(
        **{"operation": 2, "threads": 1, "in_type": 0, "out_type": 0, "format": 0, "powers_of_two": 0},
        **{"batch": 1, "rows": 1, "columns": COLUMNS, "tile_rows": 1, "tile_columns": 128, "x": x, "out": out},
        **{"batch_stride": 0, "row_stride": COLUMNS, "scales": b"", "ends": b"", "groups": 0},
        **{"amax_min": 1e-4, "parallel": 0},
    )
    library.dsmini_tiles.argtypes, library.dsmini_tiles.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int64
    library.dsmini_tiles(call, len(call))


if __name__ == "__main__":
    trial.main(sys.argv[1])
    if "overflow" in sys.argv:
        run_beyond_memory(ctypes.CDLL(sys.argv[1]))
    print("all calls ran")
