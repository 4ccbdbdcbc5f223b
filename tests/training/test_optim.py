"""The optimizers, each against its definition, written out with plain loops in FP64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmini import TrainConfig, Transformer
from dsmini.numerics.orthogonalize import JORDAN, NEWTON_SCHULZ, NewtonSchulz
from dsmini.training.optim import AdamWBF16, Muon, ParameterAverage, optimizers
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, FP64_UNIT, relative_error, rounding

# Who moves what


def by_name(model: Transformer, params: list[Tensor]) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in params]  # a buffer, such as the routing bias, would have no name here


def is_plain(name: str) -> bool:
    """Norms and gates do not decay."""
    return "norm" in name or "gate" in name


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_parameter_has_one_optimizer_and_its_decay(
    small_model: Callable[..., Transformer], optimizer: Any, moments: Any
) -> None:
    model = small_model()
    groups = [
        g
        for o in optimizers(model, TrainConfig(optimizer=optimizer, moments=moments, weight_decay=0.1))
        for g in o.param_groups
    ]
    members = [by_name(model, g["params"]) for g in groups]
    assert sorted(name for group in members for name in group) == sorted(name for name, _ in model.named_parameters())
    for group, names in zip(groups, members, strict=True):
        for name in names:
            assert group["weight_decay"] == (0.0 if is_plain(name) else 0.1), name


def test_muon_moves_the_matrices_between_hidden_states(small_model: Callable[..., Transformer]) -> None:
    model = small_model()
    muon, adamw = optimizers(model, TrainConfig(optimizer="muon", muon_lr=0.5, lr=0.25, gate_lr=None))
    by_muon = set(by_name(model, [p for g in muon.param_groups for p in g["params"]]))
    by_adamw = set(by_name(model, [p for g in adamw.param_groups for p in g["params"]]))
    assert not by_muon & by_adamw
    assert by_adamw == {n for n in by_adamw | by_muon if is_plain(n) or n in ("embed.weight", "head.weight")}
    assert {"layers.1.ffn.experts.w1", "layers.0.attn.wkv_b.weight", "mtp.0.eh_proj.weight"} <= by_muon
    assert {g["peak_lr"] for g in muon.param_groups} == {0.5} and {g["peak_lr"] for g in adamw.param_groups} == {0.25}


# Muon


def orthogonal_by_hand(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps on one matrix [o, i] in FP64, of X = G / |G|, a wide one as it is, a tall one turned."""
    x = matrix.double()
    if x.shape[0] > x.shape[1]:
        return orthogonal_by_hand(x.T).T
    x = x / (math.sqrt((x * x).sum().item()) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def muon_by_hand(start: Tensor, grads: list[Tensor], lr: float, mu: float, decay: float) -> Tensor:
    """Return a matrix, or each matrix of a stack, after the steps."""
    if start.dim() == 3:
        each = [muon_by_hand(s, [g[e] for g in grads], lr, mu, decay) for e, s in enumerate(start)]
        return torch.stack(each)
    w, m = start.double(), torch.zeros_like(start, dtype=torch.float64)
    for grad in grads:
        g = grad.double()
        m = mu * m + (1 - mu) * g
        nesterov = mu * m + (1 - mu) * g
        w = w - lr * decay * w
        if not g.any():  # an unvisited expert: the remains of its momentum are not a direction
            continue
        w = w - lr * math.sqrt(max(1.0, w.shape[0] / w.shape[1])) * orthogonal_by_hand(nesterov)
    return w


SHAPES = [(8, 8), (5, 17), (17, 5), (1, 7), (7, 1), (1, 1), (63, 130), (3, 9, 5), (4, 5, 9), (1, 6, 6), (16, 4, 4)]


def drifting_gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype) -> list[Tensor]:
    common = torch.randn(shape, dtype=dtype)
    return [common + torch.randn(shape, dtype=dtype) for _ in range(steps)]


def muon_steps(
    start: Tensor, grads: list[Tensor], dtype: torch.dtype, others: bool = True, steps: NewtonSchulz = JORDAN
) -> Tensor:
    """Return the result of the shipped optimizer, among other matrices of the same and of other shapes."""
    p = nn.Parameter(start.clone())
    crowd = [nn.Parameter(torch.randn_like(start)), nn.Parameter(torch.randn(3, 2, dtype=start.dtype))]
    params = [crowd[0], p, crowd[1]] if others else [p]
    groups = [{"params": params, "weight_decay": 0.3}]
    optimizer = Muon(groups, lr=0.07, momentum=0.9, matmul_dtype=dtype, newton_schulz=steps)
    for grad in grads:
        p.grad = grad.clone()
        for other in crowd:
            other.grad = torch.randn_like(other)
        optimizer.step()
    return p.detach()


