"""Models of the same shape from other projects."""

from importlib.util import find_spec

MISSING = None if find_spec("transformers") else "transformers is not installed; pip install 'dsmini[peers]'"
"""Why they cannot run here; None if they can."""
