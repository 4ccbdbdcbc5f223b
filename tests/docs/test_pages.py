"""Statements of docs/ about the code are true. Those that need no import are checked by .ci/style.py."""

import re

import torch

import dsmini
from dsmini.functional import attention
from dsmini.inference import generation
from dsmini.nn.mla import attention_work
from tests.helpers.commands import ROOT


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


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
