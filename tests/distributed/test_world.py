"""What the ranks agree on: an error of one is raised by all, whatever its type."""

import errno
from typing import Any

import pytest
import torch

from dsmini.distributed.meeting import launcher
from dsmini.distributed.world import World
from tests.distributed.ranks import run_ranks


class UnsendableError(ValueError):
    """An error that cannot be sent to another process as it is."""

    def __init__(self, words: str, limit: int) -> None:
        super().__init__(words)
        self.limit, self.work = limit, lambda: limit


def raised(kind: str) -> Exception:
    """Return an error as the code of a rank raises it."""
    try:
        b"\xff".decode()
    except UnicodeDecodeError as error:
        undecodable = error
    return {
        "value": ValueError("no such value"),
        "key": KeyError("layers.3"),
        "runtime": RuntimeError("shapes differ"),
        "memory": MemoryError("no memory is left"),
        "torch": torch.OutOfMemoryError("out of memory"),
        "disk": OSError(errno.ENOSPC, "No space left on device"),
        "unicode": undecodable,
        "unsendable": UnsendableError("beyond the limit", 3),
    }[kind]


def caught(world: World, way: str, kind: str, at: tuple[int, ...]) -> tuple[str, str, bool]:
    """Return type and words of the error that a rank sees when some raise one, and whether the ranks still agree."""

    def work() -> Any:
        if world.rank in at:
            raise raised(kind)

    try:
        getattr(world, way)(work)
    except Exception as error:
        return type(error).__name__, str(error), world.gather(world.rank) == [0, 1]
    return "", "", False


KINDS = [
    ("value", "ValueError", "no such value"),
    ("key", "KeyError", "layers.3"),
    ("runtime", "RuntimeError", "shapes differ"),
    ("memory", "MemoryError", "no memory is left"),
    ("torch", "OutOfMemoryError", "out of memory"),
    ("disk", "OSError", "No space left on device"),
    ("unicode", "UnicodeDecodeError", "can't decode byte 0xff"),
    ("unsendable", "ValueError", "beyond the limit"),
]


@pytest.mark.parametrize(("kind", "name", "words"), KINDS, ids=[kind for kind, _, _ in KINDS])
def test_error_of_rank_0_is_raised_by_all(kind: str, name: str, words: str) -> None:
    first, second = run_ranks(2, caught, "first", kind, (0,))
    assert first == second and first[0] == name and words in first[1] and first[2]


@pytest.mark.parametrize(("kind", "name", "words"), KINDS, ids=[kind for kind, _, _ in KINDS])
def test_error_of_one_rank_is_raised_by_all_with_its_name(kind: str, name: str, words: str) -> None:
    joint = {"key": "RuntimeError", "unicode": "ValueError"}.get(kind, name)
    first, second = run_ranks(2, caught, "together", kind, (1,))
    assert first == second and first[0] == joint and "rank 1: " in first[1] and words in first[1] and first[2]


def test_error_of_all_ranks_keeps_its_words() -> None:
    assert run_ranks(2, caught, "together", "value", (0, 1)) == [("ValueError", "no such value", True)] * 2


@pytest.mark.parametrize(
    ("size", "local", "words"),
    [
        (1, 1, "python"),
        (4, 4, "torchrun --standalone --nproc-per-node 4"),
        (4, 2, "torchrun --nnodes 2 --nproc-per-node 2"),
    ],
)
def test_command_to_continue_starts_as_many_processes(
    size: int, local: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(size))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert launcher() == words
