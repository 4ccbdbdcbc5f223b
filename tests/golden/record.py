"""Write the golden values of this machine into values.json: python -m tests.golden.record

Run it only to change values on purpose, and give the reason in the commit. ONEDNN_MAX_CPU_ISA=AVX2
ATEN_CPU_CAPABILITY=avx2 before the command records another machine on the same CPU. The first machine of the file is
the reference: what it computes within a tolerance, any machine must.
"""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.golden.fingerprint import THREADS, fingerprint
from tests.golden.models import HASHES, LOGITS, TOKENS, measured
from tests.golden.runs import RUNS, prepared, trained

VALUES = Path(__file__).parent / "values.json"


def read() -> dict[str, Any]:
    """Return the recorded hashes, the same on all machines, and the values of each machine."""
    return json.loads(VALUES.read_text(encoding="utf-8")) if VALUES.exists() else {"machines": {}}


def record() -> None:
    """Compute every value and write it under this machine's name."""
    torch.set_num_threads(THREADS)
    os.environ["DSMINI_BACKEND"] = "eager"
    values, name = read(), fingerprint()
    mine: dict[str, Any] = {
        "logits": {name: measured(compute()) for name, compute in LOGITS.items()},
        "tokens": {name: write() for name, write in TOKENS.items()},
    }
    with tempfile.TemporaryDirectory() as path:
        folder = prepared(Path(path))
        mine["runs"] = {name: trained(name, folder) for name in RUNS}
    values["hashes"] = {name: compute() for name, compute in HASHES.items()}
    values["machines"][name] = mine
    VALUES.write_text(short_lists(json.dumps(values, indent=1)) + "\n", encoding="utf-8")
    print(f"{VALUES}: {name}, runs {', '.join(mine['runs'])}")


def short_lists(text: str) -> str:
    """Write each list of numbers in JSON on one line."""
    return re.sub(r"\[\n *([^][{}]*?)\n *\]", lambda found: "[" + re.sub(r"\n *", " ", found[1]) + "]", text)


if __name__ == "__main__":
    record()
