"""Read from calls.h how the C++ declares its calls and limits, so that Python packs them by the names of their fields.

Python knows of no other order. A test compares sizes and offsets with a compiler's.
"""

import re
from operator import itemgetter
from pathlib import Path
from struct import Struct
from typing import Any

HEADERS = ("matrix.h", "calls.h")
STRUCT = re.compile(r"^struct (\w+)(?: : ([\w, ]+))? \{(?:\}|(.*?)^\});", re.MULTILINE | re.DOTALL)
FIELDS = re.compile(r"^  (?:const )?(\w+)(?:<[^>]*>)?(\*?) (\w+(?:, \w+)*);", re.MULTILINE)
LIMIT = re.compile(r"\b(MOST_\w+) = (\d+)(?: << (\d+))?[,;]")
NUMBERS = {"int64_t": "q", "double": "d"}


class Layout:
    """The fields of a struct in order, each with its format: q, d, or 64s for a struct of 64 bytes inside."""

    def __init__(self, fields: dict[str, str]) -> None:
        self.fields = fields
        self.struct = Struct("=" + "".join(fields.values()))
        self.size = self.struct.size
        self._in_order = itemgetter(*fields)

    def pack(self, **fields: Any) -> bytes:
        """Return the struct with these numbers and packed structs. b"" stands for a struct of zeros."""
        return self.pack_all(fields)

    def pack_all(self, fields: dict[str, Any]) -> bytes:
        """Do what pack does without a copy of the fields: a call takes a few microseconds."""
        assert len(fields) == len(self.fields), f"fields {fields.keys() ^ self.fields.keys()}"
        return self.struct.pack(*self._in_order(fields))


def read_layouts(text: str) -> dict[str, Layout]:
    """Return the layouts of the structs that C++ declares, by name. A struct follows those that it is made of."""
    layouts = dict[str, Layout]()
    for name, bases, body in STRUCT.findall(text):
        fields = dict[str, str]()
        for base in re.findall(r"\w+", bases):
            fields |= layouts[base].fields
        for kind, pointer, names in FIELDS.findall(body):
            format = "q" if pointer else NUMBERS.get(kind) or f"{layouts[kind].size}s"
            fields |= dict.fromkeys(names.split(", "), format)
        layouts[name] = Layout(fields)
    return layouts


_HEADERS = "".join(Path(__file__).with_name(name).read_text() for name in HEADERS)
LAYOUTS = read_layouts(_HEADERS)
LIMITS = {name: int(number) << int(shift or 0) for name, number, shift in LIMIT.findall(_HEADERS)}
"""The largest sizes that the C++ takes: MOST_TOKENS and others."""

CALLS = {
    re.sub("(?<=[a-z])(?=[A-Z])", "_", name.removesuffix("Call")).lower(): layout
    for name, layout in LAYOUTS.items()
    if name.endswith("Call")
}
"""The calls by the functions that take them: linear takes a LinearCall."""
