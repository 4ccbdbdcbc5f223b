"""Try a compiled library in a process of its own: python trial.py LIBRARY

A compiler may have been told to write for another CPU. The first such instruction ends a process, so it is this one.
The calls are in C++ (trial.h). Imports neither torch nor this package: it takes a few hundredths of a second.
"""

import ctypes
import sys


def main(path: str) -> None:
    try:
        attempt = ctypes.CDLL(path).dsmini_try
    except (OSError, AttributeError) as error:
        sys.exit(f"it cannot be loaded: {error}")
    attempt.restype = ctypes.c_char_p
    if failed := attempt():
        sys.exit(f"a call failed: {failed.decode()}")


if __name__ == "__main__":
    main(sys.argv[1])
