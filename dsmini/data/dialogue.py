"""python -m dsmini.data.dialogue > dialogue.txt: small conversations, made by rules, to train a model that answers.

A line that begins with > is of a person, the line after it is the answer. An empty line ends a conversation.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from dsmini.reading import read_toml

CONVERSATIONS = 6000
"""Number of conversations in a text."""
PARTS = read_toml(Path(__file__).with_name("dialogue.toml"))
Turn = tuple[str, str]
"""The line of a person, and its answer."""


def conversation(draw: random.Random) -> Iterator[Turn]:
    """Yield the turns of a conversation: a greeting, questions, and sometimes a name that is asked for later."""
    name, named = draw.choice(PARTS["names"]), draw.random() < 0.5
    if draw.random() < 0.6:
        hello = draw.choice(PARTS["hellos"])
        yield hello, "I am fine, thank you. How can I help you?" if "how" in hello else "Hello! How can I help you?"
    if named:
        yield draw.choice(PARTS["i_am"]).format(name), f"Nice to meet you, {name}!"
    for _ in range(draw.randint(1, 4)):
        yield question(draw)
    if named and draw.random() < 0.7:
        yield draw.choice(PARTS["who_am_i"]), f"Your name is {name}."
    if draw.random() < 0.3:
        yield draw.choice(PARTS["thanks"]), "You are welcome. Goodbye!"


def question(draw: random.Random) -> Turn:
    """Return a question about a fact, or about two small numbers, and its answer."""
    a, b = draw.randint(0, 9), draw.randint(0, 9)
    opposites = PARTS["opposites"] | {other: one for one, other in PARTS["opposites"].items()}
    facts = (PARTS["colors"], PARTS["sounds"], PARTS["capitals"], opposites)
    (thing, color), (animal, sound), (country, capital), (word, opposite) = (draw.choice([*of.items()]) for of in facts)
    questions = (
        (f"What color is {thing}?", f"{thing.capitalize()} is {color}."),
        (f"What does {animal} do?", f"{animal.capitalize()} {sound}."),
        (f"What is the capital of {country}?", f"The capital of {country} is {capital}."),
        (f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."),
        (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."),
        (f"What comes after {a}?", f"After {a} comes {a + 1}."),
    )
    return draw.choice(questions)


def dialogues(conversations: int, seed: int = 0) -> str:
    """Return a text of conversations. The same numbers give the same text."""
    draw = random.Random(seed)
    every = (list(conversation(draw)) for _ in range(conversations))
    return "".join("".join(f"> {asked}\n{said}\n" for asked, said in turns) + "\n" for turns in every)


if __name__ == "__main__":
    sys.stdout.write(dialogues(CONVERSATIONS))
