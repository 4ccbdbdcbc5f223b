"""Chat templates that fail, or would crash, hang or fill the memory: each is refused in a sentence, within limits."""

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dsmini.text import chat
from dsmini.text.chat import MARK, ChatTemplate
from tests.helpers.configs import refusal

LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLING = "{% set ns = namespace(s='x' * 1000) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
REFUSALS = tomllib.loads(Path(__file__).with_name("templates.toml").read_text(encoding="utf-8")) | {
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "is not a Jinja template: maximum recursion depth exceeded",
    "{% for x in [1] %}" * 60 + "{% endfor %}" * 60: "refuses the conversation: SyntaxError: too many",
}


def render(source: str, content: Any = "hi", **limits: Any) -> str:
    return ChatTemplate(source, Path("t.jinja"), {}).render([{"role": "user", "content": content}], **limits)


@pytest.mark.parametrize("source", REFUSALS, ids=lambda source: source[:40])
def test_template_that_fails_is_refused_in_a_sentence(source: str) -> None:
    said = refusal(render, source)
    assert said.startswith(f"the chat template of t.jinja {REFUSALS[source]}")
    assert said.isprintable() and len(said) < 400


@pytest.mark.parametrize(
    ("source", "limits", "sentence"),
    [
        (LOOPS, {"seconds": 1}, "it takes more than 1 s of CPU time"),
        ("{{ 9 ** (9 ** 9) % 7 }}", {"seconds": 1}, "it takes more than 1 s of CPU time"),
        (DOUBLING, {"memory": 200 << 20}, "it needs more than 200 MiB of memory"),
    ],
    ids=["loops", "number", "doubling"],
)
def test_template_without_end_is_stopped(source: str, limits: dict[str, Any], sentence: str) -> None:
    assert refusal(render, source, **limits) == f"the chat template of t.jinja refuses the conversation: {sentence}"


@pytest.mark.parametrize("content", ["a", f"\r\n\u2028{MARK}\udc80<\x00", "日🙂"])
def test_text_of_a_message_comes_back_as_it_is(content: str) -> None:
    assert render("{{ messages[0].content }}", content) == content


def test_process_that_never_answers_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "PATIENCE", 0.01)
    assert refusal(render, "x").endswith("refuses the conversation: it takes more than 0.01 s")


def test_process_that_crashes_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.CompletedProcess([], -11, b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: dead)
    assert refusal(render, "x").endswith("refuses the conversation: it crashes its process, with status -11")
