"""Triton programs on tiles, launched by tiles.py. Rounding is integer arithmetic and one addition."""

import triton
import triton.language as tl


@triton.jit
def quantize_program(
    x,
    out,
    scales,
    ends,
    r,
    c,
    rt,
    ct,
    groups,
    floor,
    UE8M0: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    MAX: tl.constexpr,
    NAN: tl.constexpr,
    BF16: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Quantize TILES neighbors in one row of tiles: a block [TALL, TILES, WIDE] of contiguous x [batch * r, c].

    floor is the bits of amax_min; TALL, WIDE and GROUPS are HEIGHT, WIDTH and groups rounded up to powers of two.
    """
    programs_a_row = (ct + TILES - 1) // TILES
    tile_row = tl.program_id(0) // programs_a_row
    if GROUPS == 0:
        before, within = (tile_row // rt).to(tl.int64) * r, tile_row % rt * HEIGHT
        first, end = before + within, before + tl.minimum(within + HEIGHT, r)
    else:
        first, end = _rows_of_group(ends, groups, tile_row, HEIGHT, GROUPS)
    rows = first + tl.arange(0, TALL)
    tile = (tl.program_id(0) % programs_a_row).to(tl.int64) * TILES + tl.arange(0, TILES)
    inside = tl.arange(0, WIDE)
    columns = tile[:, None] * WIDTH + inside[None, :]
    there = (rows < end)[:, None, None] & ((columns < c) & (inside < WIDTH)[None, :])[None, :, :]
    at = rows[:, None, None] * c + columns[None, :, :]

    values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    scale = _scale_of(values, floor, MAX, UE8M0)
    y = tl.div_rn(values, scale[None, :, None])
    sign = y.to(tl.int32, bitcast=True) & -0x80000000
    magnitude = tl.abs(y)
    magnitude = tl.where(magnitude < MAX, magnitude, MAX)
    exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) >> 23, 128 - BIAS)
    magic = ((exponent + (23 - MANTISSA)) << 23).to(tl.float32, bitcast=True)
    total = magnitude + magic
    if scales is not None:
        steps = total.to(tl.int32, bitcast=True) - magic.to(tl.int32, bitcast=True)
        code = ((exponent - (128 - BIAS)) << MANTISSA) + steps
        code = tl.where(y == y, tl.where(sign < 0, code + (NAN + 1), code), NAN)
        tl.store(out + at, code.to(out.dtype.element_ty), mask=there)
        tl.store(scales + tile_row.to(tl.int64) * ct + tile, scale, mask=tile < ct)
    else:
        rounded = ((total - magic).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        _store(out + at, tl.where(y == y, rounded, y) * scale[None, :, None], there, BF16)


@triton.jit
def _scale_of(values, floor, MAX: tl.constexpr, UE8M0: tl.constexpr):
    """Return the FP32 scale of each tile of values [TALL, TILES, WIDE]; NaN where a value is not finite."""
    amax = tl.max(tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2), axis=0)
    floored = tl.maximum(amax, floor).to(tl.float32, bitcast=True)
    scale = tl.div_rn(floored, MAX).to(tl.int32, bitcast=True)
    if UE8M0:
        scale = (scale + 0x7FFFFF) & 0x7F800000
    finite = amax < 0x7F800000  # pyright: ignore[reportOperatorIssue] - tl.max is typed as a pair
    return tl.where(finite, scale, 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def _rows_of_group(ends, groups, tile_row, HEIGHT: tl.constexpr, GROUPS: tl.constexpr):
    """Return the first row of a row of tiles and the row after its last, if each group begins a new tile.

    After the last group's tiles both are 0.
    """
    group = tl.arange(0, GROUPS)
    end = tl.load(ends + group, mask=group < groups, other=0).to(tl.int64)
    start = tl.load(ends + group - 1, mask=(group > 0) & (group < groups), other=0).to(tl.int64)
    tiles = (end - start + HEIGHT - 1) // HEIGHT
    passed = tile_row - (tl.cumsum(tiles, axis=0) - tiles)
    mine = (passed >= 0) & (passed < tiles)
    first = tl.sum(tl.where(mine, start + passed * HEIGHT, 0), axis=0)
    return first, tl.minimum(first + HEIGHT, tl.sum(tl.where(mine, end, 0), axis=0))


@triton.jit
def dequantize_program(
    codes,
    scales,
    out,
    rows,
    r,
    c,
    width,
    rt,
    ct,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    STEP: tl.constexpr,
    ABOVE: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    PACKED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BF16: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Decode a block [ROWS, COLUMNS] of values [rows, c] from codes [rows, width] of bytes. rows is batch * r."""
    blocks_a_row = (c + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) // blocks_a_row * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks_a_row * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < c)[None, :]
    tile_row = (row // r * rt + row % r // HEIGHT).to(tl.int64)
    scale = tl.load(scales + tile_row[:, None] * ct + (column // WIDTH)[None, :], mask=there, other=0.0)

    line = codes + row.to(tl.int64)[:, None] * width
    if PACKED:
        # code 2i has byte 3i and the low half of the next, code 2i + 1 the high half and the byte after it
        byte = (column // 2 * 3 + column % 2)[None, :]
        low = tl.load(line + byte, mask=there, other=0).to(tl.int32)
        high = tl.load(line + byte + 1, mask=there, other=0).to(tl.int32)
        code = tl.where((column % 2 == 0)[None, :], low | ((high & 0xF) << 8), (low >> 4) | (high << 4))
    else:
        code = tl.load(line + column[None, :], mask=there, other=0).to(tl.int32)

    magnitude = code & NAN
    bits = (magnitude << (23 - MANTISSA)) + ((127 - BIAS) << 23)
    subnormal = (magnitude.to(tl.float32) * STEP).to(tl.int32, bitcast=True)
    bits = tl.where((magnitude >> MANTISSA) == 0, subnormal, bits)
    bits = tl.where(magnitude < ABOVE, bits, tl.where(magnitude == INFINITY, 0x7F800000, 0x7FC00000))
    bits = tl.where(code > NAN, bits | -0x80000000, bits)
    at = row.to(tl.int64)[:, None] * c + column[None, :]
    _store(out + at, bits.to(tl.float32, bitcast=True) * scale, there, BF16)


@triton.jit
def pack_program(codes, out, n, c, width, BLOCK: tl.constexpr):
    """Pack int16 codes [rows, c] into BLOCK of the n bytes of out [rows, width]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, byte = at // width, at % width
    first = byte // 3 * 2
    even = tl.load(codes + row * c + first, mask=(at < n) & (first < c), other=0).to(tl.int32)
    odd = tl.load(codes + row * c + first + 1, mask=(at < n) & (first + 1 < c), other=0).to(tl.int32)
    middle = ((even >> 8) & 0xF) | ((odd & 0xF) << 4)
    packed = tl.where(byte % 3 == 0, even, tl.where(byte % 3 == 1, middle, odd >> 4))
    tl.store(out + at, packed.to(tl.uint8), mask=at < n)


@triton.jit
def _store(pointers, value, there, BF16: tl.constexpr):
    """Store FP32 values, rounded once. BF16 is rounded by bits, since the interpreter's cast truncates."""
    if BF16:
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        tl.store(pointers, (bits >> 16).to(tl.int16), mask=there)
    else:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=there)
