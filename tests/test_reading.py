"""The reader of JSON and TOML: what it gives, and what it refuses in a sentence."""

import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

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

DEEP = 100_000


def test_json_values_are_the_librarys() -> None:
    text = '{"a": [1, -2.5e3, "é\\n", true, null, {}], "b": 12345678901234567890}'
    assert parse_json(text, "x") == {"a": [1, -2500.0, "é\n", True, None, {}], "b": 12345678901234567890}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "x")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * DEEP, "x nests tables or lists more than 64 deep"),
        ('{"a":' * DEEP, "x nests tables or lists more than 64 deep"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "x nests tables or lists more than 64 deep"),
        ('{"a": {"b": [0, NaN]}}', "x: a.b[1] is NaN; want a finite number"),
        ('{"a": -Infinity}', "x: a is -Infinity; want a finite number"),
        ('{"a": 1e999}', "x: a is 1e999, which is beyond any float; want a finite number"),
        ('{"a": ' + "9" * 5000 + "}", "x: a is a number of 5,000 digits; want a finite number"),
        ('{"a\\u001b": 1e999}', r"x: 'a\x1b' is 1e999, which is beyond any float"),
        ('{"' + "a" * 20_000 + '": 1e999}', "x: '" + "a" * 299 + "... is 1e999, which is beyond any float"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "x names 'c' twice; keep one of the two"),
        ("{", "x is not JSON: Expecting property name"),
        ("", "x is not JSON: Expecting value"),
    ],
    ids=range(12),
)
def test_json_that_no_caller_can_use_is_refused(text: str, sentence: str) -> None:
    assert refusal(parse_json, text, "x").startswith(sentence)


@pytest.mark.parametrize("unit", ["[]", "{}", "0"])
def test_number_of_json_values_is_bounded_before_parsing(tmp_path: Path, unit: str) -> None:
    (tmp_path / "x").write_text("[" + ",".join([unit] * (MOST_VALUES + 1)) + "]")
    tracemalloc.start()
    try:
        for read in (read_json, read_table):
            assert re.search(r"x holds about \d,\d{3},\d{3} values, want 2,000,000", refusal(read, tmp_path / "x"))
        assert tracemalloc.get_traced_memory()[1] < 4 * (tmp_path / "x").stat().st_size
    finally:
        tracemalloc.stop()
    many = ", ".join(f'"{i}": 0' for i in range(200_000))  # tensors of an index, twice the largest in use
    assert len(parse_json(f"{{{many}}}", "x")) == 200_000


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a = " + "[" * DEEP, "{path} nests tables or lists more than 64 deep"),
        (".".join("a" * DEEP) + " = 1", "{path} nests tables or lists more than 64 deep"),
        (".".join("a" * 100) + " = 1", "{path} nests tables or lists more than 64 deep"),
        ("a = " + "9" * 5000, "cannot read {path}: it has a number of thousands of digits"),
        ("b.a = 0x" + "f" * 5000, "{path}: b.a is a number of hundreds of digits"),
        ("a = 1\na = 2", "cannot read {path}: Cannot overwrite a value"),
        ("#" * 1_000_001, "cannot read {path}: it has more than 1,000,000 bytes"),
    ],
    ids=range(7),
)
def test_toml_that_no_caller_can_use_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    assert refusal(read_toml, path).startswith(sentence.format(path=path))


def test_dots_inside_texts_are_no_nesting(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(f'a = "{"." * 5000}"\nb = 1.5  # {"." * 5000}\nc = [{"1.5, " * 5000}]\n')
    assert read_toml(tmp_path / "x.toml") == {"a": "." * 5000, "b": 1.5, "c": [1.5] * 5000}


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    for path, sentence in [
        (tmp_path / "fifo", "it is a FIFO, want a regular file"),
        (tmp_path, "it is a folder, want a regular file"),
        (Path("/dev/zero"), "it is a device, want a regular file"),
        (tmp_path / "broken", "there is no file"),
    ]:
        assert sentence in refusal(open_regular, path)
        assert sentence in refusal(read_table, path)


def test_file_larger_than_its_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bytes(tmp_path / "x", 5) == b"12345"
    assert "it has more than 4 bytes" in refusal(read_bytes, tmp_path / "x", 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a\0b", "holds a NUL character"),
        ("a" * 5000, "is too long for a path"),
        ("é" * 200, "is too long for a path"),
        ("a/" * 3000, "is too long for a path"),
        ("\ud800", "has characters that no name of a file can have"),
    ],
)
def test_path_that_no_system_takes_is_refused(name: str, words: str) -> None:
    said = refusal(check_path, Path(name), "out")
    assert said.startswith("out='")
    assert words in said
    assert len(said) < 300


def test_long_lists_and_hostile_names_are_cut() -> None:
    names: list[Any] = [f"n{i}" for i in range(1000)]
    assert listed(names).endswith("n48, n49, and 950 more")
    assert listed(["a\x1b[31m", "b" * 1000]) == "'a\\x1b[31m', '" + "b" * 299 + "..."
