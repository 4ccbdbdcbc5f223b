"""Matrices in each format, and the formats of V4 that training does not need.

A matrix in FP8 has an FP32 scale for each block of 128x128. Worked example, DeepSeek-V3's wq_a of [1536, 7168]:

    1536 * 7168 * fp8_size + ceil(1536 / fp8_tile) * ceil(7168 / fp8_tile) * fp32_size
        = 11,010,048 + 12 * 56 * 4 = 11,012,736 bytes

V4 stores the indexer's entries in FP4, with scales of one byte that are powers of two.

Source: DeepSeek-V3 report, section 3.3.2; DeepSeek-V4 inference code (FP4 with E8M0 scales).
"""

from dsmini.planner.quantities.quantity import BYTES, COUNT, Bytes, Count, rounded_up
from dsmini.planner.quantities.sizes import BF16, FP8, FP8_TILE, FP32

FP4 = BYTES(0.5, "fp4_size", "Size of an FP4 number", "V4 inference code: E2M1, two in a byte")
E8M0 = BYTES(1, "e8m0_size", "Size of a scale that is a power of two", "V4 config.json: scale_fmt ue8m0")
BF16_COST = COUNT(
    2, "bf16_cost", "Operations in FP8 that take the time of one in BF16", "V4 report: FLOPs in FP8 units"
)
FP4_COST = COUNT(0.5, "fp4_cost", "Operations in FP8 that take the time of one in FP4", "V4 report: FLOPs in FP8 units")
SIZES = {"float32": FP32, "bfloat16": BF16}
"""Bytes of a number of each dtype that has no scales."""


def scaled_matrix(rows: Count, columns: Count) -> Bytes:
    """Return the bytes of a matrix in FP8 with the scales of its blocks."""
    return rows * columns * FP8 + rounded_up(rows / FP8_TILE) * rounded_up(columns / FP8_TILE) * FP32
