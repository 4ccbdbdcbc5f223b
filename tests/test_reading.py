"""The reader of JSON and TOML: what it gives, and what it refuses in a sentence."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini.reading import (
    DEEPEST,
    MOST_VALUES,
    check_path,
    listed,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_table,
    read_toml,
)
from tests.helpers.configs import refusal

DEEP, DIGITS = 100_000, "9" * 5000
TOO_DEEP = "nests tables or lists more than 64 deep"
JSON = [  # a text, and what is said of x
    *((text, f"x {TOO_DEEP}") for text in ("[" * DEEP, '{"a":' * DEEP, "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1))),
    ('{"a": {"b": [0, NaN]}}', "x: a.b[1] is nan; want a finite number"),
    ('{"a": -Infinity}', "x: a is -inf; want a finite number"),
    ("1e999", "x: its value is inf; want a finite number"),
    (f'{{"a": {DIGITS}}}', "x has a number of thousands of digits; want one that a float can hold"),
    (f'{{"a": [{DIGITS[:400]}]}}', "x: a[0] is a number of hundreds of digits; want one that a float can hold"),
    ('{"a\\u001b": 1e999}', r"x: 'a\x1b' is inf"),
    ('{"' + "a" * 20_000 + '": 1e999}', "x: '" + "a" * 299 + "... is inf"),
    ('{"a": 1, "b": {"c": 1, "d": 2, "c": 2}}', "x names 'c' twice; keep one of the two"),
    ("{", "x is not JSON: Expecting property name"),
    ("", "x is not JSON: Expecting value"),
]
TOML = [
    *(("a = " + "[" * DEEP, "{path} " + TOO_DEEP), (".".join("a" * DEEP) + " = 1", "{path} " + TOO_DEEP)),
    (".".join("a" * 100) + " = 1", "{path} " + TOO_DEEP),
    (f"a = {DIGITS}", "{path} has a number of thousands of digits"),
    ("b.a = 0x" + "f" * 5000, "{path}: b.a is a number of hundreds of digits"),
    ("a = 1\na = 2", "cannot read {path}: Cannot overwrite a value"),
    ("#" * 1_000_001, "cannot read {path}: it has more than 1,000,000 bytes"),
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_values_come_back(value: object) -> None:
    assert parse_json(json.dumps(value), "x") == value


@pytest.mark.parametrize(("text", "sentence"), JSON, ids=range(len(JSON)))
def test_json_that_no_caller_can_use_is_refused(text: str, sentence: str) -> None:
    assert refusal(parse_json, text, "x").startswith(sentence)


@pytest.mark.parametrize(("text", "sentence"), TOML, ids=range(len(TOML)))
def test_toml_that_no_caller_can_use_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    assert refusal(read_toml, path).startswith(sentence.format(path=path))


def test_the_deepest_nesting_and_dots_inside_texts_are_read(tmp_path: Path) -> None:
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "x")
    (tmp_path / "x.toml").write_text(f'a = "{"." * 5000}"\nb = 1.5  # {"." * 5000}\nc = [{"1.5, " * 5000}]\n')
    assert read_toml(tmp_path / "x.toml") == {"a": "." * 5000, "b": 1.5, "c": [1.5] * 5000}


@pytest.mark.parametrize("unit", ["[]", "{}", "0"])
def test_number_of_json_values_is_bounded_before_parsing(tmp_path: Path, unit: str) -> None:
    (tmp_path / "x").write_text("[" + ",".join([unit] * (MOST_VALUES + 1)) + "]")
    tracemalloc.start()
    try:
        assert "values, want 2,000,000 or fewer" in refusal(read_json, tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 4 * (tmp_path / "x").stat().st_size
    finally:
        tracemalloc.stop()


def test_only_regular_files_up_to_a_limit_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    (tmp_path / "x").write_bytes(b"12345")
    for path, sentence in [
        (tmp_path / "fifo", "it is a FIFO, want a regular file"),
        (tmp_path, "it is a folder, want a regular file"),
        (Path("/dev/zero"), "it is a device, want a regular file"),
        (tmp_path / "broken", "there is no file"),
    ]:
        assert sentence in refusal(open_regular, path) and sentence in refusal(read_table, path)
    assert read_bytes(tmp_path / "x", 5) == b"12345"
    assert "it has more than 4 bytes" in refusal(read_bytes, tmp_path / "x", 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a\0b", "holds a NUL character"),
        *((name, "is too long for a path") for name in ("a" * 5000, "é" * 200, "a/" * 3000)),
        ("\ud800", "has characters that no name of a file can have"),
    ],
)
def test_path_that_no_system_takes_is_refused(name: str, words: str) -> None:
    said = refusal(check_path, Path(name), "out")
    assert said.startswith("out='") and words in said and len(said) < 300


def test_long_lists_and_hostile_names_are_cut() -> None:
    assert listed([f"n{i}" for i in range(1000)]).endswith("n48, n49, and 950 more")
    assert listed(["a\x1b[31m", "b" * 1000]) == "'a\\x1b[31m', '" + "b" * 299 + "..."
