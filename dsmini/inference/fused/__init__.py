"""A decoding step in few calls of C++, in place of the thirty operations of each block: about 2.5 times as fast.

It knows the modules of nn/ by their attributes and writes their forward again, as one operation for each half of a
block. A reader of the model need not meet it: without it, or where a layer is not plain, the modules themselves run.
"""

from dsmini.inference.fused.decoder import Decoder

__all__ = ["Decoder"]
