"""Faults: each rank that dies, stands still, computes a wrong number or cannot write ends as the table says.

A run that is started again ends with the bits of one that met no fault. A row with many faults is a run that is
started again after each of them.
"""

import dataclasses
import itertools
import math
import os
import random
import re
import shlex
import signal
import socket
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from dsmini import RunConfig, TrainConfig
from dsmini.distributed import heartbeat
from dsmini.distributed.failure import STALLED
from dsmini.distributed.world import World, joined
from dsmini.training import start as training_start
from dsmini.training.origin import RunOrigin
from dsmini.training.record import read_events
from tests.distributed.faults import parsed
from tests.distributed.ranks import START, new_store, outcomes, run_ranks, spoken, start, wait_until
from tests.distributed.runs import KILLED, STEPS, events, run, small_config, statuses
from tests.helpers.runs import differences, read_records

EP: dict[str, Any] = {"ep": 2}
LOST = {1, -signal.SIGABRT}
"""Statuses of a rank whose peer died: it leaves, or gloo aborts it."""
ENDS: dict[str, tuple[set[int | None], set[int | None]]] = {
    "kill": ({KILLED}, LOST),
    "exception": ({1}, LOST),
    "abort": ({-signal.SIGABRT}, LOST),
    "segfault": ({-signal.SIGSEGV}, LOST),
    **dict.fromkeys(("hang", "alone"), ({STALLED}, {STALLED})),
    "stop": ({None}, {STALLED}),
    "terminate": ({0}, {0}),
    "flip": ({1}, {1}),
}
"""For faults that end an attempt: statuses of their rank, and of the others."""


class Row(NamedTuple):
    """Faults of a run, and what comes of them."""

    faults: str
    n: int = 2
    parallel: Mapping[str, Any] = EP
    changes: Mapping[str, Any] = {}
    """Settings of the train config."""
    events: Mapping[str, list[int]] = {}
    """Steps of events of rank 0 by name."""
    words: Sequence[str] = ()
    """Said on the way, by the run, an event or an error of each rank that raises."""
    like: str = ""
    """Faults of the run with the same bits."""


ROWS = tomllib.loads(Path(__file__).with_name("faults.toml").read_text())
TABLE = {name: Row(**row) for name, row in ROWS.items()}
QUICK, SLOW = [*TABLE][:2], [*TABLE][2:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Row], Path]:
    """Return the folder of a run without a row's faults; rows of one layout and recipe share it."""
    known: dict[str, Path] = {}

    def of(row: Row) -> Path:
        changes = {**row.changes, "save_in_background": False}
        key = repr((row.n, row.parallel, changes, row.like))
        if key not in known:
            known[key] = tmp_path_factory.mktemp("whole") / "run"
            assert run_ranks(row.n, run, known[key], row.parallel, parsed(row.like), **changes) == [True] * row.n
        return known[key]

    return of


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_fault_ends_as_the_table_says(name: str, tmp_path: Path, whole: Callable[[Row], Path]) -> None:
    row, folder = TABLE[name], tmp_path / "run"
    faults = parsed(row.faults)
    ending = [fault for fault in faults if fault.kind in ENDS]
    *attempts, last = (
        outcomes(row.n, run, folder, row.parallel, faults, **row.changes) for _ in range(len(ending) + 1)
    )
    assert all((end.status, end.value) == (0, True) for end in last), last
    for fault, ends in zip(ending, attempts, strict=True):
        for rank, end in enumerate(ends):
            assert end.status in ENDS[fault.kind][rank != fault.rank], (fault, statuses(ends), end.failure)
            assert fault.kind == "flip" or rank == fault.rank or end.failure == "", end.failure
    for event, steps in row.events.items():
        assert [found["step"] for found in events(folder, event)] == steps
    told = [found.get("sentence", "") for rank in range(row.n) for found in read_events(folder, rank)]
    told += [path.read_text() for path in folder.glob("said-*")] + [e.failure for ends in attempts for e in ends]
    assert all(word in "\n".join(told) for word in row.words), told
    assert not list(folder.rglob(".*partial*"))
    assert differences(folder, whole(row), row.changes.get("steps", STEPS)) == []


def test_failed_last_save_raises_on_all_ranks(tmp_path: Path) -> None:
    ends = outcomes(3, run, tmp_path / "run", {"dp": 3}, parsed(f"full_disk:2:{STEPS}:save:written"))
    said = f"step {STEPS}: rank 2: No space left on device; step 6 is still there"
    assert all(end.status == 1 and said in end.failure for end in ends), ends


# --- kills at any moment

RUNS = int(os.environ.get("DSMINI_KILLED_RUNS", "2"))
"""Number of runs that are killed at random moments."""
LONGER: dict[str, Any] = {"steps": 12, "eval_every": 5, "grad_accum": 2, "save_every": 1}


