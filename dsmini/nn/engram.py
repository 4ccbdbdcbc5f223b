"""Engram: rows of tables that are looked up by hashed n-grams, and added to the residual where a gate finds them apt.

A token and those before it are an n-gram. For each order n = 2 .. N, and each of several heads, a hash names a row of a
table, without any product: a table may be as large as main memory.

    c_t      id of token t, after ids whose texts differ in case, accents or spaces alone became one
    mix_n    = XOR over k < n of c_(t-k) m_k                 m_k odd, int64 without overflow
    row      = mix_n mod prime_(n,j), in the part of the table that order n and head j have
    e        = the rows of all orders and heads, side by side
    g_i      = sigmoid(sign(a) sqrt(max(|a|, 1e-6))),  a = norm(h_i) . norm(W_k,i e) / sqrt(m)    for each stream i
    u_i      = g_i W_v e
    h'_i     = h_i + u_i + SiLU(conv(norm(u_i)))             depthwise and causal, with dilation N; zero at first

Two n-grams may share a row of one head, but hardly of all heads: every head has a prime of its own. Before the start of
a sequence, or of a document, all ids are that of a padding token.

N is engram_max_ngram_size. Where the sources differ: DeepSeek-V4.1 has no convolution (engram_conv_size None), an eps
of 1e-20 in its norms, where this file takes norm_eps, and sign(0) as 1. The paper's
demo adds biases to W_k and W_v, which V4.1 and this file do not have. V4.1 itself cannot be verified here: no trusted
implementation of it exists. The form with a convolution is tested next to transformers' qwen4_exp.

Source: Engram (arXiv 2601.07372), section 2; DeepSeek-V4.1's inference code.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsmini import ops
from dsmini.config import ModelConfig, layer_config
from dsmini.config.fields import require
from dsmini.config.model import SLACK
from dsmini.nn.attention import Context
from dsmini.nn.cache import CacheDtype, Rows, Stores
from dsmini.nn.codec import Numbers
from dsmini.nn.first_values import draw_first
from dsmini.nn.layers import Embedding, FP32Module, Projection, at_least_fp32, make_linear, output_linear

LAYER_SEED = 10007
"""Distance between the seeds of the multipliers of two layers."""
SMALLEST = 1e-6
"""Least size of a gate's logit before its root is taken: a root has no slope at 0."""


class StreamNorm(FP32Module):
    """RMSNorm of each of n streams with a weight [n, m] of its own, in FP32 at least."""

    def __init__(self, n: int, dim: int, eps: float) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.ones(n, dim, dtype=torch.float32))
        self.eps: float = eps

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "b s n m"]) -> Float[Tensor, "b s n m"]:
        x = at_least_fp32(x)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class ShortConv(FP32Module):
    """A convolution over earlier tokens, each channel by itself: weight [k, n, m], dilation in tokens.

    It starts at zero, as in the paper.
    """

    def __init__(self, size: int, n: int, dim: int, dilation: int) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.zeros(size, n, dim, dtype=torch.float32))
        self.dilation: int = dilation

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, u: Float[Tensor, "b s n m"], context: Context, stored: Rows | None) -> Float[Tensor, "b s n m"]:
        """Return the sum over k of weight[-1 - k] times what was k dilation tokens before.

        Args:
            stored: inputs at the tokens before these, of a cache.
        """
        history = with_earlier(u.flatten(-2), (len(self.weight) - 1) * self.dilation, context, stored)
        total = torch.zeros_like(u)
        for k, weight in enumerate(self.weight.flip(0)):
            there, seen = earlier(history, k * self.dilation, context)
            total = total + weight * (there * seen).view_as(u)
        return total


