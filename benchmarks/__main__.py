"""python -m benchmarks: measure, beside what is predicted, and draw a report."""

from benchmarks.runner import main
from dsmini.console.command import run

if __name__ == "__main__":
    run(main)
