"""Layers next to transformers': streams of V4, which are mixed, and of Hunyuan V4, and Engram of Qwen4."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead
from transformers.models.hy_v4 import HYV4Config
from transformers.models.hy_v4.modeling_hy_v4 import HYV4HyperConnection, HYV4HyperHead
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

from dsmini import ops
from dsmini.nn import Context
from dsmini.nn.engram import Engram
from dsmini.nn.hyper_connections import StreamHead, expand
from dsmini.nn.residual import CONNECTIONS
from tests.conftest import SMALL
from tests.helpers.tolerances import relative_error

M = 24
THEIRS: dict[str, tuple[Any, Any, Any]] = {
    "sinkhorn": (DeepseekV4Config, DeepseekV4HyperConnection, DeepseekV4HyperHead),
    "identity": (HYV4Config, HYV4HyperConnection, HYV4HyperHead),
}


def written(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor | None = None) -> Tensor:
    """Return the new streams as transformers' decoder layers make them."""
    return post.unsqueeze(-1) * output.unsqueeze(-2) + (streams if comb is None else comb.mT @ streams)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("n", [2, 4, 5])
def test_streams_and_gradients(n: int, kind: str, backend: Any) -> None:
    """Three sublayers and the end, with every eps large and few divisions, to show their places, in one state."""
    config_class, connection, their_end = THEIRS[kind]
    config: Any = config_class(hidden_size=M, hc_mult=n, hc_eps=1e-2, rms_norm_eps=1e-1, hc_sinkhorn_iters=2)
    sizes: dict[str, Any] = {"eps": config.hc_eps, "norm_eps": config.rms_norm_eps}
    pairs = [(CONNECTIONS[kind](M, n, sinkhorn_iters=2, **sizes), connection(config)) for _ in range(3)]
    head, their_head = StreamHead(M, n, **sizes), their_end(config)
    for mine, theirs in [*pairs, (head, their_head)]:
        for name, p in mine.named_parameters():
            p.data.normal_()
            getattr(theirs, name if hasattr(theirs, name) else f"hc_{name}").data.copy_(p)
    x = torch.randn(2, 7, M)
    streams = theirs_streams = expand(x, n).contiguous()
    for mine, theirs in pairs:
        with ops.use(backend):
            read, mix = mine.read(streams)
            streams = mine.write(streams, F.silu(read), mix)
        *weights, their_read = theirs(theirs_streams)
        theirs_streams = written(theirs_streams, F.silu(their_read), *weights)
        assert relative_error(read, their_read) < 1e-5
    assert relative_error(streams, theirs_streams) < 1e-5
    with ops.use(backend):
        got, want = head.collapse(streams), their_head(theirs_streams)
    assert relative_error(got, want) < 1e-5
    direction = torch.randn_like(want)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    for mine, theirs in pairs:
        for name, p in mine.named_parameters():
            assert relative_error(p.grad, getattr(theirs, name).grad) < 1e-4, name


# --- Engram: rows, gates, convolution and gradients

V, END = 61, 60


@pytest.mark.parametrize(("streams", "order", "kernel"), [(2, 3, 4), (4, 3, 4), (3, 4, 2)])
def test_rows_read_and_gradients_of_qwen4(streams: int, order: int, kernel: int) -> None:
    """It takes ids as they are, from a start of its end token on, and has other multipliers; its norms are 1 + w."""
    config: Any = Qwen4ExpTextConfig(
        hidden_size=M, hc_count=streams, vocab_size=V, ngram_size=order, ple_embed_dim=12 * (order - 1),
        heads_per_ngram=2, ngram_vocab_size_base=40, make_ngram_vocab_size_divisible_by=1, ple_conv_kernel_size=kernel,
        eos_token_id=END, ple_layer_ids=[1, 3], rms_norm_eps=1e-2, seed=0,
    )  # fmt: skip
    sizes: dict[str, Any] = {"dim": M, "vocab_size": V, "hc_mult": streams, "norm_eps": 1e-2, "n_layers": 3}
    sizes |= {"engram_layer_ids": (0, 2), "engram_max_ngram_size": order, "engram_n_heads": 2, "engram_head_dim": 6}
    sizes |= {"engram_vocab_size": 40, "engram_conv_size": kernel, "engram_pad_token_id": END}
    for place, layer in enumerate((0, 2)):
        theirs, mine = Qwen4ExpTextPLELayer(config, layer, place), Engram(**SMALL | sizes, layer=layer)
        table: Any = theirs.ple_embedding
        for p in theirs.parameters():
            p.data.normal_()
        assert mine.primes.flatten().tolist() == table.ngram_heads_vocab_sizes.tolist()
        mine.multipliers.copy_(table.layer_multipliers)
        mine.embed.weight.data.copy_(table.ngram_embedding.weight[: len(mine.embed.weight)])
        mine.wk.weight.data.copy_(theirs.key_proj.weight)
        mine.wv.weight.data.copy_(theirs.value_proj.weight)
        assert mine.conv is not None and mine.conv_norm is not None
        for weight, norm in (
            (mine.q_norm.weight, theirs.norm_query),
            (mine.k_norm.weight, theirs.norm_key),
            (mine.conv_norm.weight, theirs.norm_conv),
        ):
            weight.data.copy_(1 + norm.weight.view(streams, M))
        mine.conv.weight.data.copy_(theirs.conv1d.weight.view(streams, M, kernel).permute(2, 0, 1))
        tokens, x = torch.randint(END, (2, 19)), torch.randn(2, 19, streams, M)
        context = Context(positions=torch.arange(19)[None], tokens=tokens)
        rows = mine.hashed(context)
        assert torch.equal(mine.embed(rows).flatten(-3), table(tokens, None))
        got = mine(x, context)[0]
        want = x + theirs(x.flatten(2), tokens, None).view_as(x)
        assert relative_error(got, want) < 1e-5
        direction = torch.randn_like(want)
        (got * direction).sum().backward()
        (want * direction).sum().backward()
        of_conv = theirs.conv1d.weight.grad.view(streams, M, kernel).permute(2, 0, 1)
        pairs = [(mine.wk.weight, theirs.key_proj.weight.grad), (mine.wv.weight, theirs.value_proj.weight.grad)]
        pairs += [(mine.conv.weight, of_conv), (mine.q_norm.weight, theirs.norm_query.weight.grad.view(streams, M))]
        pairs += [(mine.embed.weight, table.ngram_embedding.weight.grad[: len(mine.embed.weight)])]
        for p, grad in pairs:
            assert relative_error(p.grad, grad) < 1e-4
