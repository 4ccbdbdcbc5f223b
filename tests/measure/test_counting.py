"""Counted bytes and FLOPs: each rule by hand, whole steps against torch's counter and the config."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import steps
from benchmarks.case import Setting
from benchmarks.shapes import QUICK
from benchmarks.steps import check_bandwidth, step_figures
from dsmini import ModelConfig, Transformer, accounting, ops, quantize
from dsmini.functional import causal_attention
from dsmini.measure import prediction
from dsmini.measure.calibration import load_or_measure
from dsmini.measure.counting import Count, CountedOperation, count
from dsmini.measure.rates import Curve, Roofs, flops_rate, point_seconds, product_rate
from tests.conftest import randomise
from tests.helpers.questions import made_up_roofs

F4, I8 = 4, 8


def only(run: Callable[[], object]) -> CountedOperation:
    counted = count(run).operations
    assert len(counted) == 1, [op.name for op in counted]
    return counted[0]


X, Y = torch.rand(6, 10), torch.rand(6, 10)
TABLE, ROWS = torch.rand(50, 10), torch.tensor([3, 3, 7])
BYTES: dict[str, tuple[Callable[[], object], int, int]] = {
    "out of place": (lambda: X + Y, 2 * 60 * F4, 60 * F4),
    "in place": (lambda: X.add_(Y), 2 * 60 * F4, 60 * F4),
    "overwritten": (lambda: X.copy_(Y), 60 * F4, 60 * F4),
    "filled": (lambda: X.zero_(), 0, 60 * F4),
    "expanded": (lambda: X + Y[:1].expand(6, 10), 70 * F4, 60 * F4),
    "a row": (lambda: X + Y[0], 70 * F4, 60 * F4),
    "cast": (lambda: X.bfloat16(), 60 * F4, 60 * 2),
    "gathered": (lambda: TABLE.index_select(0, ROWS), 30 * F4 + 3 * I8, 30 * F4),
    "embedded": (lambda: F.embedding(ROWS, TABLE), 30 * F4 + 3 * I8, 30 * F4),
    "indexed": (lambda: TABLE[ROWS], 30 * F4 + 3 * I8, 30 * F4),
    "product": (lambda: X @ Y.T, 2 * 60 * F4, 36 * F4),
    "joined": (lambda: torch.cat((X, Y)), 2 * 60 * F4, 120 * F4),
}


@pytest.mark.parametrize("what", BYTES)
def test_bytes_by_hand(what: str) -> None:
    run, read, written = BYTES[what]
    op = only(run)
    assert (op.read, op.written) == (read, written)


MASK = torch.rand(6, 10) < 0.3
SCATTERED: dict[str, tuple[Callable[[], object], int, int]] = {
    "masked": (lambda: X.masked_fill_(MASK, 0.0), 60, int(MASK.sum()) * F4),
    "rows filled": (lambda: TABLE.clone().index_fill_(0, ROWS, 1.0), 3 * I8, 30 * F4),
    "a row set": (lambda: TABLE.clone().index_put_((ROWS[1:],), torch.tensor(1.0)), 2 * I8 + F4, 20 * F4),
    "masked rows set": (lambda: TABLE.clone().index_put_((torch.arange(50) < 3,), X[:3]), 50 + 30 * F4, 30 * F4),
    "added where named": (
        lambda: TABLE.clone().index_put_((ROWS,), X[:3], accumulate=True),
        3 * I8 + 2 * 30 * F4,
        30 * F4,
    ),
    "scattered": (lambda: X.scatter_(1, ROWS[None], Y[:1, :3]), 3 * I8 + 3 * F4, 3 * F4),
    "a number scattered": (lambda: X.scatter_(1, ROWS[None], 1.0), 3 * I8, 3 * F4),
    "rows added": (lambda: TABLE.clone().index_add_(0, ROWS, X[:3]), 3 * I8 + 2 * 30 * F4, 30 * F4),
}


@pytest.mark.parametrize("what", SCATTERED)
def test_scattering_moves_what_is_named(what: str) -> None:
    run, read, written = SCATTERED[what]
    op = count(run).operations[-1]
    assert (op.read, op.written) == (read, written)


def test_in_inference_mode_the_same_is_counted() -> None:
    model = randomise(Transformer(CONFIG)).eval()
    tokens = torch.randint(0, 96, (2, 70))
    with torch.no_grad():
        plain = count(lambda: model(tokens))
    with torch.inference_mode():
        whole = count(lambda: model(tokens))
    assert whole.flops == plain.flops > 0
    assert 0.9 < whole.bytes / plain.bytes <= 1  # there torch computes a norm with other operations


def test_a_fused_optimizer_reads_gradients_and_leaves_them() -> None:
    p = torch.nn.Parameter(torch.rand(1000))
    adamw = torch.optim.AdamW([p], fused=True)
    p.grad = torch.rand(1000)
    adamw.step()
    (op,) = [op for op in count(adamw.step).operations if op.name == "_fused_adamw_"]
    assert abs(op.written - 3 * 4000) <= 8
    assert abs(op.read - 4 * 4000) <= 8


def test_views_and_room_are_free_but_are_calls() -> None:
    counted = count(lambda: torch.empty(4, 4).view(16).unsqueeze(0).expand(3, 16).transpose(0, 1).detach())
    assert not counted.operations
    assert counted.views >= 5


def test_experts_without_rows_are_not_read() -> None:
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    x, w = torch.rand(12, 16), torch.rand(4, 16, 8)
    ends = torch.tensor([5, 5, 12, 12], dtype=torch.int32)
    op = only(lambda: F.grouped_mm(x, w, offs=ends))
    assert op.read == 12 * 16 * F4 + 2 * 16 * 8 * F4 + 4 * 4
    assert op.written == 12 * 8 * F4
    assert op.flops == 2 * 12 * 16 * 8
    assert op.kind == "grouped product"


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_is_counted_with_causality(causal: bool) -> None:
    q, k, v = (torch.rand(2, 3, 200, 16, requires_grad=True) for _ in range(3))
    with Count() as forward:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with Count() as backward:
        y.sum().backward()
    pairs = 200 * 201 // 2 if causal else 200 * 200
    assert forward.flops == 2 * 6 * pairs * 32
    assert backward.flops == 5 * 6 * pairs * 32


def test_products_as_torch_counts_them() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 8))
    x = torch.rand(5, 7, 16)

    def step() -> None:
        y = layers(x)
        (y @ y.mT).sum().backward()

    with FlopCounterMode(display=False) as theirs:
        step()
    assert count(step).flops == theirs.get_total_flops() > 0


def test_a_cache_keeps_what_was_used_last() -> None:
    """Use sums, which write only four bytes, so that cold bytes are those read."""
    a, b, c, large = (torch.rand(n) for n in (1000, 1000, 1000, 3000))
    for room, order, warm in (
        (1 << 20, (a, b, c, a, b, c), (False, False, False, True, True, True)),
        (8100, (a, b, b, a, c, a, b), (False, False, True, True, False, True, False)),
        (8100, (large, a, a, large, large), (False, False, True, False, False)),
    ):
        with Count(room) as counted:
            results = [x.sum() for x in order]
        assert [op.cold < 4000 for op in counted.operations] == list(warm)
        del results


@pytest.mark.parametrize("shapes", [((1, 64), (64, 512)), ((512, 64), (64, 1))])
def test_a_row_is_a_row_on_either_side(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    a, b = map(torch.rand, shapes)
    op = only(lambda: a @ b)
    assert op.rows == 1 and op.flops == 2 * 64 * 512


def test_a_bandwidth_far_above_the_roof_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10e9
    monkeypatch.setattr(steps, "read_bandwidth", lambda device: now)
    machine = dataclasses.replace(roofs(), bandwidth=10e9, copy=8e9)
    setting = Setting(quick=True, device=torch.device("cpu"), dtype=torch.float32, roofs=machine)
    assert check_bandwidth("x", 9.9e9, setting) == 10e9
    assert check_bandwidth("x", 12.4e9, setting) == 10e9, "a kernel may read faster than a sum"
    with pytest.raises(ValueError, match=r"x: 12.6 GB/s from memory is above the roof of 10.0: .* --fresh"):
        check_bandwidth("x", 12.6e9, setting)
    now = 20e9
    assert check_bandwidth("x", 19e9, setting) == now, "the stored roof was measured on a busy machine"
    slowed = iter([10e9, 11e9, 19e9])
    monkeypatch.setattr(steps, "read_bandwidth", lambda device: next(slowed))
    assert check_bandwidth("x", 20e9, setting) == 19e9, "other programs slowed the first readings"
    assert not [*slowed], "a reading that is enough is the last"
    monkeypatch.setattr(steps, "read_bandwidth", lambda device: now)
    now = 9e9
    assert check_bandwidth("x", 12.4e9, setting) == 10e9
    counted = count(lambda: torch.rand(1 << 16) * 2, 1 << 10)
    moved = sum(op.cold for op in counted.operations)
    figures = {f.metric: f for f in step_figures("q", {}, counted, [moved / 9e9] * 3, 2, setting, flops_bound=50.0)}
    assert figures["bandwidth"].measured == pytest.approx(9e9) and figures["bandwidth"].bound
    assert figures["useful_share"].measured == pytest.approx(50.0 * 2 / (moved / 9e9) / 1e11)
    with pytest.raises(ValueError, match="above the roof"):
        list(step_figures("q", {}, counted, [moved / 13e9] * 3, 2, setting, flops_bound=50.0))


CONFIG = ModelConfig(
    vocab_size=96,
    dim=64,
    inter_dim=128,
    moe_inter_dim=32,
    n_layers=3,
    n_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=16,
    n_mtp_layers=0,
    max_seq_len=512,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seq_len", [100, 256])
def test_flops_of_a_training_step_are_the_configs(
    seq_len: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allow 1 % for one block of queries without padding; padding and masks add FLOPs otherwise."""
    monkeypatch.setattr(causal_attention, "BLOCK", 128)
    model = randomise(Transformer(CONFIG, compute_dtype=dtype))
    tokens, targets = torch.randint(0, 96, (2, 4, seq_len)).unbind()
    counted = count(lambda: model.losses(tokens, targets).total.backward())
    least, square = (
        accounting.step_flops(CONFIG, batch_size=4, seq_len=seq_len, causal=causal).total for causal in (True, False)
    )
    assert 1 <= counted.flops / least < 1.4
    if (seq_len, dtype) == (100, torch.float32):
        assert abs(counted.flops / square - 1) < 0.01


