"""Hyper-connections: the start as a pre-norm residual, doubly stochastic mixing, dtypes."""

import inspect

import pytest
import torch
from torch import nn

from dsmini.nn.hyper_connections import HyperConnection, StreamHead, expand, sinkhorn
from dsmini.nn.residual import CONNECTIONS

B, S, N, M = 2, 5, 4, 16


@pytest.mark.parametrize("kind", CONNECTIONS)
@pytest.mark.parametrize("n", [2, N, 64])
def test_starts_as_a_pre_norm_residual(n: int, kind: str) -> None:
    """Three sublayers with other homes: their streams stay equal to the plain residual."""
    x, layers = torch.randn(B, S, M), [nn.Linear(M, M) for _ in range(3)]
    streams, head = expand(x, n), StreamHead(M, n)
    for i, layer in enumerate(layers):
        connection = CONNECTIONS[kind](M, n, home=i)
        read, mix = connection.read(streams)
        torch.testing.assert_close(read, x, rtol=1e-5, atol=1e-5)
        streams, x = connection.write(streams, layer(read), mix), x + layer(x)
    torch.testing.assert_close(streams, expand(x, n), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.collapse(streams), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "scales"), [("sinkhorn", 3), ("identity", 2)])
def test_streams_part_as_they_learn(kind: str, scales: int) -> None:
    """The gradients of pre differ between a home and the others, and those of fn are not zero."""
    connection = CONNECTIONS[kind](M, N, home=2)
    assert connection.base[:N].argmax() == 2
    assert connection.scale.tolist() == pytest.approx([0.01] * scales), "mHC, table 5"
    streams = torch.randn(B, S, N, M)
    read, mix = connection.read(streams)
    connection.write(streams, read.tanh(), mix).square().sum().backward()
    grads = connection.base.grad
    assert grads is not None and connection.fn.grad is not None and connection.fn.grad.abs().max() > 0
    assert len({round(float(g), 6) for g in grads[:N]}) == N


def test_streams_of_fp64_meet_weights_of_fp32() -> None:
    """As with compute_dtype=torch.float64, or torch's default dtype."""
    streams = torch.randn(B, S, N, M)
    connection = HyperConnection(M, N)
    for read in (lambda x: connection.read(x)[0], StreamHead(M, N).collapse):
        want, got = read(streams), read(streams.double())
        assert got.dtype == torch.float64
        torch.testing.assert_close(got.float(), want)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_mixing_is_doubly_stochastic(spread: float) -> None:
    comb = sinkhorn(spread * torch.randn(50, N, N), 20, 1e-6)
    assert bool((comb >= 0).all())
    torch.testing.assert_close(comb.sum(-2), torch.ones(50, N), rtol=0, atol=1e-4)
    slack = 1e-4 if spread < 5 else 0.05  # far from uniform, rows converge slowly
    torch.testing.assert_close(comb.sum(-1), torch.ones(50, N), rtol=0, atol=slack)


@pytest.mark.slow
def test_compiled_sinkhorn_has_finite_gradients() -> None:
    """Logits as far apart as FP32's exponential allows, where a fused backward has been seen to overflow."""
    logits = (40 * torch.randn(64, N, N)).requires_grad_()
    weights = torch.randn(64, N, N)
    (plain,) = torch.autograd.grad((weights * sinkhorn(logits, 20, 1e-6)).sum(), logits)
    fused = torch.compile(inspect.unwrap(sinkhorn))
    (compiled,) = torch.autograd.grad((weights * fused(logits, 20, 1e-6)).sum(), logits)
    assert bool(compiled.isfinite().all())
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)


def test_head_starts_as_the_mean() -> None:
    streams = torch.randn(B, S, N, M)
    torch.testing.assert_close(StreamHead(M, N).collapse(streams), streams.mean(-2), rtol=1e-5, atol=1e-6)
