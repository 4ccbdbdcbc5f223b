"""Whole models next to transformers' DeepSeek-V4: table and scores, clamps, streams, each attention, choices."""

from pathlib import Path
from typing import Any

import hf
import pytest
import torch
import torch.nn.functional as F
from test_transformers import LOGITS, tokens_for
from test_v4_folders import YARN
from torch import Tensor

from dsmini.nn import compressed_attention
from tests.helpers.tolerances import relative_error

# every eps is large, to show its place
CHANGES = hf.v4_layers(0, 4, 7, 4) | {"index_topk": 3, "hc_mult": 4, "hc_sinkhorn_iters": 3}
CHANGES |= {"rms_norm_eps": 1e-2, "hc_eps": 1e-2}


def chosen_sets(indices: Tensor) -> list[set[int]]:
    """Return the entries that each query chose."""
    return [set(row) - {-1} for row in indices.flatten(0, 1).tolist()]


@pytest.mark.parametrize("yarn", [False, True])
def test_logits_choices_and_gradients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, yarn: bool) -> None:
    """At lengths around window and blocks; gradients of all that learns from the output at the longest.

    Queries come in blocks of 16, the last of which is ragged.
    """
    choices: tuple[list[Tensor], list[Tensor]] = [], []
    topk_keys = compressed_attention.topk_keys
    monkeypatch.setattr(compressed_attention, "BLOCK", 16)
    monkeypatch.setattr(
        compressed_attention, "topk_keys", lambda *args: (choices[0].append(topk_keys(*args)), choices[0][-1])[1]
    )
    theirs: Any = hf.v4(tmp_path / "config", **CHANGES, **({"rope_scaling": YARN} if yarn else {}))
    for layer in (1, 3):
        indexer = theirs.model.layers[layer].self_attn.compressor.indexer
        indexer.register_forward_hook(lambda *args: choices[1].append(args[2]))
    mine, tokens = hf.ours(theirs), tokens_for(theirs)
    for s in (1, 3, 4, 8, 9, 10, 16, 35, 61):
        got, want = mine(tokens[:, :s]), theirs(tokens[:, :s]).logits
        assert relative_error(got, want) < LOGITS, s
    blocks = [F.pad(part, (0, 3 - part.shape[2]), value=-1) for part in choices[0][-8:]]  # four of each layer
    for mine_of_layer, theirs_of_layer in zip((blocks[:4], blocks[4:]), choices[1][-2:], strict=True):
        assert chosen_sets(torch.cat(mine_of_layer, 1)) == chosen_sets(theirs_of_layer)
    direction = torch.randn_like(want)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    grads = hf.gradients(theirs)
    learned = [(name, p) for name, p in mine.named_parameters() if ".indexer." not in name]
    assert len(learned) > 100
    for name, p in learned:
        assert p.grad is not None, name
        assert relative_error(p.grad, grads[name]) < 3e-5, name
