"""Chaos: plans come from the seed alone, each fault is done once, and does what its kind says."""

import errno
import itertools
import math
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmini.config import RunConfig, TrainConfig
from dsmini.config.parallel import ParallelConfig
from dsmini.distributed.chaos import FAULT_KINDS, IN_SAVES, STEP_PHASES, ChaosPlan, ChaosRequest, Fault, parse_chaos
from dsmini.distributed.events import EventLog, log_path, read_events
from dsmini.distributed.faults import SPIKE, Chaos, ChaosError, corrupt_newest, flip_bit
from dsmini.distributed.world import World
from dsmini.training.survival import Survival

PLAN_OF_7 = [
    "stop of rank 2 at step 8 in forward",
    "abort of rank 0 at step 24 in optimizer",
    "segfault of rank 0 at step 24 in forward",
    "full_disk of rank 0 at step 35 in save:writing",
    "kill_saving of rank 2 at step 55 in save:written",
]


@given(seed=st.integers(0, 2**64), ranks=st.integers(1, 9), steps=st.integers(0, 300), mean=st.floats(1, 100))
def test_plan_is_a_function_of_the_seed(seed: int, ranks: int, steps: int, mean: float) -> None:
    plan = ChaosPlan.from_seed(seed, ranks, steps, mean)
    assert plan == ChaosPlan.from_seed(seed, ranks, steps, mean)
    for fault in plan.faults:
        assert fault.kind in FAULT_KINDS and 0 <= fault.rank < ranks and 1 <= fault.step <= steps
        assert fault.phase.startswith("save:") == (fault.kind in IN_SAVES)
        assert fault.phase.startswith("save:") or fault.phase in STEP_PHASES
    assert [fault.step for fault in plan.faults] == sorted(fault.step for fault in plan.faults)
    assert len({str(fault) for fault in plan.faults}) == len(plan.faults)


def test_plan_of_a_seed_stays_the_same() -> None:
    assert [str(fault) for fault in ChaosPlan.from_seed(7, 4, 60, 20).faults] == PLAN_OF_7


def test_faults_of_a_loss_come_to_ranks_that_have_one() -> None:
    faults = ChaosPlan.from_seed(3, 4, 10_000, 20, with_loss=(2, 3)).faults
    assert {fault.rank for fault in faults if fault.kind in ("nan", "spike")} == {2, 3}
    assert {fault.rank for fault in faults if fault.kind == "kill"} == {0, 1, 2, 3}


@pytest.mark.parametrize(("schedule", "ranks"), [("1f1b", {2, 3}), ("zbv", {0, 1})])
def test_run_draws_faults_of_a_loss_for_its_last_stage(schedule: Any, ranks: set[int], tmp_path: Path) -> None:
    world = World()
    world.size = 4
    config = RunConfig(parallel=ParallelConfig(pp=2, schedule=schedule), train=TrainConfig(steps=1000))
    request = ChaosRequest(seed=1, mean_steps=5, kinds=("nan",))
    found: set[int] = set()
    for world.rank in range(4):
        chaos = Survival(config, world, tmp_path, request).chaos
        assert chaos is not None
        found |= {fault.rank for fault in chaos.left}
    assert found == ranks


def test_faults_come_at_the_mean_distance_and_of_every_kind() -> None:
    plan = ChaosPlan.from_seed(1, 8, 40_000, 20)
    expected = 40_000 / 20
    assert abs(len(plan.faults) - expected) < 5 * math.sqrt(expected), "of a Poisson process"
    for names in ([fault.kind for fault in plan.faults], [fault.rank for fault in plan.faults]):
        counts = [names.count(name) for name in set(names)]
        mean = len(names) / len(counts)
        assert len(counts) in (len(FAULT_KINDS), 8) and all(abs(n - mean) < 5 * math.sqrt(mean) for n in counts)


def one(kind: str, phase: str, step: int = 3, rank: int = 0) -> ChaosPlan:
    return ChaosPlan(faults=(Fault(kind=kind, rank=rank, step=step, phase=phase),))


class Died(BaseException):
    """The end of a process, in place of it."""


