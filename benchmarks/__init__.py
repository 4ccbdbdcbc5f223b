"""Questions about speed, size and error, measured here; run from a checkout: python -m benchmarks."""
