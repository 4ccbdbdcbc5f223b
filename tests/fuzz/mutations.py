"""Seeded damage to files: flipped bits, lost and repeated parts, and hostile values inside JSON and TOML."""

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

RAW = [
    *("NaN", "1e999", "-1e999", "9" * 5000, "1" + "0" * 400, "[" * 300 + "]" * 300),
    *("[" * 100_000, '{"a":' * 100_000),  # which are not JSON
]
"""Texts in the place of a value."""
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 0.5, -0.5, 1e308, 10**9, 10**18, 10**30, 2**31 - 1, 2**63 - 1, 2**63, 2**64),
    *("", "x", "1", "none", "a\0b", "a" * 5000, "\ud800", "\x1b[31m\x07", "../../x", "é\u202e", [], {}, [1, 2], [[]]),
    *([0.5], ["a"], {"a": 1}, {"type": "yarn"}, {"type": []}, [10**30], [-1, None], [2**31] * 4),
]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return a file's bytes with one kind of damage."""
    n = max(1, len(content))
    i, j = sorted((draw.randrange(n), draw.randrange(n)))
    flipped = bytearray(content)
    for _ in range(draw.choice([1, 20]) if content else 0):
        flipped[draw.randrange(n)] ^= 1 << draw.randrange(8)
    kinds = [
        *(b"", content[:i], content[:i] + content[j:], content[:j] + content[i:], content + draw.randbytes(9)),
        *(content[:i] + draw.randbytes(8) + content[i:], content[:i] + b"\xff\xfe" + content[i:]),
        *(content[:i] + bytes(min(40, n - i)) + content[i + 40 :], bytes(flipped), bytes(flipped), draw.randbytes(100)),
    ]
    return draw.choice(kinds)


def edited(content: bytes, draw: random.Random) -> bytes:
    """Return JSON with a hostile value, a lost, renamed or repeated key somewhere in it."""
    value = json.loads(content)
    if draw.random() < 0.1:
        return draw.choice([*RAW, *map(json.dumps, VALUES)]).encode()
    holder = draw.choice([one for one in _holders(value) if one])
    key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    kind, text = draw.randrange(10), None
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):
        text = f"{json.dumps(holder[key])}, {json.dumps(key)}: {json.dumps(holder[key])}"
    elif kind in (3, 4):
        text = draw.choice(RAW)
    else:
        holder[key] = draw.choice(VALUES)
    if text is not None:
        holder[key] = "\x01"
    return json.dumps(value).replace('"\\u0001"', text or "").encode()


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _holders(part)


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
        lines.insert(
            i, draw.choice(["[" * 2000, "a." * 90000 + "a = 1", "a = " + "[" * 100_000, "[a]\n" * 9, "=", "["])
        )
    else:
        texts = [*RAW, "inf", "nan", "0x" + "f" * 5000, "1979-05-27", *map(json.dumps, VALUES)]
        lines[i] = f"{lines[i].partition('=')[0]} = {draw.choice(texts)}"
    return "\n".join(lines).encode()
