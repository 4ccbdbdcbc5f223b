"""Agreement of the ranks: an error of one is raised by all, whatever its type."""

import errno
import itertools
import os
import re
import socket
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from dsmini import machine
from dsmini.distributed import mesh
from dsmini.distributed import world as worlds
from dsmini.distributed.failure import STALLED, words_of_loss
from dsmini.distributed.heartbeat import ENDED, Heartbeat, place_of
from dsmini.distributed.meeting import launcher
from dsmini.distributed.mesh import hashed, unequal_replicas
from dsmini.distributed.world import World, joined, own_device
from tests.distributed.ranks import new_store, outcomes, run_ranks


class UnsendableError(ValueError):
    """An error that cannot be sent to another process as it is."""

    def __init__(self, words: str, limit: int) -> None:
        super().__init__(words)
        self.limit, self.work = limit, lambda: limit


def errors() -> list[tuple[Exception, str, str]]:
    """Return errors, the type that all ranks raise for one of some ranks, and its words."""
    try:
        b"\xff".decode()
    except UnicodeDecodeError as error:
        undecodable = error
    return [
        (ValueError("no such value"), "ValueError", "no such value"),
        (KeyError("layers.3"), "RuntimeError", "KeyError: 'layers.3'"),
        (MemoryError("no memory is left"), "MemoryError", "no memory is left"),
        (torch.OutOfMemoryError("too much"), "RuntimeError", "OutOfMemoryError: too much"),
        (OSError(errno.ENOSPC, "No space left on device"), "OSError", "No space left on device"),
        (undecodable, "ValueError", "can't decode byte 0xff"),
        (UnsendableError("beyond the limit", 3), "ValueError", "beyond the limit"),
    ]


def test_loss_of_a_rank_is_known_by_the_words_of_gloo_nccl_and_the_store() -> None:
    lost = [
        dist.DistBackendError("NCCL communicator was aborted on rank 1"),
        dist.DistBackendError("ncclRemoteError: ... possibly due to a network error or a remote process exiting"),
        dist.DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed."),
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
        RuntimeError("[gloo/transport/tcp/buffer.cc:72] Timed out waiting 8000ms for recv operation"),
    ]
    others = [
        dist.DistBackendError("ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1 both on 1a0"),
        RuntimeError("[gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4"),
        ValueError("closed by peer"),
    ]
    assert [error for error in lost if not words_of_loss(error)] == []
    assert [error for error in others if words_of_loss(error)] == []


def test_words_of_a_loss_are_the_cause_without_places_in_gloo_and_its_advice() -> None:
    gloo = "[/gloo/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. This is typically caused by bugs."
    pipeline = RuntimeError("[Stage 1] failed to run forward: args: ('Tensor(torch.Size([3, 16, 24]))',)")
    pipeline.__cause__ = RuntimeError(gloo)
    assert words_of_loss(pipeline) == "Read error [127.0.0.1]:1: Connection reset by peer"


def failing(error: Exception, said: Path) -> None:
    with said.open("a") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr.reconfigure(write_through=True)  # as PYTHONUNBUFFERED does, where lines of two ranks mixed
    with joined(20.0):
        raise error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (dist.DistBackendError("NCCL error:\nDuplicate GPU"), "rank 0: DistBackendError: NCCL error: Duplicate GPU\n"),
        (RuntimeError("Broken pipe"), "rank 0: lost another process (Broken pipe); a run of dsmini.train continues"),
    ],
    ids=["NCCL", "lost"],
)
def test_error_of_a_group_is_told_with_its_message(error: Exception, said: str, tmp_path: Path) -> None:
    ends = outcomes(2, failing, error, tmp_path / "said", timeout=None)
    assert [end.status for end in ends] == [1, 1] and said in (tmp_path / "said").read_text()


def unshared(world: World, folder: Path) -> str:
    worlds.SHARED_WITHIN = 0.2
    own = folder / f"{min(world.rank, 1)}"
    own.mkdir(exist_ok=True)
    try:
        world.refuse_unshared(own / "runs" / "new")  # before it is made
    except ValueError as error:
        return str(error)
    return ""


