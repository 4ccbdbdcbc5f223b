"""Lines for people, of any command and package, and text that is not ours made safe for a terminal."""

from rich.console import Console
from rich.text import Text

# a control character becomes its picture, such as U+241B for escape; C1 controls and overrides of direction have none
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
CONTROLS |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def printable(text: str) -> str:
    """Return the text with each control character replaced by a picture of it; newlines and tabs stay.

    A terminal obeys control characters: they move its cursor, change its title and forge lines.
    """
    return text.translate(CONTROLS)


def say(console: Console, line: str = "", style: str = "") -> None:
    """Print a line without markup, colours of numbers or wrapping; its control characters become pictures."""
    console.print(Text(printable(line), style=style), soft_wrap=True)
