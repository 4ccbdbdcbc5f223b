"""Measurements; run from a checkout: python -m benchmarks, or alone python -m benchmarks.quantize and the like."""
