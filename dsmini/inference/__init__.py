"""Decoding from a cache: generation, sampling, speculative decoding."""

from dsmini.inference.generation import Generated, Generation, generate
from dsmini.inference.sampling import Sampling
from dsmini.inference.stats import Stats

__all__ = ["Generated", "Generation", "Sampling", "Stats", "generate"]
