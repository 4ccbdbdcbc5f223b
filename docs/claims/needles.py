"""Write a text of needles: python docs/claims/needles.py [FILE]        needles.txt without a name

A table gives each letter three digits, "k=527". It is written ROUNDS times, and each time the letters come in another
order, in groups that stay where they are: so a record comes again 138 to 174 bytes later, and its place alone does not
say which of a group it is. Only who finds the letter in the round before knows its digits. Then another table begins.
"""

import random
import string
import sys
from collections.abc import Iterator
from pathlib import Path

LETTERS, GROUP, ROUNDS, TABLES = string.ascii_lowercase, 4, 8, 3200


def records(chance: random.Random) -> Iterator[str]:
    """Yield the lines of a table."""
    digits = {letter: f"{chance.randrange(1000):03}" for letter in LETTERS}
    order = chance.sample(LETTERS, len(LETTERS))
    groups = [order[i : i + GROUP] for i in range(0, len(order), GROUP)]
    for _ in range(ROUNDS):
        for group in groups:
            yield from (f"{letter}={digits[letter]}\n" for letter in chance.sample(group, len(group)))


def text(tables: int, seed: int = 0) -> str:
    """Return this many tables; one seed gives one text."""
    chance = random.Random(seed)
    return "".join(line for _ in range(tables) for line in records(chance))


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "needles.txt").write_text(text(TABLES), encoding="ascii")
