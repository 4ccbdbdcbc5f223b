"""Units of quantities: checked by Python when a formula runs, and by pyright before it does."""

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dsmini.planner.quantities.quantity import (
    BYTES,
    BYTES_PER_SECOND,
    COUNT,
    DOLLARS,
    FLOPS_PER_SECOND,
    SECONDS,
    TOKENS,
    WATTS,
    Anything,
    exponential,
    geometric_mean,
    largest,
    per,
    power,
    rounded_down,
    rounded_up,
    smallest,
    total,
)

ROOT = Path(__file__).parent.parent.parent
WRONG = {
    "sum": lambda: BYTES(2) + SECONDS(3),  # pyright: ignore
    "difference": lambda: BYTES(2) - SECONDS(3),  # pyright: ignore
    "less": lambda: BYTES(2) < SECONDS(3),  # pyright: ignore
    "greater": lambda: BYTES(2) > SECONDS(3),  # pyright: ignore
    "at most": lambda: BYTES(2) <= SECONDS(3),  # pyright: ignore
    "at least": lambda: BYTES(2) >= SECONDS(3),  # pyright: ignore
    "largest": lambda: largest(BYTES(2), BYTES(2), SECONDS(3)),  # pyright: ignore
    "smallest": lambda: smallest(BYTES(2), SECONDS(3)),  # pyright: ignore
    "total": lambda: total([BYTES(2), SECONDS(3)]),  # pyright: ignore
}


@pytest.mark.parametrize("case", WRONG)
def test_different_units_raise_an_error_with_both(case: str) -> None:
    with pytest.raises(TypeError, match=r"2 B .* 3 s: units differ, B and s"):
        WRONG[case]()


def test_a_plain_number_is_a_count() -> None:
    with pytest.raises(TypeError, match="units differ, B and a count"):
        BYTES(2) + 1  # pyright: ignore
    with pytest.raises(TypeError, match="units differ, s and a count"):
        _ = SECONDS(2) > 1  # pyright: ignore


@pytest.mark.parametrize("call", [rounded_up, rounded_down, exponential, lambda x: power(x, 2), lambda x: power(x, x)])
def test_operations_of_counts_refuse_units(call: Callable[[Anything], Anything]) -> None:
    with pytest.raises(TypeError, match=r"of Quantity = 2 B: it takes counts without a unit"):
        call(BYTES(2))


def test_units_follow_products_and_quotients() -> None:
    size, rate, time, peak = BYTES(6), BYTES_PER_SECOND(2), SECONDS(3), FLOPS_PER_SECOND(8)
    units: list[tuple[Anything, float, str]] = [
        (size / rate, 3, "s"),
        (rate * time, 6, "B"),
        (time * rate, 6, "B"),
        (size / time, 2, "B/s"),
        (2 / time, 2 / 3, "1/s"),
        (size / size, 1, ""),
        (peak / rate, 4, "FLOP/B"),
        (per(size, TOKENS), 6, "B/token"),
        (per(size, TOKENS) * TOKENS(2), 12, "B"),
        (WATTS(5) * time, 15, "J"),
        (geometric_mean(time, SECONDS(12)), 6, "s"),
        (DOLLARS(3) * COUNT(2), 6, "$"),
    ]
    assert [(q.value, q.units) for q, _, _ in units] == [(pytest.approx(value), unit) for _, value, unit in units]


def test_comparisons_are_by_value() -> None:
    assert BYTES(2) < BYTES(3) <= BYTES(3) and BYTES(3) > BYTES(2) >= BYTES(2)
    assert not (BYTES(3) < BYTES(3) or BYTES(2) >= BYTES(3))
    assert largest(SECONDS(2), SECONDS(7), SECONDS(3)).value == 7
    assert smallest(SECONDS(2), SECONDS(7), SECONDS(3)).value == 2


def test_rounding_gives_whole_numbers() -> None:
    assert rounded_up(COUNT(7) / 2).value == 4
    assert rounded_down(COUNT(7) / 2).value == 3


def test_whole_numbers_stay_exact() -> None:
    flops = COUNT(671_026_404_353) * COUNT(1_000_003)
    assert flops.value == 671_026_404_353 * 1_000_003 != int(671_026_404_353.0 * 1_000_003.0)


