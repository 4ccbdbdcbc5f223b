"""Measure speed, size and error on this machine; run from a checkout: python -m benchmarks."""
