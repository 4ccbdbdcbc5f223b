"""Chat templates that fail, or would crash, hang or fill the memory: each is refused in a sentence, within limits."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from dsmini.text import chat
from dsmini.text.chat import LONGEST, MARK, ChatTemplate
from tests.helpers.configs import refusal

LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLING = "{% set ns = namespace(s='x' * 1000) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
PARENTHESES = "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"
DEEP = "refuses the conversation: RecursionError: "
LARGE = "refuses the conversation: it needs more than 512 MiB of memory"
UNSAFE = "refuses the conversation: access to attribute '{}' of '{}' object is unsafe."
REFUSALS: list[tuple[str, str]] = [
    ("{% if %}", "is not a Jinja template: "),
    ("{# nothing #}", "renders nothing; mend it, or leave out --chat"),
    ("{{ raise_exception('turns must alternate') }}", "refuses the conversation: turns must alternate"),
    ("{{ raise_exception('a\x1b[2J\u202eb\nc' * 999) }}", "refuses the conversation: 'a\\x1b[2J\\u202eb ca"),
    ("{{ messages[0]['content'] + 1 }}", "refuses the conversation: TypeError: "),
    ("{{ messages[7].role.x }}", "refuses the conversation: list object has no element 7"),
    ("{{ 1 / 0 }}", "refuses the conversation: ZeroDivisionError: "),
    ("{{ cycler() }}", "refuses the conversation: RuntimeError: at least one item"),
    ("{{ 'abcdef ' | truncate(1) }}", "refuses the conversation: AssertionError: expected length >= 3"),
    ("{% include '/etc/passwd' %}", "refuses the conversation: TypeError: no loader"),
    # what the sandbox hides: a lone '{{ x.__class__ }}' is empty
    ("{{ ''.__class__ }}{{ ''.__class__.__mro__ }}", UNSAFE.format("__class__", "str")),
    ("{{ raise_exception.__globals__['sys'] }}", UNSAFE.format("__globals__", "function")),
    ("{{ '{0.__class__.__mro__}'.format(1) }}", UNSAFE.format("__class__", "int")),
    ("{{ messages.append(1) }}", UNSAFE.format("append", "list")),
    # what would take all of the stack or the memory
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", DEEP),
    ("{% for x in [1] recursive %}{{ loop([[1]]) }}{% endfor %}", DEEP),
    (PARENTHESES, "is not a Jinja template: maximum recursion depth exceeded"),
    (
        "{% for x in [1] %}" * 60 + "{% endfor %}" * 60,
        "refuses the conversation: SyntaxError: too many statically nested",
    ),
    ("{{ '%1000000000d' % 1 }}", LARGE),
    ("{{ messages | tojson(indent=10**9) }}", LARGE),
    (
        "{% for a in range(1999) %}{{ 'x' * 9999 }}{% endfor %}",
        f"refuses the conversation: its text would be longer than {LONGEST:,} characters",
    ),
]


def render(source: str, content: Any = "hi", **limits: Any) -> str:
    return ChatTemplate(source, Path("t.jinja"), {}).render([{"role": "user", "content": content}], **limits)


@pytest.mark.parametrize(("source", "sentence"), REFUSALS, ids=[source[:40] for source, _ in REFUSALS])
def test_template_that_fails_is_refused_in_a_sentence(source: str, sentence: str) -> None:
    said = refusal(render, source)
    assert said.startswith(f"the chat template of t.jinja {sentence}")
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
