"""Write the golden values of this machine into values.json: python -m tests.golden.record

Run it only to change values on purpose, and give the reason in the commit. ONEDNN_MAX_CPU_ISA=AVX2
ATEN_CPU_CAPABILITY=avx2 before the command records another machine on the same CPU. The first machine of the file is
the reference: what it computes within a tolerance, any machine must.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden.counts import count_values
from tests.golden.fingerprint import THREADS, fingerprint
from tests.golden.models import HASHES, LOGITS, MLA, TOKENS, measured
from tests.golden.runs import GENERATE, TRAIN, continued, prepared, trained
from tests.golden.tolerances import RUN_LOGITS, logits_tolerance

VALUES = Path(__file__).parent / "values.json"
DRAWS = 40
"""Number of times that tokens are written with noise. Two logits closer than twice the tolerance change places in an
eighth of the draws or more: that none does has a chance of 0.5 %."""


def read() -> dict[str, Any]:
    """Return the recorded counts and hashes, the same on all machines, and the values of each machine."""
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
        mine["runs"] = {name: trained(name, folder) for name in (*TRAIN, "resumed")}
        mine["generate"] = {name: continued(name, folder) for name in GENERATE}
        sums = {run: found.pop("sums") for run, found in mine["runs"].items()}
        if name == next(iter(values["machines"]), name):
            values["sums"] = {
                run: {file: [float(f"{total:.6g}") for total, _ in found.values()] for file, found in files.items()}
                for run, files in sums.items()
            }
            values["certain tokens"] = {
                name: certain(TOKENS[name], logits_tolerance(name), MLA["vocab_size"]) for name in TOKENS
            }
            values["certain characters"] = {
                name: certain(partial(continued, name, folder), RUN_LOGITS, vocab_size=256) for name in GENERATE
            }
    values["counts"] = count_values()
    values["hashes"] = {name: compute() for name, compute in HASHES.items()}
    values["machines"][name] = mine
    VALUES.write_text(short_lists(json.dumps(values, indent=1)) + "\n", encoding="utf-8")
    print(f"{VALUES}: {name}, runs {', '.join(mine['runs'])}")


def short_lists(text: str) -> str:
    """Write each list of numbers in JSON on one line."""
    return re.sub(r"\[\n *([^][{}]*?)\n *\]", lambda found: "[" + re.sub(r"\n *", " ", found[1]) + "]", text)


def certain(write: Callable[[], Sequence[Any]], tolerance: float, vocab_size: int) -> list[int]:
    """Return how many of the first tokens or characters of each row stay the same if the logits are a bit off."""
    want = write()
    lengths = [len(row) for row in want]
    for seed in range(DRAWS):
        with noise(2 * tolerance, vocab_size, seed):
            lengths = [min(n, agreeing(*both)) for n, *both in zip(lengths, want, write(), strict=True)]
    return lengths


def agreeing(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the number of leading elements that are equal."""
    return next((i for i, both in enumerate(zip(a, b, strict=False)) if both[0] != both[1]), min(len(a), len(b)))


@contextmanager
def noise(amplitude: float, vocab_size: int, seed: int) -> Iterator[None]:
    """Add to all logits numbers up to this amplitude, as a share of the largest logit."""
    generator, calls = torch.Generator().manual_seed(seed), []

    def add(module: nn.Module, args: Any, out: Any) -> Tensor | None:
        if not isinstance(out, Tensor) or out.shape[-1] != vocab_size:
            return None
        calls.append(1)
        return out + amplitude * out.abs().max() * (2 * torch.rand(out.shape, generator=generator) - 1)

    hook = nn.modules.module.register_module_forward_hook(add)
    yield
    hook.remove()
    assert calls, "the logits were computed elsewhere"


if __name__ == "__main__":
    record()
