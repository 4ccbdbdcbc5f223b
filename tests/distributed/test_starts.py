"""Several processes of a command that do not start alike, or not all: one sentence, once, and status 2."""

import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from dsmini.distributed.meeting import meet, tell
from dsmini.distributed.world import joined
from tests.distributed.ranks import Speech, free_port, new_store, spoken, wait_until
from tests.distributed.runs import small_config

HELD_BY_RANK_0 = {"TORCHELASTIC_USE_AGENT_STORE": "False"}


# --- one process, and a store


def launch(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, port: object, by_launcher: bool = True) -> None:
    """Set what a launcher sets."""
    names = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in (names | {"TORCHELASTIC_USE_AGENT_STORE": by_launcher}).items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """Return the keys of a meeting of four, which rank 0 has to come to: this process."""
    store = new_store()
    launch(monkeypatch, 0, 4, store.port)
    return dist.PrefixStore("meeting 0", store)


def come(meeting: dist.Store, *ranks: int) -> None:
    """Count ranks in that do not exist."""
    for rank in ranks:
        meeting.set(f"came {rank}", "")


@pytest.mark.parametrize(
    ("there", "words"), [((), "1 of 4 .* without ranks 1, 2, 3;"), ((1, 2), "3 of 4 .* within 0.2 s, without rank 3;")]
)
def test_missing_ranks_are_named_by_those_that_came(there: Sequence[int], words: str, meeting: dist.Store) -> None:
    come(meeting, *there)
    with pytest.raises(ValueError, match=words):
        meet(0.2)


def test_mistake_of_another_ends_the_wait(meeting: dist.Store) -> None:
    meeting.set("mistake", "rank 2: no such flag")
    with pytest.raises(ValueError, match="rank 2: no such flag"):
        meet(60.0)


@pytest.mark.parametrize(("spoken_before", "said"), [(0, "error: wrong\n"), (1, "")])
def test_sentence_is_printed_once(
    spoken_before: int, said: str, meeting: dist.Store, capsys: pytest.CaptureFixture[str]
) -> None:
    come(meeting, *range(4))
    if spoken_before:
        meeting.add("speakers", 1)
        meeting.set("said", "")
    tell("wrong", ValueError("wrong"))
    assert capsys.readouterr().err == said


def test_rank_that_comes_but_does_not_connect_is_told(meeting: dist.Store) -> None:
    """A firewall lets processes reach the store, but not each other."""
    come(meeting, 1, 2, 3)
    with pytest.raises(ValueError, match="cannot connect to each other: it takes longer than 1 s"):
        joined(1.0, longest_wait=4.0).__enter__()


@pytest.mark.parametrize("port", ["abc", "99999", "0", ""])
def test_port_that_is_none_is_named(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, 0, 2, port, by_launcher=False)
    with pytest.raises(ValueError, match=f"MASTER_PORT is '{port}', not a port from 1 to 65535"):
        meet(1.0)


def test_store_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, 1, 2, free_port(), by_launcher=False)
    with pytest.raises(ValueError, match=r"cannot join the 2 processes .* nobody answers within 0.2 s"):
        meet(0.2)


# --- commands


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


def assert_refused(got: Speech, *words: str, speaker: int = 0, missing: int = 0) -> None:
    """Check that one rank alone said one sentence, with these words, and all that came ended with status 2."""
    assert got.statuses == [2] * (got.n - missing) + [0] * missing, got.errors
    assert [rank for rank, text in enumerate(got.errors) if text] == [speaker], got.errors
    sentence = got.errors[speaker]
    assert sentence.startswith("error: ") and sentence.count("\n") == 1, sentence
    assert all(word in sentence for word in words), sentence


def only_sentence(got: Speech, ends: list[int]) -> str:
    assert got.statuses == ends, got.errors
    (sentence,) = filter(None, got.errors)
    assert sentence.startswith("error: ") and sentence.count("\n") == 1
    return sentence


def test_unequal_keys_are_named(config: Path, tmp_path: Path) -> None:
    args = [str(config), "--out", str(tmp_path / "run")]
    got = spoken(tmp_path, args, [*args, "--train.lr", "0.5", "--train.steps", "9"])
    assert_refused(got, "rank 1 was started with another train.lr, train.steps than rank 0")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([["--init", "{}/one"], ["--init", "{}/two"]], ["another --init (", "/two, not ", "weights to start from"]),
        ([["--init", "{}/one"], []], ["another --init (none, not "]),
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


