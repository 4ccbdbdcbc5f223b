"""Pairs of a key and a value, hidden in a text, and how often a model that reads on knows a value again.

A pair is a line of its own: a sign, and one of the values of this sign. In a text to learn from, each sign of a passage
comes again and again with its value, some signs more often than others, so that a model can learn to look values up,
near and far. A test hides one pair of each sign in a text that was held out, and names one of the signs at the end.
"""

import random
from collections.abc import Sequence

import torch

from dsmini import Transformer

VALUES = {"#": "012456", "%": "789<=>", "*": "()[]{}", "+": "@\\^_|~"}
"""Values of each key. None of these signs occurs in a text of words, where other needles would be guessed."""
APART = 24
"""Mean number of bytes between the pairs of a text to learn from."""
PASSAGE = 4096
"""Bytes through which keys keep their values."""


def hide_pairs(text: str, seed: int) -> str:
    """Return the text with pairs between its lines."""
    draw = random.Random(seed)
    out: list[str] = []
    length = following = passage = 0
    pairs: list[str] = []
    for line in text.splitlines(keepends=True):
        out.append(line)
        length += len(line)
        if length >= passage:
            pairs, passage = _pairs(draw), length + PASSAGE
        while length >= following:
            pair = draw.choices(pairs, weights=[2.0**-n for n in range(len(pairs))])[0]
            out.append(pair)
            length += len(pair)
            following += draw.randint(1, 2 * APART)
    return "".join(out)


def _pairs(draw: random.Random) -> list[str]:
    """Return a pair of each key, in random order."""
    return [f"{key}{draw.choice(VALUES[key])}\n" for key in draw.sample(list(VALUES), len(VALUES))]


def test_text(text: str, length: int, depth: float, draw: random.Random) -> tuple[str, str]:
    """Return a text of `length` bytes that ends in a key, and the key's value.

    Args:
        text: is ASCII; a random part of it is taken.
        depth: share of the text that lies before the pair.
    """
    pairs = _pairs(draw)
    question, value, _ = pairs[0]
    room = length - sum(map(len, pairs)) - len(question)
    start = draw.randrange(len(text) - room)
    hay = text[start : start + room]
    places = sorted([(int(depth * room), pairs[0]), *((draw.randrange(room), pair) for pair in pairs[1:])])
    out, last = [], 0
    for at, pair in places:
        at = max(last, hay.rfind("\n", last, at) + 1)
        out += [hay[last:at], pair]
        last = at
    return "".join([*out, hay[last:].rstrip("\n"), "\n", question])[-length:], value


@torch.no_grad()
def share_answered(model: Transformer, cases: Sequence[tuple[str, str]]) -> float:
    """Return the share of texts whose value is the likeliest byte. A token is a byte."""
    right = 0
    for text, value in cases:
        tokens = torch.tensor([list(text.encode())], device=model.device)
        right += chr(int(model(tokens)[0, -1].argmax())) == value
    return right / len(cases)
