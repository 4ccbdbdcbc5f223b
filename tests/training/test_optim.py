"""The optimizers, each against its definition, written out with plain loops in FP64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmini import TrainConfig, Transformer
from dsmini.training.muon import JORDAN
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
    config = TrainConfig(optimizer=optimizer, moments=moments, weight_decay=0.1)
    groups = [group for of in optimizers(model, config) for group in of.param_groups]
    members = [by_name(model, g["params"]) for g in groups]
    assert sorted(name for group in members for name in group) == sorted(name for name, _ in model.named_parameters())
    for group, names in zip(groups, members, strict=True):
        for name in names:
            assert group["weight_decay"] == (0.0 if is_plain(name) else 0.1), name


@pytest.mark.parametrize(
    ("given", "tables", "indexer", "gate"),
    [
        ({}, 0.03, 0.003, 0.001),
        ({"gate_lr": None}, 0.03, 0.003, 0.003),
        ({"optimizer": "adamw"}, 0.003, 0.003, 0.001),
        ({"lr": 0.5, "gate_lr": None}, 0.5, 0.5, 0.5),
    ],
)
def test_left_out_learning_rate_is_larger_for_tables_next_to_muon(
    small_model: Callable[..., Transformer], given: dict[str, Any], tables: float, indexer: float, gate: float
) -> None:
    model = small_model(attention="dsa", index_n_heads=2, index_head_dim=16, index_topk=8)
    for of in optimizers(model, TrainConfig(**given)):
        for group in (group for group in of.param_groups if not isinstance(of, Muon)):
            for name in by_name(model, group["params"]):
                want = gate if name.endswith("gate.weight") else indexer if ".indexer." in name else tables
                assert group["peak_lr"] == want, name


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


def muon_steps(start: Tensor, grads: list[Tensor]) -> Tensor:
    """Return the result of the shipped optimizer, among other matrices of the same and of other shapes."""
    p = nn.Parameter(start.clone())
    crowd = [nn.Parameter(torch.randn_like(start)), nn.Parameter(torch.randn(3, 2, dtype=start.dtype))]
    groups = [{"params": [crowd[0], p, crowd[1]], "weight_decay": 0.3}]
    optimizer = Muon(groups, lr=0.07, momentum=0.9, matmul_dtype=torch.float64, newton_schulz=JORDAN)
    for grad in grads:
        p.grad = grad.clone()
        for other in crowd:
            other.grad = torch.randn_like(other)
        optimizer.step()
    return p.detach()


def muon_rounding(shape: tuple[int, ...]) -> float:
    """Relative error of four steps of 0.07. Five iterations are 15 products and multiply an error by up to
    3.4445^5 = 485; an update is about as large as the parameters times 0.07, which are themselves rounded eight times.
    """
    products = 485 * rounding(FP64_UNIT, terms=max(shape[-2:]), chained=15)
    return 4 * 0.07 * products + rounding(FP64_UNIT, chained=8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muon_is_its_definition_to_the_last_bits_in_fp64(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape, dtype=torch.float64)
    grads = drifting_gradients(shape, 4, torch.float64)
    want = muon_by_hand(start, grads, lr=0.07, mu=0.9, decay=0.3)
    got = muon_steps(start, grads)
    assert relative_error(got, want) <= muon_rounding(shape)


def test_expert_that_lost_its_tokens_keeps_its_momentum() -> None:
    start = torch.randn(3, 6, 4, dtype=torch.float64)
    grads = drifting_gradients((3, 6, 4), 6, torch.float64)
    for grad in grads[2:5]:
        grad[1] = 0
    got = [muon_steps(start, grads[:n]) for n in (2, 5, 6)]
    assert relative_error(got[1][1], got[0][1] * (1 - 0.07 * 0.3) ** 3) <= rounding(FP64_UNIT, chained=3)
    want = muon_by_hand(start, grads, lr=0.07, mu=0.9, decay=0.3)
    assert relative_error(got[2], want) <= 2 * muon_rounding((6, 4))
    assert relative_error(got[2][1], got[1][1]) > 0.01


# AdamW with BF16 moments


def test_adamw_bf16_is_torchs_adamw_whose_moments_are_rounded_after_each_step() -> None:
    start = torch.randn(40, 31)
    ours, torchs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    bf16 = AdamWBF16([{"params": [ours], "weight_decay": 0.1}], lr=0.02, betas=(0.9, 0.95))
    fp32 = torch.optim.AdamW([{"params": [torchs], "weight_decay": 0.1}], lr=0.02, betas=(0.9, 0.95))
    for steps in range(1, 9):
        grad = torch.randn(40, 31) * 10 ** torch.linspace(-4, 3, 31)
        for p, optimizer in ((ours, bf16), (torchs, fp32)):
            p.grad = grad.clone()
            optimizer.step()
        assert ((ours - torchs).abs() <= steps * 8 * FP32_UNIT * (start.abs() + 1)).all()
        for name in ("exp_avg", "exp_avg_sq"):
            stored, exact = bf16.state[ours][name], fp32.state[torchs][name]
            noise = 8 * FP32_UNIT * (exact.abs() + grad.abs())  # what moments of other signs cancel is lost in noise
            assert stored.dtype == torch.bfloat16 and not torch.equal(stored.float(), exact)
            assert ((stored - exact).abs() <= BF16_UNIT * exact.abs() + noise).all()
            exact.copy_(stored)


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
