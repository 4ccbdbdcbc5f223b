"""Seeded damage to files: flipped bits, lost and repeated parts, and hostile values inside JSON."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

RAW = [
    "NaN",
    "1e999",
    "-1e999",
    "9" * 5000,
    "1" + "0" * 400,
    "[" * 300 + "]" * 300,
    "[" * 100_000,
    '{"a":' * 100_000,
]
"""Texts in the place of a value; the last two are not JSON."""
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 0.5, -0.5, 1e308, 10**9, 10**18, 10**30, 2**31 - 1, 2**63 - 1, 2**63, 2**64),
    *("", "x", "1", "none", "a\0b", "a" * 5000, "\ud800", "\x1b[31m\x07", "../../x", "é\u202e", [], {}, [1, 2], [[]]),
    *([0.5], ["a"], {"a": 1}, {"type": "yarn"}, {"type": []}, [10**30], [-1, None], [2**31] * 4),
]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return a file's bytes with one kind of damage."""
    n = max(1, len(content))
    i, j = sorted((draw.randrange(n), draw.randrange(n)))
    kinds: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: content[:i],
        lambda: content[:i] + content[j:],
        lambda: content[:j] + content[i:],
        lambda: content[:i] + draw.randbytes(8) + content[i:],
        lambda: content[:i] + b"\xff\xfe" + content[i:],
        lambda: content[:i] + bytes(min(40, n - i)) + content[i + 40 :],
        lambda: _flipped(content, draw, 1),
        lambda: _flipped(content, draw, 20),
        lambda: content + draw.randbytes(9),
        lambda: draw.randbytes(100),
    ]
    return draw.choice(kinds)()


def _flipped(content: bytes, draw: random.Random, bits: int) -> bytes:
    out = bytearray(content)
    for _ in range(bits if out else 0):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def edited(content: bytes, draw: random.Random) -> bytes:
    """Return JSON with a hostile value, a lost, renamed or repeated key somewhere in it."""
    value = json.loads(content)
    if draw.random() < 0.1:
        return draw.choice([*RAW, *map(json.dumps, VALUES)]).encode()
    holders = [one for one in _holders(value) if one]
    holder = draw.choice(holders)
    key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    kind = draw.randrange(10)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):
        whole = json.dumps(holder[key])
        holder[key] = "\x01"
        twice = f"{whole}, {json.dumps(key)}: {whole}"
        return json.dumps(value).replace('"\\u0001"', twice).encode()
    elif kind in (3, 4):
        holder[key] = "\x01"
        return json.dumps(value).replace('"\\u0001"', draw.choice(RAW)).encode()
    else:
        holder[key] = draw.choice(VALUES)
    return json.dumps(value).encode()


def _holders(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [one for part in inner for one in _holders(part)]
    return [value, *found] if isinstance(value, dict | list) else found


def with_edited_header(content: bytes, draw: random.Random) -> bytes:
    """Return a safetensors file whose header is edited as JSON, and whose length of it is right."""
    (length,) = struct.unpack("<Q", content[:8])
    header = edited(content[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def edited_toml(content: bytes, draw: random.Random) -> bytes:
    """Return TOML with a hostile value, a lost or repeated line."""
    lines = content.decode().splitlines()
    i = draw.randrange(len(lines))
    kind = draw.randrange(8)
    if kind == 0:
        del lines[i]
    elif kind == 1:
        lines.insert(draw.randrange(len(lines)), lines[i])
    elif kind == 2:
        deep = ["[" * 2000, "a." * 90000 + "a = 1", "a = " + "[" * 100_000]
        lines.insert(i, draw.choice([*deep, "[a]\n" * 9, "=", "["]))
    else:
        texts = [*RAW, "inf", "nan", "0x" + "f" * 5000, "1979-05-27", *(json.dumps(value) for value in VALUES)]
        lines[i] = f"{lines[i].partition('=')[0]} = {draw.choice(texts)}"
    return "\n".join(lines).encode()
