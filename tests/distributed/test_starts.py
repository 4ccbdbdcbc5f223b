"""Several processes of a command that do not start alike, or not all: one sentence, once, and status 2."""

import dataclasses
import os
import re
import shlex
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from dsmini import RunConfig, TrainConfig
from dsmini.distributed.world import joined
from dsmini.training.origin import RunOrigin
from dsmini.training.start import resolved
from tests.distributed.ranks import Speech, free_port, new_store, spoken, wait_until
from tests.distributed.runs import small_config

HELD_BY_RANK_0 = {"TORCHELASTIC_USE_AGENT_STORE": "False"}


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


@dataclass(frozen=True)
class Start:
    """A start of a command by several processes, which ends with one sentence of one of them."""

    lines: Sequence[str | None]
    """The arguments of each rank; None for one that is missing."""
    words: str
    """In the sentence, which names no other rank at its beginning."""
    name: str = "train"
    environment: dict[str, str] = field(default_factory=dict)
    """Changes of what the launcher sets; {PORT} is a free port, and {SILENT} that of a service that never answers."""


LATE = "--train.batch-size 6 --parallel.timeout 900"
"""Longer than a test has: processes without a mistake must not wait for the others."""
MISTAKE = "--train.lr 'nonsense' is not a number"
OWN_STORE = HELD_BY_RANK_0 | {"MASTER_PORT": "{PORT}"}
ONE, TWO = "{place}/one", "{place}/two"
TABLE: dict[str, Start] = {
    "unequal keys": Start(
        ["", "--train.lr 0.5 --train.steps 9"],
        r"error: rank 1 was started with another train.steps \(9, not 6\), train.lr \(0.5, not .*\) than rank 0",
    ),
    # slow from here on
    "unequal weights": Start([f"--init {ONE}", f"--init {TWO}"], r"another --init \(.*/two/checkpoints/step-.*, not "),
    "weights of one": Start([f"--init {ONE}", ""], r"another --init \(none, not "),
    "two are missing": Start(
        ["--parallel.timeout 3", None] * 2, "error: 2 of 4 processes came to .* within 3 s, without ranks 1, 3;"
    ),
    "one is missing": Start([None, "--parallel.timeout 3"], "error: 1 of 2 .* within 3 s, without rank 0;"),
    **{
        f"no store at {port}": Start(
            ["--parallel.timeout 1", None],
            f"error: rank 1: cannot join the 2 processes .*{words}",
            environment=HELD_BY_RANK_0 | {"MASTER_PORT": port, "RANK": "1"},
        )
        for port, words in (
            ("{PORT}", "nobody answers within 1 s"),
            ("{SILENT}", "it takes longer than 1.5 s"),
            ("99999", "127.0.0.1:99999: nobody answers within 1 s"),
        )
    },
    "network that refuses": Start(
        ["", ""],
        "the 2 processes met, but cannot connect to each other: ",
        environment={"GLOO_SOCKET_IFNAME": "none0"},
    ),
    **{
        f"mistake of {wrong}, {store}": Start(
            [f"{LATE} --train.lr nonsense" if rank in wrong else LATE for rank in range(3)],
            f"error: {'' if 0 in wrong else 'rank [12]: '}{MISTAKE}",
            environment=environment,
        )
        for wrong in ((0,), (1,), (0, 1, 2), (1, 2))
        for store, environment in (("store of the launcher", {}), ("store of rank 0", OWN_STORE))
    },
    "layout that does not fit": Start(
        ["--parallel.pp 2 --parallel.schedule zbv --train.grad-accum 4"] * 2,
        "has 4 stages, more than model.n_layers=",
    ),
    "finished run": Start([f"--resume {ONE}"] * 2, "error: .*/one is finished: 1 of 1 steps"),
    "generate": Start([ONE, ONE], "error: dsmini.generate is one process, and a launcher started several", "generate"),
}
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
def test_one_process_says_one_sentence_and_all_end_with_status_2(
    name: str, request: pytest.FixtureRequest, config: Path, tmp_path: Path
) -> None:
    start = TABLE[name]
    place = request.getfixturevalue("place") if name in SLOW else config.parent
    own = f"{config} --out {tmp_path / 'run'} " if start.name == "train" and "finished" not in name else ""
    lines = [None if line is None else shlex.split((own + line).format(place=place)) for line in start.lines]
    with socket.create_server(("127.0.0.1", 0)) as silent:  # another service
        ports = {"PORT": free_port(), "SILENT": silent.getsockname()[1]}
        environment = {name: value.format(**ports) for name, value in start.environment.items()}
        got = spoken(tmp_path, *lines, name=start.name, environment=environment)
    assert got.statuses == [0 if line is None else 2 for line in lines], got.errors
    (sentence,) = filter(None, got.errors)
    assert sentence.startswith("error: ") and sentence.count("\n") == 1 and re.search(start.words, sentence), sentence
    assert got.outputs == [""] * len(lines) and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sigterm_ends_a_process_that_waits_for_another(config: Path, tmp_path: Path) -> None:
    args, store = [str(config), "--out", str(tmp_path / "run")], new_store()

    def stop_once_it_waits(speech: Speech) -> None:
        wait_until(lambda: store.check(["meeting 0/rank 0"]))
        os.kill(int(speech.read("pid")[0]), signal.SIGTERM)

    got = spoken(tmp_path, args, None, store=store, meanwhile=stop_once_it_waits)
    assert (got.statuses, got.errors) == ([130, 0], ["stopped\n", ""])


def test_gpu_of_one_process_is_stored_without_its_number_and_auto_is_picked_again(tmp_path: Path) -> None:
    config = RunConfig(train=TrainConfig(dtype="float32"), out=tmp_path)
    stored = resolved(config, torch.device("cuda:0"))
    assert stored.train.device == "cuda"
    before = dataclasses.replace(stored, train=dataclasses.replace(stored.train, device="cuda:0"))
    again = dataclasses.replace(before, train=dataclasses.replace(before.train, device="auto", dtype="auto"))
    accepted = RunOrigin(config=before, resume=tmp_path, before=before).accept(again).train
    assert (accepted.device, accepted.dtype) == ("auto", "float32")
