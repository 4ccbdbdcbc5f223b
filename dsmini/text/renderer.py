"""Rendering of a chat template in a process of its own, under limits of time, memory and length."""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 2.0
"""Largest CPU time of one conversation; templates that are published take milliseconds."""
MEMORY = 512 << 20
"""Largest memory of the process in bytes, its interpreter included (Linux)."""
LONGEST = 16 << 20
"""Largest number of characters of a rendered conversation."""
PATIENCE = 60.0
"""Largest time in seconds to wait for an answer: the machine may be busy, or the system may not limit CPU time."""
PROGRAM = Path(__file__).with_name("template_worker.py")


class NotATemplateError(ValueError):
    """A program that Jinja cannot parse."""


class Renderer:
    """Renders conversations by a Jinja program that is not trusted.

    The process is started once, which takes about a tenth of a second, and again if a limit ended it. It ends when
    this object or this process does.

    Args:
        seconds: largest CPU time of one conversation.
        memory: largest memory of the process in bytes.

    Raises: NotATemplateError, and ValueError with the reason for a program that cannot be compiled within the limits.
    """

    def __init__(self, source: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self._load = {"source": source, "seconds": seconds, "memory": memory, "longest": LONGEST}
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self.says: list[str] = self._start()
        """The strings that the template itself spells."""

    def render(self, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str]) -> str:
        """Return a conversation as text.

        Raises: ValueError with the reason if the template fails, or goes over a limit.
        """
        if self._process is None:
            self._start()
        return self._ask({"messages": [dict(message) for message in messages], "tokens": dict(tokens)})["text"]

    def _start(self) -> list[str]:
        self._process = subprocess.Popen(
            # without site-packages' start-up files; sys.path says where Jinja is
            [sys.executable, "-S", "-P", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for us alone
        )
        weakref.finalize(self, _end, self._process)
        return self._ask(self._load)["says"]

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request; return its answer. Raises: ValueError with the reason for a failure."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        late = threading.Timer(PATIENCE, process.kill)
        late.start()
        try:
            line = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
            try:
                process.stdin.write(line)
                process.stdin.flush()
                content = process.stdout.readline()
            except OSError:  # it has ended
                content = b""
        except BaseException:  # such as Ctrl-C: an answer that comes later must not be taken for another's
            self._process = None
            _end(process)
            raise
        finally:
            late.cancel()
        if not content.endswith(b"\n"):
            self._process = None
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            _end(process)
            raise ValueError(self._why(process.returncode))
        answer = json.loads(content.decode("utf-8", "surrogatepass"))
        if "syntax" in answer:
            raise NotATemplateError(answer["syntax"])
        if "refuses" in answer:
            raise ValueError(answer["refuses"])
        return answer

    def _why(self, status: int) -> str:
        """Return the reason for which the process ended without an answer."""
        if status == -signal.SIGPROF:
            return f"it takes more than {self._seconds:g} s of CPU time"
        if status == -signal.SIGKILL:
            return f"it takes more than {PATIENCE:g} s, or more memory than there is"
        return f"it crashes its process, with status {status}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and wait for it."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # a request that it did not read
                pipe.close()
    process.wait()
