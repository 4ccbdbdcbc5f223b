"""Statements of docs/ about the code are true."""

import re
import runpy

import pytest
import torch

import dsmini
from dsmini.functional import attention
from dsmini.inference import generation
from dsmini.nn.mla import attention_work
from tests.helpers.commands import ROOT


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def test_packages_of_the_map_are_in_the_order_of_their_imports() -> None:
    style = runpy.run_path(str(ROOT / ".ci" / "style.py"))
    listed = re.search(r"in this order, so that there\s+is no cycle: (.*?)\.", page("architecture.md"), re.DOTALL)[1]
    assert re.findall(r"`(\w+)`", listed) == [name for name in style["MAY_IMPORT"] if name not in style["SHARED"]]


def test_reading_order_has_every_file_of_the_model_and_takes_its_time() -> None:
    text = page("reading.md").partition("## Shapes")[0]
    files = {path.name for path in (ROOT / "dsmini" / "nn").glob("[!_]*.py")}
    assert files - set(re.findall(r"dsmini/nn/(\w+\.py)", text)) == set()
    minutes = sum(map(int, re.findall(r"^\| (\d+) \|", text, re.MULTILINE)))
    assert "Three hours and a quarter" in text and abs(minutes - 195) <= 10


def test_everything_to_try_runs() -> None:
    names = {"torch": torch, "dsmini": dsmini, "attention_work": attention_work, "model": dsmini.Transformer()}
    names["x"] = torch.zeros(1, 9, dtype=torch.int64)
    rows = re.findall(r"^\| \d+ \|.*\| (.*) \|$", page("reading.md"), re.MULTILINE)
    code = [expression for row in rows for expression in re.findall(r"`([^`]*\([^`]*)`", row)]
    assert len(code) == 12
    for expression in code:
        eval(expression, names)


def test_sizes_in_the_text_are_those_of_the_code() -> None:
    limits = (attention.EXPLICIT_UP_TO_BF16, attention.EXPLICIT_UP_TO, attention.EXPLICIT_UP_TO_COMPILED)
    decided = "up to {} tokens in BF16 ({} in FP32, {} compiled)".format(*limits)
    assert decided in page("decisions.md") and f"logits, {attention.BLOCK} queries at a time" in page("decisions.md")
    assert f"{generation.PREFILL} tokens at a time" in page("architecture.md")


def test_gallery_shows_every_picture_of_its_folder() -> None:
    shown = set(re.findall(r"\]\(gallery/(.+?)\)", page("gallery.md")))
    files = list((ROOT / "docs" / "gallery").iterdir())
    assert shown == {file.name for file in files}
    assert sum(file.stat().st_size for file in files) < 1_500_000


@pytest.mark.parametrize("name", ["architecture.md", "decisions.md", "reading.md", "equations.md"])
def test_names_in_the_text_are_names_of_the_code(name: str) -> None:
    """Compare every name in backquotes, such as `Trainer.step`, with the words of sources, configs and dependencies."""
    folders = ("dsmini", "kernels", "benchmarks", "configs", ".ci", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".toml", ".h")]
    words = set(re.findall(r"\w+", " ".join([*map(str, files), *(path.read_text() for path in files)])))
    named = {part for text in re.findall(r"`([\w./]+)`", page(name)) for part in re.findall(r"[^\W\d]\w+", text)}
    assert len(named) > 10 and named - words == set()