@pytest.mark.parametrize("batch", [1, 5])
@torch.no_grad()
def test_bytes_and_flops_of_a_decoding_step_are_bounded(batch: int) -> None:
    config = dataclasses.replace(QUICK, n_layers=2, vocab_size=256, max_seq_len=512)
    model = randomise(Transformer(config)).bfloat16()
    cache = model.new_cache(batch, 512)
    model(torch.randint(0, 256, (batch, 150)), cache)
    token = torch.randint(0, config.vocab_size, (batch, 1))

    def step() -> None:
        cache.truncate(150)
        model(token, cache)

    step()
    counted = count(step)
    cache.truncate(150)
    experts = [(r.counts > 0).sum().item() for r in model.run(token, cache=cache).routing]
    least = accounting.decode_bytes_per_token(config, context=151, batch=batch, experts=sum(experts) / len(experts))
    assert 1 <= counted.bytes / batch / least.total < 1.15
    flops = accounting.decode_flops_per_token(config, context=151)
    assert 1 <= counted.flops / batch / flops.total < 1.1


def roofs() -> Roofs:
    point, product = Curve(sizes=(100.0, 1e8), costs=(1e-6, 1e-2)), Curve(sizes=(1.0, 1e3), costs=(1e9, 1e11))
    return made_up_roofs(point, product, cold=4.0)


