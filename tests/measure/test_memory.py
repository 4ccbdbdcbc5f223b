"""Saved activations are measured and then freed."""

import gc
import weakref

import pytest
import torch

from dsmini import ModelConfig, Transformer
from dsmini.measure.memory import saved_for_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_measured_graph_outlives_it(dtype: torch.dtype) -> None:
    """Free the parameters: a graph that refers to itself would hold them."""
    model = Transformer(ModelConfig(n_layers=2), compute_dtype=dtype)
    held = weakref.ref(model.embed.weight)
    saved = saved_for_backward(model, torch.randint(0, 256, (2, 36)))
    assert 0 < saved.by_linears < saved.total
    del model
    gc.collect()
    assert held() is None
