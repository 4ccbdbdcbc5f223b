"""Write the golden values of this machine into values.json: python -m tests.golden.record

Run it only to change values on purpose, and give the reason in the commit. ONEDNN_MAX_CPU_ISA=AVX2
ATEN_CPU_CAPABILITY=avx2 before the command records another machine on the same CPU.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.golden.counts import count_values
from tests.golden.fingerprint import THREADS, fingerprint, multiplies_bf16
from tests.golden.models import model_values
from tests.golden.runs import run_all

VALUES = Path(__file__).parent / "values.json"


def read() -> dict[str, Any]:
    """Return the recorded counts and hashes, the same on all machines, and the values of each machine."""
    return json.loads(VALUES.read_text(encoding="utf-8")) if VALUES.exists() else {"machines": {}}


def record() -> None:
    """Compute every value and write it under this machine's name."""
    torch.set_num_threads(THREADS)
    os.environ["DSMINI_BACKEND"] = "eager"
    values, mine = read(), model_values()
    values["counts"], values["hashes"] = count_values(), mine.pop("hashes")
    with tempfile.TemporaryDirectory() as folder:
        mine["runs"] = run_all(Path(folder), bf16=multiplies_bf16())
    mine["generate"] = mine["runs"].pop("generate")
    values["machines"][fingerprint()] = mine
    VALUES.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(f"{VALUES}: {fingerprint()}, runs {', '.join(mine['runs'])}")


if __name__ == "__main__":
    record()
