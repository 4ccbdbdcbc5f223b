"""What tests of python -m dsmini.diagnose share: a text and a small config, hashes of files, and Ctrl-C."""

import hashlib
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

from tests.helpers.commands import TINY, run, start

SMALL = """
[model]
dim = 32
inter_dim = 48
moe_inter_dim = 16
n_layers = 2
n_routed_experts = 8
max_seq_len = 32
[data]
path = "text.txt"
[train]
batch_size = 4
threads = 1
"""


def begin(folder: Path, finished: str, *copies: str) -> None:
    """Write a text and small.toml into a folder, finish a run there, and copy it under other names."""
    (folder / "text.txt").write_text("".join(f"line {i * i % 997} of the text\n" for i in range(4000)))
    (folder / "small.toml").write_text(SMALL)
    (folder / "empty").mkdir()
    assert run(f"dsmini.train {TINY} --data.path text.txt --train.steps 4 --out {finished}", folder).returncode == 0
    for name in copies:
        shutil.copytree(folder / finished, folder / name)


def files(folder: Path) -> dict[str, str]:
    """Return the hash of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def interrupted(line: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Return the JSON that dsmini.diagnose prints after Ctrl-C, which comes after more than this many rounds."""
    process = start(f"dsmini.diagnose {line} --quick --rounds 1000 --json", folder)
    assert process.stderr is not None
    for shown in process.stderr:
        if (found := re.search(r"round (\d+)", shown)) and int(found[1]) > rounds:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    return json.loads(out.splitlines()[-1])
