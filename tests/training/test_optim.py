"""The optimizers, each against its definition, written out with plain loops in FP64; and Muon's iterations."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import einsum
from torch import Tensor, nn

from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.measure.costs import cost_of
from dsmini.nn import Context
from dsmini.ops import Call
from dsmini.training import muon
from dsmini.training.muon import HALLEY, JORDAN, NEWTON_SCHULZ, V4, MuonMatrices, NewtonSchulz, orthogonalize
from dsmini.training.optim import LARGEST_BETA_BF16, AdamWBF16, Muon, ParameterAverage, optimizers
from dsmini.training.qk_clip import clip_logits, largest_logits
from tests.conftest import SMALL
from tests.helpers.configs import DSA, V4_MODEL, refusal
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, FP64_UNIT, relative_error, rounding
from tests.helpers.watching import Operations

Build = Callable[..., Transformer]

# Who moves what


def movers(model: Transformer, **recipe: Any) -> dict[str, tuple[type, float, float]]:
    """Return the optimizer, learning rate and decay of each parameter, which has no other one."""
    names, found = {id(p): name for name, p in model.named_parameters()}, {}
    for of in optimizers(model, TrainConfig(**recipe)):
        for group in of.param_groups:
            mine = {names[id(p)]: (type(of), group["peak_lr"], group["weight_decay"]) for p in group["params"]}
            assert not mine.keys() & found.keys()
            found |= mine
    assert found.keys() == set(names.values())
    return found


def is_plain(name: str) -> bool:
    """Norms and gates do not decay, and Muon does not move them."""
    return "norm" in name or "gate" in name


@pytest.mark.parametrize(
    ("given", "tables", "indexer", "gate"),
    [
        ({}, 0.03, 0.003, 0.001),
        ({"gate_lr": None}, 0.03, 0.003, 0.003),
        ({"optimizer": "adamw"}, 0.003, 0.003, 0.001),
        ({"optimizer": "adamw", "moments": "bfloat16"}, 0.003, 0.003, 0.001),
        ({"lr": 0.5, "gate_lr": None}, 0.5, 0.5, 0.5),
        ({"lr": 1e-5}, 1e-5, 1e-5, 1e-5),
    ],
)
def test_default_rates_and_decays_of_each_parameter(
    small_model: Build, given: dict[str, Any], tables: float, indexer: float, gate: float
) -> None:
    model = small_model(attention="dsa", index_n_heads=2, index_head_dim=16, index_topk=8)
    for name, (optimizer, lr, decay) in movers(model, weight_decay=0.1, **given).items():
        assert decay == (0.0 if is_plain(name) else 0.1), name
        want = gate if name.endswith("gate.weight") else indexer if ".indexer." in name else tables
        assert lr == want or (optimizer is Muon and ".indexer." not in name), name


def test_muon_moves_the_matrices_between_hidden_states(small_model: Build) -> None:
    found = movers(small_model(), optimizer="muon", muon_lr=0.5, lr=0.25, gate_lr=None)
    for name, (optimizer, lr, _) in found.items():
        by_muon = not is_plain(name) and name not in ("embed.weight", "head.weight")
        assert (optimizer is Muon) == by_muon and lr == (0.5 if by_muon else 0.25), name
    assert {"layers.1.ffn.experts.w1", "layers.0.attn.wkv_b.weight", "mtp.0.eh_proj.weight"} <= found.keys()


def test_adamw_moves_what_weighs_in_v4_at_the_rate_of_gates() -> None:
    model = Transformer(ModelConfig(**SMALL | V4_MODEL))
    found = movers(model, optimizer="muon", lr=0.5, gate_lr=0.25, weight_decay=0.1)
    for end in ("hc_attn.fn", "hc_ffn.base", "hc_ffn.scale", "hc_head.fn", ".gate.weight", "attn_sink", "ape"):
        weighing = {name: found[name][1:] for name in found if name.endswith(end) and ".indexer." not in name}
        assert weighing == dict.fromkeys(weighing, (0.25, 0.0)) and weighing, end
    assert found["layers.1.attn.indexer.compressor.ape"][1:] == (0.5, 0.0), "indexers have a rate of their own"
    assert found["layers.1.attn.indexer.wq_b.weight"][1:] == (0.5, 0.1) and found["norm.weight"][1:] == (0.5, 0.0)
    for name in ("layers.2.attn.compressor.wgate.weight", "mtp.0.e_proj.weight", "mtp.0.h_proj.weight"):
        assert found[name][0] is Muon, name


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


# Muon's iterations, which bring singular values near 1


def spectrum(steps: NewtonSchulz, values: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the singular values that the steps make of these."""
    n = len(values)
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for _ in range(2))
    g = ((u * values) @ v).to(dtype)
    return torch.linalg.svdvals(orthogonalize(g[None], steps)[0].double())