def muon_rounding(unit: float, shape: tuple[int, ...]) -> float:
    """Relative error of four steps of 0.07. Five iterations are 15 products and multiply an error by up to
    3.4445^5 = 485; an update is about as large as the parameters times 0.07, which are themselves rounded eight times.
    """
    products = 485 * rounding(unit, terms=max(shape[-2:]), chained=15)
    return 4 * 0.07 * products + rounding(unit, chained=8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muon_is_its_definition_to_the_last_bits_in_fp64(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape, dtype=torch.float64)
    grads = drifting_gradients(shape, 4, torch.float64)
    want = muon_by_hand(start, grads, lr=0.07, mu=0.9, decay=0.3)
    got = muon_steps(start, grads, torch.float64)
    assert relative_error(got, want) <= muon_rounding(FP64_UNIT, shape)


@pytest.mark.parametrize("steps", NEWTON_SCHULZ)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 17), (17, 5), (63, 130), (130, 63), (3, 9, 5), (4, 5, 9)], ids=str)
def test_first_step_of_muon_has_singular_values_near_1(shape: tuple[int, ...], dtype: torch.dtype, steps: str) -> None:
    """In BF16 no more can be tested: its rounding errors grow as much as small singular values do."""
    start, grad = torch.zeros(shape), torch.randn(shape)
    after = muon_steps(start, [grad], dtype, steps=NEWTON_SCHULZ[steps])
    moved = after / (-0.07 * math.sqrt(max(1.0, shape[-2] / shape[-1])))
    for matrix, before in zip(moved.reshape(-1, *shape[-2:]), grad.reshape(-1, *shape[-2:]), strict=True):
        values = torch.linalg.svdvals(matrix.double())
        assert values.min() >= 0.6 and values.max() <= 1.3, values
        u, _, v = torch.linalg.svd(before.double(), full_matrices=False)
        nearest = u @ v
        along = (matrix.double() * nearest).sum() / (matrix.double().norm() * nearest.norm())
        assert along > 0.97  # all spread over 0.68 to 1.2 evenly gives 0.986; BF16 turns it a little


def test_expert_that_lost_its_tokens_keeps_its_momentum() -> None:
    start = torch.randn(3, 6, 4, dtype=torch.float64)
    grads = drifting_gradients((3, 6, 4), 6, torch.float64)
    for grad in grads[2:5]:
        grad[1] = 0
    got = [muon_steps(start, grads[:n], torch.float64) for n in (2, 5, 6)]
    assert relative_error(got[1][1], got[0][1] * (1 - 0.07 * 0.3) ** 3) <= rounding(FP64_UNIT, chained=3)
    want = muon_by_hand(start, grads, lr=0.07, mu=0.9, decay=0.3)
    assert relative_error(got[2], want) <= 2 * muon_rounding(FP64_UNIT, (6, 4))
    assert relative_error(got[2][1], got[1][1]) > 0.01


# AdamW with BF16 moments


def adamw_by_hand(start: Tensor, grads: list[Tensor], lr: float, decay: float) -> tuple[Tensor, Tensor]:
    """AdamW (0.9, 0.95) in FP64 after the steps, and how far BF16 moments may be from it, element by element.

    A stored moment is rounded by at most u of itself; the error fades by beta a step. An update m / (sqrt(v) + eps) is
    wrong by |dm| / sqrt(v) + |m| dv / (2 v^1.5), and a quarter more for what is of second order.
    """
    w, m, v = start.double(), torch.zeros_like(start, dtype=torch.float64), torch.zeros_like(start, dtype=torch.float64)
    dm, dv, off = torch.zeros_like(m), torch.zeros_like(m), torch.zeros_like(m)
    for t, grad in enumerate(grads, start=1):
        g = grad.double()
        dm, dv = 0.9 * (dm + BF16_UNIT * (m.abs() + dm)), 0.95 * (dv + BF16_UNIT * (v + dv))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        one, two = 1 - 0.9**t, 1 - 0.95**t
        w = w * (1 - lr * decay) - lr * (m / one) / ((v / two).sqrt() + 1e-8)
        error = dm / v.sqrt() + m.abs() * dv / (2 * v**1.5)
        off = off * (1 - lr * decay) + 1.25 * lr * error * math.sqrt(two) / one
    return w, off


def test_adamw_bf16_is_torchs_adamw_within_rounding_of_moments() -> None:
    start = torch.randn(40, 31)
    grads = [torch.randn(40, 31) * 10 ** torch.linspace(-4, 3, 31) for _ in range(8)]
    ours, torchs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    bf16 = AdamWBF16([{"params": [ours], "weight_decay": 0.1}], lr=0.02, betas=(0.9, 0.95))
    fp32 = torch.optim.AdamW([{"params": [torchs], "weight_decay": 0.1}], lr=0.02, betas=(0.9, 0.95))
    for grad in grads:
        for p, optimizer in ((ours, bf16), (torchs, fp32)):
            p.grad = grad.clone()
            optimizer.step()
    by_hand, off = adamw_by_hand(start, grads, lr=0.02, decay=0.1)
    fp32_noise = 8 * 8 * FP32_UNIT * (start.abs().double() + 1)
    assert ((torchs.double() - by_hand).abs() <= fp32_noise).all()
    away = (ours.double() - torchs.double()).abs()
    assert (away <= off + 2 * fp32_noise).all(), (away / off).max()
    assert away.mean() > 10 * (torchs.double() - by_hand).abs().mean()  # rounded indeed: there is something to see
    state = bf16.state[ours]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    moments = {name: fp32.state[torchs][name] for name in ("exp_avg", "exp_avg_sq")}
    assert relative_error(state["exp_avg_sq"], moments["exp_avg_sq"]) <= BF16_UNIT / (1 - 0.95)


# The average of the parameters


def test_the_average_is_the_one_by_hand() -> None:
    w = nn.Parameter(torch.randn(5, 3))
    average = ParameterAverage([("w", w)], decay=0.6)
    want = w.detach().double().clone()
    by_hand = [n / (n + 9) for n in range(1, 14)]  # 1/10, 2/11, ..., 13/22
    for decay in [*by_hand, 0.6, 0.6, 0.6]:  # the next would be 14 / 23, which is more
        with torch.no_grad():
            w.add_(torch.randn(5, 3))
        want = decay * want + (1 - decay) * w.detach().double()
        average.update([("w", w)])
        assert relative_error(average.tensors["w"], want) <= rounding(FP32_UNIT, chained=3 * average.updates)
    assert average.tensors["w"].dtype == torch.float32 and not average.tensors["w"].requires_grad
