"""Manifold-constrained hyper-connections (mHC): several residual streams, mixed by doubly stochastic matrices.

A pre-norm block adds to one stream, x' = x + F(norm(x)). Here the residual is n streams X [n, m] of each token. A
sublayer F (attention or feed-forward) reads one weighted sum of them and writes to all, while the streams are mixed:

    x  = sum_i pre_i X_i                                      what F reads, after its norm
    X' = post_k F(norm(x)) + sum_j comb_jk X_j                for each stream k

All weights depend on the token, by one matrix fn over the normed streams, with a gate (scale) and a bias (base) each:

    mixes = fn vec(X) / rms(vec(X))                           n for pre, n for post, n x n for comb
    pre   = sigmoid(scale_0 mixes + base) + eps
    post  = 2 sigmoid(scale_1 mixes + base)
    comb  = Sinkhorn(scale_2 mixes + base)                    rows and columns sum to 1

Plain hyper-connections leave comb free, so that a product over many layers grows or vanishes. A doubly stochastic
matrix never magnifies (its spectral norm is 1), and products of such matrices are doubly stochastic again.

Source: mHC (arXiv 2512.24880), equations 1 to 8; DeepSeek-V4 report (arXiv 2606.19348), section 2.2. The paper's
residual matrix is the transpose of comb, as DeepSeek's code has it.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsmini import ops
from dsmini.nn.layers import FP32Module, at_least_fp32

AWAY = 0.02
"""Weight of each stream but its home that a sublayer reads at first; less with more than 26 streams."""
GATE = 0.01
"""Scale of the part of the weights that depends on the token, at first. Source: mHC, table 5."""
KEEP = 6.0
"""Logit at first of a stream's way to itself, above that to the others."""


class Mix(NamedTuple):
    """Weights by which a sublayer's output and the old streams become the new ones."""

    post: Float[Tensor, "b s n"]
    comb: Float[Tensor, "b s n n"] | None = None
    """Share of the old stream (first n) in the new one (second n); None: each stream stays as it is."""


@ops.operation("sinkhorn")
def sinkhorn(logits: Float[Tensor, "*any n n"], iterations: int, eps: float) -> Float[Tensor, "*any n n"]:
    """Return a matrix whose columns sum to 1, within about eps, and its rows the nearer the more iterations there are.

    A softmax makes rows, then columns and rows are divided by their sums in turns; columns last. eps keeps a sum from
    becoming 0, forward and backward.

    Source: Sinkhorn and Knopp 1967; mHC, equation 7.
    """
    comb = logits.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