class Engram(nn.Module):
    """The Engram of one block. From a config, or from plain arguments.

    Args:
        layer: number of the block, one of config.engram_layer_ids. Its primes and multipliers follow from it.
    """

    compressed: Int[Tensor, " v"]
    """Id of each token after compression; the ids themselves until `make_hash` gets others."""
    multipliers: Int[Tensor, " n"]
    primes: Int[Tensor, "o h"]
    """Number of rows of each order and head."""

    def __init__(self, config: ModelConfig | None = None, /, layer: int | None = None, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        ids = c.engram_layer_ids or ()
        self.layer: int = ids[0] if layer is None and ids else layer or 0
        require(self.layer in ids, f"block {layer} has no Engram; name it in engram_layer_ids={list(ids)}")
        self.config: ModelConfig = c
        primes, n, m = c.engram_primes(self.layer), c.hc_mult, c.dim
        width = sum(map(len, primes)) * c.engram_head_dim
        self.embed: Embedding = Embedding(sum(map(sum, primes)), c.engram_head_dim, init_std=c.init_std)
        self.wk: Projection = make_linear(c, width, n * m)
        self.wv: Projection = output_linear(c, width)
        self.q_norm: StreamNorm = StreamNorm(n, m, c.norm_eps)
        self.k_norm: StreamNorm = StreamNorm(n, m, c.norm_eps)
        self.conv_norm: StreamNorm | None = None
        self.conv: ShortConv | None = None
        if c.engram_conv_size is not None:
            self.conv_norm = StreamNorm(n, m, c.norm_eps)
            self.conv = ShortConv(c.engram_conv_size, n, m, c.engram_max_ngram_size)
        for name, shape in (("compressed", (c.vocab_size,)), ("multipliers", (len(primes) + 1,))):
            self.register_buffer(name, torch.empty(shape, dtype=torch.int64))
        self.register_buffer("primes", torch.empty(len(primes), len(primes[0]), dtype=torch.int64))
        draw_first(self)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Make the hash of ids that are not compressed."""
        self.make_hash()

    def make_hash(self, compressed: Int[Tensor, " v"] | None = None) -> None:
        """Make multipliers and primes for compressed ids; None: each token has its own.

        The multipliers are so small that no product overflows.
        """
        if self.compressed.is_meta:
            return
        c = self.config
        ids = torch.arange(c.vocab_size, device="cpu") if compressed is None else compressed
        self.compressed.copy_(ids)
        self.multipliers.copy_(multipliers(c.engram_seed, self.layer, int(ids.max()) + 1, c.engram_max_ngram_size))
        self.primes.copy_(torch.tensor(c.engram_primes(self.layer), device="cpu"))

    def forward(
        self, x: Float[Tensor, "b s *streams m"], context: Context | None
    ) -> tuple[Float[Tensor, "b s *streams m"], Context]:
        """Return the residual with what was looked up, and the context of the rest of the block.

        Raises: ValueError without ids of tokens.
        """
        if context is None or context.tokens is None:
            raise ValueError("Engram looks n-grams up by the ids of tokens and got none; give Context(tokens=...)")
        cache = context.cache
        store = None if cache is None else cache.store
        # 1. the rows of all n-grams that end at a token, side by side: [b, s, e]
        rows = self.hashed(context, None if store is None else store.ids)
        e = self.embed(rows).flatten(-3).to(x.dtype)
        # 2. how well they fit each stream: [b, s, n, 1]
        streams = x.view(*x.shape[:2], -1, x.shape[-1])
        with ops.without_autocast(streams):
            q = self.q_norm(streams)
            k = self.k_norm(self.wk(e).view_as(streams))
            fit = (q * k).sum(-1, keepdim=True) / streams.shape[-1] ** 0.5
            gate = (fit.abs().clamp(min=SMALLEST).sqrt() * fit.sign()).sigmoid()
            # 3. what they add to each stream, with that of some tokens before: [b, s, n, m]
            u = gate * self.wv(e).unsqueeze(-2)
            if self.conv is not None and self.conv_norm is not None:
                inputs = None if store is None else store.inputs
                u = u + F.silu(self.conv(self.conv_norm(u), context, inputs))
            x = (streams + u).to(x.dtype).view_as(x)
        if cache is not None and store is not None:
            context = replace(context, cache=replace(cache, store=store.attention))
        return x, context

    def hashed(self, context: Context, stored: Rows | None = None) -> Int[Tensor, "b s o h"]:
        """Return the row of each order and head for each token.

        Args:
            stored: compressed ids of the tokens before these, of a cache.
        """
        c = self.config
        n = c.engram_max_ngram_size - 1
        assert context.tokens is not None
        # fp32: a cache stores rows of numbers, and FP32 has all ids
        ids = with_earlier(self.compressed[context.tokens.long()].float().unsqueeze(-1), n, context, stored).long()
        pad, mix, rows = self.compressed[c.engram_pad_token_id], None, []
        for k in range(n + 1):
            there, seen = earlier(ids, k, context)
            term = there.where(seen, pad) * self.multipliers[k]
            mix = term if mix is None else mix ^ term
            if k:
                rows.append(mix % self.primes[k - 1])
        sizes = self.primes.flatten()
        return torch.stack(rows, -2) + (sizes.cumsum(0) - sizes).view_as(self.primes)

    def new_cache(self, attention: Any, batch_size: int, max_seq_len: int, dtype: CacheDtype, device: Any) -> Any:
        """Return the empty cache of the block: that of its attention, the latest ids, and inputs of the convolution.

        Both are rings with SLACK places more, so that the last tokens may be taken back.
        """

        def ring(reach: int, width: int, dtype: torch.dtype) -> Rows:
            return Rows(batch_size, min(reach + SLACK, max_seq_len), Numbers(width, dtype), device, tokens=None)

        c, dtype = self.config, torch.bfloat16 if dtype == "fp8" else dtype
        ids = ring(c.engram_max_ngram_size - 1, 1, torch.float32)
        inputs = ring(c.engram_reach, c.hc_mult * c.dim, dtype) if c.engram_reach else None
        return Stores(attention=attention, ids=ids, inputs=inputs)


def multipliers(seed: int, layer: int, vocab_size: int, n: int) -> Int[Tensor, " n"]:
    """Return a layer's odd numbers m_0 .. m_(n-1); each times an id below vocab_size is below 2^63.

    Source: DeepSeek-V4.1's inference code and the paper's demo.
    """
    drawn = np.random.default_rng(seed + LAYER_SEED * layer).integers(0, (2**63 - 1) // vocab_size // 2, n)
    return torch.from_numpy(2 * drawn + 1)


def with_earlier(new: Tensor, n: int, context: Context, stored: Rows | None) -> Tensor:
    """Return n rows before the new tokens, and those of these [b, s, w]: [b, n + s, w].

    Rows before the start of a sequence hold any numbers.

    Args:
        stored: rows of a cache, to which the new ones are appended.
    """
    rows = new
    if stored is not None and context.cache is not None:
        rows = stored.extend(new, context.cache.at, n, new.dtype)
    return F.pad(rows, (0, 0, n + new.shape[1] - rows.shape[1], 0))


def earlier(rows: Tensor, k: int, context: Context) -> tuple[Tensor, Bool[Tensor, "#b s 1"]]:
    """Return the row k tokens before each new token, [b, s, w], and True where that is in the token's document."""
    documents, s = context.documents, context.positions.shape[1]
    seen = context.positions >= k
    if documents is not None:
        seen = seen & (F.pad(documents, (k, 0))[:, :s] == documents)
    return rows[:, rows.shape[1] - s - k : rows.shape[1] - k], seen.unsqueeze(-1)
