"""Plain English, counted: openings and words that slow a reader down stay rare in docstrings, comments and pages.

`python -m tests.helpers.english [FOLDER ...]` lists every place.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HEADLESS = r"(?:What|Of|Whether|How|Those|Which|Whose|So many|As many)\b"
RULES = {
    # a clause without a subject that stands as a sentence: "Of each layer, the bytes." A question may open like that.
    "headless clause": re.compile(rf"(?:^|(?<=[.:;] )){HEADLESS}[^?]*?(?:[.:;](?= |$)|$)"),
    "behind (after)": re.compile(r"\bbehind\b", re.I),
    "so many (this many)": re.compile(r"\b(?:so|as) many (?!as\b)", re.I),
    "anew (again)": re.compile(r"\banew\b", re.I),
    "is no (is not a; there is no)": re.compile(
        r"(?<!\bthere )\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|bigger\b|worse\b)", re.I
    ),
    "beside (next to, compared with)": re.compile(r"\bbeside\b", re.I),
    "twin (baseline)": re.compile(r"\btwins?\b", re.I),
    "go on (continue, run)": re.compile(r"\b(?:go|goes|going|went) on\b", re.I),
}


def prose_of_source(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring and each block of comments."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                for i, block in enumerate(re.split(r"\n[ \t]*\n", value.value)):
                    yield value.lineno + 2 * i, " ".join(block.split())
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        text = token.string.lstrip("#:! ").strip()
        if token.start[0] != last + 1 or not block:
            if block:
                yield first, " ".join(block)
            block, first = [], token.start[0]
        block.append(text)
        last = token.start[0]
    if block:
        yield first, " ".join(block)


def prose_of_page(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each paragraph, list item and table cell outside code blocks."""
    code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            for cell in line.split("|"):
                yield number, re.sub(r"^[#>*\-\d. ]+", "", cell.strip())


SOURCES = {name: sorted((ROOT / name).rglob("*.py")) for name in ("dsmini", "kernels", "benchmarks", "tests")}
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernels").rglob("*.md")]
PLACES = (*SOURCES, "pages")


@cache
def prose(place: str) -> list[tuple[Path, int, str]]:
    """Return the file, the line and the text of all that a folder's sources say, or the pages."""
    if place == "pages":
        return [(path, *spot) for path in PAGES for spot in prose_of_page(path)]
    return [(path, *spot) for path in SOURCES[place] for spot in prose_of_source(path)]


def found(place: str, rule: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {text[max(0, hit.start() - 40) : hit.end() + 40]}"
        for path, line, text in prose(place)
        if path.name != Path(__file__).name
        for hit in RULES[rule].finditer(text)
    ]


def words(place: str) -> int:
    return sum(len(text.split()) for _, _, text in prose(place))


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for place in PLACES:
        print(f"# {place}: {words(place)} words")
        for rule in RULES:
            places = [spot for spot in found(place, rule) if not wanted or any(spot.startswith(w) for w in wanted)]
            print(f"## {rule}: {len(places)}, {len(found(place, rule)) * 10_000 / words(place):.1f} per 10,000 words")
            print(*places, sep="\n")