def killed_at_random(world: World, folder: Path, seconds: float, rank: int, layout: dict[str, Any]) -> bool:
    """Train, saving after each step; one rank is killed after some seconds, unless it has come to its end."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    if world.rank == rank:
        timer.start()
    try:
        return run(world, folder, layout, **LONGER)
    finally:
        timer.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, EP, EP | {"pp": 2}], ids=["1 process", "2 ranks", "4 ranks"])
def test_kill_at_random_moments_ends_with_the_same_bytes(layout: dict[str, Any], tmp_path: Path) -> None:
    """Kill a rank of each run again and again at moments that are drawn, of steps and of saves."""
    n, steps = math.prod(layout.values()), LONGER["steps"]
    assert all(end.value for end in outcomes(n, run, tmp_path / "whole", layout | {"timeout": 60.0}, **LONGER))
    first, *_, last = read_events(tmp_path / "whole")
    longest, kills = last["time"] - first["time"], 0
    for seed in range(5 * RUNS):
        if seed >= RUNS and kills:
            break  # on a busy machine the first run may take longer, so that all moments drawn come after the end
        draw, folder, ended = random.Random(seed), tmp_path / f"{seed}", False
        while not ended:
            victim = draw.randrange(n)
            ends = outcomes(n, killed_at_random, folder, draw.uniform(0, longest), victim, layout | {"timeout": 60.0})
            killed, ended = ends[victim].status == KILLED, statuses(ends) == [0] * n
            assert ended or (killed and all(end.status in {*LOST, KILLED, 0} for end in ends)), ends
            kills += killed
        assert differences(folder, tmp_path / "whole", steps) == []
    assert kills


def dies_before_the_mesh(world: World, folder: Path, parallel: dict[str, Any]) -> bool:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(world, folder, parallel, grad_accum=2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [EP, EP | {"pp": 2}], ids=["mesh", "ends of a pipeline"])
def test_death_while_groups_are_made_ends_the_others(layout: dict[str, Any], tmp_path: Path) -> None:
    n = math.prod(layout.values())
    ends = outcomes(n, dies_before_the_mesh, tmp_path / "run", layout | {"timeout": 5.0})
    assert statuses(ends) == [1, KILLED, *[1] * (n - 2)], ends


# --- a rank that fails


def fail_where_destroying_waits(where: str) -> None:
    """Let rank 1 fail, with a group that is destroyed as NCCL's is: it waits for the others."""
    dist.destroy_process_group = lambda: time.sleep(3600)
    of: Any = {"fill": training_start, "backward": torch.Tensor, "all_reduce": dist}[where]
    real, calls = getattr(of, where), itertools.count()

    def call(*args: Any, **options: Any) -> Any:
        if next(calls) == (where != "fill"):
            if where != "all_reduce":
                raise RuntimeError("a fault of this rank")
            args = (torch.zeros(3, dtype=torch.float8_e4m3fn),)  # gloo sums no FP8
        return real(*args, **options)

    if os.environ["RANK"] == "1":
        setattr(of, where, call)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "words"),
    [("fill", "Error: a fault of this rank"), ("backward", "Error: a fault of this rank"), ("all_reduce", "Error: ")],
)
def test_rank_that_fails_says_so_first_and_all_end(where: str, words: str, config: Path, tmp_path: Path) -> None:
    line = [str(config), "--out", str(tmp_path / "run"), "--parallel.ep", "2"]
    begin = time.monotonic()
    got = spoken(tmp_path, line, line, prepare=partial(fail_where_destroying_waits, where))
    assert got.statuses == [1, 1] and time.monotonic() - begin < 100, got.errors
    assert "Traceback" in got.errors[1] and words in got.errors[1] and "rank 1 failed" in got.errors[1]
    assert "lost another process" in got.errors[0] and "Traceback" not in got.errors[0], got.errors[0]


def saved_slowly(world: World, folder: Path, seconds: float, **changes: Any) -> bool:
    """Train with saves in the background, of which the first takes some seconds to reach the disk on rank 1."""
    real, calls = os.fsync, itertools.count()

    def fsync(file: int) -> None:
        if world.rank == 1 and threading.current_thread().name.startswith("saving") and next(calls) == 0:
            time.sleep(seconds)
        real(file)

    os.fsync = fsync
    return run(world, folder, EP | {"timeout": 5.0}, save_every=1, save_in_background=True)


@pytest.mark.slow
def test_slow_disk_behind_a_run_is_no_stall(tmp_path: Path) -> None:
    assert run_ranks(2, saved_slowly, tmp_path / "run", 12.0) == [True, True]


# --- the end of a launcher


def hold_store(sender: Any) -> None:
    """Hold the store as a launcher does, until it is killed."""
    store = new_store()
    sender.send(store.port)
    time.sleep(600)


