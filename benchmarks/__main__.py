"""python -m benchmarks: measure, next to what is predicted, and draw a report."""

import sys

from benchmarks.command_line import listed, parse
from benchmarks.questions import questions_here

if __name__ == "__main__":
    known = questions_here()
    if sys.argv[1:] in (["--list"], ["--help"], ["-h"]):  # at once: torch takes seconds to import
        parse(sys.argv[1:], known)
        print("\n".join(listed(known)))
        sys.exit()
    from benchmarks.runner import main
    from dsmini.console.command import run

    run(lambda args: main(args, known))