def test_steps_bring_singular_values_near_1() -> None:
    """Two of Halley's steps come closer than five of Jordan's, for singular values whose squares add up to 1."""
    for steps, low, least in ((JORDAN, 0.0021, 0.68), (JORDAN, 0.003, 0.68), (HALLEY, 0.001, 0.9629)):
        small = torch.logspace(math.log10(low), -1, 39, dtype=torch.float64)
        values = spectrum(steps, torch.cat([small, (1 - small.square().sum()).sqrt()[None]]))
        assert values.min() >= least and values.max() <= (1.21 if steps is JORDAN else 1 + 1e-9)


def test_v4s_ten_steps_end_at_1() -> None:
    """Eight of Jordan's and two that end at 1: within 1 % from 2.4e-5 of the norm on, within 0.06 % from 1e-3 on."""
    assert NEWTON_SCHULZ["v4"] is V4 and len(V4.coefficients) == 10
    for low, most in ((2.4e-5, 0.01), (1e-3, 6e-4)):
        small = torch.logspace(math.log10(low), -1, 39, dtype=torch.float64)
        values = spectrum(V4, torch.cat([small, (1 - small.square().sum()).sqrt()[None]]))
        assert (values - 1).abs().max() <= most


def test_halley_in_fp32_holds_its_bound_where_it_is_hardest() -> None:
    """One or some large values, and all others at the lower end of the interval, where X X^T rounds most."""
    for n, large, low in ((4, 1, 1e-3), (33, 1, 1.001e-3), (64, 2, 1e-3), (192, 1, 1e-3), (96, 48, 2e-3)):
        small = torch.full((n - large,), low, dtype=torch.float64)
        values = torch.cat([((1 - small.square().sum()) / large).sqrt().expand(large), small])
        got = spectrum(HALLEY, values, torch.float32)
        assert got.min() >= 0.96 and got.max() <= 1 + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_singular_values_stay_equal(dtype: torch.dtype) -> None:
    """All at the upper end of the interval, where rounding may lead beyond it."""
    one = torch.cat([torch.ones(1), torch.full((39,), 1e-3)]).double()
    for values in (torch.ones(40, dtype=torch.float64), one):
        assert spectrum(HALLEY, values, dtype).max() <= 1.02


@pytest.mark.parametrize("steps", [JORDAN, HALLEY, V4], ids=["jordan", "halley", "v4"])
def test_zeros_and_tiny_numbers_stay_finite(steps: NewtonSchulz) -> None:
    for size in (0.0, 1e-30, 1e-12, 1e12):
        got = orthogonalize(size * torch.randn(2, 3, 4), steps)
        assert got.isfinite().all() and bool(got.any()) == bool(size)


def test_cost_counts_half_of_the_symmetric_products() -> None:
    p = torch.zeros(2, 5, 3)
    matrices = MuonMatrices(params=[p], grads=[p], momenta=[p])
    options: Any = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "matmul_dtype": torch.float32}
    cost = cost_of(Call("muon_update", (matrices, NewtonSchulz(((1.0, 0.0, 0.0),))), options, None))
    # 3 x 3 entries, 6 of them different: sums of 5 and of 3 terms; then 3 x 5 sums of 3
    assert cost.flops == 2 * 2 * (6 * 5 + 6 * 3 + 15 * 3)
    assert (cost.read, cost.written) == (3 * p.nbytes, 2 * p.nbytes)
    cost = cost_of(Call("muon_update", (matrices, HALLEY), options, None))
    # X X^T and X's product as above, two inverses of 3 x 3, and of S and of all factors one product of 6 entries each
    assert cost.flops == 2 * 2 * (6 * 5 + 15 * 3 + 2 * 6 * 3) + 2 * 2 * 27


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


@pytest.mark.parametrize(("beta2", "falls"), [(LARGEST_BETA_BF16, True), (LARGEST_BETA_BF16 + 2e-4, False)])
def test_largest_beta_lets_every_bf16_moment_fall(beta2: float, falls: bool) -> None:
    p = nn.Parameter(torch.zeros(128))
    optimizer = AdamWBF16([p], lr=0.02, betas=(0.9, beta2))
    p.grad = torch.zeros(128)
    optimizer.step()
    every = optimizer.state[p]["exp_avg_sq"]
    every.copy_(before := torch.arange(128) / 128 + 1)  # all mantissas
    optimizer.step()
    assert bool((every.float() < before).all()) == falls


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


