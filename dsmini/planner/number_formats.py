"""Bytes of a number in each format, as inputs that formulas of memory and traffic begin with.

DeepSeek's FP8 is a code of one byte and FP32 scales: one scale for 128 numbers in a row of activations or of the
cache, one for each block of 128x128 weights. Worked example, the 512 numbers of DeepSeek-V3's latent in FP8:

    512 * fp8_bytes + ceil(512 / scale_tile) * fp32_bytes = 512 + 4 * 4 = 528 bytes

E5M6 has 12 bits, so 12 bytes hold 8 numbers. V3 saves the input of the matrix after attention in it.

Source: DeepSeek-V3 report, section 3.3.2; DeepSeek-V4 inference code (FP4 with E8M0 scales).
"""

from dsmini.planner.quantity import BYTES, COUNT, Bytes, Count, rounded_up

FP32 = BYTES(4, "fp32_bytes", "Number in FP32", "IEEE 754, binary32")
BF16 = BYTES(2, "bf16_bytes", "Number in BF16", "bfloat16: 1 sign, 8 exponent and 7 fraction bits")
FP8 = BYTES(1, "fp8_bytes", "Number in FP8", "V3, section 3.3: E4M3")
FP4 = BYTES(0.5, "fp4_bytes", "Number in FP4", "V4 inference code: E2M1, two in a byte")
E8M0 = BYTES(1, "e8m0_bytes", "Scale that is a power of two", "V4 config.json: scale_fmt ue8m0")
TILE = COUNT(128, "scale_tile", "Numbers in a row, or rows and columns of a block, with one FP32 scale", "V3, 3.3.2")
INDEX = BYTES(8, "index_bytes", "Index", "int64 of PyTorch")
E5M6_GROUP = COUNT(8, "e5m6_group", "Numbers of E5M6 that are packed together", "12 bits a number")
E5M6_GROUP_SIZE = BYTES(12, "e5m6_group_bytes", "Packed numbers of E5M6", "12 bits a number")
BF16_COST = COUNT(
    2, "bf16_cost", "Operations in FP8 that take the time of one in BF16", "V4 report: FLOPs in FP8 units"
)
FP4_COST = COUNT(0.5, "fp4_cost", "Operations in FP8 that take the time of one in FP4", "V4 report: FLOPs in FP8 units")
SIZES = {"float32": FP32, "bfloat16": BF16}
"""Bytes of a number of each dtype that has no scales."""


def scaled_row(width: Count) -> Bytes:
    """Return the bytes of this many numbers in FP8 with their scales."""
    return width * FP8 + rounded_up(width / TILE) * FP32


def scaled_matrix(rows: Count, columns: Count) -> Bytes:
    """Return the bytes of a matrix in FP8 with the scales of its blocks."""
    return rows * columns * FP8 + rounded_up(rows / TILE) * rounded_up(columns / TILE) * FP32


def e5m6_row(width: Count) -> Bytes:
    """Return the bytes of this many numbers in E5M6 with their scales."""
    return rounded_up(width / E5M6_GROUP) * E5M6_GROUP_SIZE + rounded_up(width / TILE) * FP32
