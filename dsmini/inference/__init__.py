"""Decoding from a cache: generation, sampling, speculative decoding."""