@pytest.mark.parametrize(
    ("kind", "phase", "call"),
    [
        ("kill", "backward", ("os.kill", signal.SIGKILL)),
        ("terminate", "optimizer", ("os.kill", signal.SIGTERM)),
        ("stop", "forward", ("os.kill", signal.SIGSTOP)),
        ("kill_saving", "save:renamed", ("os.kill", signal.SIGKILL)),
        ("abort", "between", ("os.abort", None)),
        ("segfault", "forward", ("ctypes.string_at", 0)),
        ("hang", "forward", ("time.sleep", 3600)),
    ],
)
def test_fault_does_once_what_its_kind_says(
    kind: str, phase: str, call: tuple[str, int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace the functions that end or hold the process. test_faults_kills.py lets them do so."""
    called: list[tuple[str, Any]] = []

    def dying(name: str) -> Callable[..., None]:
        def die(*arguments: Any) -> None:
            called.append((name, arguments[-1] if arguments else None))
            raise Died

        return die

    for name in ("os.kill", "os.abort", "ctypes.string_at", "time.sleep"):
        monkeypatch.setattr(f"dsmini.distributed.faults.{name}", dying(name))
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    for _ in range(2):
        chaos = Chaos(one(kind, phase), 0, tmp_path, EventLog(log_path(tmp_path)))
        with suppress(Died):
            for step, name in itertools.product(range(1, 6), (*STEP_PHASES, "save:renamed")):
                chaos.at(name, step)
        assert called == [call], "the restarted run does not repeat it"
    (event,) = read_events(tmp_path)
    assert (event.event, event.step, event.fields) == ("fault", 3, {"rank": 0, "kind": kind, "phase": phase})


@pytest.mark.parametrize(("kind", "number"), [("full_disk", errno.ENOSPC), ("io_error", errno.EIO)])
def test_fault_of_a_save_comes_at_the_next_save(tmp_path: Path, kind: str, number: int) -> None:
    chaos = Chaos(one(kind, "save:writing"), 0, tmp_path)
    chaos.at("save:writing", 2)
    chaos.at("save:renamed", 10)
    with pytest.raises(OSError, match="by chaos") as error:
        chaos.at("save:writing", 10)
    assert error.value.errno == number
    chaos.at("save:writing", 20)


def test_loss_is_poisoned_once_on_one_rank(tmp_path: Path) -> None:
    plan = ChaosPlan(faults=(*one("nan", "forward").faults, *one("spike", "forward", step=5).faults))
    chaos = Chaos(plan, 0, tmp_path)
    chaos.at("forward", 3)
    factors = [chaos.loss_factor(step) for step in range(1, 7)]
    assert factors[:2] == [1, 1] and math.isnan(factors[2]) and factors[3:] == [1, SPIKE, 1]
    assert Chaos(plan, 0, tmp_path).left == [] == Chaos(plan, 1, tmp_path).left


def test_fault_that_cannot_be_noted_is_not_done(tmp_path: Path) -> None:
    chaos = Chaos(one("exception", "forward"), 0, tmp_path / "gone")
    chaos.at("forward", 3)
    chaos = Chaos(one("exception", "forward"), 0, tmp_path)
    with pytest.raises(ChaosError, match="exception of rank 0 at step 3 in forward, by chaos"):
        chaos.at("forward", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_flip_changes_one_bit_of_the_mantissa(dtype: torch.dtype) -> None:
    for where in (0.0, 0.5, 0.999):
        tensor = torch.randn(5, 7).to(dtype).t()
        before = tensor.clone()
        flip_bit(tensor, 17, where)
        assert (tensor != before).nonzero().tolist() == [[3, 2]]
        assert 0.4 < tensor[3, 2].item() / before[3, 2].item() < 2.1, "the exponent and the sign are the same"


def test_flip_hits_one_parameter_once(tmp_path: Path) -> None:
    chaos = Chaos(one("flip", "between"), 0, tmp_path)
    weights = {"a": torch.ones(3), "b": torch.ones(2, 2), "counts": torch.ones(2, dtype=torch.int64)}
    assert chaos.flip(2, weights.items()) is None
    name = chaos.flip(3, weights.items())
    assert [key for key, tensor in weights.items() if (tensor != 1).any()] == [name]
    assert chaos.flip(4, weights.items()) is None


def test_corrupt_inverts_one_byte_of_the_newest_checkpoint(tmp_path: Path) -> None:
    assert corrupt_newest(tmp_path, "x") is None
    for name in ("step-000020", "step-000100", "quarantined-step-000200"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "a.bin").write_bytes(bytes(100))
        (folder / "empty").touch()
    Chaos(one("corrupt", "between"), 0, tmp_path).at("between", 3)
    counts = {path.parent.name: path.read_bytes().count(0) for path in tmp_path.rglob("a.bin")}
    assert counts == {"step-000020": 100, "step-000100": 99, "quarantined-step-000200": 100}


def test_request_of_the_command_line() -> None:
    assert parse_chaos("7").mean_steps == 50 and parse_chaos("7").kinds == FAULT_KINDS
    request = parse_chaos("7:40:kill,stop,kill")
    assert (request.seed, request.mean_steps, request.kinds) == (7, 40, ("kill", "stop"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the seed is '', not a whole number from 0 on; want SEED"),
        ("-1", "the seed is '-1'"),
        ("x:40", "the seed is 'x'"),
        ("7:", "the mean distance is '', not a number of steps"),
        ("7:0", "the mean distance of faults is 0 steps, want a finite number above 0"),
        ("7:nan", "the mean distance of faults is nan steps"),
        ("7:40:kil", "unknown kind of fault 'kil'; did you mean 'kill'?"),
        ("7:40:xyz", "unknown kind of fault 'xyz'; want some of kill, terminate"),
        ("7:40:", "unknown kind of fault ''"),
        ("7:40:kill:9", "it has 4 parts"),
    ],
)
def test_wrong_request_gets_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"chaos|mean distance|kind") as error:
        parse_chaos(text)
    assert message in str(error.value) and "\n" not in str(error.value)
