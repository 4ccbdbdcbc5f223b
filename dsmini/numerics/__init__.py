"""What a number is: tiles of E4M3 codes, each tile with its own scale."""

from dsmini.numerics.quantization import WEIGHT_TILE, dequantize_tiles, encode_tiles, quantize_tiles, tile_scales

__all__ = ["WEIGHT_TILE", "dequantize_tiles", "encode_tiles", "quantize_tiles", "tile_scales"]
