"""The tokenizers library: a checked file becomes its tokenizer, and a failure inside it becomes a sentence."""

import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dsmini.reading import is_there, read_table, readable
from dsmini.text.tokenizer_file import MOST_VALUES, fault_of

if TYPE_CHECKING:
    import tokenizers

NOT_A_TOKENIZER = "is not a tokenizer.json of the tokenizers library"
OTHER = "name another tokenizer.json, such as DeepSeek publishes"

_REDIRECTING = threading.Lock()
"""Held while file descriptor 2 is another file; a second thread leaves it so."""


def load(path: Path, markup: Collection[str]) -> "tokenizers.Tokenizer":
    """Read a tokenizer.json.

    Args:
        markup: added tokens that no text may spell, beside the file's special tokens and those of the form <｜...｜>.

    Raises: ValueError for a file that is missing, unreadable, or would take more memory than texts need, and if the
        tokenizers library is not installed.
    """
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise ValueError(
            f"reading {path} needs the tokenizers library; install it with: pip install 'tokenizers>=0.20'"
        ) from None
    if not is_there(path):
        raise ValueError(f"there is no tokenizer file {path}; name a tokenizer.json, or leave it out for bytes")
    try:
        content = read_table(path, MOST_VALUES)
        for token in content.get("added_tokens", []):
            # DeepSeek's file calls <｜User｜> and others of that form ordinary, so that a text could spell them
            name = token["content"]
            token["special"] |= name in markup or re.fullmatch("<｜.*｜>", name) is not None
        fault = fault_of(content)
        content = json.dumps(content)
    except Exception as error:  # whatever a foreign file makes of the lines above
        raise ValueError(f"{path} {NOT_A_TOKENIZER}: {error}; name one such as DeepSeek publishes") from None
    if fault is not None:
        raise ValueError(f"{path} {fault}; {OTHER}")
    with named(path, NOT_A_TOKENIZER, quiet=True):
        library = Library.from_str(content)
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    return library


@contextmanager
def named(path: Path, fault: str, quiet: bool = False) -> Iterator[None]:
    """Raise ValueError with the file's name for an error of the tokenizers library, its panics included.

    Args:
        quiet: show nothing of what Rust itself prints about a panic.
    """
    try:
        if quiet:
            with _without_panics():
                yield
        else:
            yield
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        said = " ".join(str(error).split())
        raise ValueError(f"{path} {fault}: {readable(said)}; {OTHER}") from None


def _is_panic(error: BaseException) -> bool:
    """Return whether Rust code panicked: a BaseException whose class cannot be imported."""
    return type(error).__name__ == "PanicException"


@contextmanager
def _without_panics() -> Iterator[None]:
    """Hold back the standard error of a short block; show it afterwards, without what Rust wrote about a panic."""
    with ExitStack() as stack:
        if not _REDIRECTING.acquire(blocking=False):
            yield
            return
        stack.callback(_REDIRECTING.release)
        panicked = False
        try:
            held = stack.enter_context(tempfile.TemporaryFile())
            shown = os.dup(2)
        except OSError:  # no place for files, or no standard error
            shown = held = None
        if held is not None and shown is not None:
            os.dup2(held.fileno(), 2)
            stack.callback(lambda: _show_again(shown, held, panicked))
        try:
            yield
        except BaseException as error:
            panicked = _is_panic(error)
            raise


def _show_again(shown: int, held: IO[bytes], panicked: bool) -> None:
    """Let file descriptor 2 be `shown` again, and write there what was held back."""
    if sys.stderr is not None:
        sys.stderr.flush()
    os.dup2(shown, 2)
    os.close(shown)
    held.seek(0)
    said = held.read()
    said = re.split(rb"\n?thread '[^\n]* panicked at ", said)[0] if panicked else said
    with suppress(OSError):
        while said:
            said = said[os.write(2, said) :]
