"""Several processes of a command that do not start alike, or not all: one sentence, once, and status 2."""

import dataclasses
import os
import re
import shlex
import signal
import socket
import threading
import tomllib
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from dsmini import RunConfig, TrainConfig
from dsmini.distributed.world import World, joined
from dsmini.training import start
from dsmini.training.origin import RunOrigin
from tests.distributed.ranks import new_store, spoken, wait_until
from tests.distributed.runs import small_config

# --- one process, and a store


def test_rank_that_comes_but_does_not_connect_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall lets processes reach the store, but not each other."""
    store = new_store()
    launched = {"RANK": 0, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for name, value in (launched | {"TORCHELASTIC_USE_AGENT_STORE": True}).items():
        monkeypatch.setenv(name, str(value))
    for rank in (1, 2, 3):
        store.set(f"meeting 0/rank {rank}", "")
    with pytest.raises(ValueError, match="cannot connect to each other: it takes longer than 1 s"):
        joined(1.0, longest_wait=4.0).__enter__()


# --- commands


TABLE = tomllib.loads(Path(__file__).with_name("starts.toml").read_text())
LATE = "--train.batch-size 6 --parallel.timeout 900"
QUICK, SLOW = [*TABLE][:1], [*TABLE][1:]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def place(config: Path) -> Path:
    """Return a folder with a config, and with runs `one` and `two` that differ in their weights."""
    for name, seed in (("one", "1"), ("two", "2")):
        line = [str(config), "--out", str(config.parent / name), "--train.steps", "1", "--train.seed", seed]
        assert spoken(config.parent, line, line).statuses == [0, 0]
    return config.parent


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_one_sentence_is_said_and_all_end_with_status_2(
    name: str, request: pytest.FixtureRequest, config: Path, tmp_path: Path
) -> None:
    start = TABLE[name]
    command, environment = start.get("name", "train"), start.get("environment", {})
    place = request.getfixturevalue("place") if name in SLOW else config.parent
    own = f"{config} --out {tmp_path / 'run'} " if command == "train" and "finished" not in name else ""
    lines = [
        None if line == "missing" else shlex.split((own + line).format(place=place, LATE=LATE))
        for line in start["lines"]
    ]
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        ports = {"PORT": closed.getsockname()[1], "SILENT": silent.getsockname()[1]}
        closed.close()
        changes = {name: value.format(**ports) for name, value in environment.items()}
        got = spoken(tmp_path, *lines, name=command, environment=changes)
    assert got.statuses == [0 if line is None else 2 for line in lines], got.errors
    (sentence,) = filter(None, got.errors)
    assert sentence.startswith("error: ") and sentence.count("\n") == 1 and re.search(start["words"], sentence), (
        sentence
    )
    assert got.outputs == [""] * len(lines) and not (tmp_path / "run").exists()


def _in_a_folder_of_its_own(folder: Path) -> None:
    """Stand for a machine whose file has another content, or for a file that grew while rank 0 read it."""
    rank = os.environ["RANK"]
    (folder / rank).mkdir()
    (folder / rank / "text.txt").write_text(f"This is the text of rank {rank}.\n" * 99)
    os.chdir(folder / rank)


@pytest.mark.slow
def test_ranks_that_read_unequal_texts_are_refused(config: Path, tmp_path: Path) -> None:
    line = [str(config), "--data.path", "text.txt", "--out", str(tmp_path / "run")]
    got = spoken(tmp_path, line, line, prepare=partial(_in_a_folder_of_its_own, tmp_path))
    assert got.statuses == [2, 2] and not (tmp_path / "run").exists(), got.errors
    (sentence,) = filter(None, got.errors)
    assert re.match(r"error: rank 1 was started with another text \(sha256 \w{12}, not sha256 \w{12}\)", sentence)


@pytest.mark.slow
def test_only_the_first_of_two_runs_says_that_it_tokenized_the_text(config: Path, tmp_path: Path) -> None:
    lines = [[str(config), "--train.steps", "1", "--out", str(tmp_path / name)] for name in ("first", "second")]
    first, second = (spoken(tmp_path, line, line) for line in lines)
    assert first.statuses == second.statuses == [0, 0], first.errors
    assert "tokenized once into" in first.outputs[0] and "where it was tokenized before" in second.outputs[0]


@pytest.mark.slow
def test_sigterm_ends_a_process_that_waits_for_another(config: Path, tmp_path: Path) -> None:
    store = new_store()

    def stop_once_it_waits() -> None:
        wait_until(lambda: store.check(["meeting 0/rank 0"]))
        (pid,) = tmp_path.glob("*/pid-0")
        os.kill(int(pid.read_text()), signal.SIGTERM)

    other = threading.Thread(target=stop_once_it_waits)
    other.start()
    got = spoken(tmp_path, [str(config), "--out", str(tmp_path / "run")], None, store=store)
    other.join()
    assert (got.statuses, got.errors) == ([130, 0], ["stopped\n", ""])


def test_folder_is_tried_before_the_text_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tokenizing may take hours."""
    config = RunConfig(train=TrainConfig(dtype="float32", device="cpu"), out=tmp_path / "runs" / "new")
    monkeypatch.setattr(World, "refuse_unshared", Mock(side_effect=ValueError("is not there for rank 1")))
    monkeypatch.setattr(start, "load_corpus", Mock(side_effect=AssertionError))
    with (
        pytest.raises(ValueError, match="is not there for rank 1"),
        start.started(RunOrigin(config=config), config, Console(quiet=True)),
    ):
        pass


def test_share_of_the_cores_is_not_stored_for_a_lone_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(train=TrainConfig(dtype="float32"), out=tmp_path)
    assert start.resolved(config, torch.device("cpu")).train.threads == torch.get_num_threads()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert start.resolved(config, torch.device("cpu")).train.threads is None


def test_gpu_of_one_process_is_stored_without_its_number_and_auto_is_picked_again(tmp_path: Path) -> None:
    config = RunConfig(train=TrainConfig(dtype="float32"), out=tmp_path)
    stored = start.resolved(config, torch.device("cuda:0"))
    assert stored.train.device == "cuda"
    before = dataclasses.replace(stored, train=dataclasses.replace(stored.train, device="cuda:0"))
    again = dataclasses.replace(before, train=dataclasses.replace(before.train, device="auto", dtype="auto"))
    accepted = RunOrigin(config=before, resume=tmp_path, before=before).accept(again).train
    assert (accepted.device, accepted.dtype) == ("auto", "float32")