def test_folder_that_is_not_on_all_machines_is_refused(tmp_path: Path) -> None:
    (words,) = {*run_ranks(3, unshared, tmp_path)}
    assert " of rank 0 is not there for rank 1 (on " in words and ", 2 (on " in words and "--out" in words
    assert not [*tmp_path.glob("*/.seen*")]


def test_hash_of_a_gpu_changes_with_each_bit() -> None:
    """Hash on the device, not in main memory."""
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        tensor = torch.arange(130).to(dtype)
        on_gpu = SimpleNamespace(is_cuda=True, numel=tensor.numel, detach=lambda t=tensor: t, itemsize=tensor.itemsize)
        before = hashed(cast(Any, on_gpu))
        tensor.view(torch.uint8)[17] ^= 4
        assert hashed(cast(Any, on_gpu)) != before


def test_messages_have_a_limited_size_and_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "BUCKET", 10)
    sent: list[tuple[int, int]] = []

    def doubled(message: torch.Tensor, number: int) -> None:
        sent.append((number, message.numel()))
        message *= 2

    tensors = [[torch.ones(2, 3), torch.ones(6), torch.ones(3), torch.ones(40)], [], [torch.ones(1).bfloat16()]]
    mesh.in_messages(tensors, doubled)
    assert sent == [(0, 6), (0, 9), (0, 40), (2, 1)]
    assert all((t == 2).all() for of in tensors for t in of)


def caught(world: World) -> list[tuple[str, str, str, bool]]:
    """Return each way and error that a rank sees where some raise one, and whether the ranks still agree."""
    found = []
    for error, *_ in errors():
        for way, at in (("first", (0,)), ("together", (1,)), ("together", (0, 1))):

            def work(error: Exception = error, at: tuple[int, ...] = at) -> Any:
                if world.rank in at:
                    raise error

            try:
                getattr(world, way)(work)
            except Exception as seen:
                found.append((way, type(seen).__name__, str(seen), world.gather(world.rank) == [0, 1]))
    return found


def test_error_of_some_ranks_is_raised_by_all() -> None:
    one, other = run_ranks(2, caught)
    assert one == other and len(one) == 3 * len(errors())
    for (_, kind, words), of_first, of_one, of_all in zip(errors(), one[::3], one[1::3], one[2::3], strict=True):
        assert all(seen[1] == kind and words in seen[2] and seen[3] for seen in (of_first, of_one, of_all))
        assert ["rank 1: " in seen[2] for seen in (of_first, of_one, of_all)] == [False, True, False]


def late_sum() -> int:
    """Join the others, rank 1 last, and add up."""
    time.sleep(0.5 * int(os.environ["RANK"]))
    with joined(20.0):
        one = torch.ones((), dtype=torch.int64)
        dist.all_reduce(one)
        return int(one)


@pytest.mark.slow
def test_attempts_on_the_same_store_do_not_meet_addresses_of_dead_ranks() -> None:
    """Let rank 1 come late: without a prefix for each attempt, rank 0 would find the address of the dead one.

    The one of two ranks with the lower port waits for the other, so the address matters in half of the attempts.
    """
    store = new_store()
    for attempt in range(6):
        ends = outcomes(2, late_sum, timeout=None, store=store, attempt=attempt)
        assert [end.value for end in ends] == [2, 2]


def test_command_to_continue_starts_as_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    one_machine, two = "torchrun --standalone --nproc-per-node 4", "torchrun --nnodes 2 --nproc-per-node 2"
    for size, local, words in (("1", "1", "python"), ("4", "4", one_machine), ("4", "2", two)):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert launcher() == words


DEVICES = tomllib.loads(Path(__file__).with_name("devices.toml").read_text())["devices"]


