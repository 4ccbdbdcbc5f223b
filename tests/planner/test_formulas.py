"""Laws of all figures: they are what their formulas say, have fitting units, and are all documented."""

import ast

import pytest

from dsmini.planner.figure import Figures
from dsmini.planner.pages import FIRST
from dsmini.planner.plan import COMPARED, changed, read_axis
from dsmini.planner.request import SIZES as NAMES
from tests.helpers.plans import computed, plan_of

V3_LAYOUT = "gpus=2048 pipeline=16 expert=64 moments=bfloat16"
BF16 = f"{V3_LAYOUT} tensor=2 zero=1 schedule=zb1p precision=bf16 recompute=full"
GQA = "attention=gqa n_kv_heads=16 qk_norm=True embed_norm=True topk_method=greedy n_expert_groups=1 n_limited_groups=1"
SIZES = "vocab_size=100000 dim=6144 inter_dim=10000 moe_inter_dim=1500 n_heads=96"
SIZES += " qk_nope_head_dim=96 v_head_dim=160 n_shared_experts=2 n_activated_experts=6"
LATENT = "q_lora_rank=1000 kv_lora_rank=600 qk_rope_head_dim=32"
GROUPS = "n_routed_experts=576 n_expert_groups=16 n_limited_groups=3 expert=32"
WORK = "seq_len=200 batch=30720 tokens=7e12 context=200 sequences=50 prompt=100"
WORK += " failures_per_node_day=0.0001 restart_time=200 checkpoint_halt=20 utilization=0.3"
CASES = {
    "deepseek-v3 utilization=0.4": f"{SIZES} {LATENT} {GROUPS} {WORK} gpus=4096 micro_batch=2 acceptance=0.7 drafts=2",
    "deepseek-v3 context=3000 utilization=0.4": f"{WORK} context=120000 pipeline=32",
    f"deepseek-v3 {BF16} utilization=0.5": f"{SIZES} {LATENT} {GROUPS} {WORK}",
    f"deepseek-v3 {GQA} {V3_LAYOUT} tensor=2 zero=3 schedule=1f1b precision=fp8 utilization=0.4": (
        f"{SIZES} {WORK} n_kv_heads=32 n_routed_experts=320"
    ),
    f"deepseek-v3.2 {V3_LAYOUT} tensor=1 batch=15360 decode_gpus=64 prefill_gpus=64 utilization=0.4": (
        f"{SIZES} {LATENT} {WORK} n_routed_experts=320 index_topk=512 index_n_heads=32"
    ),
    "toy utilization=0.4": f"{SIZES} {LATENT} {WORK} n_routed_experts=32",
    "toy-mha precision=fp32 utilization=0.4": f"{SIZES} {WORK}",
}
"""Plans, and other values of their inputs."""


def other_plan(words: str) -> Figures:
    """Return the figures of a plan with other values of its inputs."""
    changes = {name: value for name, (value,) in map(read_axis, CASES[words].split())}
    return changed(plan_of(words), changes, plan_of(words).hardware).figures


KINDS = [
    "deepseek-v3",
    "toy",
    "shakespeare",
    "toy gpus=4 pipeline=4 n_dense_layers=2 batch=8",
    "toy recompute=full gpus=1",
]
KINDS += [
    "deepseek-v3 n_layers=60 n_dense_layers=7 gpus=512",
    "toy-dsa",
    "toy-dense @laptop",
    "deepseek-v3 @gb200-nvl72",
    "deepseek-v4-flash gpus=2048 cache_dtype=fp8",
]
KINDS += ["deepseek-v3 gpus=2048 pipeline=16 expert=64 schedule=1f1b recompute=full precision=fp8 zero=1 imbalance=1.5"]


@pytest.mark.parametrize("words", [*KINDS, *CASES])
def test_each_formula_gives_its_figure(words: str) -> None:
    """No figure depends on anything that its formula does not name, also with other values of all inputs."""
    for figures in (plan_of(words).figures, *([other_plan(words)] if words in CASES else [])):
        values = {name: float(figure) for name, figure in figures.items()}
        named = {name: figure for name, figure in figures.items() if figure.formula}
        found = {name: computed(figure.formula, values) for name, figure in named.items()}
        assert len(named) > 60
        assert {name: values[name] for name in named} == pytest.approx(found, rel=1e-12)
        assert [name for name, figure in figures.items() if not figure.title] == []
        assert [name for name, figure in figures.items() if not (figure.formula or figure.source)] == []


def test_changed_inputs_act_on_figures() -> None:
    """Every change of CASES is an input of some figure, but for those of a training that does not fit."""
    rare = {"failures_per_node_day", "restart_time", "checkpoint_halt"}
    for words, text in CASES.items():
        changes = {name: value for name, (value,) in map(read_axis, text.split())}
        found = other_plan(words)
        assert changes.keys() - found.keys() - {*NAMES} <= rare  # sizes are also numbers of shapes
        named = changes.keys() & found.keys()
        assert {name: float(found[name]) for name in named} == {name: changes[name] for name in named}


SECONDS = ("mean_time_to_failure", "training_gpu_hours", "training_cost")
"""Figures whose formula has the seconds of an hour or a day as a plain number."""


def dimension(unit: str) -> dict[str, float]:
    """Return the exponents of seconds and dollars; bytes, tokens and operations count as plain numbers."""
    over, _, under = unit.partition("/")
    return dict.fromkeys({over} & {"s", "$"}, 1.0) | dict.fromkeys({under} & {"s", "$"}, -1.0)


def of_formula(node: ast.AST, figures: Figures) -> dict[str, float] | None:
    """Return the dimension of a formula by the units of the names in it; None for a zero, which has any."""
    match node:
        case ast.Constant(value=0):
            return None
        case ast.Name(id=name):
            return dimension(figures[name].unit)
        case ast.BinOp(left=left, op=ast.Mult() | ast.Div() as op, right=right):
            a, b = of_formula(left, figures) or {}, of_formula(right, figures) or {}
            sign = 1 if isinstance(op, ast.Mult) else -1
            both = {base: a.get(base, 0.0) + sign * b.get(base, 0.0) for base in {*a, *b}}
            return {base: power for base, power in both.items() if power}
        case ast.Call(func=ast.Name(id="sqrt"), args=[inner]):
            return {base: power / 2 for base, power in (of_formula(inner, figures) or {}).items()}
        case ast.BinOp(left=left, right=right):
            parts = [of_formula(left, figures), of_formula(right, figures)]
        case ast.Call(args=args):
            parts = [of_formula(arg, figures) for arg in args]
        case _:
            return {}
    known = [part for part in parts if part is not None]
    assert all(part == known[0] for part in known), ast.unparse(node)
    return known[0] if known else None


@pytest.mark.parametrize("words", [*CASES, "deepseek-v3"])
def test_units_of_formulas_are_those_of_figures(words: str) -> None:
    """Sums add like to like, and an amount over a rate is a time."""
    figures = plan_of(words).figures
    for name, figure in figures.items():
        if figure.formula and name not in SECONDS and figure:
            found = of_formula(ast.parse(figure.formula, mode="eval").body, figures)
            assert found == dimension(figure.unit), name


def test_headlines_are_figures_of_some_plan() -> None:
    known = {name for words in KINDS for name in plan_of(words).figures}
    assert {name for names in FIRST.values() for name in names} | set(COMPARED) <= known
