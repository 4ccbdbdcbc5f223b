"""Random models and caches, their bytes, and the activations that they save."""

import dataclasses
import gc
import weakref

import pytest
import torch

from dsmini import ModelConfig, Transformer
from dsmini.measure.memory import reset_peak, saved_for_backward
from dsmini.measure.workloads import random_cache, random_model, random_tokens
from tests.helpers.configs import V4
from tests.helpers.questions import TINY

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, "fp8"])
@pytest.mark.parametrize("config", [TINY, ModelConfig(**V4, max_seq_len=64)], ids=["MLA", "V4"])
@torch.no_grad()
def test_random_cache_is_full_and_has_room(config: ModelConfig, dtype: torch.dtype) -> None:
    model = random_model(config, CPU, torch.float32)
    cache = random_cache(model, batch=2, context=16, room=4, dtype=dtype)
    assert cache.lengths.tolist() == [16, 16]
    for store in [*cache.stores, *cache.index_stores]:
        rows = [part for part in getattr(store, "parts", [store]) if hasattr(part, "data")]
        assert rows and all(part.data[:, :16].any() for part in rows)
    tokens = random_tokens(config, 2, 4, CPU)
    assert torch.isfinite(model(tokens, cache)).all()
    assert cache.lengths.tolist() == [20, 20]


def test_saved_bytes_grow_with_tokens_and_refuse_a_width() -> None:
    model = random_model(dataclasses.replace(TINY, n_layers=1), CPU, torch.float32).train()
    few, many = (saved_for_backward(model, random_tokens(TINY, 1, n + 1, CPU)) for n in (20, 40))
    assert 0 < few.by_linears < few.total
    assert many.total > 1.9 * few.total
    with pytest.raises(ValueError, match="64 tokens equal the rows or columns of a matrix"):
        saved_for_backward(model, random_tokens(TINY, 1, 65, CPU))


def test_nothing_of_the_measured_graph_outlives_it() -> None:
    """Free the parameters: a graph that refers to itself would hold them."""
    model = Transformer(TINY, compute_dtype=torch.bfloat16)
    held = weakref.ref(model.embed.weight)
    saved_for_backward(model, torch.randint(0, 256, (2, 37)))
    del model
    gc.collect()
    assert held() is None


def test_the_peak_of_the_measured_gpu_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the current one, which is cuda:0 in a process that measures cuda:1."""
    reset: list[object] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    for name in ("cpu", "cuda:1"):
        reset_peak(torch.device(name))
    assert reset == [torch.device("cuda:1")]
