"""Short number formats, tiles with a scale each, and products of them."""

from dsmini.numerics.dispatch import grouped_linear
from dsmini.numerics.formats import E4M3, E5M2, E5M6, FORMATS, Format
from dsmini.numerics.gemm import Accumulator, fp8_matmul, fp8_swiglu_matmul
from dsmini.numerics.quantization import (
    ACTIVATION_TILE,
    AMAX_MIN,
    SMALLEST_AMAX,
    TOKEN_TILE,
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
    "ACTIVATION_TILE",
    "AMAX_MIN",
    "E4M3",
    "E5M2",
    "E5M6",
    "FORMATS",
    "SMALLEST_AMAX",
    "TOKEN_TILE",
    "WEIGHT_TILE",
    "Accumulator",
    "Format",
    "QuantizedTensor",
    "Weight",
    "dense",
    "dequantize_tiles",
    "encode_tiles",
    "fp8_matmul",
    "fp8_swiglu_matmul",
    "grouped_linear",
    "matrix_of",
    "quantize",
    "quantize_tiles",
    "round_tiles",
    "rows_of",
    "swiglu",
    "tile_scales",
]
