"""Cases that cut a tensor into tiles, and the comparison of two quantized tensors."""

import pytest

from dsmini.numerics import QuantizedTensor
from tests.helpers.quantizer import NAMES, raw, same

EVERY_FORMAT = pytest.mark.parametrize("format", NAMES)
ANY = [  # shape, tile, shape of the scales
    ((300,), (1, 128), (3,)),
    ((300,), "row", (1,)),
    ((300,), "tensor", (1,)),
    ((7, 130), (1, 128), (7, 2)),
    ((130, 7), (128, 1), (2, 7)),
    ((130, 576), (128, 128), (2, 5)),
    ((7, 130), "row", (7, 1)),
    ((7, 130), "tensor", (1, 1)),
    ((2, 3, 130), [2, 64], (2, 2, 3)),
    ((2, 3, 130), "row", (2, 3, 1)),
    ((2, 3, 130), "tensor", (1, 1, 1)),
    ((0, 130), (1, 128), (0, 2)),
    ((0, 130), "tensor", (0, 1)),
    ((2, 0), "row", (2, 0)),
    ((1, 1, 5), (4, 4), (1, 1, 2)),
]
EVERY_CUT = pytest.mark.parametrize(("shape", "tile", "tiles"), ANY, ids=lambda case: str(case).replace(" ", ""))


def alike(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Return True if two quantized tensors are equal in every field and bit."""
    fields = [(q.shape, q.tile, q.scale, q.format, q.dtype, q.codes.dtype, q.codes.shape) for q in (a, b)]
    return fields[0] == fields[1] and raw(a.codes).tobytes() == raw(b.codes).tobytes() and same(a.scales, b.scales)
