"""Explanations: complete, in order, equal to the computation, and of the given width."""

import ast
import math
import re
from typing import Any

import pytest

from dsmini.planner.quantities.explanation import Explanation, explain, find, named, text, wrapped
from dsmini.planner.quantities.formula import inputs, walk
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
    BytesPerToken,
    Count,
    Seconds,
    exponential,
    geometric_mean,
    largest,
    per,
    power,
    rounded_up,
    smallest,
    total,
)
from tests.helpers.random_figures import drawn, random_figure

a, b, c, d = (COUNT(value, name, name) for name, value in zip("abcd", (2, 3, 5, 7), strict=True))


def cache_of_a_token() -> BytesPerToken:
    layers = COUNT(61, "n_layers", "Number of layers", "a config")
    latent = COUNT(512, "kv_lora_rank", "Width of the latent", "a config")
    rope = COUNT(64, "qk_rope_head_dim", "Width of the rotary key", "a config")
    number = BYTES_PER_TOKEN(2, "cache_number", "Bytes of a number in the cache", "BF16")
    return (layers * (latent + rope) * number).named("kv_cache", "Cache of a token, all layers", "V2, section 2.1")


def time_of_a_step() -> Seconds:
    cache = cache_of_a_token() * TOKENS(4096, "context", "Tokens of the context", "asked for")
    memory = (cache / BYTES_PER_SECOND(3.35e12, "memory_bandwidth", "Bandwidth", "data sheet")).named("memory_time", "")
    work = 2 * FLOPS(37e9, "flops", "Work", "a config") * COUNT(128, "batch", "Sequences", "asked for")
    products = work / FLOPS_PER_SECOND(989.4e12, "peak_bfloat16", "Peak", "white paper")
    return largest(memory, products).named("step_time", "Time of a step", "roofline")


def test_the_cache_of_a_token_is_explained() -> None:
    assert text(explain(cache_of_a_token())) == (
        "kv_cache: Cache of a token, all layers\n"
        "  = n_layers × (kv_lora_rank + qk_rope_head_dim) × cache_number\n"  # noqa: RUF001
        "  = 61 × (512 + 64) × 2 B/token\n"  # noqa: RUF001
        "  = 70.3 kB/token (70,272 B/token)\n"
        "  source: V2, section 2.1\n"
        "\n"
        "inputs\n"
        "  n_layers = 61: Number of layers (a config)\n"
        "  kv_lora_rank = 512: Width of the latent (a config)\n"
        "  qk_rope_head_dim = 64: Width of the rotary key (a config)\n"
        "  cache_number = 2 B/token: Bytes of a number in the cache (BF16)\n"
    )


def test_steps_go_from_the_question_to_what_it_needs() -> None:
    explained = explain(time_of_a_step())
    assert [step.name for step in explained.steps] == ["step_time", "memory_time", "kv_cache"]
    assert [line.name for line in explained.inputs] == [
        *("n_layers", "kv_lora_rank", "qk_rope_head_dim", "cache_number", "context", "memory_bandwidth"),
        *("flops", "batch", "peak_bfloat16"),
    ]
    assert explained.steps[0].needs == ("memory_time", "flops", "batch", "peak_bfloat16")


def test_a_maximum_says_which_one_it_is() -> None:
    step = explain(time_of_a_step()).steps[0]
    assert step.formula == "max(memory_time, 2 × flops × batch / peak_bfloat16)"  # noqa: RUF001
    assert step.choices == ("largest: 2 × flops × batch / peak_bfloat16 = 9.57 ms",)  # noqa: RUF001
    assert "    largest: 2 × flops × batch / peak_bfloat16 = 9.57 ms\n" in text(explain(time_of_a_step()))  # noqa: RUF001
    least = explain((smallest(b, a) + largest(a, c)).named("x", "X")).steps[0]
    assert least.choices == ("smallest: a = 2", "largest: c = 5")


