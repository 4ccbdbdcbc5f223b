"""Run a command: set its exit status, and report an error in one sentence."""

import io
import re
import sys
from collections.abc import Callable, Sequence


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run a command's main and exit with its status; a mistake of the user is one sentence and status 2."""
    for out in (sys.stdout, sys.stderr):
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="replace")  # for a character that the terminal cannot show
    try:
        status = main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except ArithmeticError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except BrokenPipeError:  # the reader of the output has ended, as in `| head`
        sys.stderr.close()
        status = 1
    except OSError as error:
        print(f"error: {error}; free some space or choose another folder; what was saved is untouched", file=sys.stderr)
        status = 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("memory|alloc|overflow", str(error)):
            raise
        first = (str(error).splitlines() or ["no memory is left"])[0]
        print(f"error: too large for this machine: {first}; use a smaller model or batch", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    sys.exit(status)
