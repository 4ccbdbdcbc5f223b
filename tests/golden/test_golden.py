"""Compare with values of version 0.1.0: within tolerances on any machine, bitwise on those that recorded them.

A change that keeps the behaviour keeps these values. A change of behaviour records them again with
python -m tests.golden.record and gives the reason.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.fingerprint import THREADS, fingerprint
from tests.golden.models import HASHES, LOGITS, TOKENS, measured
from tests.golden.record import read
from tests.golden.runs import FIGURES, HERE, RUNS, prepared, succeed, trained
from tests.golden.tolerances import FP32_RUN, NEAR, logits_tolerance, run_tolerance

RECORDED = read()
MACHINES = list(RECORDED["machines"].values())
REFERENCE = MACHINES[0]
KNOWN: dict[str, Any] = RECORDED["machines"].get(fingerprint(), {})
"""Values whose bits are wanted; empty on a machine that has recorded none."""
wants_bits = pytest.mark.skipif(not KNOWN, reason="this machine has recorded no bits; python -m tests.golden.record")


@pytest.fixture(autouse=True)
def _plain_code_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DSMINI_BACKEND", "eager")
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_as_recorded(name: str) -> None:
    got, want = measured(LOGITS[name]()), REFERENCE["logits"][name]
    atol = logits_tolerance(name) * want["largest"]
    torch.testing.assert_close(torch.tensor(got["floats"]), torch.tensor(want["floats"]), rtol=0, atol=atol)
    assert got["largest"] == pytest.approx(want["largest"], abs=atol)
    if KNOWN:
        assert got == KNOWN["logits"][name]


@wants_bits
@pytest.mark.parametrize("name", TOKENS)
def test_written_tokens_are_as_recorded(name: str) -> None:
    assert TOKENS[name]() == KNOWN["tokens"][name]


@pytest.mark.parametrize("name", HASHES)
def test_saved_folder_is_as_recorded(name: str) -> None:
    assert HASHES[name]() == RECORDED["hashes"][name]


@pytest.mark.parametrize("name", RUNS)
def test_run_is_as_recorded(name: str, folder: Path) -> None:
    """Losses of every step; where there are bits, those of weights, optimizer, average, random state and figures."""
    got = trained(name, folder)
    want = next(of["runs"][name] for of in MACHINES if name in of["runs"])
    assert (got["corpus"], got["tokens"]) == (want["corpus"], want["tokens"])
    for key in NEAR[name]:
        assert [n is None for n in got[key]] == [n is None for n in want[key]]
        for step, (a, b) in enumerate(zip(got[key], want[key], strict=True)):
            assert b is None or abs(a - b) <= run_tolerance(name, key, step) * abs(b), (key, step)
    if KNOWN and name in KNOWN["runs"]:
        for key in ("weights", "others", *FIGURES):
            assert got[key] == KNOWN["runs"][name][key], key


def test_stored_run_of_v4_continues_as_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    shutil.copytree(HERE / "old_run_v4/run", tmp_path / "run")
    succeed(f"--resume run --data.path '{HERE}/old_run/text.txt'", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    stored = [json.loads(line) for line in (HERE / "old_run_v4/later.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    for got, want in zip(rows[10:], stored, strict=True):
        for key, most in (FP32_RUN | {"indexer_kl": 5e-3}).items():  # AVX2 and AVX-512 differ by 2.5e-6
            wanted = want[key] if want[key] is None else pytest.approx(want[key], rel=most)
            assert got[key] == wanted, (key, want["step"])