@pytest.mark.parametrize(("environment", "got"), DEVICES)
def test_each_process_has_a_gpu_of_its_own(
    environment: dict[str, str], got: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert [str(own_device(name)) for name in ("cuda", "cpu", "cuda:1", "auto")] == got
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pytest.raises(
        ValueError, match=r"LOCAL_RANK=8 has no GPU of its own: this process sees 8; .* set LOCAL_RANK=0"
    ):
        own_device("cuda")


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_processes_on_gpus_without_a_local_rank_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other launchers than torchrun, such as srun, set other variables."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match=r"LOCAL_RANK is not set, .* start all with torchrun"):
        own_device(device)
    assert own_device("cpu").type == "cpu"


def test_several_processes_of_a_mac_use_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert own_device("auto").type == "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert own_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="several processes cannot train on mps"):
        own_device("mps")


@pytest.mark.parametrize(
    ("bits", "words"),
    [("ab", "ranks 0, 1 hold unequal copies of"), ("aba", "rank 1 differs in"), ("baaac", "ranks 0, 4 differ in")],
)
def test_rank_that_is_alone_is_named_and_both_of_two(bits: str, words: str) -> None:
    world: Any = SimpleNamespace(gather=lambda _: [{(tuple(range(len(bits))), "w"): one} for one in bits])
    assert unequal_replicas(world, {})[1] == f"{words} w"


def test_processes_share_the_cores_that_they_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other launchers than torchrun do not say how many processes a machine has, and may give each its own cores."""
    threads: list[int] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(machine, "_core_limits", lambda: ())
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    mine, elsewhere, apart = ("here", [*range(6)]), ("there", [*range(6)]), ("here", [6, 7])
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(World, "gather", lambda self, value: [mine, elsewhere, mine, apart][: self.size])
    for given in (None, 2, 64):
        World(size=4).share_cores(given)
    World(size=2).share_cores(None)
    World().share_cores(5)
    World().share_cores(None)
    assert threads == [3, 2, 3, 6, 5]


def test_gpus_are_chosen_before_nccl_and_gloo_sends_what_is_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, object]] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(worlds, "meet", lambda seconds: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: called.append(("set_device", device)))
    monkeypatch.setattr(worlds, "_connect", lambda backend, *_: called.append(("connect", backend)))
    with joined(1.0, torch.device("cuda:1")) as world:
        assert (world.rank, world.size) == (1, 2)
    assert called == [("set_device", torch.device("cuda:1")), ("connect", "cpu:gloo,cuda:nccl")]


# --- the heartbeat: of ranks in one process with scripted times, and of a process whose store ends


class Ended(BaseException):
    """The end of a process, in place of it."""


def end(status: int) -> None:
    raise Ended(status)


PLACE = {"waits": ("torch/distributed/c10d.py:1 all_reduce", True), "waits elsewhere": ("exchange.py:2 wait", True)}


STALLS = tomllib.loads(Path(__file__).with_name("stalls.toml").read_text())["stall"]


@pytest.mark.parametrize("case", STALLS, ids=lambda case: ", ".join(case["ranks"]))
def test_stall_is_found_and_ends_all(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    behaviours, culprit, speaker = case["ranks"], case.get("culprit"), case.get("speaker")
    now, clock, lines = {"behaviour": ""}, itertools.count(), itertools.count()
    patches: dict[str, Callable[..., Any]] = {
        "os._exit": end,
        "time.sleep": lambda seconds: None,
        "time.monotonic": lambda: next(clock),
        "place_of": lambda thread: PLACE.get(now["behaviour"], ("faults.py:3 do", False)),
        "stack_of": lambda thread: next(lines) if now["behaviour"] == "validates" else 0,
    }
    for name, function in patches.items():
        monkeypatch.setattr(f"dsmini.distributed.heartbeat.{name}", function)
    store: Any = dist.HashStore()
    said: dict[int, tuple[int, float, str]] = {}
    ranks = [
        Heartbeat(rank, len(behaviours), store, 3.0, lambda *stall, rank=rank: said.setdefault(rank, stall))
        for rank in range(len(behaviours))
    ]
    for rank, behaviour in zip(ranks, behaviours, strict=True):
        rank.beat(14, "saving" if behaviour == "saves" else "backward")
        rank._publish(ENDED if behaviour == "ends" else rank.phase)
    living = {rank for rank, behaviour in enumerate(behaviours) if behaviour not in ("is stopped", "ends")}
    statuses: dict[int, int] = {}
    for _ in range(500 if speaker is None else 10):
        for rank in sorted(living - statuses.keys()):
            now["behaviour"] = behaviours[rank]
            if behaviours[rank] == "moves":
                ranks[rank].beat(14, "backward")
            try:
                ranks[rank].exchange(1.0)
            except Ended as ended:
                statuses[rank] = ended.args[0]
    if speaker is None:
        assert statuses == {} and said == {}
        return
    assert statuses == dict.fromkeys(living, STALLED) and said.keys() == {speaker}
    assert said[speaker][0] == culprit and re.match(case["words"], said[speaker][2])


def test_rank_that_failed_ends_those_that_do_not_hear_of_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On NCCL a main thread waits in a collective for a rank that has ended, and no error comes."""
    monkeypatch.setattr(os, "_exit", end)
    store: Any = dist.HashStore()
    first, other = (Heartbeat(rank, 2, store, 3.0, Mock()) for rank in range(2))
    with pytest.raises(KeyError), other:
        raise KeyError("a fault")
    for _ in range(10):
        first.exchange(1.0)
    with pytest.raises(Ended, match="1"):
        first.exchange(1.0)
    assert "rank 0: lost another process (rank 1 has failed)" in capfd.readouterr().err
    first.on_stall.assert_not_called()  # pyright: ignore[reportAttributeAccessIssue]


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[float] = []
    beat = Heartbeat(0, 2, dist.HashStore(), 3.0, lambda *_: None, period=0.01)
    monkeypatch.setattr(beat, "exchange", lambda of: (passed.append(of), beat.closed.set()))
    clock = iter([0.0, 100.0, *[100.0] * 9])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    beat._run()
    assert passed == [0.03]


def test_end_of_the_store_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[bool] = []
    beat = Heartbeat(0, 2, dist.HashStore(), 3.0, lambda *_: None, lambda: lost.append(True), period=0.01)

    monkeypatch.setattr(beat, "exchange", Mock(side_effect=dist.DistNetworkError("Connection reset by peer")))
    beat._run()
    assert lost == [True]


def test_store_that_does_not_answer_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    beat = Heartbeat(1, 2, dist.HashStore(), 0.2, lambda *stall: said.append(stall[2]), period=0.01)
    monkeypatch.setattr(beat, "exchange", lambda _: beat.closed.wait(60))
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended, match=f"{STALLED}"):
        beat._run()
    beat.closed.set()
    assert "held by rank 0 or the launcher, has not answered for 0 s" in said[0]


def code(module: str, file: str, line: str) -> Any:
    """Return a function of one line of a module that is installed."""
    names: dict[str, Any] = {"__name__": module}
    exec(compile(f"def function(call):\n    {line}\n", f"/usr/lib/python3/site-packages/{file}", "exec"), names)
    return names["function"]


def test_place_is_the_innermost_line_outside_torch_of_an_installed_package_too() -> None:
    seen, held, main = [], threading.Lock(), threading.main_thread().ident
    ours = code("dsmini.distributed.mesh", "dsmini/distributed/mesh.py", "call(lock)")
    torchs = code("torch.distributed.distributed_c10d", "torch/distributed/distributed_c10d.py", "call()")

    def look() -> None:
        end = time.monotonic() + 20
        while not (seen and seen[-1][1]) and time.monotonic() < end:
            seen.append(place_of(main))
        held.release()

    held.acquire()
    threading.Thread(target=look).start()
    ours.__globals__["lock"] = held.acquire
    ours(torchs)
    assert seen[-1] == ("dsmini/distributed/mesh.py:2 function", True)
