"""python -m dsmini.diagnose as a user runs it: answers, JSON, a page, and mistakes in one sentence."""

import json
from pathlib import Path

import pytest

from dsmini.diagnosis.training_work import TRAINING
from tests.helpers.commands import run_all
from tests.helpers.diagnoses import SMALL, begin, files, interrupted

QUICK = "--quick --rounds 5"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a text, a config, and an unfinished, a finished and a damaged run."""
    folder = tmp_path_factory.mktemp("place")
    begin(folder, "finished", "unfinished", "damaged")
    (folder / "lost.toml").write_text(SMALL.replace("text.txt", "lost.txt"))
    (folder / "odd.toml").write_text("[model]\nn_headz = 3\n")
    (folder / "unfinished" / "summary.json").unlink()
    (folder / "damaged" / "summary.json").unlink()
    for file in (folder / "damaged" / "checkpoints").glob("*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    return folder


def test_answers_of_a_config_and_of_a_run(place: Path) -> None:
    """Check verdict, JSON and page, and that the run is not changed."""
    before = files(place / "unfinished")
    lines = [
        f"small.toml {QUICK} --out found",
        f"unfinished {QUICK} --json",
        f"small.toml {QUICK} --only replay --json",
    ]
    answers = run_all([("dsmini.diagnose", line) for line in lines], place, columns=100)
    assert [status for status, _ in answers] == [0, 0, 0], answers
    shown, of_run, only = (output for _, output in answers)
    for words in ("replay", "dense_active", "5 rounds in turns", "made free", "what to do first"):
        assert words in shown, words
    assert "<svg" in (place / "found" / "diagnosis.html").read_text()
    written = json.loads((place / "found" / "diagnosis.json").read_text())
    found = json.loads(of_run.splitlines()[-1])
    for record in (written, found):
        assert record["gains"]["replay"]["rounds"] == 5
        assert record["gains"].keys() | record["not_tried"].keys() >= {each.name for each in TRAINING.interventions}
        assert record["step_seconds"] > 0 and record["sentence"]
    one = json.loads(only.splitlines()[-1])
    assert one["gains"].keys() <= {"replay", "waiting", "quiet_machine"}
    assert files(place / "unfinished") == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nothing.toml", "there is no file nothing.toml"),
        ("empty", "empty has no config.toml, so it is not a training run"),
        ("odd.toml", "n_headz"),
        ("lost.toml", "lost.txt"),
        ("finished", "finished is finished; diagnose its config instead"),
        ("damaged", "cannot read damaged"),
        ("small.toml --only nonsense", "unknown intervention 'nonsense'; use one of replay"),
        ("small.toml --only all_threads fastest_dtype --model.dim 3", "unknown flag '--model.dim'"),
        ("small.toml --rounds 2", "--rounds 2 is not from 5 to 1000"),
        ("small.toml --rounds x", "--rounds 'x' is not a whole number"),
    ],
)
def test_mistake_is_one_sentence(place: Path, line: str, words: str) -> None:
    ((status, output),) = run_all([("dsmini.diagnose", line)], place)
    assert status == 2 and words in output, output
    assert output.strip().count("\n") == 0, output


def test_intervention_that_does_not_apply_says_why(place: Path) -> None:
    dense = SMALL.replace("n_layers = 2", "n_layers = 2\nn_dense_layers = 2\nn_mtp_layers = 0")
    (place / "dense.toml").write_text(dense)
    ((status, output),) = run_all([("dsmini.diagnose", "dense.toml --only uniform_routing")], place)
    assert status == 2 and "--only uniform_routing does not apply: the model has no routed experts" in output


def test_ctrl_c_keeps_the_whole_rounds(place: Path) -> None:
    record = interrupted("small.toml --only replay dense_active", place, 7)
    assert record["stopped"] and record["gains"]["replay"]["rounds"] >= 7
