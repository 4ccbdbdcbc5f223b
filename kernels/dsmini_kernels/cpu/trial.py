"""Try a compiled library in a process of its own: python trial.py LIBRARY ENTRY=LAYOUT ...

A compiler may have been told to write for another CPU. The first such instruction ends a process, so it is this one.
Every operation runs with all types, formats and kinds of tiles. Imports neither torch nor
this package: it takes a few hundredths of a second.
"""

import ctypes
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from struct import Struct
from typing import Any

ROWS, COLUMNS = 3, 130
QUANTIZE, DEQUANTIZE, QUANTIZE_DEQUANTIZE = range(3)
SIZES = (4, 2, 2)
PACKED = 2
TILES = ((1, 128), (128, 1), (3, 5))
VALUES = [(-1.0) ** i * 2.0 ** (i % 5 - 3) for i in range(ROWS * COLUMNS)]
"""Numbers that all formats hold."""
WEIGHT_SIZES = (4, 2, 1, 1)
WEIGHTS = range(len(WEIGHT_SIZES))
"""Bytes of a number in FP32, BF16 and E4M3."""
BLOCKS = ("attention", "grouped", "feed_forward")
"""Entries that `dsmini_blocks` calls, in the order of their numbers."""
Memory = Callable[[int], int]
"""Returns the address of this many bytes, all zero."""


def main(path: str, *layouts: str) -> None:
    library = ctypes.CDLL(path)
    structs = structs_of(layouts)
    for name in (*structs, *(["blocks"] if BLOCKS[0] in structs else [])):
        entry = getattr(library, f"dsmini_{name}")
        entry.argtypes, entry.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int64
    if "tiles" in structs:
        try_tiles(library, structs["tiles"])
    kept: list[Any] = []

    def memory(size: int) -> int:
        kept.append(ctypes.create_string_buffer(size + 1))
        return ctypes.addressof(kept[-1])

    for name, call in step_calls(memory):
        if name not in structs:
            continue
        packed = structs[name].pack(*call)
        error = getattr(library, f"dsmini_{name}")(packed, len(packed))
        if name in BLOCKS:
            twice = 2 * (Struct("=2q").pack(BLOCKS.index(name), len(packed)) + packed)
            error = error or library.dsmini_blocks(twice, len(twice))
        if error:
            sys.exit(f"a call of {name} ended with error {error}")


def structs_of(layouts: Iterable[str]) -> dict[str, Struct]:
    """Return the struct of each entry, from arguments such as linear=15q."""
    return {name: Struct(f"={layout}") for name, _, layout in (given.partition("=") for given in layouts)}


