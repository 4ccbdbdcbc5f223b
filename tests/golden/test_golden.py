"""Compare with values of version 0.1.0: bitwise on machines that recorded them, logits and losses nearly on any other.

A change that keeps the behaviour keeps these values. A change of behaviour records them again with
python -m tests.golden.record and gives the reason.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.counts import NAMES, counts
from tests.golden.fingerprint import THREADS, fingerprint
from tests.golden.models import HASHES, LOGITS, TOKENS, measured
from tests.golden.record import read
from tests.golden.runs import FIGURES, GENERATE, RUNS, continued, prepared, trained
from tests.golden.tolerances import SCHEDULE, logits_tolerance, run_tolerance

RECORDED = read()
REFERENCE = next(iter(RECORDED["machines"].values()))
KNOWN: dict[str, Any] | None = RECORDED["machines"].get(fingerprint())
"""Values whose bits are wanted; None on a machine that has recorded none."""
known_machine = pytest.mark.skipif(KNOWN is None, reason=f"{fingerprint()} has recorded no bits")


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


@pytest.fixture(scope="module")
def run_of(folder: Path) -> Callable[[str], dict[str, Any]]:
    """Return a function that trains a run, once, and returns its name and its values."""

    @cache
    def train(name: str) -> dict[str, Any]:
        got = trained(name, folder)
        if name == "default" and got["corpus"] != REFERENCE["runs"][name]["corpus"]:  # another Python's library
            return train("default on a book")
        return {"name": name, **got}

    return train


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_as_recorded(name: str) -> None:
    got, want = measured(LOGITS[name]()), REFERENCE["logits"][name]
    atol = logits_tolerance(name) * want["largest"]
    torch.testing.assert_close(torch.tensor(got["floats"]), torch.tensor(want["floats"]), rtol=0, atol=atol)
    assert got["largest"] == pytest.approx(want["largest"], abs=atol)
    if KNOWN:
        assert got == KNOWN["logits"][name]


@known_machine
@pytest.mark.parametrize("name", TOKENS)
def test_written_tokens_are_as_recorded(name: str) -> None:
    assert KNOWN and TOKENS[name]() == KNOWN["tokens"][name]


@pytest.mark.parametrize("name", HASHES)
def test_saved_folder_is_as_recorded(name: str) -> None:
    assert HASHES[name]() == RECORDED["hashes"][name]


@pytest.mark.parametrize("name", NAMES)
def test_counts_of_config_are_as_recorded(name: str) -> None:
    assert counts(name) == RECORDED["counts"][name]


@pytest.mark.parametrize("name", RUNS)
def test_run_ends_as_recorded(name: str, run_of: Callable[[str], dict[str, Any]]) -> None:
    """Compare losses; where there are bits, weights, optimizer state, EMA, random state and every figure of a step."""
    got, tolerance = run_of(name), run_tolerance(name)
    want = REFERENCE["runs"][got["name"]]
    assert (got["corpus"], got["tokens"]) == (want["corpus"], want["tokens"])
    near = dict.fromkeys(("loss", "mtp_loss", "val_loss"), tolerance.losses)
    near |= {"balance_loss": tolerance.balance, "grad_norm": tolerance.grad_norm, "lr": SCHEDULE}
    for key, most in near.items():
        assert [n is None for n in got[key]] == [n is None for n in want[key]]
        for step, (a, b) in enumerate(zip(got[key], want[key], strict=True)):
            assert b is None or abs(a - b) <= most * abs(b), (key, step)
    if KNOWN and got["name"] in KNOWN["runs"]:
        for key in ("weights", "others", *FIGURES):
            assert got[key] == KNOWN["runs"][got["name"]][key], key


@known_machine
@pytest.mark.parametrize("name", GENERATE)
def test_resumed_run_continues_prompts_as_recorded(
    name: str, run_of: Callable[[str], dict[str, Any]], folder: Path
) -> None:
    run_of("resumed")
    assert KNOWN and continued(name, folder) == KNOWN["generate"][name]