@pytest.mark.parametrize(
    ("figure", "formula", "numbers"),
    [
        (a + b + c, "a + b + c", "2 + 3 + 5"),
        (a + (b + c), "a + b + c", "2 + 3 + 5"),
        (a - (b - c), "a - (b - c)", "2 - (3 - 5)"),
        (a - b - c, "a - b - c", "2 - 3 - 5"),
        (a - (b + c), "a - (b + c)", "2 - (3 + 5)"),
        (a * (b * c), "a * b * c", "2 * 3 * 5"),
        (a * (b / c), "a * b / c", "2 * 3 / 5"),
        (a / (b * c), "a / (b * c)", "2 / (3 * 5)"),
        (a / (b / c), "a / (b / c)", "2 / (3 / 5)"),
        (a / b / c, "a / b / c", "2 / 3 / 5"),
        ((a + b) * (c - d), "(a + b) * (c - d)", "(2 + 3) * (5 - 7)"),
        (a * b + c / d, "a * b + c / d", "2 * 3 + 5 / 7"),
        (power(a + b, 2), "(a + b)^2", "(2 + 3)^2"),
        (power(power(a, b), c), "(a^b)^c", "(2^3)^5"),
        (power(a, b * c), "a^(b * c)", "2^(3 * 5)"),
        (a * power(b, c), "a * b^c", "2 * 3^5"),
        (largest(a + b, c) * d, "max(a + b, c) * d", "max(2 + 3, 5) * 7"),
        (rounded_up(a / b) / (c + d), "ceil(a / b) / (c + d)", "ceil(2 / 3) / (5 + 7)"),
        (exponential(a / b), "exp(a / b)", "exp(2 / 3)"),
        (geometric_mean(a, b), "sqrt(a * b)", "sqrt(2 * 3)"),
        (a * COUNT(-3) - COUNT(-1), "a * (-3) - (-1)", "2 * (-3) - (-1)"),
        (per(BYTES(70, "size", "Size"), TOKENS) * 2, "size per token * 2", "70 B per token * 2"),
        (total([a, b * c, d]), "a + b * c + d", "2 + 3 * 5 + 7"),
        (SECONDS(86400) * a, "24 h * a", "24 h * 2"),
        (a * 1, "a * 1", "2 * 1"),
    ],
)
def test_formulas_have_the_fewest_parentheses(figure: Anything, formula: str, numbers: str) -> None:
    step = explain(figure.named("x", "X")).steps[0]
    assert (step.formula.replace("×", "*"), step.numbers.replace("×", "*")) == (formula, numbers)  # noqa: RUF001


FUNCTIONS: dict[str, Any] = {"max": max, "min": min, "exp": math.exp, "sqrt": math.sqrt}
SENSITIVE: dict[str, Any] = {**FUNCTIONS, "max": lambda x, y: x + 2 * y, "min": lambda x, y: 3 * x + y}
"""Functions of which no argument is without effect."""


def computed(formula: str, values: dict[str, float], functions: dict[str, Any] = FUNCTIONS) -> float:
    """Return what Python gives for a formula in names."""
    code = formula.replace("×", "*").replace("^", "**")  # noqa: RUF001
    return eval(compile(ast.parse(code, mode="eval"), "formula", "eval"), {"__builtins__": {}}, {**functions, **values})


def without_a_pair(formula: str) -> list[str]:
    """Return a formula without each pair of parentheses that belongs to no function."""
    out, open_ = [], []
    for i, letter in enumerate(formula):
        if letter == "(":
            open_.append(i)
        elif letter == ")":
            start = open_.pop()
            if start == 0 or not formula[start - 1].isalpha():
                out.append(formula[:start] + formula[start + 1 : i] + formula[i + 1 :])
    return out


@pytest.mark.parametrize("seed", range(12))
def test_formulas_of_random_figures_give_their_values(seed: int) -> None:
    """Each formula, read by Python, is the value; without any pair of its parentheses it is another."""
    figure = random_figure(f"{seed}", drawn(f"{seed}"), operations=14, named=0.6).named("root", "Root")
    known = {name: node.value for name, node in named([figure]).items()}
    steps = explain(figure).steps
    assert len(steps) > 4
    for step in steps:
        assert computed(step.formula, known) == pytest.approx(known[step.name], rel=1e-12)
        if len(step.formula) < 500:
            value = computed(step.formula, known, SENSITIVE)
            for other in without_a_pair(step.formula):
                assert computed(other, known, SENSITIVE) != pytest.approx(value, rel=1e-9), other


@pytest.mark.parametrize("seed", range(12))
def test_every_named_figure_and_input_is_explained_once(seed: int) -> None:
    figure = random_figure(f"{seed}", drawn(f"{seed}"), operations=14, named=0.6).named("root", "Root")
    explained = explain(figure)
    assert {step.name for step in explained.steps} == {node.name for node in walk(figure) if node.op == "name"}
    assert {line.name for line in explained.inputs} == set(inputs(figure))
    names = [entry.name for entry in (*explained.steps, *explained.inputs)]
    assert len(names) == len(set(names)) and names[0] == "root"
    for step in explained.steps:
        assert set(step.needs) == {word for word in re.findall(r"[a-z]\w*", step.formula) if word not in FUNCTIONS}
        assert set(step.needs) <= set(names)


