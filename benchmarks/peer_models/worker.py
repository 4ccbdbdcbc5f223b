"""Run a GGUF file by llama.cpp: PYTHON worker.py FILE ROOM AT_ONCE THREADS

It runs in a process of its own, with any Python that has llama-cpp-python, because that brings its own OpenMP. It needs
nothing else. A line of its standard input is a JSON list of tokens to append, empty to empty the cache first. A line of
its standard output is the seconds that this took, by its own clock; the first says that the model is there.
"""

import json
import os
import sys
import time

if __name__ == "__main__":
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    path, room, at_once, threads = sys.argv[1], *map(int, sys.argv[2:])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the library may print
    sizes = {"n_ctx": room, "n_batch": at_once, "n_threads": threads, "n_threads_batch": threads}
    llama = Llama(path, **sizes, use_mmap=False, verbose=False)
    print("ready", file=answers)
    for line in sys.stdin:
        tokens = json.loads(line)
        start = time.perf_counter()
        if tokens:
            llama.eval(tokens)
        else:
            llama.reset()
        print(time.perf_counter() - start, file=answers)
