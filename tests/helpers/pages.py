"""Printed pages, compared with a stored one.

UPDATE_PAGES=1 pytest tests/report    writes them again; read what has changed before a commit
"""

import io
import os
import re
from html import unescape
from pathlib import Path
from typing import Any

from rich.console import Console


def check_page(stored: Path, shown: str) -> None:
    """Compare lines with those of a stored page."""
    if os.environ.get("UPDATE_PAGES"):
        stored.parent.mkdir(exist_ok=True)
        stored.write_text(shown, encoding="utf-8")
    assert shown.splitlines() == stored.read_text(encoding="utf-8").splitlines(), f"{stored} holds another page"


def on_terminal(report: Any, width: int = 80) -> str:
    """Return what a terminal of this width shows."""
    out = io.StringIO()
    report.show(Console(file=out, width=width))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def text_of(page: str) -> str:
    """Return the text of a page, a line for each element and each row of a table, without the drawings."""
    body = re.sub(r"<(svg|style|head).*?</\1>", "", page, flags=re.DOTALL)
    body = re.sub(r"</?(span|sup|a|b|code)\b[^>]*>", " ", body)
    body = re.sub(r"\s*</t[dh]>\s*<t[dh][^>]*>\s*", " | ", body)
    lines = (unescape(" ".join(part.split())) for part in re.split(r"<[^>]+>", body))
    return "".join(f"{line}\n" for line in lines if line)
