"""Engram with a convolution, next to transformers' modules of Qwen4: rows, gates, convolution and gradients."""

from typing import Any

import pytest
import torch
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

from dsmini.nn import Context
from dsmini.nn.engram import Engram
from tests.conftest import SMALL
from tests.helpers.tolerances import relative_error

V, M, END = 61, 24, 60


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
