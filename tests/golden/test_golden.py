"""Compare with values of version 0.1.0: bitwise on the machines that recorded them, within a tolerance elsewhere.

A change that keeps the behaviour keeps these values. A change of behaviour records them again with
python -m tests.golden.record and gives the reason.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.counts import NAMES, counts
from tests.golden.fingerprint import THREADS, fingerprint, multiplies_bf16
from tests.golden.models import HASHES, LOGITS, TOKENS, measured
from tests.golden.record import read
from tests.golden.runs import FIGURES, GENERATE, RUNS, run_all
from tests.golden.tolerances import SCHEDULE, logits_tolerance, losses_tolerance

RECORDED = read()
KNOWN = RECORDED["machines"].get(fingerprint())
REFERENCE = KNOWN or next(iter(RECORDED["machines"].values()))
needs_known_machine = pytest.mark.skipif(
    KNOWN is None, reason=f"bits depend on the machine, and values.json has none of: {fingerprint()}"
)


@pytest.fixture(autouse=True)
def _plain_code_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DSMINI_BACKEND", "eager")
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train all runs once, and return their values with the generated texts."""
    bf16 = "bf16" in KNOWN["runs"] if KNOWN else multiplies_bf16()
    return run_all(tmp_path_factory.mktemp("runs"), bf16)


def recorded_run(name: str, runs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of a run and the recorded ones; skip if they are not comparable."""
    if name not in runs:
        pytest.skip("products in BF16 are emulated slowly on this machine")
    recorded = REFERENCE["runs"][name]
    if name == "default" and runs[name]["corpus"] != recorded["corpus"]:
        pytest.skip("this Python's standard library is another text than the recorded one")
    return runs[name], recorded


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_as_recorded(name: str) -> None:
    got, want = measured(LOGITS[name]()), REFERENCE["logits"][name]
    if KNOWN:
        assert got == want
    atol = logits_tolerance(name) * want["largest"]
    torch.testing.assert_close(torch.tensor(got["floats"]), torch.tensor(want["floats"]), rtol=0, atol=atol)
    assert got["largest"] == pytest.approx(want["largest"], abs=atol)


@needs_known_machine
@pytest.mark.parametrize("name", TOKENS)
def test_written_tokens_are_as_recorded(name: str) -> None:
    assert TOKENS[name]() == KNOWN["tokens"][name]


@pytest.mark.parametrize("name", HASHES)
def test_saved_folder_is_as_recorded(name: str) -> None:
    assert HASHES[name]() == RECORDED["hashes"][name]


@pytest.mark.parametrize("name", NAMES)
def test_counts_of_config_are_as_recorded(name: str) -> None:
    assert counts(name) == RECORDED["counts"][name]


def test_every_config_was_counted() -> None:
    assert sorted(RECORDED["counts"]) == NAMES


@needs_known_machine
@pytest.mark.parametrize("name", RUNS)
def test_run_ends_with_recorded_bits(name: str, runs: dict[str, Any]) -> None:
    """Compare weights, optimizer state, EMA, random state, and every figure of every step."""
    got, want = recorded_run(name, runs)
    assert got["weights"] == want["weights"]
    assert got["others"] == want["others"]
    assert {key: got[key] for key in FIGURES} == {key: want[key] for key in FIGURES}


@pytest.mark.parametrize("name", RUNS)
def test_run_has_losses_near_the_recorded(name: str, runs: dict[str, Any]) -> None:
    got, want = recorded_run(name, runs)
    assert got["corpus"] == want["corpus"]
    assert got["tokens"] == want["tokens"]
    assert got["lr"] == pytest.approx(want["lr"], rel=SCHEDULE)
    for key in ("loss", "mtp_loss", "val_loss"):
        assert [n is None for n in got[key]] == [n is None for n in want[key]]
        there = [[n for n in values[key] if n is not None] for values in (got, want)]
        assert there[0] == pytest.approx(there[1], rel=losses_tolerance(name))


@needs_known_machine
@pytest.mark.parametrize("name", GENERATE)
def test_resumed_run_continues_prompts_as_recorded(name: str, runs: dict[str, Any]) -> None:
    assert runs["generate"][name] == KNOWN["generate"][name]


def test_old_run_holds_no_path_of_this_machine() -> None:
    """Resume a copied run by naming its text again."""
    for path in (Path(__file__).parent / "old_run").rglob("*.toml"):
        named = [line for line in path.read_text().splitlines() if line.startswith("path =")]
        assert named in ([], ['path = "/elsewhere/text.txt"'])
    assert not Path("/elsewhere/text.txt").exists()
