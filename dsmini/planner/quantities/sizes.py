"""Sizes of numbers in memory and on links, as inputs of a plan.

    FP32    4 bytes                     BF16    2 bytes
    FP8     1 byte, and an FP32 scale for each tile of 128 numbers (activations) or block of 128x128 (weights)
    E5M6    12 bits: 12 bytes hold 8 numbers; V3 saves the input of the matrix after attention in it
    FP4     half a byte, and scales of a byte that are powers of two; V4's indexer stores its entries in it

A row of V3's hidden state, 7168 numbers, is 14,336 bytes in BF16 and 7168 + 4 * 56 = 7392 bytes in FP8. V3's wq_a of
[1536, 7168] has 12 * 56 blocks: 11,010,048 + 672 * 4 = 11,012,736 bytes in FP8.

Source: DeepSeek-V3 report, sections 3.3.2 and 3.3.3; DeepSeek-V4 inference code (FP4 with E8M0 scales).
"""

from dsmini.planner.quantities.quantity import BYTES, COUNT, Bytes, Count, rounded_up

FP32 = BYTES(4, "fp32_size", "Size of an FP32 number", "IEEE 754")
BF16 = BYTES(2, "bf16_size", "Size of a BF16 number", "bfloat16 format")
FP8 = BYTES(1, "fp8_size", "Size of an FP8 number", "V3, section 3.3.1")
FP4 = BYTES(0.5, "fp4_size", "Size of an FP4 number", "V4 inference code: E2M1, two in a byte")
E8M0 = BYTES(1, "e8m0_size", "Size of a scale that is a power of two", "V4 config.json: scale_fmt ue8m0")
BF16_COST = COUNT(
    2, "bf16_cost", "Operations in FP8 that take the time of one in BF16", "V4 report: FLOPs in FP8 units"
)
FP4_COST = COUNT(0.5, "fp4_cost", "Operations in FP8 that take the time of one in FP4", "V4 report: FLOPs in FP8 units")
INDEX = BYTES(8, "index_size", "Size of an index", "int64 of PyTorch")
FP8_TILE = COUNT(128, "fp8_tile", "Numbers that share an FP8 scale, in a row", "V3, section 3.3.2")
E5M6_GROUP = COUNT(8, "e5m6_group", "Numbers of E5M6 that are packed together", "12 bits a number")
E5M6_GROUP_SIZE = BYTES(12, "e5m6_group_size", "Size of packed numbers of E5M6", "12 bits a number")
SIZES = {"float32": FP32, "bfloat16": BF16}
"""Bytes of a number of each dtype that has no scales."""


def fp8_row(width: Count) -> Bytes:
    """Return the bytes of a row of FP8 activations: codes, and a scale for each tile."""
    return width * FP8 + rounded_up(width / FP8_TILE) * FP32


def e5m6_row(width: Count) -> Bytes:
    """Return the bytes of a row of E5M6 activations: packed codes, and a scale for each tile."""
    return rounded_up(width / E5M6_GROUP) * E5M6_GROUP_SIZE + rounded_up(width / FP8_TILE) * FP32


def scaled_matrix(rows: Count, columns: Count) -> Bytes:
    """Return the bytes of a matrix in FP8 with the scales of its blocks."""
    return rows * columns * FP8 + rounded_up(rows / FP8_TILE) * rounded_up(columns / FP8_TILE) * FP32
