"""Questions about speed, size and error, measured here; run from a checkout: python -m benchmarks."""

from dsmini import _startup as _startup  # before torch: Ctrl-C while it is imported
