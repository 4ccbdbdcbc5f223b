"""Write a text of needles: python docs/claims/needles.py [FILE]        needles.txt without a name

A table gives each of 31 keys one of two signs that no other key has. A line is a whole table, two bytes a record; it
is written ROUNDS times: so a record comes again 66 bytes later, and only who looks back so far knows its sign. Then
another table begins. Keys have one order, so the loss is about signs alone: ln 2 for each that is not found.
"""

import random
import sys
from pathlib import Path

SYMBOLS = "".join(map(chr, range(33, 126)))
KEYS, SIGNS = SYMBOLS[:31], (SYMBOLS[31:62], SYMBOLS[62:])
LINE, ROUNDS, TABLES = 66, 16, 3800


def table(chance: random.Random) -> str:
    """Return the lines of a table."""
    records = [key + chance.choice(signs) for key, *signs in zip(KEYS, *SIGNS, strict=True)]
    return ROUNDS * ("".join(records).ljust(LINE - 1) + "\n")


def text(tables: int, seed: int = 0) -> str:
    """Return this many tables; one seed gives one text."""
    chance = random.Random(seed)
    return "".join(table(chance) for _ in range(tables))


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "needles.txt").write_text(text(TABLES), encoding="ascii")
