"""Run a GGUF file by llama.cpp or ik_llama.cpp: PYTHON worker.py PACKAGE FILE ROOM AT_ONCE THREADS

It runs in a process of its own, with any Python that has the package, because each brings its own OpenMP. It needs
nothing else. A line of its standard input is a JSON list of tokens to append, empty to empty the cache first. A line of
its standard output is the seconds that this took, by its own clock; the first says that the model is there.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Feed = Callable[[Sequence[int]], None]


def llama_cpp(path: str, room: int, at_once: int, threads: int) -> tuple[Feed, Callable[[], None]]:
    """Return functions that append tokens and that empty the cache, of llama.cpp."""
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    sizes: dict[str, Any] = {"n_ctx": room, "n_batch": at_once, "n_threads": threads, "n_threads_batch": threads}
    llama = Llama(path, **sizes, use_mmap=False, verbose=False)
    return llama.eval, llama.reset


def ik_llama_cpp(path: str, room: int, at_once: int, threads: int) -> tuple[Feed, Callable[[], None]]:
    """Return functions that append tokens and that empty the cache, of ik_llama.cpp with the settings fastest for MLA.

    They are MLA in its third form (mla 3), flash attention, weights repacked as they are loaded, and fused experts.
    """
    from ik_llama_cpp import _ctypes_api as api  # pyright: ignore[reportMissingImports]
    from ik_llama_cpp._internals import make_batch_range  # pyright: ignore[reportMissingImports]

    loading = api.llama_model_default_params()
    loading.mla, loading.repack_tensors, loading.use_mmap = 3, True, False
    model = api.llama_model_load_from_file(path.encode(), loading)
    how = api.llama_context_default_params()
    how.n_ctx, how.n_batch, how.n_ubatch, how.n_threads, how.n_threads_batch = room, at_once, at_once, threads, threads
    how.mla_attn, how.flash_attn, how.fused_moe_up_gate = 3, True, True
    context = model and api.llama_init_from_model(model, how)
    if not context:
        raise RuntimeError("ik_llama.cpp cannot load the model")
    held = 0

    def feed(tokens: Sequence[int]) -> None:
        nonlocal held
        for i in range(0, len(tokens), at_once):
            part = list(tokens[i : i + at_once])
            batch = make_batch_range(part, pos_start=held, logits_last=True)
            status = api.llama_decode(context, batch)
            api.llama_get_logits_ith(context, len(part) - 1)  # waits for the result
            api.llama_batch_free(batch)
            if status:
                raise RuntimeError(f"ik_llama.cpp cannot append {len(part)} tokens at {held}: status {status}")
            held += len(part)

    def reset() -> None:
        nonlocal held
        api.llama_kv_cache_clear(context)
        held = 0

    return feed, reset


def main() -> None:
    package, path, *sizes = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the libraries may print
    feed, reset = {"llama_cpp": llama_cpp, "ik_llama_cpp": ik_llama_cpp}[package](path, *map(int, sizes))
    print("ready", file=answers)
    for line in sys.stdin:
        tokens = json.loads(line)
        start = time.perf_counter()
        if tokens:
            feed(tokens)
        else:
            reset()
        print(time.perf_counter() - start, file=answers)


if __name__ == "__main__":
    main()
