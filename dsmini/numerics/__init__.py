"""Short number formats, tiles with a scale each, and products of them."""

from dsmini.numerics.dispatch import grouped_linear
from dsmini.numerics.formats import E2M1, E4M3, E5M2, E5M6, FORMATS, Format, at_least_fp32
from dsmini.numerics.fp4 import FP4_BLOCK, dequantize_fp4, fp4_to_fp8, quantize_fp4, round_fp4
from dsmini.numerics.gemm import fp8_matmul, fp8_swiglu_matmul
from dsmini.numerics.quantization import (
    AMAX_MIN,
    SMALLEST_AMAX,
    WEIGHT_TILE,
    QuantizedTensor,
    Weight,
    dense,
    dequantize_tiles,
    encode_tiles,
    matrix_of,
    quantize,
    quantize_tiles,
    round_tiles,
    rows_of,
    tile_scales,
)
from dsmini.numerics.swiglu import swiglu

__all__ = [
    "AMAX_MIN",
    "E2M1",
    "E4M3",
    "E5M2",
    "E5M6",
    "FORMATS",
    "FP4_BLOCK",
    "SMALLEST_AMAX",
    "WEIGHT_TILE",
    "Format",
    "QuantizedTensor",
    "Weight",
    "at_least_fp32",
    "dense",
    "dequantize_fp4",
    "dequantize_tiles",
    "encode_tiles",
    "fp4_to_fp8",
    "fp8_matmul",
    "fp8_swiglu_matmul",
    "grouped_linear",
    "matrix_of",
    "quantize",
    "quantize_fp4",
    "quantize_tiles",
    "round_fp4",
    "round_tiles",
    "rows_of",
    "swiglu",
    "tile_scales",
]
