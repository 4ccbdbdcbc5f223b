"""Several processes of a command that do not start alike, or not all: one sentence, once, and status 2."""

import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from dsmini.distributed.meeting import meet
from dsmini.distributed.world import joined
from tests.distributed.faulty import statuses
from tests.distributed.ranks import command, free_port, new_store, outcomes, spoken
from tests.distributed.runs import small_config


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a config, and with runs `one` and `two` that differ in their weights."""
    folder = tmp_path_factory.mktemp("place")
    config = small_config(folder)
    for name, seed in (("one", "1"), ("two", "2")):
        more = ("--out", str(folder / name), "--train.steps", "1", "--train.seed", seed)
        assert statuses(outcomes(2, command, str(config), *more)) == [0, 0]
    return folder


def assert_refused(got: tuple[list[int | None], list[str]], *words: str, speaker: int = 0, missing: int = 0) -> None:
    """Check that one rank alone said one sentence, with these words, and all that came ended with status 2."""
    ends, said = got
    assert ends == [2] * (len(ends) - missing) + [0] * missing, said
    assert [rank for rank, text in enumerate(said) if text] == [speaker], said
    assert said[speaker].startswith("error: ") and said[speaker].count("\n") == 1, said
    assert all(word in said[speaker] for word in words), said


def test_unequal_keys_are_named(place: Path, tmp_path: Path) -> None:
    args = [str(place / "small.toml"), "--out", str(tmp_path / "run")]
    got = spoken(tmp_path, args, [*args, "--train.lr", "0.5", "--train.steps", "9"])
    assert_refused(got, "rank 1 was started with another train.lr, train.steps than rank 0")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([["--init", "{}/one"], ["--init", "{}/two"]], ["another --init (", "/two, not ", "weights to start from"]),
        ([["--init", "{}/one"], []], ["another --init (none, not "]),
        ([["--chaos", "1:5:kill"], ["--chaos", "2:5:kill"]], ["another --chaos (2:5:kill, not 1:5:kill)"]),
        ([[], ["--chaos", "2"]], ["another --chaos (2:", "not none)"]),
    ],
)
def test_unequal_options_are_named(
    lines: Sequence[Sequence[str]], words: Sequence[str], place: Path, tmp_path: Path
) -> None:
    own = [str(place / "small.toml"), "--out", str(tmp_path / "run")]
    got = spoken(tmp_path, *([*own, *(word.format(place) for word in line)] for line in lines))
    assert_refused(got, "rank 1 was started with", *words)
    assert not (tmp_path / "run").exists()


# --- a missing process

SHORT = ("--parallel.timeout", "2")
HELD_BY_RANK_0 = {"TORCHELASTIC_USE_AGENT_STORE": "False"}


@pytest.mark.parametrize(("gone", "words"), [((1, 3), "2 of 4"), ((0,), "1 of 2"), ((2,), "3 of 4")])
def test_missing_ranks_are_named_after_the_timeout(
    gone: Sequence[int], words: str, place: Path, tmp_path: Path
) -> None:
    args, n = [str(place / "small.toml"), "--out", str(tmp_path / "run"), *SHORT], int(words[-1])
    ends, said = spoken(tmp_path, *(None if rank in gone else args for rank in range(n)))
    assert ends == [0 if rank in gone else 2 for rank in range(n)]
    (sentence,) = filter(None, said)
    names = f"rank{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))};"
    assert f"error: {words} processes came to 127.0.0.1:" in sentence and f"within 2 s, without {names}" in sentence
    assert sentence.count("\n") == 1


def test_missing_holder_of_the_store_is_told(place: Path, tmp_path: Path) -> None:
    environment = HELD_BY_RANK_0 | {"MASTER_PORT": str(free_port())}
    args = [str(place / "small.toml"), "--out", str(tmp_path / "run"), *SHORT]
    start = time.monotonic()
    assert_refused(
        spoken(tmp_path, args, None, environment=environment | {"RANK": "1"}),
        "error: rank 1: cannot join the 2 processes",
        "nobody answers within 2 s",
        missing=1,
    )
    assert time.monotonic() - start < 8


def test_port_of_another_service_is_told(place: Path, tmp_path: Path) -> None:
    args = [str(place / "small.toml"), "--out", str(tmp_path / "run"), *SHORT]
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = HELD_BY_RANK_0 | {"MASTER_PORT": str(silent.getsockname()[1]), "RANK": "1"}
        got = spoken(tmp_path, args, None, environment=environment)
    assert_refused(got, "error: rank 1: cannot join the 2 processes", "it takes longer than 2 s", missing=1)
    assert time.monotonic() - start < 10


def test_sigterm_ends_a_process_that_waits_for_another(place: Path, tmp_path: Path) -> None:
    args = [str(place / "small.toml"), "--out", str(tmp_path / "run"), "--parallel.timeout", "40"]
    start = time.monotonic()
    assert spoken(tmp_path, args, None, signal_after=3.0) == ([130, 0], ["stopped\n", ""])
    assert time.monotonic() - start < 20


def test_network_that_refuses_is_told_once(place: Path, tmp_path: Path) -> None:
    args = [str(place / "small.toml"), "--out", str(tmp_path / "run")]
    ends, said = spoken(tmp_path, args, args, environment={"GLOO_SOCKET_IFNAME": "none0"})
    assert ends == [2, 2]
    (sentence,) = filter(None, said)
    assert "the 2 processes came to 127.0.0.1:" in sentence and "cannot connect to each other: " in sentence


@pytest.mark.parametrize("port", ["abc", "99999", "0", ""])
def test_port_that_is_none_is_named(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"MASTER_PORT is '{port}', not a port from 1 to 65535"):
        meet(1.0)


def test_rank_that_comes_but_does_not_connect_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count in a rank 1 that does not exist: a firewall lets processes reach the store, but not each other."""
    store = new_store()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    meeting = dist.PrefixStore("meeting 0", store)  # pyright: ignore[reportPrivateImportUsage]
    meeting.set("came 1", "")
    meeting.add("came", 1)
    start = time.monotonic()
    with pytest.raises(ValueError, match="cannot connect to each other: it takes longer than 1 s"):
        joined(1.0, longest_wait=4.0).__enter__()
    assert time.monotonic() - start < 3.5