def test_division_by_zero_names_both() -> None:
    with pytest.raises(ZeroDivisionError, match="Quantity = 2 B divided by rate = 0 B/s"):
        _ = BYTES(2) / BYTES_PER_SECOND(0, "rate", "Rate")


def test_a_quantity_does_not_change() -> None:
    figure = BYTES(2)
    with pytest.raises(AttributeError, match="setting value"):
        figure.value = 3


def test_a_name_keeps_value_and_unit() -> None:
    named = (BYTES(6) / SECONDS(3)).named("rate", "Rate of something", "a book")
    assert (named.value, named.units, named.name, named.title, named.source) == (
        2,
        "B/s",
        "rate",
        "Rate of something",
        "a book",
    )
    assert repr(named) == "rate = 2 B/s"
    assert math.isclose(float(named), 2)


# --- by pyright

REFUSED = {
    "sum": "BYTES(2) + SECONDS(2)",
    "difference": "b - s",
    "sum with a number": "b + 1",
    "number first": "1 + b",
    "comparison": "b < s",
    "comparison at least": "b >= s",
    "largest": "largest(b, s)",
    "smallest": "smallest(b, s)",
    "total": "total([b, s])",
    "mean": "geometric_mean(b, s)",
    "rounding": "rounded_up(b)",
    "power": "power(b, 2)",
    "exponential": "exponential(s)",
    "rate of a rate": "per(rate, TOKENS)",
    "product without a name": "b * b",
    "bytes that are seconds": "-> Bytes: s",
    "bytes that are a rate": "-> Bytes: b / s",
    "seconds that are their inverse": "-> Seconds: rate / b",
    "bytes that are a time": "-> Bytes: b / rate",
    "count that is a time": "-> Count: n * s",
}
ACCEPTED = {
    "sum": "-> Bytes: b + b",
    "largest": "-> Seconds: largest(s, s)",
    "total": "-> Bytes: total([b, b])",
    "time": "-> Seconds: b / rate",
    "product": "-> Bytes: rate * s",
    "product turned": "-> Bytes: s * rate",
    "rate": "-> BytesPerSecond: b / s",
    "inverse": "-> PerSecond: 1 / s",
    "count": "-> Count: s / s",
    "scaled": "-> Seconds: n * s / 2",
    "rate of tokens": "-> SecondsPerToken: per(s, TOKENS)",
    "named": "-> Bytes: (rate * s).named('a', 'b')",
}
HEADER = """from dsmini.planner.quantities.quantity import *
from dsmini.planner.quantities.quantity import Bytes, BytesPerSecond, Count, PerSecond, Seconds, SecondsPerToken
b, s, n, rate = BYTES(2), SECONDS(2), COUNT(2), BYTES_PER_SECOND(2)
"""


def function(line: str) -> str:
    """Return a case as a function of one line."""
    answer, _, body = line.rpartition(": ")
    return f"def f(){answer}: {'return ' + body if answer else '_ = ' + body}"


@pytest.mark.skipif(shutil.which("pyright") is None, reason="needs pyright")
def test_pyright_refuses_wrong_units(tmp_path: Path) -> None:
    """One call for all cases: each stands on a line of its own, and the lines with errors are read back."""
    cases = [("refused", name, line) for name, line in REFUSED.items()]
    cases += [("accepted", name, line) for name, line in ACCEPTED.items()]
    (tmp_path / "cases.py").write_text(HEADER + "\n".join(function(line) for _, _, line in cases) + "\n")
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard", "reportRedeclaration": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(["pyright", "--outputjson", "."], cwd=tmp_path, capture_output=True, text=True)
    found = [d for d in json.loads(done.stdout)["generalDiagnostics"] if d["severity"] == "error"]
    first = HEADER.count("\n")
    wrong = {d["range"]["start"]["line"] - first: d["message"] for d in found}
    assert set(wrong) <= set(range(len(cases))), found
    verdicts = [("refused" if i in wrong else "accepted", name) for i, (_, name, _) in enumerate(cases)]
    assert verdicts == [(verdict, name) for verdict, name, _ in cases]
    assert all("Quantity" in message for message in wrong.values()), wrong
