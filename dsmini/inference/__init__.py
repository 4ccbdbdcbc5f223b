"""Decoding from a cache: generation, sampling, speculative decoding."""

from dsmini.inference.generation import Generated, Generation, Stats, generate
from dsmini.inference.sampling import Sampling

__all__ = ["Generated", "Generation", "Sampling", "Stats", "generate"]
