"""A program of its own that renders a chat template, so that the system can limit its time and memory.

A template is a stranger's program. Jinja's sandbox keeps it away from files and from Python's objects, but not from
time and memory: one expression, such as 10**10**8, takes both, and nothing in the same interpreter can stop it.

Standard input holds a request in JSON, {"source", "given", "seconds", "memory", "longest"}; standard output gets
{"text": the rendered conversation} or {"refuses": the reason}. Over its CPU time the process ends without an answer.
This file imports nothing of dsmini, so that the process starts quickly.
"""

import json
import resource
import sys
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


def environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that transformers gives a template."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.globals.update({"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)})  # pyright: ignore[reportArgumentType, reportCallIssue]
    made.filters["tojson"] = _tojson
    return made


def _refuse(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Write JSON without escapes for < and >, which Jinja's own filter has."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def main() -> None:
    """Answer the request."""
    # lone surrogates, which messages may hold, stay as they are
    request = json.loads(sys.stdin.buffer.read().decode("utf-8", "surrogatepass"))
    limits = {"CORE": 0, "FSIZE": 0, "AS": request["memory"], "CPU": request["seconds"]}  # no file can be written
    for name, most in limits.items():
        limit = getattr(resource, f"RLIMIT_{name}")
        highest = resource.getrlimit(limit)[1]
        try:
            resource.setrlimit(limit, (most if highest == resource.RLIM_INFINITY else min(most, highest), highest))
        except ValueError:
            if name != "AS":  # on macOS a process begins with more address space than any such limit
                raise
    try:
        text = environment().from_string(request["source"]).render(request["given"])
        if len(text) > request["longest"]:
            raise jinja2.TemplateError(f"its text would be longer than {request['longest']:,} characters")
        answer = {"text": text}
    except MemoryError:
        answer = {"refuses": f"it needs more than {request['memory'] >> 20} MiB of memory"}
    except Exception as error:  # whatever a stranger's program can raise
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        answer = {"refuses": kind + str(error)[:10_000]}
    sys.stdout.buffer.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass"))


if __name__ == "__main__":
    main()
