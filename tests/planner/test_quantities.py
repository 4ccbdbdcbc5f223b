"""Quantities: units, exact values, words for people, and explanations that Python computes again."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini.planner.quantities import quantity
from dsmini.planner.quantities.display import exactly, shown
from dsmini.planner.quantities.explanation import explain, find, named, text, wrapped
from dsmini.planner.quantities.formula import evaluate, gradient, inputs, walk
from dsmini.planner.quantities.grid import evaluate_many
from dsmini.planner.quantities.quantity import (
    BYTES,
    BYTES_PER_SECOND,
    BYTES_PER_TOKEN,
    COUNT,
    FLOPS,
    FLOPS_PER_SECOND,
    SECONDS,
    TOKENS,
    Anything,
    Count,
    Unit,
    exponential,
    geometric_mean,
    largest,
    power,
    rounded_down,
    rounded_up,
    smallest,
    total,
)
from tests.helpers.commands import ROOT
from tests.helpers.plans import FUNCTIONS, python

ONE = COUNT(1)
a, b, c, d = (COUNT(value, name, name) for name, value in zip("abcd", (2, 3, 5, 7), strict=True))
NAMES = vars(quantity) | {"a": a, "b": b, "c": c, "d": d}


def table(name: str) -> list[list[str]]:
    """Return the rows of a table of quantities.txt."""
    text = (Path(__file__).parent / "quantities.txt").read_text(encoding="utf-8")
    _, _, rest = text.partition(f"[{name}]")
    rows = [line.split(" | ") for line in rest.partition("\n[")[0].splitlines()[1:] if not line.startswith("#")]
    assert len(rows) > 5
    return rows


def in_base_units(written: str) -> Anything:
    value, _, symbol = written.partition(" ")
    over, _, under = symbol.partition("/")
    return Unit[Any, Any](over.strip("1"), under)(eval(value), "given", "Given")


def test_figures_are_shown_in_three_digits_and_inputs_as_they_were_given() -> None:
    for written, people, digits in table("words"):
        figure = in_base_units(written).named("figure", "Figure")
        assert (shown(figure), exactly(figure)) == (people, digits)
    for written, people in table("given"):
        assert shown(in_base_units(written)) == people


def test_units_follow_products_and_quotients() -> None:
    for expression, value, unit in table("units"):
        found = eval(expression, NAMES)
        assert (found.value, found.units or "-") == (pytest.approx(eval(value), rel=1e-15), unit), expression
    assert BYTES(2) < BYTES(3) <= BYTES(3) and BYTES(3) > BYTES(2) >= BYTES(2)
    assert not (BYTES(3) < BYTES(3) or BYTES(2) >= BYTES(3))


@pytest.mark.parametrize(("expression", "said"), table("refused"))
def test_wrong_units_raise_an_error_that_names_them(expression: str, said: str) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        eval(expression, NAMES)


def test_values_are_named_and_do_not_change() -> None:
    rate = (BYTES(6) / SECONDS(3)).named("rate", "Rate of something", "a book")
    assert (float(rate), rate.title, rate.source, repr(rate)) == (2, "Rate of something", "a book", "rate = 2 B/s")
    with pytest.raises(ZeroDivisionError, match="Quantity = 2 B divided by rate = 0 B/s"):
        _ = BYTES(2) / BYTES_PER_SECOND(0, "rate", "Rate")
    with pytest.raises(AttributeError, match="setting value"):
        rate.value = 3


# --- formulas


@pytest.mark.parametrize(("expression", "formula", "numbers"), table("formulas"))
def test_formulas_have_the_fewest_parentheses(expression: str, formula: str, numbers: str) -> None:
    step = explain(eval(expression, NAMES).named("x", "X")).steps[0]
    assert (step.formula.replace("×", "*"), step.numbers.replace("×", "*")) == (formula, numbers)  # noqa: RUF001


def bounded(x: Count) -> Count:
    """Return a smooth function of x between -1/2 and 1/2."""
    return x / (ONE + x * x)


SMOOTH: Mapping[str, Callable[[Count, Count], Count]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: bounded(x) * y,
    "/": lambda x, y: x / (ONE + y * y),
    "max": largest,
    "min": smallest,
    "**": lambda x, y: power(ONE + bounded(x), ONE + bounded(y)),
    "exp": lambda x, y: exponential(bounded(x)) * y,
    "sqrt": lambda x, y: geometric_mean(ONE + x * x, ONE + y * y),
    "shared": lambda x, y: bounded(x) * bounded(x) * y + x,
}
"""Operations without jumps, in terms that stay in their domain whatever x and y are."""
Recipe = list[tuple[str, int, int, bool]]
RECIPES = st.lists(
    st.tuples(st.sampled_from(sorted(SMOOTH)), st.integers(0, 7), st.integers(0, 7), st.booleans()),
    min_size=8,
    max_size=20,
)
VALUES = st.fixed_dictionaries({name: st.floats(0.5, 2) for name in "abcde"})


def cooked(recipe: Recipe, values: Mapping[str, float]) -> Count:
    """Return a figure of these inputs: operations on the last results, some of which get a name."""
    known = [COUNT(values[name], name, name) for name in "abcde"]
    for number, (op, i, j, is_named) in enumerate(recipe):
        made = SMOOTH[op](known[i % len(known)], known[j % len(known)])
        known = [*known[-7:], made.named(f"part_{number}", f"Part {number}") if is_named else made]
    return total(known).named("root", "Root")


@given(recipe=RECIPES, values=VALUES)
def test_explanation_of_any_figure_gives_it(recipe: Recipe, values: dict[str, float]) -> None:
    """Each step has its own name and what it needs, and Python reads its formula as its value."""
    figure = cooked(recipe, values)
    known = {name: node.value for name, node in named([figure]).items()}
    explained = explain(figure)
    names = [entry.name for entry in (*explained.steps, *explained.inputs)]
    assert names[0] == "root" and sorted(names) == sorted(known)
    assert {line.name for line in explained.inputs} == set(inputs(figure))
    for step in explained.steps:
        assert set(step.needs) == {word for word in re.findall(r"[a-z]\w*", step.formula) if word not in FUNCTIONS}
        value = eval(python(step.formula), dict(FUNCTIONS), known)
        assert value == pytest.approx(known[step.name], rel=1e-12)


@given(recipe=RECIPES, first=VALUES, second=VALUES)
def test_formulas_are_the_computation_again(recipe: Recipe, first: dict[str, float], second: dict[str, float]) -> None:
    """For one other value, for all, and for rows of them at once; and their derivatives are differences."""
    figure, again = cooked(recipe, first), cooked(recipe, second)
    assert evaluate(figure, {}) == figure.value and evaluate(figure, second) == again.value
    columns = {name: np.array([first[name], second[name]]) for name in first}
    (rows,) = evaluate_many([figure], columns)
    assert rows == pytest.approx([figure.value, again.value], rel=1e-12)
    slopes = gradient(figure)
    for name in slopes.keys() & {node.name for node in walk(figure)} if not _is_at_a_jump(figure) else ():
        high, low = (evaluate(figure, {name: first[name] * (1 + e)}) for e in (1e-5, -1e-5))
        scale = 1 + abs(figure.value) + max(map(abs, slopes.values()))
        assert slopes[name] == pytest.approx((high - low) / (2e-5 * first[name]), abs=1e-6 * scale), name


def _is_at_a_jump(figure: Anything) -> bool:
    """Return True if two arguments of a max or min are so near that a small step changes which one it is."""
    pairs = [[arg.value for arg in node.args] for node in walk(figure) if node.op in ("max", "min")]
    return any(math.isclose(x, y, rel_tol=1e-2, abs_tol=1e-2) for x, y in pairs)


def test_rounding_and_choice_count_as_constant_in_a_derivative() -> None:
    x = COUNT(2.3, "x", "x")
    assert gradient(rounded_up(x) * x) == {"x": 3} and gradient(rounded_down(x) * x) == {"x": 2}
    assert gradient(largest(a, COUNT(2, "z", "Z"))) == {"a": 1, "z": 0}, "the first of equals"
    (rows,) = evaluate_many([rounded_up(x) - rounded_down(x / 2) + smallest(x, a)], {"x": np.array([2.3, 4.0])})
    assert list(rows) == [3 - 1 + 2, 4 - 2 + 2]


def test_shared_and_long_formulas_are_walked_once_without_recursion() -> None:
    """A node used twice in each of 60 levels has 2 ** 60 paths to it."""
    node: Anything = SECONDS(1, "x", "x")
    for _ in range(60):
        node = node + node
    assert len(list(walk(node))) == 61 and evaluate(node, {"x": 3}) == 3 * 2**60 and gradient(node) == {"x": 2**60}
    chain = a
    for _ in range(10_000):
        chain = chain + b
    assert evaluate(chain, {"b": 1}) == 10_002
    assert explain(chain.named("chain", "Chain")).steps[0].formula == "a" + " + b" * 10_000
    double = (2 * a).named("double", "Double")
    assert evaluate(double + double, {"double": 100}) == 8, "only inputs can be changed"


# --- explanations


def step_time() -> Anything:
    row = COUNT(512, "kv_lora_rank", "Latent", "a config") + COUNT(64, "qk_rope_head_dim", "Rotary key", "a config")
    cache = COUNT(61, "n_layers", "Layers", "a config") * row * BYTES_PER_TOKEN(2, "cache_number", "Number", "BF16")
    cache = cache.named("kv_cache", "Cache of a token, all layers", "V2, section 2.1")
    read = cache * TOKENS(4096, "context", "Context", "asked for")
    memory = (read / BYTES_PER_SECOND(3.35e12, "memory_bandwidth", "Bandwidth", "data sheet")).named("memory_time", "")
    work = 2 * FLOPS(37e9, "flops", "Work", "a config") * COUNT(128, "batch", "Sequences", "asked for")
    products = work / FLOPS_PER_SECOND(989.4e12, "peak", "Peak", "white paper")
    return largest(memory, products).named("step_time", "Time of a step", "roofline")


EXPLAINED = """\
step_time: Time of a step
  = max(memory_time, 2 × flops × batch / peak)
  = max(85.9206 µs, 2 × 37 GFLOP × 128 / 989.4 TFLOP/s)
    largest: 2 × flops × batch / peak = 9.57 ms
  = 9.57 ms (0.009573478876 s)
  source: roofline

