"""Make the notebooks of PAGES from these, so that the two cannot differ: python docs/tutorials/make_notebook.py"""

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGES = ("mla", "look_inside", "change_one_idea", "million_tokens")
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text(?: about)?\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def notebook(page: str) -> dict[str, Any]:
    """Return a notebook of a page: its prose as Markdown cells, its code as code cells with the output it shows."""
    cells: list[dict[str, Any]] = []
    start = 0
    for match in BLOCK.finditer(page):
        cells += _prose(page[start : match.start()])
        printed = match.group(2)
        outputs = [{"output_type": "stream", "name": "stdout", "text": _lines(printed)}] if printed else []
        source = _lines(match.group(1).rstrip("\n"))
        cells.append(
            {"cell_type": "code", "metadata": {}, "execution_count": None, "source": source, "outputs": outputs}
        )
        start = match.end()
    cells += _prose(page[start:])
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _prose(text: str) -> list[dict[str, Any]]:
    return [{"cell_type": "markdown", "metadata": {}, "source": _lines(text.strip())}] if text.strip() else []


def _lines(text: str) -> list[str]:
    """Return the lines of a text as a notebook stores them, with their line ends."""
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    for name in PAGES:
        made = notebook((HERE / f"{name}.md").read_text())
        (HERE / f"{name}.ipynb").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
