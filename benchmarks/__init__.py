"""One question a file; run from a checkout, as python -m benchmarks.NAME."""