@pytest.mark.slow
@pytest.mark.parametrize(("gone", "words"), [((1, 3), "2 of 4"), ((0,), "1 of 2")])
def test_missing_ranks_are_named_after_the_timeout(
    gone: Sequence[int], words: str, config: Path, tmp_path: Path
) -> None:
    args, n = [str(config), "--out", str(tmp_path / "run"), "--parallel.timeout", "3"], int(words[-1])
    got = spoken(tmp_path, *(None if rank in gone else args for rank in range(n)))
    sentence = only_sentence(got, [0 if rank in gone else 2 for rank in range(n)])
    names = f"rank{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))};"
    assert f"error: {words} processes came to 127.0.0.1:" in sentence and f"within 3 s, without {names}" in sentence


@pytest.mark.slow
def test_missing_holder_of_the_store_is_told(config: Path, tmp_path: Path) -> None:
    args = [str(config), "--out", str(tmp_path / "run"), "--parallel.timeout", "1"]
    for port, words in ((free_port(), "nobody answers within 1 s"), (None, "it takes longer than 1.5 s")):
        with socket.create_server(("127.0.0.1", 0)) as silent:  # another service
            environment = {"MASTER_PORT": str(port or silent.getsockname()[1]), "RANK": "1"}
            got = spoken(tmp_path, args, None, environment=HELD_BY_RANK_0 | environment)
        assert_refused(got, "error: rank 1: cannot join the 2 processes", words, missing=1)


@pytest.mark.slow
def test_sigterm_ends_a_process_that_waits_for_another(config: Path, tmp_path: Path) -> None:
    args, store = [str(config), "--out", str(tmp_path / "run")], new_store()

    def stop_once_it_waits(speech: Speech) -> None:
        wait_until(lambda: store.check(["meeting 0/came 0"]))
        os.kill(int(speech.read("pid")[0]), signal.SIGTERM)

    got = spoken(tmp_path, args, None, store=store, meanwhile=stop_once_it_waits)
    assert (got.statuses, got.errors) == ([130, 0], ["stopped\n", ""])


@pytest.mark.slow
def test_network_that_refuses_is_told_once(config: Path, tmp_path: Path) -> None:
    args = [str(config), "--out", str(tmp_path / "run")]
    sentence = only_sentence(spoken(tmp_path, args, args, environment={"GLOO_SOCKET_IFNAME": "none0"}), [2, 2])
    assert "the 2 processes met, but cannot connect to each other: " in sentence


# --- a mistake before the processes meet


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, HELD_BY_RANK_0], ids=["store of the launcher", "store of rank 0"])
@pytest.mark.parametrize("wrong", [(0,), (1,), (0, 1, 2), (1, 2)], ids=str)
def test_mistake_of_some_ranks_is_told_once(
    wrong: Sequence[int], environment: dict[str, str], config: Path, tmp_path: Path
) -> None:
    """Give the processes longer to come than a test has: those without a mistake must not wait for the others."""
    own = [str(config), "--out", str(tmp_path / "run"), "--train.batch-size", "6", "--parallel.timeout", "900"]
    lines = [[*own, "--train.lr", "nonsense"] if rank in wrong else own for rank in range(3)]
    port = {"MASTER_PORT": str(free_port())} if environment else {}
    sentence = only_sentence(spoken(tmp_path, *lines, environment=environment | port), [2] * 3)
    assert "--train.lr 'nonsense' is not a number" in sentence and ("rank" in sentence) == (0 not in wrong)


@pytest.mark.slow
def test_layout_that_does_not_fit_is_told_once(config: Path, tmp_path: Path) -> None:
    args = [str(config), "--parallel.pp", "2", "--parallel.schedule", "zbv", "--train.grad-accum", "4"]
    assert_refused(spoken(tmp_path, args, args), "has 4 stages, more than model.n_layers=")


@pytest.mark.slow
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


@pytest.mark.slow
def test_error_that_all_ranks_raise_is_told_once(place: Path, tmp_path: Path) -> None:
    args = ["--resume", str(place / "one")]
    assert_refused(spoken(tmp_path, args, args), f"{place / 'one'} is finished: 1 of 1 steps")
