"""Chat templates that fail, or would crash, hang or fill the memory: each is refused in a sentence, within limits."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsmini.text import renderer as module
from dsmini.text.chat import MARK, ChatTemplate, read_template
from dsmini.text.renderer import LONGEST, PROGRAM, Renderer
from dsmini.text.template_worker import _sentence

LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLING = "{% set ns = namespace(s='x' * 1000) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
PARENTHESES = "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"
DEEP = "refuses the conversation: it is nested too deeply, or calls itself without end"
LARGE = "refuses the conversation: it needs more than 512 MiB of memory"
UNSAFE = "refuses the conversation: access to attribute '{}' of '{}' object is unsafe."
REFUSALS: list[tuple[str, str]] = [
    ("{% if %}", "is not a Jinja template: "),
    ("{# nothing #}", "renders nothing; mend it, or leave out --chat"),
    ("{{ raise_exception('turns must alternate') }}", "refuses the conversation: turns must alternate"),
    ("{{ raise_exception('a\x1b[2J\u202eb\nc' * 999) }}", "refuses the conversation: a�[2J�b ca"),
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
    (PARENTHESES, DEEP),
    (
        "{% for x in [1] %}" * 60 + "{% endfor %}" * 60,
        "refuses the conversation: SyntaxError: too many statically nested",
    ),
    ("{{ '%1000000000d' % 1 }}", LARGE),
    ("{{ messages | tojson(indent=10**9) }}", LARGE),
    (
        "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        f"refuses the conversation: its text would be longer than {LONGEST:,} characters",
    ),
]


@pytest.mark.parametrize(("source", "sentence"), REFUSALS, ids=[source[:40] for source, _ in REFUSALS])
def test_template_that_fails_is_refused_in_a_sentence(source: str, sentence: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the sentence is compared below)
        ChatTemplate(source, Path("t.jinja"), {}).render([{"role": "user", "content": "hi"}])
    said = str(refused.value)
    assert said.startswith(f"the chat template of t.jinja {sentence}")
    assert said.isprintable() and len(said) < 400


def test_template_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(ValueError, match=r"chat_template.jinja: it is a folder, want a regular file"):
        read_template(tmp_path, {"chat_template": "x"})


@pytest.mark.parametrize(
    ("source", "limit", "sentence"),
    [
        (LOOPS, {"seconds": 0.2}, r"it takes more than 0\.2 s of CPU time"),
        ("{{ lipsum(n=10**8) }}", {"seconds": 0.2}, r"it takes more than 0\.2 s of CPU time"),
        ("{{ 9 ** (9 ** 9) % 7 }}", {"seconds": 0.2}, r"it takes more than 0\.2 s of CPU time"),
        (DOUBLING, {"memory": 200 << 20, "seconds": 60}, "it needs more than 200 MiB of memory"),
    ],
    ids=["loops", "text", "number", "doubling"],
)
def test_template_without_end_is_stopped(source: str, limit: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        Renderer(source, **limit).render([], {})


def test_renderer_serves_again_after_a_limit() -> None:
    renderer = Renderer(
        "{% for x in range(messages[0].n) %}{% for y in range(99999) %}{% endfor %}{% endfor %}ok", seconds=0.2
    )
    assert renderer.render([{"n": 0}], {}) == "ok"
    with pytest.raises(ValueError, match="CPU time"):
        renderer.render([{"n": 99999}], {})
    assert renderer.render([{"n": 1}], {}) == "ok"


def test_process_is_started_once_and_ends_with_its_renderer() -> None:
    renderer = Renderer("{{ messages[0].content }}")
    process = renderer._process
    assert process is not None
    for content in ("a", f"\r\n\u2028{MARK}\udc80<\x00", "日🙂"):  # what JSON and lines could change
        assert renderer.render([{"content": content}], {}) == content
    assert renderer._process is process and process.poll() is None
    del renderer
    assert process.wait(timeout=100) != 0


def test_process_that_never_answers_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer("x")
    assert renderer._process is not None
    os.kill(renderer._process.pid, signal.SIGSTOP)  # no limit of CPU time ends it
    with monkeypatch.context() as patch:  # the next process may take longer to start
        patch.setattr(module, "PATIENCE", 0.3)
        with pytest.raises(ValueError, match=r"^it takes more than 0\.3 s, or more memory than there is$"):
            renderer.render([], {})
    assert renderer.render([], {}) == "x"


def test_process_cannot_write_files(tmp_path: Path) -> None:
    """Write as no template can: the limit is a second wall behind the sandbox."""
    code = "import template_worker; open('{0}/before', 'wb', 0).write(b'x'); template_worker._limit_memory(1 << 30); "
    code = code.format(tmp_path) + f"open('{tmp_path}/after', 'wb', 0).write(b'x')"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROGRAM.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert [(tmp_path / name).stat().st_size for name in ("before", "after")] == [1, 0]


def test_reason_is_one_short_line() -> None:
    assert _sentence(RecursionError(), 0) == "it is nested too deeply, or calls itself without end"
    assert len(_sentence(KeyError("x\n" * 10**6), 0)) < 320 and "\n" not in _sentence(KeyError("x\ny"), 0)
