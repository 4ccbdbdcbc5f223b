"""The reader of JSON and TOML: what it gives, and what it refuses in a sentence."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini.reading import brief, check_path, listed, open_regular, parse_json, read_bytes, read_table, read_toml
from tests.helpers.configs import refusal

DEEP, DIGITS = 100_000, "9" * 5000
TOO_DEEP = "nests tables or lists too deeply"
NO_FLOAT = "x holds the number {}; want one that a float can hold"
JSON = [  # a text, and what is said of x
    *((text, f"x {TOO_DEEP}") for text in ("[" * DEEP, '{"a":' * DEEP)),
    ('{"a": {"b": [0, NaN]}}', NO_FLOAT.format("NaN")),
    ('{"a": -Infinity}', NO_FLOAT.format("-Infinity")),
    ("1e999", NO_FLOAT.format("1e999")),
    *((f'{{"a": [{digits}]}}', NO_FLOAT.format("9" * 20)) for digits in (DIGITS, DIGITS[:400])),
    ('{"a": 1, "b": {"c": 1, "d": 2, "c": 2}}', "x names 'c' twice; keep one of the two"),
    ("{", "x is not JSON: Expecting property name"),
    ("", "x is not JSON: Expecting value"),
]
TOML = [
    *((text, "{path} " + TOO_DEEP) for text in ("a = " + "[" * DEEP, ".".join("a" * DEEP) + " = 1")),
    (f"a = {DIGITS}", "cannot read {path}: Exceeds the limit"),
    ("a = 1\na = 2", "cannot read {path}: Cannot overwrite a value"),
    ("\udcff", "cannot read {path}: 'utf-8' codec"),
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
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert refusal(read_toml, path).startswith(sentence.format(path=path))


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
    assert listed([f"n{i}" for i in range(1000)]).endswith("n6, n7, and 992 more")
    assert listed(["a\x1b[31m", "b" * 1000]) == "'a\\x1b[31m', '" + "b" * 299 + "..."


def test_a_number_that_python_does_not_write_has_words() -> None:
    assert brief(16**5000) == brief([16**5000]) == "a number of thousands of digits"
