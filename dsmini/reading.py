"""Read small files that anybody may have written: regular files only, of bounded size.

Every reader of JSON and TOML goes through this module. It knows two outcomes: a value, or a ValueError of one sentence
that names the file.
"""

import difflib
import json
import math
import os
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

LARGEST = 100_000_000
"""Maximum size of a JSON file in bytes. The largest useful ones, tokenizers and headers, have a tenth of it."""
LARGEST_TOML = 1_000_000
"""Maximum size of a TOML file in bytes."""
TOO_DEEP = "nests tables or lists too deeply; want a flatter one"
LISTED = 8
"""Number of names, or of faults, in one sentence; it says how many more there are."""
LONGEST_NAME = 255
"""Maximum number of bytes in one part of a path; no file system in use has more."""

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class UnreadableError(ValueError):
    """A file or folder of which nobody knows whether it is whole: the system cannot read it now, or this version."""


@contextmanager
def refusing(what: str, fix: str, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Raise a ValueError in the place of an error of the system: "WHAT: the system's words; FIX"."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror}; {fix}") from None


def find_config(name: Path) -> Path:
    """Return the file of a config: a path as it is, or the file of a name that dsmini comes with, such as toy-dense.

    A folder that holds no config does not hide a name.

    Raises: ValueError for a name that is neither, with near ones.
    """
    installed, checkout = Path(__file__).with_name("configs"), Path(__file__).parents[1] / "configs"
    files = (installed if installed.is_dir() else checkout).glob("*.toml")
    known = {path.stem: path for path in sorted(files, key=lambda path: path.stem)}
    of_that_name = known.get(str(name))
    if is_there(name):
        no_config = name.is_dir() and not any(is_there(name / file) for file in ("config.toml", "config.json"))
        return of_that_name if of_that_name and no_config else name
    if of_that_name:
        return of_that_name
    near = difflib.get_close_matches(name.stem if name.suffix in (".toml", ".json") else name.name, known)
    fix = f"did you mean {' or '.join(near)}?" if near else f"name a file, or one of {', '.join(known)}"
    raise ValueError(f"there is no file {name}; {fix}")


def refuse_folder(path: Path) -> None:
    """Refuse a folder where a config is wanted. Raises: ValueError with a config that is in it, if there is one."""
    if not path.is_dir():
        return
    usual = [path / name for name in ("config.json", "config.toml") if is_there(path / name)]
    for config in [*usual, *sorted(path.glob("*.toml")), *sorted(path.glob("*.json"))]:
        raise ValueError(f"{path} is a folder; name the config in it, such as {config}")
    raise ValueError(f"{path} is a folder without a .toml or .json; name a config")


def check_path(path: Path, what: str) -> None:
    """Refuse a path that no system call takes.

    Args:
        what: name of the key or argument that holds the path, for the error.

    Raises: ValueError for a NUL or half a character of UTF-16 in it, and for a name that is too long.
    """
    text = str(path)
    try:
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    except UnicodeEncodeError:
        raise ValueError(f"{what}={brief(text)} has characters that no name of a file can have; rename it") from None
    if "\0" in text:
        raise ValueError(f"{what}={brief(text)} holds a NUL character; no name of a file can have one")
    if longest > LONGEST_NAME or len(text) > 4096:
        raise ValueError(f"{what}={brief(text)} is too long for a path; names have {LONGEST_NAME} bytes or fewer")


def brief(value: Any, longest: int = 120) -> str:
    """Return the repr of a value, cut to this many characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= longest else f"{text[:longest]}..."


def readable(name: str) -> str:
    """Return a name from a file as it is, unless it is long or holds control characters: then cut, or as its repr."""
    return name if name.isprintable() and len(name) <= 300 else brief(name, 300)


def listed(names: Sequence[str], most: int = LISTED) -> str:
    """Return names separated by commas; of a long list the first ones, and the number of the others."""
    more = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*map(readable, names[:most]), *more])


def is_there(path: Path) -> bool:
    """Return whether anything has this name, a broken link and a device too.

    Raises: ValueError for a path that no system call takes, or that may not be looked at.
    """
    check_path(path, "path")
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UnreadableError(f"cannot look at {path}: {error.strerror}; check its permissions") from None
    return True


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read its bytes. Never waits, as opening a FIFO would.

    Raises: ValueError for a file that is missing, may not be read, or is of another kind.
    """
    check_path(path, "path")
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; check the name") from None
    except OSError as error:
        raise UnreadableError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise ValueError(f"cannot read {path}: it is {kind}, want a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """Return the content of a regular file. Raises: ValueError for one that cannot be read, or is too large."""
    with open_regular(path) as file, refusing(f"cannot read {path}", "check the disk", UnreadableError):
        content = bytearray()  # in chunks: one call for all takes the memory of the largest file
        while len(content) <= largest and (chunk := file.read(1 << 20)):
            content += chunk
    if len(content) > largest:
        raise ValueError(f"cannot read {path}: it has more than {largest:,} bytes; name another file")
    return bytes(content)


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Return the text of a regular file in UTF-8. Raises: ValueError for one that cannot be read."""
    try:
        return read_bytes(path, largest).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: {error}; want a text in UTF-8") from None


def read_table(path: Path) -> dict[str, Any]:
    """Return the keys of a JSON file. Raises: ValueError for one that cannot be read, or holds something else."""
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, want a table of keys")
    return value


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the tables of a file with a line of JSON for each; none if there is no file.

    Lines that are torn, or hold something else, are left out: a kill or a full disk leaves such lines.

    Raises: ValueError for a file that cannot be read.
    """
    if not is_there(path):
        return
    with open_regular(path) as file, refusing(f"cannot read {path}", "check the disk", UnreadableError):
        for line in file:
            row = None
            with suppress(ValueError):
                row = parse_json(line.decode(errors="replace"), path.name)
            if isinstance(row, dict):
                yield row


def parse_json(text: str, source: str) -> Any:
    """Return the value of a JSON text.

    Args:
        source: name of the file or place, for errors.

    Raises: ValueError for no JSON, a key given twice, numbers that no finite float holds, and too deep nesting.
    """

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"holds the number {number[:20]}; want one that a float can hold")
        return value

    def whole(number: str) -> int:
        finite(number)
        return int(number)

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"names {brief(twice)} twice; keep one of the two")
        return out

    try:
        return json.loads(text, object_pairs_hook=table, parse_constant=finite, parse_float=finite, parse_int=whole)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{source} {TOO_DEEP}") from None
    except ValueError as error:
        raise ValueError(f"{source} {error}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file. Raises: ValueError naming the file and what is wrong with it."""
    text = read_text(path, LARGEST_TOML)
    # dotted keys take tomllib a time that grows with the square of their parts
    if re.search(r"(?:\.\s*[\w\"'-]+\s*){640}", text):
        raise ValueError(f"{path} {TOO_DEEP}")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{path} {TOO_DEEP}") from None
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from None