def test_curves_are_followed_between_and_beyond_their_sizes() -> None:
    curve = Curve(sizes=(100.0, 10000.0), costs=(1.0, 100.0))
    assert curve.at(10) == 1.0
    assert curve.at(1000) == pytest.approx(10.0)
    assert curve.at(20000) == 200.0
    machine = roofs()
    assert point_seconds(machine, "move", "float32", 1e8, 0.0) == pytest.approx(1e-2)
    assert point_seconds(machine, "move", "float32", 1e8, 1.0) == pytest.approx(4e-2)
    assert flops_rate(machine, "product", "float32", 1e3, 0.0) == pytest.approx(1e11)
    assert flops_rate(machine, "product", "float32", 1e6, 1.0) == pytest.approx(1e11 / 4)


def test_products_go_by_matrix_size_softmax_by_its_curve() -> None:
    machine = roofs()
    slow = {name: Curve(sizes=c.sizes, costs=[x / 10 for x in c.costs]) for name, c in machine.curves.items()}
    small = {name: slow[name] for name in slow if "small product" in name}
    machine = dataclasses.replace(machine, curves={**machine.curves, **small})
    large_rate, small_rate = (product_rate(machine, "float32", 16, size, 0.0) for size in (1 << 20, 1 << 18))
    assert large_rate == pytest.approx(10 * small_rate)
    assert small_rate < product_rate(machine, "float32", 16, 1 << 19, 0.0) < large_rate
    x, w = torch.rand(16, 1024), torch.rand(1024, 1024)
    op = only(lambda: x @ w[:, :512])
    rate = product_rate(machine, "float32", 16, 1 << 19, op.cold_share)
    assert prediction.operation_seconds(op, machine) == pytest.approx(2 * 16 * 2**19 / rate + 1e-6)
    far = {name: Curve(sizes=c.sizes, costs=[100 * x for x in c.costs]) for name, c in machine.curves.items()}
    apart = dataclasses.replace(machine, curves={**machine.curves, **{n: far[n] for n in far if "softmax" in n}})
    op = only(lambda: w.softmax(-1))
    assert prediction.operation_seconds(op, apart) == pytest.approx(100 * prediction.operation_seconds(op, machine))


