"""Measurements; run from a checkout: python -m benchmarks, or alone python -m benchmarks.quantize and the like."""

from dsmini import _startup as _startup  # before torch: Ctrl-C while it is imported
