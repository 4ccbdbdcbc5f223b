"""What is kept for backward is measured, and then let go."""

import gc
import weakref

import pytest
import torch

from dsmini import ModelConfig, Transformer
from dsmini.measure.kept import kept_for_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_measured_graph_outlives_it(dtype: torch.dtype) -> None:
    """A graph that holds itself would hold the parameters too."""
    model = Transformer(ModelConfig(n_layers=2), compute_dtype=dtype)
    held = weakref.ref(model.embed.weight)
    inside, whole = kept_for_backward(model, torch.randint(0, 256, (2, 36)))
    assert 0 < inside < whole
    del model
    gc.collect()
    assert held() is None
