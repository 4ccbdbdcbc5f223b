"""Chat templates that would crash, hang or fill the memory: each is refused in a sentence, within limits."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsmini.text import renderer as module
from dsmini.text.chat import MARK, ChatTemplate, read_template
from dsmini.text.renderer import LONGEST, PROGRAM, Renderer
from dsmini.text.template_worker import _sentence

LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLING = "{% set ns = namespace(s='x' * 1000) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
FAILING = {
    "recursive macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply, or calls itself"),
    "recursive loop": (
        "{% for x in [1] recursive %}{{ loop([[1]]) }}{% endfor %}",
        "nested too deeply, or calls itself",
    ),
    "parentheses": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
    "60 loops": ("{% for x in [1] %}" * 60 + "{% endfor %}" * 60, "SyntaxError: too many statically nested blocks"),
    "cycler": ("{{ cycler() }}", "RuntimeError: at least one item"),
    "truncate": ("{{ 'abcdef ' | truncate(1) }}", "AssertionError: expected length >= 3"),
    "raise": ("{{ raise_exception('a\x1b[2J\u202eb\nc' * 999) }}", "a�.2J�b ca"),
    "width": ("{{ '%1000000000d' % 1 }}", "more than 512 MiB of memory"),
    "indent": ("{{ messages | tojson(indent=10**9) }}", "more than 512 MiB of memory"),
    "doubling": (DOUBLING, "more than 512 MiB of memory"),
    "output": ("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", f"longer than {LONGEST:,} characters"),
}


def refusal(source: str) -> str:
    """Return the sentence with which a template refuses a conversation of one turn."""
    try:
        ChatTemplate(source, Path("t.jinja"), {}).render([{"role": "user", "content": "hi"}])
    except ValueError as error:
        return str(error)
    raise AssertionError("the template was rendered")


@pytest.mark.parametrize("name", FAILING)
def test_template_that_fails_refuses_in_a_sentence(name: str) -> None:
    source, reason = FAILING[name]
    said = refusal(source)
    prefix = "the chat template of t.jinja refuses the conversation: "
    assert said.startswith(prefix) and reason.replace(".2J", "[2J") in said
    assert said.isprintable() and len(said) < len(prefix) + 320


@pytest.mark.parametrize("source", [LOOPS, "{{ lipsum(n=10**8) }}", "{{ 9 ** (9 ** 9) % 7 }}"])
def test_template_without_end_is_stopped(source: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=r"^it takes more than 0\.2 s of CPU time$"):
        Renderer(source, seconds=0.2).render([], {})
    assert time.process_time() - start < 1  # waiting takes no CPU time


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
    assert process.wait(timeout=10) != 0


def test_process_that_never_answers_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer("x")
    assert renderer._process is not None
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    late = threading.Timer(20, renderer._process.kill)  # else the test would wait for ever
    late.start()
    os.kill(renderer._process.pid, signal.SIGSTOP)  # no limit of CPU time ends it
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^it takes more than 0\.3 s, or more memory than there is$"):
        renderer.render([], {})
    late.cancel()
    assert time.monotonic() - start < 15
    assert renderer.render([], {}) == "x"


def test_process_cannot_write_files(tmp_path: Path) -> None:
    """Write as no template can: the limit is a second wall behind the sandbox."""
    code = "import sys; import template_worker as w; {}open(sys.argv[1], 'wb', 0).write(b'x')"
    for limit, status in (("", 0), ("w._limit_memory(1 << 30); ", 1)):
        command = [sys.executable, "-c", code.format(limit), str(tmp_path / "x")]
        done = subprocess.run(command, cwd=PROGRAM.parent, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
    assert "File too large" in done.stderr and (tmp_path / "x").stat().st_size == 0


def test_template_that_renders_nothing_is_named() -> None:
    assert refusal("{# nothing #}") == "the chat template of t.jinja renders nothing; mend it, or leave out --chat"


def test_sandbox_hides_objects_files_and_state() -> None:
    for source in (
        "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['sys'] }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ):
        assert refusal(source)


def test_template_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(ValueError, match=r"chat_template.jinja: it is a folder, want a regular file"):
        read_template(tmp_path, {"chat_template": "x"})


def test_reason_is_one_short_line() -> None:
    assert _sentence(RecursionError(), 0) == "it is nested too deeply, or calls itself without end"
    assert len(_sentence(KeyError("x\n" * 10**6), 0)) < 320 and "\n" not in _sentence(KeyError("x\ny"), 0)
