"""Inject the faults of a plan into one rank, each once in a run, however often the run is restarted.

A fault is noted in chaos-rank-0003.log in the run's folder before it is done, and one that cannot be noted is not
done: else a restarted run would die of it again and again. The hooks that training calls:

    chaos.at("backward", step)              where a phase begins; ends or stops the process, or raises
    loss = loss * chaos.loss_factor(step)   in the forward: NaN or SPIKE once, else 1.0
    chaos.flip(step, named_parameters)      between steps: one bit of a weight, once
    chaos.at("save:renamed", step)          inside a save, in the process that does it
"""

import ctypes
import errno
import math
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dsmini.distributed.chaos import OF_LOSS, ChaosPlan, Fault
from dsmini.distributed.events import EventLog

if TYPE_CHECKING:
    from torch import Tensor

SPIKE = 1000.0
"""Factor of the loss of a spike."""
SIGNALS = {
    **{"kill": signal.SIGKILL, "kill_saving": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP},
}
ERRNO = {"full_disk": errno.ENOSPC, "io_error": errno.EIO}
OF_HOOKS = (*OF_LOSS, "flip")
"""Kinds that `at` leaves to the other hooks."""


class ChaosError(RuntimeError):
    """The exception that the kind `exception` raises."""


class Chaos:
    """The faults of one rank.

    Args:
        run: the run's folder; it remembers the faults that were done, and has the checkpoints to corrupt.
        log: told of each fault before it is done.
    """

    def __init__(self, plan: ChaosPlan, rank: int, run: Path, log: EventLog | None = None) -> None:
        self.rank, self.run, self.log = rank, run, log
        self.path = run / f"chaos-rank-{rank:04d}.log"
        done = set(self.path.read_text(encoding="utf-8").splitlines()) if self.path.exists() else set()
        self.left = [fault for fault in plan.faults if fault.rank == rank and str(fault) not in done]
        """Faults that are still to come, by step."""

    def at(self, phase: str, step: int) -> None:
        """Do what is due in a phase of a step; a fault of an earlier step, whose time was missed, too.

        Raises: ChaosError, and OSError in a save, where the plan says so.
        """
        while fault := self._take(step, phase, lambda kind: kind not in OF_HOOKS):
            self._do(fault)

    def loss_factor(self, step: int) -> float:
        """Return the factor of this rank's loss in a step: NaN, SPIKE, or 1.0."""
        factor = 1.0
        while fault := self._take(step, "forward", OF_LOSS.__contains__):
            factor *= math.nan if fault.kind == "nan" else SPIKE
        return factor

    def flip(self, step: int, parameters: "Iterable[tuple[str, Tensor]]") -> str | None:
        """Flip one bit of the mantissa of a weight if that is due; return the name of the parameter.

        Args:
            parameters: local tensors of floats by name.
        """
        fault = self._take(step, "between", "flip".__eq__)
        if fault is None:
            return None
        draw = random.Random(str(fault))
        named = [(name, tensor) for name, tensor in parameters if tensor.numel() and tensor.is_floating_point()]
        if not named:
            return None
        name, tensor = named[math.floor(draw.random() * len(named))]
        flip_bit(tensor, math.floor(draw.random() * tensor.numel()), draw.random())
        return name

    def _take(self, step: int, phase: str, of: Callable[[str], bool]) -> Fault | None:
        """Return a fault that is due, after it was noted; None without one, or if it cannot be noted."""
        fault = next((one for one in self.left if one.step <= step and one.phase == phase and of(one.kind)), None)
        if fault is None:
            return None
        self.left.remove(fault)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{fault}\n")
        except OSError:
            return None
        if self.log is not None:
            self.log.write("fault", step, rank=self.rank, kind=fault.kind, phase=phase)
        return fault

    def _do(self, fault: Fault) -> None:
        kind = fault.kind
        if kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[kind])
        elif kind in ERRNO:
            raise OSError(ERRNO[kind], os.strerror(ERRNO[kind]), f"{self.run}, by chaos")
        elif kind == "exception":
            raise ChaosError(f"{fault}, by chaos")
        elif kind == "hang":
            while True:
                time.sleep(3600)
        elif kind == "corrupt":
            corrupt_newest(self.run, str(fault))
        else:
            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file
            os.abort() if kind == "abort" else ctypes.string_at(0)


def flip_bit(tensor: "Tensor", element: int, where: float) -> None:
    """Flip a bit of the mantissa of one element, chosen by a number from 0 to 1: it stays finite, and near."""
    import torch

    bits = round(-math.log2(torch.finfo(tensor.dtype).eps))
    bit = math.floor(where * bits)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    with torch.no_grad():
        index = torch.unravel_index(torch.tensor(element), tensor.shape)
        one = tensor[index].clone()
        one.view(kinds[tensor.element_size()]).bitwise_xor_(1 << bit)
        tensor[index] = one


def corrupt_newest(run: Path, seed: str) -> Path | None:
    """Invert a byte of a file of the newest checkpoint, both chosen by a seed; return the file, if there is one."""
    draw = random.Random(seed)
    folders = [path for path in run.glob("checkpoints/*") if re.fullmatch(r"step-\d+", path.name)]
    newest = max(folders, key=lambda path: int(path.name.removeprefix("step-")), default=run / "no checkpoint")
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    if not files:
        return None
    path = files[math.floor(draw.random() * len(files))]
    with path.open("r+b") as file:
        place = math.floor(draw.random() * path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))
    return path
