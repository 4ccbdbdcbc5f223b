"""Chat templates that fail, or reach for what the sandbox hides: each is refused in a sentence."""

from pathlib import Path
from typing import Any

import pytest

from dsmini.text.chat import MARK, ChatTemplate
from tests.helpers.configs import refusal

PARENTHESES = "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"
DEEP = "refuses the conversation: RecursionError: "
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
    # what would take all of the stack
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", DEEP),
    ("{% for x in [1] recursive %}{{ loop([[1]]) }}{% endfor %}", DEEP),
    (PARENTHESES, "is not a Jinja template: maximum recursion depth exceeded"),
    (
        "{% for x in [1] %}" * 60 + "{% endfor %}" * 60,
        "refuses the conversation: SyntaxError: too many statically nested",
    ),
]


def render(source: str, content: Any = "hi") -> str:
    return ChatTemplate(source, Path("t.jinja"), {}).render([{"role": "user", "content": content}])


@pytest.mark.parametrize(("source", "sentence"), REFUSALS, ids=[source[:40] for source, _ in REFUSALS])
def test_template_that_fails_is_refused_in_a_sentence(source: str, sentence: str) -> None:
    said = refusal(render, source)
    assert said.startswith(f"the chat template of t.jinja {sentence}")
    assert said.isprintable() and len(said) < 400


@pytest.mark.parametrize("content", ["a", f"\r\n\u2028{MARK}\udc80<\x00", "日🙂"])
def test_text_of_a_message_comes_back_as_it_is(content: str) -> None:
    assert render("{{ messages[0].content }}", content) == content
