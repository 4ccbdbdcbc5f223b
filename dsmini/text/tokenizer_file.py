"""Checks of a tokenizer.json before the tokenizers library reads it, which runs in this process and has no limits.

A file's steps may replace texts by longer ones. 28 steps that double a text take all memory for a text of one word, so
the growth of all steps together is bounded here. Every check rests on the keys that the library reads, whatever type a
step claims to have. Time is not bounded: the library gives up on a regular expression only after ten million retries.
"""

import base64
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from dsmini.reading import brief

MOST_VALUES = 6_000_000
"""Largest number of values in a file; one with a million tokens and a million merges has four million."""
GROWTH = 1_000
"""Largest number of characters that all steps together may make of one; published files make 2 to 100."""
MOST_STEPS = 1_000
"""Largest number of steps in each part of a file."""
LONGEST_TOKEN = 10_000
"""Largest number of characters of a token; published ones have a few hundred."""

PARTS = (("normalizer", "pre_tokenizer"), ("decoder",), ("post_processor",))
"""Parts whose steps work on each other's results."""
INSIDE = ("normalizers", "pretokenizers", "decoders", "processors")
"""Keys that hold the steps of a sequence."""
NEVER_LONGER = {
    *("Sequence", "Replace", "Prepend", "Precompiled", "TemplateProcessing"),  # these by their keys
    *("Strip", "StripAccents", "Nmt", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"),
    *("BertPreTokenizer", "UnicodeScripts", "CharDelimiterSplit", "FixedLength", "Fuse", "ByteFallback"),
}
"""Types of steps that add nothing to a text, apart from what their keys spell."""
LONGER = {"NFKC": 18, "NFKD": 18, "Metaspace": 2}
"""Most characters that a step makes of one, by its type; 4 for all others, such as ByteLevel."""


def fault_of(content: Mapping[str, Any]) -> str | None:
    """Return why a tokenizer.json cannot be used, as words after its name; None if nothing is wrong.

    Raises: any exception for content that the library would refuse too.
    """
    for parts in PARTS:
        steps = [step for part in parts for step in _steps(content.get(part))]
        if any(not isinstance(step, dict) or not isinstance(step.get("type"), str) for step in steps):
            return f"has a step without a type in its {' or '.join(parts)}"
        if len(steps) > MOST_STEPS:
            return f"has {len(steps):,} steps in its {' and '.join(parts)}, want {MOST_STEPS:,} or fewer"
        if prod(map(_growth, steps)) > GROWTH:
            return f"makes texts more than {GROWTH:,} times as long in its {' and '.join(parts)}"
    return _fault_of_model(content["model"])


def _fault_of_model(model: Mapping[str, Any]) -> str | None:
    if model.get("dropout"):
        return f"has dropout {brief(model['dropout'])}, which gives a text other tokens each time; want null"
    vocab = model.get("vocab") or {}
    tokens = vocab if isinstance(vocab, dict) else [pair[0] for pair in vocab]
    longest = max((len(text) for text in [*tokens, *model.values()] if isinstance(text, str)), default=0)
    if longest > LONGEST_TOKEN:
        return f"has a token of {longest:,} characters, want {LONGEST_TOKEN:,} or fewer"
    if isinstance(vocab, dict) and len(set(vocab.values())) < len(vocab):
        owners: dict[Any, str] = {}
        first, second = next((owners[id], name) for name, id in vocab.items() if owners.setdefault(id, name) != name)
        return f"gives {brief(first)} and {brief(second)} the same id {brief(vocab[first])}"
    return None


def _steps(step: Any) -> Iterator[Any]:
    """Yield a step and those inside it."""
    if step is None:
        return
    yield step
    if isinstance(step, dict):
        for key in INSIDE:
            for inner in step.get(key) or ():
                yield from _steps(inner)


def _growth(step: Mapping[str, Any]) -> float:
    """Return the largest number of characters or tokens that a step makes of one."""
    growth = 1.0 if step["type"] in NEVER_LONGER else LONGER.get(step["type"], 4.0)
    if "pattern" in step and "content" in step:
        literal = step["pattern"].get("String")  # else a regular expression, which may match at every place
        growth *= max(1.0, len(step["content"]) / len(literal)) if literal else 1 + len(step["content"])
    if "prepend" in step:
        growth *= 1 + len(step["prepend"])
    if step.get("precompiled_charsmap"):
        # the length of a table for finding, that table, and the texts to insert, each ended by a NUL
        raw = base64.b64decode(step["precompiled_charsmap"])
        growth *= max(1, *(len(text.decode()) for text in raw[4 + int.from_bytes(raw[:4], "little") :].split(b"\0")))
    if "single" in step:
        special = step.get("special_tokens") or {}
        growth *= sum(map(len, (_ids(piece, special) for piece in step["single"])))
    return growth


def _ids(piece: Mapping[str, Any], special: Mapping[str, Any]) -> list[Any]:
    """Return the ids of a piece of a template; one for a text."""
    return special[piece["SpecialToken"]["id"]]["ids"] if "SpecialToken" in piece else [None]
