"""What is saved for backward is measured, and then let go."""

import gc
import weakref

import pytest
import torch

from dsmini import ModelConfig, Transformer
from dsmini.measure.saved import saved_for_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_measured_graph_outlives_it(dtype: torch.dtype) -> None:
    """A graph that holds itself would hold the parameters too."""
    model = Transformer(ModelConfig(n_layers=2), compute_dtype=dtype)
    held = weakref.ref(model.embed.weight)
    saved = saved_for_backward(model, torch.randint(0, 256, (2, 36)))
    assert 0 < saved.by_linears < saved.total
    del model
    gc.collect()
    assert held() is None