@ops.operation("read_streams")
def read_streams(streams: Float[Tensor, "*b n m"], weights: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
    """Return the sum of the streams by weights, computed in FP32 at least, in the dtype of the streams."""
    return (weights.unsqueeze(-1) * at_least_fp32(streams)).sum(-2).to(streams.dtype)


@ops.operation("write_streams")
def write_streams(
    streams: Float[Tensor, "*b n m"],
    output: Float[Tensor, "*b m"],
    post: Float[Tensor, "*b n"],
    comb: Float[Tensor, "*b n n"] | None = None,
) -> Float[Tensor, "*b n m"]:
    """Return the sum of a sublayer's output by post, and of the old streams by comb, computed in FP32 at least."""
    mixed = at_least_fp32(streams)
    if comb is not None:
        mixed = comb.mT @ mixed  # transposed: comb_jk is the share of the old stream j in k
    return (post.unsqueeze(-1) * output.unsqueeze(-2) + mixed).to(streams.dtype)


@ops.operation("stream_mixes")
def stream_mixes(streams: Float[Tensor, "*b n m"], fn: Float[Tensor, "r nm"], eps: float) -> Float[Tensor, "*b r"]:
    """Return the product of fn with the streams of a token as one vector, by its root mean square, in FP32 at least."""
    flat = at_least_fp32(streams).flatten(-2)
    return F.linear(flat, fn.to(flat.dtype)) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


class StreamWeights(FP32Module):
    """Base of what weighs streams: rows of fn with a bias each, and a scale for each part of them.

    Args:
        dim: m, width of a stream.
        n_streams: n.
        eps: V4's hc_eps.
        norm_eps: eps of the norm of the streams.
    """

    def __init__(self, dim: int, n_streams: int = 4, *, eps: float = 1e-6, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.n: int = n_streams
        self.eps: float = eps
        self.norm_eps: float = norm_eps
        self.rows: list[int] = self.rows_of(n_streams)
        rows = sum(self.rows)
        self.fn: nn.Parameter = nn.Parameter(torch.empty(rows, n_streams * dim, dtype=torch.float32))
        self.base: nn.Parameter = nn.Parameter(torch.empty(rows, dtype=torch.float32))
        self.scale: nn.Parameter = nn.Parameter(torch.empty(len(self.rows), dtype=torch.float32))
        self.reset_parameters()

    @staticmethod
    def rows_of(n: int) -> list[int]:
        """Return the number of rows of fn for each scale."""
        return [n]

    def first_base(self) -> Float[Tensor, " r"]:
        """Return the bias of each row at first, or of more."""
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Begin with weights of which none depends on the token yet."""
        with torch.no_grad():
            self.fn.zero_()
            self.scale.fill_(GATE)
            self.base.copy_(placed_as(self.first_base()[: len(self.base)], self.base))

    def expand(self, x: Float[Tensor, "b s *streams m"]) -> Float[Tensor, "b s n m"]:
        """Return equal streams of x; x itself where it is streams."""
        return expand(x, self.n)


class HyperConnection(StreamWeights):
    """The connection of one sublayer to the streams.

    It starts as a pre-norm residual: from equal streams a sublayer reads their common value, and its output is added to
    each of them. It reads most from its home stream, so that the streams part as they learn.

    Args:
        sinkhorn_iters: divisions of rows and columns, V4's hc_sinkhorn_iters.
        home: number of a stream; sublayers in turns have others.
        sizes: as of StreamWeights.
    """

    def __init__(
        self, dim: int, n_streams: int = 4, *, sinkhorn_iters: int = 20, home: int = 0, **sizes: float
    ) -> None:
        self.sinkhorn_iters: int = sinkhorn_iters
        self.home: int = home % n_streams
        super().__init__(dim, n_streams, **sizes)

    @staticmethod
    def rows_of(n: int) -> list[int]:
        """Return the number of rows of fn for each scale: for pre, for post, and for comb row by row."""
        return [n, n, n * n]

    def first_base(self) -> Float[Tensor, " r"]:
        n = self.n
        away = min(AWAY, 0.5 / max(1, n - 1))
        pre = torch.full((n,), away, dtype=torch.float32)
        pre[self.home] = 1 - (n - 1) * away
        return torch.cat(((pre - self.eps).logit(), torch.zeros(n), KEEP * torch.eye(n).flatten()))

    def read(self, streams: Float[Tensor, "b s n m"]) -> tuple[Float[Tensor, "b s m"], Mix]:
        """Return what the sublayer reads, and the weights of what it will write."""
        with ops.without_autocast(streams):
            mixes = stream_mixes(streams, self.fn, self.norm_eps).split(self.rows, -1)
            parts = zip(self.scale, mixes, self.base.split(self.rows), strict=True)
            pre, *rest = (scale * mix + base for scale, mix, base in parts)
            return read_streams(streams, pre.sigmoid() + self.eps), self.mix_of(*rest)

    def mix_of(self, post: Float[Tensor, "b s n"], comb: Float[Tensor, "b s nn"]) -> Mix:
        """Return the weights of what the sublayer will write, from their logits."""
        comb = comb.unflatten(-1, (self.n, self.n))
        return Mix(2 * post.sigmoid(), sinkhorn(comb, self.sinkhorn_iters, self.eps))

    def write(
        self, streams: Float[Tensor, "b s n m"], output: Float[Tensor, "b s m"], mix: Mix
    ) -> Float[Tensor, "b s n m"]:
        """Return the new streams: a sublayer's output, and the old streams mixed."""
        with ops.without_autocast(streams):
            return write_streams(streams, output, mix.post, mix.comb)


class IdentityConnection(HyperConnection):
    """The connection of Hunyuan V4: the streams are not mixed, so that no part of fn and no Sinkhorn makes comb.

        post = 2 sigmoid(scale_1 mixes + base) + eps              V4 adds no eps
        X'_k = post_k F(norm(x)) + X_k

    Streams meet only in what a sublayer reads. No product of matrices can grow, whatever the depth. It starts as
    HyperConnection does; Hunyuan V4 itself reads 1/n of each stream at first, from rows of fn that are not zero.

    Source: transformers' hy_v4, HYV4HyperConnection, with its hc_magnitude of 2.
    """

    @staticmethod
    def rows_of(n: int) -> list[int]:
        """Return the number of rows of fn for each scale: for pre and for post."""
        return [n, n]

    def mix_of(self, post: Float[Tensor, "b s n"]) -> Mix:
        return Mix(2 * post.sigmoid() + self.eps)


def placed_as(value: Tensor, like: Tensor) -> Tensor:
    """Return a value, divided over the processes that a parameter is divided over (FSDP2)."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), mesh, like.placements)  # pyright: ignore[reportAttributeAccessIssue]


def expand(x: Float[Tensor, "b s *streams m"], n_streams: int) -> Float[Tensor, "b s n m"]:
    """Return equal streams of x; x itself where it is streams."""
    return x if x.dim() == 4 else x.unsqueeze(-2).expand(*x.shape[:-1], n_streams, x.shape[-1])


class StreamHead(StreamWeights):
    """The ends of the streams: equal streams of an embedding, and their weighted sum before the last norm.

    The sum starts as the mean.
    """

    def first_base(self) -> Float[Tensor, " n"]:
        share = 1 / self.n - self.eps
        return torch.full((self.n,), math.log(share / (1 - share)), dtype=torch.float32)

    def collapse(self, streams: Float[Tensor, "b s n m"]) -> Float[Tensor, "b s m"]:
        """Return one hidden state of each position's streams."""
        with ops.without_autocast(streams):
            mixes = stream_mixes(streams, self.fn, self.norm_eps)
            return read_streams(streams, (self.scale * mixes + self.base).sigmoid() + self.eps)
