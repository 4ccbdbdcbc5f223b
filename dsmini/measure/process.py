"""Run some steps in a process of its own, and say how much memory it took: python -m dsmini.measure.process SHAPE.

The peak of a process never falls, so it takes a new process to measure that of one workload.
"""

import base64
import os
import pickle
import subprocess
import sys

import torch

from dsmini.measure.memory import peak_since_reset
from dsmini.measure.workloads import StepShape

STEPS = 3
CPU = torch.device("cpu")


def peak_of_process(shape: StepShape) -> int:
    """Return the largest resident memory, in bytes, of a process that runs a few of these steps on the CPU."""
    given = base64.b85encode(pickle.dumps(shape)).decode()
    command = [sys.executable, "-m", "dsmini.measure.process", str(torch.get_num_threads())]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=dict(os.environ), check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def main() -> None:
    """Run the step that the standard input describes, and print the peak."""
    torch.set_num_threads(int(sys.argv[1]))
    step = pickle.loads(base64.b85decode(sys.stdin.read())).make(CPU)
    for _ in range(STEPS):
        step()
    print(peak_since_reset(CPU))  # not getrusage, which knows the peak of the parent


if __name__ == "__main__":
    main()