def test_inverse_roots_off_the_cpu_are_of_the_whole_stack_at_once() -> None:
    """A GPU would start a kernel for each operation; a CPU cuts matrices in halves, hundreds of operations."""
    counts = {}
    for device in ("meta", "cpu"):
        square = torch.eye(256, device=device).expand(2, -1, -1)
        with Operations() as watched:
            assert muon._inverse_root(square).shape == square.shape
        counts[device] = len(watched.results)
    assert counts["meta"] < 10 < counts["cpu"]


# --- QK-clip scales all logits of a head by its factor, leaves other heads alone, and holds the threshold in training

CASES: dict[str, dict[str, Any]] = {
    "mla": {},
    "no query compression": {"q_lora_rank": None},
    "yarn": {"original_seq_len": 8, "rope_factor": 4.0},
    "dsa": DSA,
}


def model_of(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL | changes))
    for name, p in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(p, std=3 * p.shape[-1] ** -0.5)
    return model.eval()


def logits_of(layer: Any, x: Tensor) -> Tensor:
    """Return the scaled logits [h, s, t] of one sequence, from the layer's own projections."""
    cos_sin = Context(positions=torch.arange(x.shape[1])[None]).cos_sin(layer.rope)
    q = layer.queries(layer.query_latent(x), cos_sin)
    k, _ = layer.keys_and_values(*layer.latents(x, cos_sin))
    return (einsum(q, k, "b s h d, b t h d -> b h s t") * layer.scale)[0].detach()


@pytest.mark.parametrize("case", CASES)
def test_all_logits_of_a_head_scale_by_its_factor(case: str) -> None:
    model, tokens = model_of(**CASES[case]), torch.randint(61, (1, 32))
    with largest_logits(model) as most:
        model(tokens)
    assert set(most) == {"layers.0.attn", "layers.1.attn"}
    layer, x = model.layers[0].attn, torch.randn(1, 9, 24)
    before, largest = logits_of(layer, x), most["layers.0.attn"]
    seen = torch.ones(32, 32).tril().bool()
    embedded = model.layers[0].attn_norm(model.embedded(tokens))
    torch.testing.assert_close(largest, logits_of(layer, embedded)[:, seen].amax(1))
    threshold = float(largest.sort().values[1]) - 1e-4  # two heads of three are above it
    values = layer.wkv_b.weight.unflatten(0, (3, -1))[:, 6:].clone()
    clip_logits(model, {"layers.0.attn": largest}, threshold)
    g = (threshold / largest).clamp(max=1)
    assert sorted((g < 1).tolist()) == [False, True, True]
    torch.testing.assert_close(logits_of(layer, x), before * g[:, None, None], rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.wkv_b.weight.unflatten(0, (3, -1))[:, 6:], values), "values stay"
    with largest_logits(model) as after:
        model(tokens)
    assert float(after["layers.0.attn"].max()) == pytest.approx(threshold, rel=1e-4)


def test_the_largest_of_several_forwards_and_of_a_document_alone() -> None:
    model, tokens = model_of(n_mtp_layers=0), torch.randint(61, (2, 32))
    every: list[Tensor] = []
    for part in tokens.split(1):
        with largest_logits(model) as most:
            model(part)
        every.append(most["layers.1.attn"])
    with largest_logits(model) as both:
        model(tokens[:1])
        model(tokens[1:])
    torch.testing.assert_close(both["layers.1.attn"], torch.maximum(*every))
    documents = torch.arange(32)[None].expand(2, -1).contiguous()  # each token sees itself alone
    with largest_logits(model) as alone:
        model.states(tokens, documents=documents)
    layer, rows = model.layers[0], tokens.split(1)
    own = [logits_of(layer.attn, layer.attn_norm(model.embedded(row))).diagonal(dim1=1, dim2=2).amax(1) for row in rows]
    torch.testing.assert_close(alone["layers.0.attn"], torch.maximum(*own), rtol=1e-4, atol=1e-4)


def test_what_it_does_not_go_with_is_refused() -> None:
    run = RunConfig(train=dataclasses.replace(RunConfig().train, qk_clip=100.0))
    for model in (V4_MODEL, {"attention": "mha"}, {"qk_norm": True}):
        assert "train.qk_clip looks at" in refusal(dataclasses.replace, run, model=ModelConfig(**model))
    assert "train.qk_clip looks at" in refusal(
        dataclasses.replace, run, train=dataclasses.replace(run.train, compile=True)
    )
    assert "one process" in refusal(run.parallel.check, run.model, run.train, 2)