def test_an_input_is_explained_by_its_source() -> None:
    explained = explain(TOKENS(4096, "context", "Tokens of the context", "asked for"))
    assert explained.steps == []
    assert text(explained) == "inputs\n  context = 4,096 tokens: Tokens of the context (asked for)\n"


def test_a_figure_without_a_name_is_refused() -> None:
    with pytest.raises(AssertionError, match="has no name"):
        explain(a + b)


def test_two_figures_of_one_name_are_refused() -> None:
    with pytest.raises(AssertionError, match="two figures have a name: a = 2, a = 3"):
        explain((a + COUNT(3, "a", "Another")).named("x", "X"))
    assert len(explain((a + COUNT(2, "a", "The same")).named("x", "X")).inputs) == 1


# --- width


def long_sum() -> Count:
    parts = [COUNT(i, f"part_{i}", f"Part {i}", "a source") for i in range(1, 30)]
    return (total(parts) * (parts[0] + parts[1] * parts[2])).named("long", "Sum of many parts")


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_lines_keep_the_width_and_the_formula(width: int) -> None:
    for figure in (long_sum(), time_of_a_step()):
        explained = explain(figure)
        shown = text(explained, width)
        assert max(map(len, shown.splitlines())) <= width
        for step in explained.steps:
            for formula in (step.formula, step.numbers):
                assert " ".join(f"= {formula}".split()) in " ".join(shown.split())


def test_long_sums_break_before_an_operator_at_the_top() -> None:
    lines = wrapped("alpha × (beta + gamma) + delta × (epsilon + zeta) + eta", 40, "  = ", "    ")  # noqa: RUF001
    assert lines == ["  = alpha × (beta + gamma)", "    + delta × (epsilon + zeta) + eta"]  # noqa: RUF001
    assert wrapped("max(first_long_name, second_long_name)", 30, "= ", "  ") == [
        "= max(first_long_name,",
        "  second_long_name)",
    ]
    assert wrapped("a_name_longer_than_any_line + b", 10, "= ", "  ") == ["= a_name_longer_than_any_line", "  + b"]


# --- looked up by name


def test_figures_are_found_with_all_they_need() -> None:
    figures = [time_of_a_step(), cache_of_a_token(), a + b]
    assert find(figures, "kv_cache").value == 70_272
    assert find(figures, "context").value == 4096
    assert find(figures, "b") is b
    assert len(named(figures)) == 3 + 9 + 2


def test_an_unknown_name_lists_the_nearest_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown figure 'kv_cach'; did you mean kv_cache.*--explain list shows all 12"
    ):
        find([time_of_a_step()], "kv_cach")
    with pytest.raises(ValueError, match=r"unknown figure 'time'; did you mean .*memory_time"):
        find([time_of_a_step()], "time")
    with pytest.raises(ValueError, match=r"unknown figure 'zzz'; --explain list shows all 12 names"):
        find([time_of_a_step()], "zzz")


def test_a_long_chain_needs_no_recursion() -> None:
    chain = a
    for _ in range(10_000):
        chain = chain + b
    explained: Explanation = explain(chain.named("chain", "Chain"))
    assert explained.steps[0].formula == "a" + " + b" * 10_000


def test_numbers_of_a_step_give_its_result_when_a_reader_computes_them() -> None:
    """61 times 1.15 is 70.15, which is not 70.3: parts of a formula have six digits."""
    row = BYTES(576 * 2).named("row", "Row")
    (cache, *_) = explain((COUNT(61, "layers", "Layers") * row).named("cache", "Cache")).steps
    assert (cache.numbers, cache.value) == ("61 × 1.152 kB", "70.3 kB")  # noqa: RUF001


def test_choice_and_name_of_another_figure_say_a_number_once() -> None:
    size = BYTES(4, "size", "Size")
    found = explain(largest(BYTES(0), size - size).named("left", "Left"))
    assert found.steps[0].choices == ("largest: 0 B",)
    assert text(explain(size.named("gradient", "Gradient"))).splitlines()[:3] == [
        "gradient: Gradient",
        "  = size",
        "  = 4 B",
    ]