memory_time:
  = kv_cache × context / memory_bandwidth
  = 70.272 kB/token × 4,096 tokens / 3.35 TB/s
  = 85.9 µs (8.592063045e-05 s)

kv_cache: Cache of a token, all layers
  = n_layers × (kv_lora_rank + qk_rope_head_dim) × cache_number
  = 61 × (512 + 64) × 2 B/token
  = 70.3 kB/token (70,272 B/token)
  source: V2, section 2.1

inputs
  n_layers = 61: Layers (a config)
  kv_lora_rank = 512: Latent (a config)
  qk_rope_head_dim = 64: Rotary key (a config)
  cache_number = 2 B/token: Number (BF16)
  context = 4,096 tokens: Context (asked for)
  memory_bandwidth = 3.35 TB/s: Bandwidth (data sheet)
  flops = 37 GFLOP: Work (a config)
  batch = 128: Sequences (asked for)
  peak = 989.4 TFLOP/s: Peak (white paper)
"""  # noqa: RUF001


def test_explanation_goes_from_the_question_to_the_inputs() -> None:
    assert text(explain(step_time())) == EXPLAINED
    assert explain(step_time()).steps[0].needs == ("memory_time", "flops", "batch", "peak")
    least = explain((smallest(b, a) + largest(a, c)).named("x", "X")).steps[0]
    assert least.choices == ("smallest: a = 2", "largest: c = 5")
    size = BYTES(4, "size", "Size")
    left = largest(BYTES(0), size - size).named("left", "Left")
    assert explain(left).steps[0].choices == ("largest: 0 B",), "a number is said once"
    copy = text(explain(size.named("gradient", "Gradient"))).splitlines()
    assert copy[:3] == ["gradient: Gradient", "  = size", "  = 4 B"]
    alone = explain(TOKENS(4096, "context", "Tokens of the context", "asked for"))
    assert text(alone) == "inputs\n  context = 4,096 tokens: Tokens of the context (asked for)\n"


def test_figures_without_a_name_or_with_that_of_another_are_refused() -> None:
    with pytest.raises(AssertionError, match="has no name"):
        explain(a + b)
    with pytest.raises(AssertionError, match="two figures have a name: a = 2, a = 3"):
        explain((a + COUNT(3, "a", "Another")).named("x", "X"))
    assert len(explain((a + COUNT(2, "a", "The same")).named("x", "X")).inputs) == 1


@pytest.mark.parametrize("width", [60, 80, 140])
def test_lines_keep_the_width_and_the_formula(width: int) -> None:
    parts = [COUNT(i, f"part_{i}", f"Part {i}", "a source") for i in range(1, 30)]
    long = (total(parts) * (parts[0] + parts[1] * parts[2])).named("long", "Sum of many parts")
    for figure in (long, step_time()):
        explained = explain(figure)
        lines = text(explained, width)
        assert max(map(len, lines.splitlines())) <= width
        for step in explained.steps:
            for formula in (step.formula, step.numbers):
                assert f"= {formula}" in " ".join(lines.split())


def test_long_formulas_break_before_an_operator_at_the_top() -> None:
    lines = wrapped("alpha × (beta + gamma) + delta × (epsilon + zeta) + eta", 40, "  = ", "    ")  # noqa: RUF001
    assert lines == ["  = alpha × (beta + gamma)", "    + delta × (epsilon + zeta) + eta"]  # noqa: RUF001
    lines = wrapped("max(first_long_name, second_long_name)", 30, "= ", "  ")
    assert lines == ["= max(first_long_name,", "  second_long_name)"]
    lines = wrapped("a_name_longer_than_any_line + b", 10, "= ", "  ")
    assert lines == ["= a_name_longer_than_any_line", "  + b"]


def test_figures_are_found_by_name_or_the_nearest_are_told() -> None:
    figures = [step_time(), a + b]
    assert find(figures, "kv_cache").value == 70_272 and find(figures, "b") is b
    assert len(named(figures)) == 3 + 9 + 2
    for name, said in (
        ("kv_cach", r"did you mean kv_cache.*\? --explain list shows all 14 names"),
        ("time", r"did you mean .*memory_time"),
        ("zzz", r"--explain list shows all 14 names"),
    ):
        with pytest.raises(ValueError, match=f"unknown figure '{name}'; {said}"):
            find(figures, name)


# --- by pyright

WRONG = """-> Bytes: SECONDS(2)   -> Bytes: BYTES(2) / SECONDS(2)   -> Seconds: BYTES_PER_SECOND(2) / BYTES(2)
-> Bytes: BYTES(2) / BYTES_PER_SECOND(2)   -> Count: COUNT(2) * SECONDS(2)   : _ = BYTES(2) * BYTES(2)
: _ = geometric_mean(BYTES(2), SECONDS(2))   : _ = per(BYTES_PER_SECOND(2), TOKENS)"""
RIGHT = """-> Bytes: BYTES(2) + BYTES(2)   -> Seconds: largest(SECONDS(2), SECONDS(2))   -> Bytes: total([BYTES(2)])
-> Seconds: BYTES(2) / BYTES_PER_SECOND(2)   -> Bytes: BYTES_PER_SECOND(2) * SECONDS(2)   -> PerSecond: 1 / SECONDS(2)
-> Bytes: SECONDS(2) * BYTES_PER_SECOND(2)   -> BytesPerSecond: BYTES(2) / SECONDS(2)   -> Count: BYTES(2) / BYTES(2)
-> Seconds: COUNT(2) * SECONDS(2)   -> SecondsPerToken: per(SECONDS(2), TOKENS)   -> Bytes: BYTES(2).named('a', 'b')"""
HEADER = """from dsmini.planner.quantities.quantity import *
from dsmini.planner.quantities.quantity import Bytes, BytesPerSecond, Count, PerSecond, Seconds, SecondsPerToken
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pyright") is None, reason="needs pyright")
def test_pyright_refuses_wrong_units(tmp_path: Path) -> None:
    """Each case is a function on a line of its own, and the lines with errors are read back."""
    wrong_cases, right_cases = (re.split(r"   |\n", cases) for cases in (WRONG, RIGHT))
    refused = [*(f": _ = {expression}" for expression, _ in table("refused")), *wrong_cases]
    lines = [f"def f(){case.replace(': ', ': return ') if '->' in case else case}" for case in (*refused, *right_cases)]
    (tmp_path / "cases.py").write_text(HEADER + "\n".join(lines) + "\n")
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard", "reportRedeclaration": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(["pyright", "--outputjson", "."], cwd=tmp_path, capture_output=True, text=True)
    found = [d for d in json.loads(done.stdout)["generalDiagnostics"] if d["severity"] == "error"]
    wrong = {d["range"]["start"]["line"] - HEADER.count("\n"): d["message"] for d in found}
    assert sorted(wrong) == list(range(len(refused))), found
    assert all("Quantity" in message for message in wrong.values()), wrong
