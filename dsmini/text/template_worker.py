"""A program of its own that renders a chat template under limits of CPU time and memory.

A template is a stranger's program. Jinja's sandbox keeps it away from files and from Python's objects, but not from
time and memory: one expression, such as '%1000000000d' % 1, takes both, and nothing in the same interpreter can stop
it. A process can be limited by the operating system, whatever the expression is.

Each line of standard input is a request in JSON, and each gets a line of JSON:
{"source", "seconds", "memory", "longest"}   ->  {"says": strings that the template itself spells}
{"messages", "tokens"}                       ->  {"text": the rendered conversation}
A failure gives {"syntax": sentence} or {"refuses": sentence}. Over the CPU time the process ends without an answer.

This file imports nothing of dsmini, so that the process starts quickly.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %}, which marks the text to train on; it changes nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: "jinja2.parser.Parser") -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that transformers gives a template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    functions: dict[str, Callable[..., Any]] = {"raise_exception": _refuse, "strftime_now": _now}
    environment.globals.update(functions)
    environment.filters["tojson"] = _tojson
    return environment


def _refuse(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Write JSON without escapes for < and >, which Jinja's own filter has."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class Worker:
    """A template and its limits."""

    def __init__(self, source: str, seconds: float, memory: int, longest: int) -> None:
        self.seconds, self.memory, self.longest = seconds, memory, longest
        _limit_memory(memory)
        environment = _environment()
        tree = environment.parse(source)
        constants = (node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str))
        self.says = [*(node.data for node in tree.find_all(jinja2.nodes.TemplateData)), *constants]
        self._template = environment.from_string(tree)

    def render(self, messages: list[dict[str, str]], tokens: dict[str, str]) -> str:
        """Return the conversation as text. Raises: TemplateError for one that becomes too long."""
        parts, size = list[str](), 0
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        for part in self._template.generate(**given, **tokens):
            size += len(part)
            if size > self.longest:
                raise jinja2.TemplateError(f"its text would be longer than {self.longest:,} characters")
            parts.append(part)
        return "".join(parts)


def _limit_memory(nbytes: int) -> None:
    """Limit the memory of this process, where the system can (Linux), and forbid writing to files."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))


def _limit_seconds(seconds: float) -> None:
    """Let the system end this process after so much CPU time from now, even inside an expression; 0 ends the limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _sentence(error: Exception, memory: int) -> str:
    """Return the reason for a failure, on one line and of bounded length."""
    if isinstance(error, MemoryError):
        return f"it needs more than {memory >> 20} MiB of memory"
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or calls itself without end"
    said = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
    said = " ".join(said[:10_000].split())
    said = "".join(c if c.isprintable() else "\ufffd" for c in said)  # a terminal obeys control characters
    return said if len(said) <= 300 else said[:300] + " ..."


def main() -> None:
    """Answer requests until standard input ends."""
    worker: Worker | None = None
    memory = 0
    for line in sys.stdin.buffer:
        # lone surrogates, which messages may hold, stay as they are
        request = json.loads(line.decode("utf-8", "surrogatepass"))
        try:
            if worker is None:
                memory = request["memory"]
                _limit_seconds(request["seconds"])
                worker = Worker(**request)
                answer: dict[str, Any] = {"says": worker.says}
            else:
                _limit_seconds(worker.seconds)
                answer = {"text": worker.render(**request)}
            content = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
        except jinja2.TemplateSyntaxError as error:
            content = json.dumps({"syntax": _sentence(error, memory)}).encode()
        except Exception as error:  # whatever a stranger's program can raise
            content = json.dumps({"refuses": _sentence(error, memory)}).encode()
        _limit_seconds(0)
        sys.stdout.buffer.write(content + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