# --- a mistake before the processes meet


@pytest.mark.parametrize("environment", [{}, HELD_BY_RANK_0], ids=["store of the launcher", "store of rank 0"])
@pytest.mark.parametrize("wrong", [(0,), (1,), (0, 1, 2), (1, 2)], ids=str)
def test_mistake_of_some_ranks_is_told_once(
    wrong: Sequence[int], environment: dict[str, str], place: Path, tmp_path: Path
) -> None:
    own = [str(place / "small.toml"), "--out", str(tmp_path / "run"), "--train.batch-size", "6"]
    lines = [[*own, "--train.lr", "nonsense"] if rank in wrong else own for rank in range(3)]
    port = {"MASTER_PORT": str(free_port())} if environment else {}
    start = time.monotonic()
    ends, said = spoken(tmp_path, *lines, environment=environment | port)
    assert time.monotonic() - start < 20
    assert ends == [2] * 3
    (sentence,) = filter(None, said)
    assert sentence.startswith("error: ") and "--train.lr 'nonsense' is not a number" in sentence
    assert ("rank" in sentence) == (0 not in wrong) and sentence.count("\n") == 1


def test_layout_that_does_not_fit_is_told_once(place: Path, tmp_path: Path) -> None:
    args = [str(place / "small.toml"), "--parallel.pp", "2", "--parallel.schedule", "zbv", "--train.grad-accum", "4"]
    assert_refused(spoken(tmp_path, args, args), "has 4 stages, more than model.n_layers=")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([["none"], ["none"]], "error: there is no folder none"),
        ([["{}/one"], ["{}/one", "--top-k", "x"]], "error: rank 1: --top-k 'x' is not a whole number"),
        ([["{}/one"], ["{}/one", "--seed", "3"]], "error: rank 1 was started with other flags"),
    ],
)
def test_generate_tells_a_mistake_once(lines: Sequence[Sequence[str]], words: str, place: Path, tmp_path: Path) -> None:
    got = spoken(tmp_path, *([word.format(place) for word in line] for line in lines), name="generate")
    assert_refused(got, words)


def test_error_that_all_ranks_raise_is_told_once(place: Path, tmp_path: Path) -> None:
    args = ["--resume", str(place / "one")]
    assert_refused(spoken(tmp_path, args, args), f"{place / 'one'} is finished: 1 of 1 steps")
