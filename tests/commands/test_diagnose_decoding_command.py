"""python -m dsmini.diagnose --work decode as a user runs it: a config, a finished run, a folder, and mistakes."""

import json
from pathlib import Path

import pytest

from dsmini.diagnosis.decoding.alternatives import INTERVENTIONS
from tests.helpers.commands import run, run_all
from tests.helpers.diagnoses import begin, files, interrupted

QUICK = "--work decode --quick --rounds 5"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a text, a config, a finished run, a folder made of it, and one without weights."""
    folder = tmp_path_factory.mktemp("place")
    begin(folder, "finished")
    assert run("dsmini.convert finished folder", folder).returncode == 0
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text((folder / "folder" / "config.json").read_text())
    return folder


def test_answers_of_a_config_a_run_and_a_folder(place: Path) -> None:
    """Check verdict, JSON and page, what was diagnosed, and that run and folder are not changed."""
    before = files(place / "finished"), files(place / "folder")
    lines = [
        f"small.toml {QUICK} --out found",
        f"finished {QUICK} --context 16 --batch 2 --json",
        f"folder {QUICK} --only free_cache --json",
    ]
    answers = run_all([("dsmini.diagnose", line) for line in lines], place, columns=110)
    assert [status for status, _ in answers] == [0, 0, 0], answers
    shown, of_run, of_folder = (output for _, output in answers)
    for words in ("free_cache", "expanded_mla", "dense_active", "5 rounds in turns", "made free"):
        assert words in shown, words
    page = (place / "found" / "diagnosis.html").read_text()
    for words in ("<svg", "random weights", "24 tokens in the cache of each", "decoding waits for no data"):
        assert words in page, words
    written = json.loads((place / "found" / "diagnosis.json").read_text())
    found, only = (json.loads(output.splitlines()[-1]) for output in (of_run, of_folder))
    for record in (written, found):
        assert record["gains"]["free_cache"]["rounds"] == 5 and record["step_seconds"] > 0
        assert record["gains"].keys() | record["not_tried"].keys() >= {each.name for each in INTERVENTIONS}
        assert "accepted_guesses" in {finding["name"] for finding in record["findings"]}
    assert "uniform_routing" in found["gains"] and "uniform_routing" in written["not_tried"]
    assert only["gains"].keys() == {"free_cache", "quiet_machine"}
    assert (files(place / "finished"), files(place / "folder")) == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("small.toml --work decode --context 32", "--context 32 is not from 1 to 31"),
        ("small.toml --work decode --context 0", "--context 0 is not from 1 to 31"),
        ("small.toml --context 8", "--context 8 is for decoding; add --work decode"),
        ("small.toml --batch 8", "--batch 8 is for decoding; add --work decode"),
        ("small.toml --work decode --batch 0", "--batch 0 is not from 1 to 1024"),
        ("small.toml --work sleep", "--work 'sleep' is not one of train, decode"),
        ("small.toml --work decode --only replay", "unknown intervention 'replay'; use one of free_cache"),
        ("small.toml --work decode --only uniform_routing", "--only uniform_routing does not apply: one token visits"),
        ("empty --work decode", "empty"),
        ("bare --work decode", "bare"),
        ("nothing.toml --work decode", "there is no file nothing.toml"),
        ("finished", "finished is finished; diagnose its config instead"),
    ],
)
def test_mistake_is_one_sentence(place: Path, line: str, words: str) -> None:
    quick = "" if "--work sleep" in line else " --quick"  # no rates are measured for a mistake
    ((status, output),) = run_all([("dsmini.diagnose", line + quick)], place)
    assert status == 2 and words in output, output
    assert output.strip().count("\n") == 0, output


def test_ctrl_c_keeps_the_whole_rounds(place: Path) -> None:
    record = interrupted("small.toml --work decode --only free_cache dense_active", place, 7)
    assert record["stopped"] and record["gains"]["free_cache"]["rounds"] >= 7
