"""Generate a text from a few words with integers alone, so that it is the same on all machines."""

WORDS = (
    *("the", "a", "of", "in", "as", "is", "on", "by", "sea", "wind", "stone", "river", "lantern", "harbour", "winter"),
    *("question", "silver", "quiet", "under", "before", "between", "carries", "follows", "answers", "forgets"),
    *("measures", "seven", "old", "green", "never", "often", "gently", "twice"),
)
ENDS = (", ", ". ", ".\n", "; ", "?\n\n")


def text(words: int = 6000) -> str:
    """Return this many words, about six bytes each with the separator.

    The numbers come from a linear congruential generator (Numerical Recipes), whose high bits are used.
    """
    state, parts = 1, []
    for _ in range(words):
        state = (1664525 * state + 1013904223) % 2**32
        parts.append(WORDS[(state >> 16) % len(WORDS)])
        parts.append(ENDS[(state >> 24) % len(ENDS)] if (state >> 10) % 7 == 0 else " ")
    return "".join(parts)
