"""Residual streams that are not mixed, next to transformers' modules of Hunyuan V4."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.hy_v4 import HYV4Config
from transformers.models.hy_v4.modeling_hy_v4 import HYV4HyperConnection, HYV4HyperHead

from dsmini.nn.hyper_connections import IdentityConnection, StreamHead, expand
from tests.helpers.tolerances import relative_error

M = 24


@pytest.mark.parametrize("n", [2, 4, 5])
def test_streams_of_hunyuan_v4_and_gradients(n: int) -> None:
    """Three sublayers and the end, with every eps large, to show its place, in one state and its gradients."""
    config: Any = HYV4Config(hidden_size=M, hc_mult=n, hc_eps=1e-2, rms_norm_eps=1e-1)
    sizes: dict[str, Any] = {"eps": config.hc_eps, "norm_eps": config.rms_norm_eps}
    pairs = [(IdentityConnection(M, n, **sizes), HYV4HyperConnection(config)) for _ in range(3)]
    head, their_head = StreamHead(M, n, **sizes), HYV4HyperHead(config)
    for mine, theirs in [*pairs, (head, their_head)]:
        for name, p in mine.named_parameters():
            p.data.normal_()
            getattr(theirs, name if hasattr(theirs, name) else f"hc_{name}").data.copy_(p)
    x = torch.randn(2, 7, M)
    streams = theirs_streams = expand(x, n)
    for mine, theirs in pairs:
        read, mix = mine.read(streams)
        streams = mine.write(streams, F.silu(read), mix)
        post, their_read = theirs(theirs_streams)
        theirs_streams = post.unsqueeze(-1) * F.silu(their_read).unsqueeze(-2) + theirs_streams  # its decoder layer
        assert relative_error(read, their_read) < 1e-5
    assert relative_error(streams, theirs_streams) < 1e-5
    got, want = head.collapse(streams), their_head(theirs_streams)
    assert relative_error(got, want) < 1e-5
    direction = torch.randn_like(want)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    for mine, theirs in pairs:
        for name, p in mine.named_parameters():
            assert relative_error(p.grad, getattr(theirs, name).grad) < 1e-4, name