def try_tiles(library: ctypes.CDLL, struct: Struct) -> None:
    x, scales = (ctypes.c_float * len(VALUES))(*VALUES), (ctypes.c_float * len(VALUES))(*[1.0] * len(VALUES))
    out = (ctypes.c_float * len(VALUES))()
    every = itertools.product(range(3), range(3), range(2), range(3), range(3), TILES)
    for operation, format, powers, in_type, out_type, tile in every:
        tiles = -(-ROWS // tile[0]) * -(-COLUMNS // tile[1])
        codes = COLUMNS if format != PACKED else -(-COLUMNS // 8) * 12
        in_row = codes if operation == DEQUANTIZE else COLUMNS
        out_bytes = ROWS * codes if operation == QUANTIZE else ROWS * COLUMNS * SIZES[out_type]
        scales_at = (0, 0) if operation == QUANTIZE_DEQUANTIZE else (ctypes.addressof(scales), 4 * tiles)
        call = (operation, 1, in_type, out_type, format, powers, 1, ROWS, COLUMNS, *tile)
        pointers = (ctypes.addressof(x), ctypes.sizeof(x), 0, in_row, ctypes.addressof(out), out_bytes, *scales_at)
        error = library.dsmini_tiles(struct.pack(*call, *pointers, 0, 0, 0, 1e-4, 0), struct.size)
        if error:
            sys.exit(f"a call ended with error {error}")
        if operation == QUANTIZE_DEQUANTIZE and in_type == out_type == 0:
            check(list(out))


def check(values: list[float]) -> None:
    if any(abs(got - want) > 1e-6 for got, want in zip(values, VALUES, strict=True)):
        sys.exit("it computes wrong values")


def step_calls(memory: Memory) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Yield calls of products and decoding steps with sizes that no vector divides: entry, and fields of its struct."""
    for weight, n in itertools.product(WEIGHTS, (1, 2, 7)):
        for bf16, rows in itertools.product(range(2), (n, 40 * n)):
            yield "linear", linear_call(memory, rows, 37, 131, weight, bf16)
        for inputs in (1, 2):
            yield "norms", norms_call(memory, n, 131, inputs)
        for experts in (0, 6):
            yield "feed_forward", feed_forward_call(memory, n, weight, experts)
    for weight, cache, (b, s), q_rank in itertools.product(WEIGHTS, range(3), ((1, 1), (2, 3)), (0, 19)):
        for topk in (0, 50, 150):
            yield "attention", attention_call(memory, b, s, weight, cache, q_rank, topk)
    for weight, cache, (b, s), group in itertools.product(WEIGHTS, range(2), ((1, 1), (2, 3)), (1, 3)):
        yield "grouped", grouped_call(memory, b, s, weight, cache, group)
    for weight, bf16, n in itertools.product(WEIGHTS, range(2), (1, 40)):
        yield "experts", experts_call(memory, n, weight, bf16)
    for bf16, backward in itertools.product(range(2), range(2)):
        yield "trained_experts", trained_experts_call(memory, bf16, backward)
    for bf16, backward, hidden in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)):
        yield "heads_attention", heads_attention_call(memory, bf16, backward, hidden)
    for bf16, backward in itertools.product(range(2), range(2)):
        yield "trained_norm", trained_norm_call(memory, bf16, backward)
    for bf16, (b, s), topk in itertools.product(range(2), ((1, 1), (2, 11)), (7, 150)):
        yield "topk_keys", topk_keys_call(memory, b, s, bf16, topk)
    for bf16, (b, s), (heads, latent) in itertools.product(range(2), ((1, 1), (2, 3)), ((3, 37), (19, 64), (130, 32))):
        yield "topk_attention", topk_attention_call(memory, b, s, bf16, heads, latent)
    for bf16, rational in itertools.product(range(2), range(2)):
        yield "muon", muon_call(memory, bf16, rational)


def linear_call(memory: Memory, n: int, o: int, i: int, weight: int, bf16: int) -> tuple[float, ...]:
    size = 2 if bf16 else 4
    x, y = _spans(memory, n * i * size, n * o * size)
    return (1, n, bf16, *x, *y, *_matrix(memory, o, i, weight))


def norms_call(memory: Memory, n: int, dim: int, inputs: int) -> tuple[float, ...]:
    size, two = n * dim * 4, inputs - 1
    x, z, norm, z_norm, y = _spans(memory, size, two * size, dim * 4, two * dim * 4, inputs * size)
    return (1, n, dim, x[0], z[0], x[1], z[1], norm[0], z_norm[0], norm[1], z_norm[1], *y, 1e-6, 1e-6)


def attention_call(
    memory: Memory, b: int, s: int, weight: int, cache: int, q_rank: int, topk: int
) -> tuple[float, ...]:
    dim, heads, nope, rope, latent, value, room = 45, 3, 21, 6, 133, 13, 150
    row = ((latent + rope) * 4, (latent + rope) * 2, latent + 8 + 2 * rope)[cache]
    angles = s * rope // 2 * 4
    x, y, norm, q_norm, kv_norm, cos, sin, rows, starts = _spans(
        memory, *[b * s * dim * 4] * 2, dim * 4, q_rank * 4, latent * 4, angles, angles, b * room * row, b * 8
    )
    ctypes.memmove(starts[0], Struct(f"={b}q").pack(*(room - s - 40 * i for i in range(b))), 8 * b)
    wq_a = _matrix(memory, q_rank, dim, weight) if q_rank else (0,) * 8
    shapes = ((heads * (nope + rope), q_rank or dim), (latent + rope, dim), (heads * (nope + value), latent))
    matrices = [number for shape in (*shapes, (dim, heads * value)) for number in _matrix(memory, *shape, weight)]
    return (
        *(1, b, s, dim, heads, nope, rope, latent, value, q_rank, *x, *y),
        *(norm[0], q_norm[0], kv_norm[0], norm[1], q_norm[1], kv_norm[1], cos[0], sin[0], angles, 1),
        *(*rows, cache, row, room, *starts, *wq_a, *matrices),
        *(indexer(memory, b * room, dim, q_rank or dim, weight, cache % 2, topk) if topk else (0,) * 36),
        *(0.1, 1e-6, 1e-6, 1e-6, 1e-6),
    )


def indexer(memory: Memory, rows: int, dim: int, q_in: int, weight: int, cache: int, topk: int) -> tuple[int, ...]:
    """Return the fields of an indexer, whose cache has the places of the attention's."""
    heads, width = 3, 16
    norm, bias, keys = _spans(memory, width * 4, width * 4, rows * width * (4, 2)[cache])
    shapes = ((heads * width, q_in, weight), (width, dim, weight), (heads, dim, 0))
    matrices = [number for shape in shapes for number in _matrix(memory, *shape)]
    sizes = (heads, width, topk, cache, norm[0], bias[0], norm[1], bias[1])
    return (*sizes, *keys, cache, width * (4, 2)[cache], *matrices)


def grouped_call(memory: Memory, b: int, s: int, weight: int, cache: int, group: int) -> tuple[float, ...]:
    dim, key_heads, width, value, room = 45, 2, 22, 13, 150
    row, angles = key_heads * (width + value) * (4, 2)[cache], s * width // 2 * 4
    x, y, norm, cos, sin, rows, starts = _spans(
        memory, *[b * s * dim * 4] * 2, dim * 4, angles, angles, b * room * row, b * 8
    )
    ctypes.memmove(starts[0], Struct(f"={b}q").pack(*(room - s - 40 * i for i in range(b))), 8 * b)
    heads = key_heads * group
    shapes = ((heads * width, dim), (key_heads * width, dim), (key_heads * value, dim), (dim, heads * value))
    matrices = [number for shape in shapes for number in _matrix(memory, *shape, weight)]
    return (
        *(1, b, s, dim, key_heads, group, width, value, *x, *y, *norm, cos[0], sin[0], angles, 1),
        *(*rows, cache, row, room, *starts, *matrices, 0.1, 1e-6),
    )


def feed_forward_call(memory: Memory, n: int, weight: int, experts: int) -> tuple[float, ...]:
    dim, inter, f, k = 45, 0 if experts and n == 2 else 131, 19 if experts else 0, 3 if experts else 0
    x, y, norm, gate, bias, indices, weights, scores, counts = _spans(
        *(memory, n * dim * 4, n * dim * 4, dim * 4, experts * dim * 4, experts * 4),
        *(n * k * 8, n * k * 4, n * experts * 4, experts * 8),
    )
    dense = [(inter, dim, 1), (dim, inter, 1), (inter, dim, 1)]
    stacks = [(f, dim, experts), (dim, f, experts), (f, dim, experts)]
    there = [shape if shape[0] and shape[1] else None for shape in (*dense, *stacks)]
    matrices = [
        i for shape in there for i in ((0,) * 8 if shape is None else _matrix(memory, *shape[:2], weight, shape[2]))
    ]
    out = (indices, weights, scores, counts)
    return (
        *(1, n, dim, inter, experts, f, k, 2, 2, n % 2, 1, *x, *y),
        *(norm[0], gate[0], bias[0], norm[1], gate[1], bias[1], *(a for a, _ in out), *(size for _, size in out)),
        *(*matrices, 1e-6, 1.0),
    )


def experts_call(memory: Memory, n: int, weight: int, bf16: int) -> tuple[float, ...]:
    dim, inter, experts, k, size = 45, 37, 3, 2, (4, 2)[bf16]
    x, y, indices, weights = _spans(memory, n * dim * size, n * dim * size, n * k * 8, n * k * 4)
    _choose(indices[0], n * k, experts)
    shapes = ((inter, dim), (dim, inter), (inter, dim))
    matrices = [number for shape in shapes for number in _matrix(memory, *shape, weight, experts)]
    return (1, n, dim, inter, experts, k, bf16, *x, *y, *indices, *weights, *matrices)


def trained_experts_call(memory: Memory, bf16: int, backward: int) -> tuple[float, ...]:
    n, dim, inter, experts, k, size = 143, 45, 37, 4, 2, (4, 2)[bf16]
    rows, kept, grads = n * dim * size, n * k * inter * size, experts * inter * dim * 4
    x, y, dy, indices, weights = _spans(memory, rows, rows, rows, n * k * 8, n * k * 4)
    _choose(indices[0], n * k, experts)
    pair = zip(*_spans(memory, kept, kept), strict=True)
    (dx,), four = _spans(memory, rows), zip(*_spans(memory, n * k * 4, grads, grads, grads), strict=True)
    shapes = ((inter, dim), (dim, inter), (inter, dim))
    matrices = [number for shape in shapes for number in _matrix(memory, *shape, 0, experts)]
    parts = (*x, *y, *dy, *indices, *weights, *itertools.chain(*pair), *dx, *itertools.chain(*four))
    return (1, n, dim, inter, experts, k, bf16, backward, *parts, *matrices)


def heads_attention_call(memory: Memory, bf16: int, backward: int, hidden: int) -> tuple[float, ...]:
    b, h, s, t, d, v, size = 2, 2, 131, 150, 37, 21, (4, 2)[bf16]

    def heads(rows: int, width: int, wanted: int = 1) -> tuple[int, ...]:
        (span,) = _spans(memory, wanted * b * h * rows * width * size)
        return (*span, *(strides * wanted * width * size for strides in (h * rows, 1, h)))

    every = (heads(s, d), heads(t, d), heads(t, v), heads(s, v))
    gradients = (heads(s, v, backward), heads(s, d, backward), heads(t, d, backward), heads(t, v, backward))
    lse, mask = _spans(memory, b * h * s * 4, hidden * s * t)
    sizes = (1, b, h, h, s, t, d, v, bf16, backward, 1 - hidden)
    return (*sizes, *(number for one in (*every, *gradients) for number in one), *lse, *mask, hidden, 0.1)


def trained_norm_call(memory: Memory, bf16: int, backward: int) -> tuple[float, ...]:
    n, dim, size = 35, 37, (4, 2)[bf16]
    rows, apart = n * dim * size, dim * size + 6
    sizes = (n * apart - 6, dim * 4, n * 4, rows, backward * rows, backward * dim * 4)
    x, *others = _spans(memory, *sizes)
    return (1, n, dim, bf16, backward, *x, apart, *itertools.chain(*others), 1e-6)


def topk_keys_call(memory: Memory, b: int, s: int, bf16: int, topk: int) -> tuple[float, ...]:
    heads, width, t, size = 5, 18, 150, (4, 2)[bf16]
    q, k, weights, hidden, picks = _spans(
        *(memory, b * s * heads * width * size, b * t * width * size, b * s * heads * 4, s * t, b * s * topk * 8)
    )
    return (1, b, s, t, heads, width, topk, bf16, *q, *k, t * width * size, *weights, *hidden, 1, *picks)


def topk_attention_call(memory: Memory, b: int, s: int, bf16: int, heads: int, latent: int) -> tuple[float, ...]:
    width, t, k, size = latent + 6, 150, 71, (4, 2)[bf16]
    queries, row = b * s * heads * size, width * size
    q, rows, picks, out = _spans(memory, queries * width, b * t * row, b * s * k * 8, queries * latent)
    chosen = [-1 if i % 9 == 4 else (2 * i + i // k) % t for i in range(b * s * k)]
    ctypes.memmove(picks[0], Struct(f"={len(chosen)}q").pack(*chosen), picks[1])
    return (1, b, s, t, heads, width, latent, k, bf16, *q, *rows, t * row, *picks, *out, 0.1)


def muon_call(memory: Memory, bf16: int, rational: int) -> tuple[float, ...]:
    pieces = b""
    for count, rows, columns in ((3, 37, 70), (1, 70, 37), (2, 1, 1)):
        spans = _spans(memory, *[count * rows * columns * 4] * 3)
        for at, _ in spans:
            ctypes.memset(at + 1, 0x3D, 2)  # not all are zero
        pieces += Struct("=10q").pack(*(i for pair in spans for i in pair), count, rows, columns, count > 1)
    table, coefficients = _spans(memory, len(pieces), 2 * 24)
    ctypes.memmove(table[0], pieces, len(pieces))
    ctypes.memmove(coefficients[0], Struct("=6d").pack(*[1.5, -0.5, 0.0] * 2), 48)
    return (1, bf16, rational, 3, 2, *table, *coefficients, 0.1, 0.9, 0.1)


def _choose(at: int, visits: int, experts: int) -> None:
    """Let most token-expert pairs have the first expert, an odd number the last, and none the one before."""
    chosen = [experts - 1 if i % 7 == 3 else i % 3 % (experts - 2) for i in range(visits)]
    ctypes.memmove(at, Struct(f"={visits}q").pack(*chosen), 8 * visits)


def _matrix(memory: Memory, rows: int, columns: int, weight: int, count: int = 1) -> tuple[int, ...]:
    stride = columns * WEIGHT_SIZES[weight]
    scales = count * -(-rows // 128) * -(-columns // 128) * 4 if weight >= 2 else 0
    data, scales_at = _spans(memory, count * rows * stride, scales)
    return (*data, weight, count * rows, columns, stride, *scales_at)


def _spans(memory: Memory, *sizes: int) -> list[tuple[int, int]]:
    return [(memory(size), size) if size else (0, 0) for size in sizes]


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (OSError, AttributeError) as error:
        sys.exit(f"it cannot be loaded: {error}")
