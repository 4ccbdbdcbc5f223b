"""python -m dsmini.diagnose, of training and of decoding: answers, JSON, a page, mistakes, and Ctrl-C."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from dsmini import RunConfig
from dsmini.console.progress import Progress
from dsmini.diagnosis.diagnosis import training_subject
from dsmini.training.start import resolved
from tests.conftest import CPU
from tests.helpers.commands import check_refused, finish, let_prices_be_invented, run, run_all
from tests.helpers.configs import written

TRAINING = "replay dense_active all_threads fastest_dtype"
DECODING = "free_cache drafts all_threads bfloat16_weights fp8_weights"
SMALL = (Path(__file__).parent / "place" / "small.toml").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a text, configs, an unfinished, a finished and a damaged run, and folders of a model."""
    folder = tmp_path_factory.mktemp("place")
    written(folder, "".join(f"line {i * i % 997} of the text\n" for i in range(4000)), "text.txt")
    written(folder, SMALL, "small.toml")
    written(folder, SMALL.replace("text.txt", "lost.txt"), "lost.toml")
    written(folder, SMALL.replace("n_dense_layers = 0", "n_dense_layers = 1\nn_mtp_layers = 0"), "dense.toml")
    written(folder, "[model]\nn_headz = 3\n", "odd.toml")
    (folder / "empty").mkdir()
    few = "--train.steps 2 --train.sample-tokens 0"
    finish(f"dsmini.train small.toml {few} --out finished", folder)
    for name in ("unfinished", "damaged"):
        shutil.copytree(folder / "finished", folder / name)
        (folder / name / "summary.json").unlink()
    shutil.copytree(folder / "finished", folder / "odd_summary")
    (folder / "odd_summary" / "summary.json").write_text("{")
    for file in (folder / "damaged" / "checkpoints").glob("*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    assert run("dsmini.convert finished folder", folder).returncode == 0
    (folder / "bare").mkdir()
    shutil.copy(folder / "folder" / "config.json", folder / "bare")
    return folder


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invent the machine's rates, and let it have one core: two threads crawl where another program takes a core."""
    let_prices_be_invented(monkeypatch)
    for module in ("contention", "diagnosis", "training"):
        monkeypatch.setattr(f"dsmini.diagnosis.{module}.cores", lambda: 1)


def contents(place: Path) -> dict[Path, bytes]:
    """Return the files of what is diagnosed."""
    found = [path for name in ("unfinished", "finished", "folder") for path in (place / name).rglob("*")]
    return {path: path.read_bytes() for path in found if path.is_file()}


def diagnoses(place: Path, *lines: str) -> list[tuple[str, Any]]:
    """Return what each command says, and its JSON; fail if one of them changes what it diagnoses."""
    before = contents(place)
    answers = run_all([("dsmini.diagnose", f"{line} --quick --rounds 5 --json") for line in lines], place, columns=110)
    assert [status for status, _ in answers] == [0] * len(lines), answers
    assert contents(place) == before
    return [(said, json.loads(next(line for line in said.splitlines() if line.startswith("{")))) for _, said in answers]


def check_all(place: Path, out: str, record: Any, arms: str) -> str:
    """Check a record of all arms, and that it is in a folder; return the page there."""
    assert json.loads((place / out / "diagnosis.json").read_text()) == record
    names = {*arms.split()}
    assert {record["gains"][name]["rounds"] for name in names & record["gains"].keys()} == {5}
    assert record["gains"].keys() | record["not_tried"].keys() >= names
    assert record["step_seconds"] > 0 and record["sentence"]
    return (place / out / "diagnosis.html").read_text()


def test_training_is_diagnosed_by_a_run_or_a_config(place: Path) -> None:
    (said, of_run), (_, of_config), (_, of_finished) = diagnoses(
        place, "unfinished --out found", "small.toml --only replay", "finished --only replay --out found_finished"
    )
    for words in ("replay", "dense_active", "5 rounds in turns", "change", "what to do first"):
        assert words in said, words
    assert "after step 1" in check_all(place, "found_finished", of_finished, "replay"), "its own weights"
    assert "<svg" in check_all(place, "found", of_run, TRAINING)
    assert of_config["gains"].keys() == {"replay"}


def test_the_default_run_is_diagnosed_without_a_path() -> None:
    assert training_subject(None).config == resolved(RunConfig(), CPU)


def test_decoding_is_diagnosed_by_a_config_a_run_or_a_folder(place: Path) -> None:
    (said, of_config), (_, of_run), (_, of_folder) = diagnoses(
        place,
        "small.toml --work decode --out found_decoding",
        "finished --work decode --only drafts --context 16 --batch 2",
        "folder --work decode --only free_cache",
    )
    for words in ("free_cache", "drafts", "5 rounds in turns", "change"):
        assert words in said, words
    page = check_all(place, "found_decoding", of_config, DECODING)
    for words in ("<svg", "random weights", "24 tokens in the cache of each", "decoding waits for no data"):
        assert words in page, words
    assert "accepted_guesses" in {finding["name"] for finding in of_config["findings"]}
    assert of_run["gains"].keys() == {"drafts"}
    assert of_folder["gains"].keys() == {"free_cache"}


def test_mistake_is_one_sentence(place: Path) -> None:
    run("dsmini.diagnose small.toml --only nonsense", place)  # tokenizes the text, and refuses after that
    check_refused("dsmini.diagnose", place)


@pytest.mark.parametrize(("work", "only"), [("train", "replay"), ("decode", "free_cache")])
def test_ctrl_c_keeps_the_whole_rounds(place: Path, monkeypatch: pytest.MonkeyPatch, work: str, only: str) -> None:
    """The signal comes as the seventh round begins."""
    update = Progress.update

    def interrupted(bar: Progress, done: float, **more: Any) -> None:
        if bar.label == "round 7":
            signal.raise_signal(signal.SIGINT)
        update(bar, done, **more)

    monkeypatch.setattr(Progress, "update", interrupted)
    done = run(f"dsmini.diagnose small.toml --work {work} --only {only} --quick --rounds 1000 --json", place)
    assert done.returncode == 130, done.stderr
    record = json.loads(done.stdout)
    assert record["stopped"] and record["gains"][only]["rounds"] == 6