@pytest.mark.slow
def test_a_run_whose_launcher_is_killed_is_saved_and_stops(tmp_path: Path) -> None:
    folder, (ours, theirs) = tmp_path / "run", START.Pipe(duplex=False)
    launcher = start(hold_store, theirs)

    def kill_after_three_steps() -> None:
        wait_until(lambda: len(read_records(folder)) >= 3)
        launcher.kill()

    killer = threading.Thread(target=kill_after_three_steps)
    killer.start()
    changes = {"steps": 1_000_000, "save_every": 1_000_000}
    ends = outcomes(2, run, folder, store=SimpleNamespace(port=ours.recv()), **changes)
    killer.join()
    assert [(end.status, end.value) for end in ends] == [(0, False)] * 2, ends
    (stopped,) = events(folder, "stopped")
    assert stopped["step"] >= 3 and [event["step"] for event in events(folder, "saved")] == [stopped["step"]]


# --- the command


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the config of a small run of 6 steps."""
    return small_config(tmp_path_factory.mktemp("config"))


def hang_in_fill() -> None:
    """Let rank 1 stand still while the weights are drawn, and rank 0 be slow to end: it sees rank 1 end before."""
    if os.environ["RANK"] == "1":
        training_start.fill = lambda *_: time.sleep(3600)
    else:
        heartbeat.time = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: time.sleep(2))


@pytest.mark.slow
def test_stall_of_the_command_is_told_on_stderr(config: Path, tmp_path: Path) -> None:
    """Leave the output to the line of JSON."""
    args = [str(config), "--out", str(tmp_path / "run"), "--json", "--parallel.timeout", "5"]
    got = spoken(tmp_path, args, args, prepare=hang_in_fill)
    assert got.statuses == [STALLED] * 2 and got.outputs == ["", ""]
    assert got.errors[0].count("rank 1 (pid") == 1 and "--resume" in got.errors[0]
    for rank, error in enumerate(got.errors):
        assert f"stacks of rank {rank}" in error and "MainThread:" in error
    assert "in hang_in_fill" not in got.errors[0] and "time.sleep(3600)" in got.errors[1]


# --- processes of a command that do not start alike, or not all: one sentence, once, and status 2


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


STARTS = tomllib.loads(Path(__file__).with_name("starts.toml").read_text())
LATE = "--train.batch-size 6 --parallel.timeout 900"
FIRST, *LATER = STARTS


@pytest.fixture(scope="module")
def place(config: Path) -> Path:
    """Return a folder with a config, and with runs `one` and `two` that differ in their weights."""
    for name, seed in (("one", "1"), ("two", "2")):
        line = [str(config), "--out", str(config.parent / name), "--train.steps", "1", "--train.seed", seed]
        assert spoken(config.parent, line, line).statuses == [0, 0]
    return config.parent


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)])
def test_one_sentence_is_said_and_all_end_with_status_2(
    name: str, request: pytest.FixtureRequest, config: Path, tmp_path: Path
) -> None:
    case = STARTS[name]
    command, environment = case.get("name", "train"), case.get("environment", {})
    place = request.getfixturevalue("place") if name in LATER else config.parent
    own = f"{config} --out {tmp_path / 'run'} " if command == "train" and "finished" not in name else ""
    lines = [
        None if line == "missing" else shlex.split((own + line).format(place=place, LATE=LATE))
        for line in case["lines"]
    ]
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        ports = {"PORT": closed.getsockname()[1], "SILENT": silent.getsockname()[1]}
        closed.close()
        changes = {name: value.format(**ports) for name, value in environment.items()}
        got = spoken(tmp_path, *lines, name=command, environment=changes)
    assert got.statuses == [0 if line is None else 2 for line in lines], got.errors
    (sentence,) = filter(None, got.errors)
    assert sentence.startswith("error: ") and sentence.count("\n") == 1 and re.search(case["words"], sentence), sentence
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
    monkeypatch.setattr(training_start, "load_corpus", Mock(side_effect=AssertionError))
    with (
        pytest.raises(ValueError, match="is not there for rank 1"),
        training_start.started(RunOrigin(config=config), config, Console(quiet=True)),
    ):
        pass


def test_share_of_the_cores_is_not_stored_for_a_lone_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(train=TrainConfig(dtype="float32"), out=tmp_path)
    assert training_start.resolved(config, torch.device("cpu")).train.threads == torch.get_num_threads()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert training_start.resolved(config, torch.device("cpu")).train.threads is None


def test_gpu_of_one_process_is_stored_without_its_number_and_auto_is_picked_again(tmp_path: Path) -> None:
    config = RunConfig(train=TrainConfig(dtype="float32"), out=tmp_path)
    stored = training_start.resolved(config, torch.device("cuda:0"))
    assert stored.train.device == "cuda"
    before = dataclasses.replace(stored, train=dataclasses.replace(stored.train, device="cuda:0"))
    again = dataclasses.replace(before, train=dataclasses.replace(before.train, device="auto", dtype="auto"))
    accepted = RunOrigin(config=before, resume=tmp_path, before=before).accept(again).train
    assert (accepted.device, accepted.dtype) == ("auto", "float32")