def test_kept_rates_are_those_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = list[str]()
    here = {"processor": "a"}

    def measure(device: torch.device, on_part: object) -> Roofs:
        measured.append(here["processor"])
        return dataclasses.replace(roofs(), card=dict(here))

    monkeypatch.setattr("dsmini.measure.calibration.measure", measure)
    monkeypatch.setattr("dsmini.measure.calibration.card", lambda device: dict(here))
    keep, cpu = tmp_path / "cache" / "roofs.json", torch.device("cpu")
    assert load_or_measure(cpu, keep).card == load_or_measure(cpu, keep).card == here and measured == ["a"]
    here["processor"] = "b"
    assert load_or_measure(cpu, keep).card == here and measured == ["a", "b"]
    load_or_measure(cpu, keep, fresh=True)
    here["processor"] = "a"
    load_or_measure(cpu, keep)
    assert measured == ["a", "b", "b"], "the other machine's are still there"
    for damaged in ("5", '{"x"', keep.read_text().replace('"probes"', '"prob"')):
        keep.write_text(damaged)
        assert load_or_measure(cpu, keep).card == here
    assert len(measured) == 6


def test_a_step_takes_what_its_operations_take() -> None:
    a, b = torch.rand(64, 64), torch.rand(64, 64)
    counted = count(lambda: F.silu(a @ b).view(8, 512).sum(-1))
    machine = roofs()
    parts = [prediction.operation_seconds(op, machine) for op in counted.operations]
    assert [op.kind for op in counted.operations] == ["product", "slow pointwise", "reduction"]
    assert all(seconds > 0 for seconds in parts)
    calls = len(parts) + counted.views
    least = sum(prediction.smallest_seconds(op, machine) for op in counted.operations)
    assert prediction.seconds(counted, machine) == pytest.approx(sum(parts) - least + calls * machine.call)
    kinds = prediction.by_kind(counted.operations, machine)
    assert sum(kind["predicted"] for kind in kinds.values()) == pytest.approx(sum(parts))
    assert kinds["product"]["flops"] == 2 * 64**3


def test_kernels_are_counted_by_their_declared_cost() -> None:
    """Count one call in C++ and in plain PyTorch: the kernel moves its operands once, PyTorch also its copies."""
    x = torch.randn(256, 384)
    with ops.use("cpu"):
        kernel = count(lambda: quantize(x))
    with ops.use("eager"):
        plain = count(lambda: quantize(x))
    declared = ops.Cost(x.nbytes, x.numel() + 4 * 256 * 3, 0)
    (ran,) = [op for op in kernel.operations if op.name == "quantize"]
    assert (ran.read, ran.written, ran.flops) == declared[:3]
    assert not [op for op in plain.operations if op.name == "quantize"]
    assert kernel.bytes < plain.bytes / 2
