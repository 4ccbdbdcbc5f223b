"""Short number formats, tiles with a scale each, and products of them."""

from dsmini.numerics.accumulation import Accumulator
from dsmini.numerics.formats import E4M3, E5M2, E5M6, FORMATS, UE8M0, Format
from dsmini.numerics.fp32 import at_least_fp32, without_autocast
from dsmini.numerics.gemm import fp8_matmul, fp8_swiglu_matmul
from dsmini.numerics.products import grouped_linear
from dsmini.numerics.quantization import (
    ACTIVATION_TILE,
    AMAX_MIN,
    SMALLEST_AMAX,
    TOKEN_TILE,
    WEIGHT_TILE,
    QuantizedTensor,
    Weight,
    dense,
    matrix_of,
    number_dtype,
    quantize,
    rows_of,
)
from dsmini.numerics.tiles import dequantize_tiles, encode_tiles, quantize_tiles, round_tiles, tile_scales

__all__ = [
    "ACTIVATION_TILE",
    "AMAX_MIN",
    "E4M3",
    "E5M2",
    "E5M6",
    "FORMATS",
    "SMALLEST_AMAX",
    "TOKEN_TILE",
    "UE8M0",
    "WEIGHT_TILE",
    "Accumulator",
    "Format",
    "QuantizedTensor",
    "Weight",
    "at_least_fp32",
    "dense",
    "dequantize_tiles",
    "encode_tiles",
    "fp8_matmul",
    "fp8_swiglu_matmul",
    "grouped_linear",
    "matrix_of",
    "number_dtype",
    "quantize",
    "quantize_tiles",
    "round_tiles",
    "rows_of",
    "tile_scales",
    "without_autocast",
]
