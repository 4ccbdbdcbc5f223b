"""Laws of all figures: they are what their explanations say, have fitting units, and are all declared and used."""

import functools

import pytest

from dsmini.planner.figure import Figure, titles
from dsmini.planner.pages import words
from dsmini.planner.plan import COMPARED, SECTIONS, read_axis
from dsmini.planner.words import named
from tests.helpers.plans import Formulas, figures_of, in_layout, plan_of, planned_with, setup_of

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


@functools.cache
def formulas_of(words_: str) -> Formulas:
    return Formulas(plan_of(words_).figures.values())


@pytest.mark.parametrize("words_", CASES)
def test_explained_formulas_predict_a_plan_of_other_inputs(words_: str) -> None:
    """No figure depends on anything that its explanation does not name, and every change acts on some figure."""
    changes = {name: value for name, (value,) in map(read_axis, CASES[words_].split())}
    other = planned_with(setup_of(words_), **changes)
    found = {name: f.value for name, f in named(other.figures.values()).items()}
    before, formulas = figures_of(words_), formulas_of(words_)
    both = {name for name in found.keys() & before.keys() if before[name].op != "input"}
    inputs = {name: value for name, value in found.items() if name not in formulas.steps}
    predicted = formulas.values(before_values(words_) | inputs, both)
    assert len(both) > 60
    assert {name: predicted[name] for name in both} == pytest.approx({name: found[name] for name in both}, rel=1e-12)
    acting = {name for name in inputs if name in before and inputs[name] != before[name].value}
    unfit = (
        set() if other.fits and plan_of(words_).fits else {"failures_per_node_day", "restart_time", "checkpoint_halt"}
    )
    assert changes.keys() <= acting | unfit


def before_values(words_: str) -> dict[str, float]:
    return {name: f.value for name, f in figures_of(words_).items() if f.op == "input"}


TIMED = ("mean_time_to_failure", "training_gpu_hours", "training_cost")
"""Figures whose formula has the seconds of an hour or a day as a plain number."""


def dimension(unit: str) -> dict[str, float]:
    """Return the exponents of seconds, dollars and joules; bytes, tokens and operations count as plain numbers."""
    over, _, under = unit.partition("/")
    found = dict.fromkeys({over} & {"s", "$", "J"}, 1.0)
    return found | dict.fromkeys({under} & {"s", "$", "J"}, -1.0)


def computed(node: Figure) -> dict[str, float]:
    """Return the dimension of a formula, by those that titles declare for the names in it."""
    if node.name or not node.args:
        return dimension(node.title.unit) if node.name else {}
    parts = [computed(arg) for arg in node.args]
    if node.op in ("×", "/"):  # noqa: RUF001
        sign = 1 if node.op == "×" else -1  # noqa: RUF001
        both = {base: parts[0].get(base, 0.0) + sign * parts[1].get(base, 0.0) for base in {*parts[0], *parts[1]}}
        return {base: power for base, power in both.items() if power}
    if node.op == "sqrt":
        return {base: power / 2 for base, power in parts[0].items()}
    zeros = [arg.op == "number" and arg.value == 0 for arg in node.args]
    known = [part for part, zero in zip(parts, zeros, strict=True) if not zero]
    assert all(part == known[0] for part in known), f"{node.op} of {[arg.name or arg.op for arg in node.args]}: {parts}"
    return known[0]


@pytest.mark.parametrize("words_", [*CASES, "deepseek-v3"])
def test_units_of_formulas_are_those_that_titles_declare(words_: str) -> None:
    """Sums add like to like, and an amount over a rate is a time."""
    for name, figure in figures_of(words_).items():
        if figure.op != "input" and name not in TIMED and figure.value:
            assert computed(figure.args[0]) == dimension(figure.title.unit), name


def test_every_title_is_of_a_figure_of_some_plan() -> None:
    """And each headline and compared figure is declared, so that no name is misspelt."""
    of_kinds = ["toy", "shakespeare", "toy gpus=4 pipeline=4 n_dense_layers=2 batch=8", "toy recompute=full gpus=1"]
    of_kinds += ["toy-dense utilization=0.5", "deepseek-v3 n_layers=60 n_dense_layers=7 gpus=512"]
    of_kinds += ["deepseek-v3 gpus=2048 pipeline=16 expert=64 schedule=1f1b recompute=full precision=fp8 zero=1"]
    used = {figure.name for words_ in [*CASES, "deepseek-v3", *of_kinds] for figure in plan_of(words_).sheet}
    unused = titles().keys() - used
    stages = ("verify_", "prefill_", "decode_")
    assert {name for name in unused if not name.startswith(stages)} == set()
    headlines = {name for section in SECTIONS for name in words()[section]["figures"] + words()["training"]["unfit"]}
    assert headlines | set(COMPARED) <= titles().keys()


@pytest.mark.parametrize("name", ["deepseek-v3", "toy"])
def test_search_in_plain_numbers_is_the_explained_plan(name: str) -> None:
    made = setup_of(name)
    plain, explained = in_layout(made), plan_of(name).sheet
    for figure in explained:
        value = plain.get(figure.name)
        if value is not None and figure.title.section == "training":
            assert float(value) == pytest.approx(float(figure.value), rel=1e-12), figure.name
