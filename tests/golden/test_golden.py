"""Compare with values of version 0.1.0: within tolerances on any machine, bitwise on those that recorded them.

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


@pytest.mark.parametrize("name", TOKENS)
def test_written_tokens_are_as_recorded(name: str) -> None:
    got = TOKENS[name]()
    assert_equal_as_far_as_certain(got, REFERENCE["tokens"][name], RECORDED["certain tokens"][name])
    if KNOWN:
        assert got == KNOWN["tokens"][name]


@pytest.mark.parametrize("name", HASHES)
def test_saved_folder_is_as_recorded(name: str) -> None:
    assert HASHES[name]() == RECORDED["hashes"][name]


@pytest.mark.parametrize("name", NAMES)
def test_counts_of_config_are_as_recorded(name: str) -> None:
    assert counts(name) == RECORDED["counts"][name]


def test_every_config_was_counted() -> None:
    assert sorted(RECORDED["counts"]) == NAMES


@pytest.mark.parametrize("name", RUNS)
def test_run_ends_as_recorded(name: str, run_of: Callable[[str], dict[str, Any]]) -> None:
    """Compare weights, optimizer state and EMA; where there are bits, random state and every figure of every step."""
    got, tolerance = run_of(name), run_tolerance(name)
    wanted = RECORDED["sums"][got["name"]]
    assert got["sums"].keys() == wanted.keys()
    for file, want in wanted.items():
        half, most = tolerance.weights, tolerance.any_weights
        if file.startswith("optimizer"):
            half, most = tolerance.state, tolerance.any_state
        off = {
            name: abs(total - number) / (norm or 1)
            for (name, (total, norm)), number in zip(got["sums"][file].items(), want, strict=True)
        }
        assert sorted(off.values())[len(off) // 2] <= half, file
        assert {name: share for name, share in off.items() if share > most and not name.endswith("bias")} == {}, file
    if KNOWN and got["name"] in KNOWN["runs"]:
        for key in ("weights", "others", *FIGURES):
            assert got[key] == KNOWN["runs"][got["name"]][key], key


@pytest.mark.parametrize("name", RUNS)
def test_run_has_losses_near_the_recorded(name: str, run_of: Callable[[str], dict[str, Any]]) -> None:
    got, tolerance = run_of(name), run_tolerance(name)
    want = REFERENCE["runs"][got["name"]]
    assert (got["corpus"], got["tokens"]) == (want["corpus"], want["tokens"])
    near = dict.fromkeys(("loss", "mtp_loss", "val_loss"), tolerance.losses)
    near |= {"balance_loss": tolerance.balance, "grad_norm": tolerance.grad_norm, "lr": SCHEDULE}
    for key, most in near.items():
        assert [n is None for n in got[key]] == [n is None for n in want[key]]
        for step, (a, b) in enumerate(zip(got[key], want[key], strict=True)):
            assert b is None or abs(a - b) <= most * abs(b), (key, step)


@pytest.mark.parametrize("name", GENERATE)
def test_resumed_run_continues_prompts_as_recorded(
    name: str, run_of: Callable[[str], dict[str, Any]], folder: Path
) -> None:
    run_of("resumed")
    got = continued(name, folder)
    assert_equal_as_far_as_certain(got, REFERENCE["generate"][name], RECORDED["certain characters"][name])
    if KNOWN:
        assert got == KNOWN["generate"][name]


def assert_equal_as_far_as_certain(got: list[Any], want: list[Any], certain: list[int]) -> None:
    """Compare rows up to the first element that another machine's rounding may change."""
    assert list(map(len, got)) == list(map(len, want)) or isinstance(got[0], str)
    assert [row[:n] for row, n in zip(got, certain, strict=True)] == [
        row[:n] for row, n in zip(want, certain, strict=True)
    ]


def test_old_run_holds_no_path_of_this_machine() -> None:
    """Resume a copied run by naming its text again."""
    for path in (Path(__file__).parent / "old_run").rglob("*.toml"):
        named = [line for line in path.read_text().splitlines() if line.startswith("path =")]
        assert named in ([], ['path = "/elsewhere/text.txt"'])
    assert not Path("/elsewhere/text.txt").exists()
