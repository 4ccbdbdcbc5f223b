"""Hyper-connections next to those of transformers' DeepSeek-V4, with random parameters. An eps shows its place."""

import pytest
import torch

from dsmini.nn.hyper_connections import HyperConnection, StreamHead, write

v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
configuration = pytest.importorskip("transformers.models.deepseek_v4.configuration_deepseek_v4")


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_streams_are_those_of_transformers(iterations: int) -> None:
    config = configuration.DeepseekV4Config(hidden_size=24, hc_sinkhorn_iters=iterations, hc_eps=0.05, rms_norm_eps=0.3)
    theirs, their_head = v4.DeepseekV4HyperConnection(config), v4.DeepseekV4HyperHead(config)
    with torch.no_grad():
        for p in (*theirs.parameters(), *their_head.parameters()):
            p.normal_()
    ours = HyperConnection(24, 4, sinkhorn_iters=iterations, eps=0.05, norm_eps=config.rms_norm_eps)
    ours.load_state_dict(theirs.state_dict())
    head = StreamHead(24, 4, eps=0.05, norm_eps=config.rms_norm_eps)
    head.load_state_dict({name.removeprefix("hc_"): t for name, t in their_head.state_dict().items()})
    streams, output = torch.randn(2, 3, 4, 24), torch.randn(2, 3, 24)
    post, comb, collapsed = theirs(streams)
    their_streams = post.unsqueeze(-1) * output.unsqueeze(-2) + comb.transpose(-1, -2) @ streams
    read, mix = ours(streams)
    torch.testing.assert_close(read, collapsed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(write(streams, output, mix), their_streams, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head(streams), their_head(streams), rtol=1e-5, atol=1e-5)
