"""Running a command: its exit status, and one sentence for what went wrong."""

import errno
import io
import re
import sys
import warnings
from collections.abc import Callable, Sequence

from dsmini.console.printable import printable
from dsmini.reading import brief


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run a command's main and exit with its status; a mistake of the user is one sentence and status 2."""
    for out in (sys.stdout, sys.stderr):
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    with_place = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: printable(with_place(*args, **kwargs))
    try:
        status = main(sys.argv[1:])
    except ValueError as error:
        _complain(str(error))
        status = 2
    except ArithmeticError as error:
        _complain(str(error))
        status = 1
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        sys.stderr.close()
        status = 1
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            _complain(f"{brief(str(error.filename))} is not usable as a path: {error.strerror}; use a shorter one")
            sys.exit(2)
        _complain(f"{error}; free some space or choose another folder; what was saved is untouched")
        status = 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("memory|alloc|overflow", str(error)):
            raise
        first = (str(error).splitlines() or ["no memory is left"])[0]
        _complain(f"too large for this machine: {first}; use a smaller model or batch")
        status = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    sys.exit(status)


def _complain(sentence: str) -> None:
    print(f"error: {printable(sentence)}", file=sys.stderr)
