"""Run python -m benchmarks: measure, compare with predictions, and write a page."""

from benchmarks.questions import QUESTIONS
from benchmarks.run import main
from dsmini.console.command import run

if __name__ == "__main__":
    run(lambda args: main(args, QUESTIONS))
