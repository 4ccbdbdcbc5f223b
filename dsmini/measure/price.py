"""The price of a step on this machine: its operations, each timed alone at its own shape, and what is between them.

    prices = Prices.here(torch.device("cpu"))
    prices.forecast(StepShape(work="decode", config=config, dtype="bfloat16", batch=1, tokens=1024)).seconds

The step at its real size is run dry (dry.py): the code decides which operations and kernels serve, and computes
nothing. Each distinct call is then made again alone, on random operands of its shapes (calls.py), and timed. Python
and autograd take the rest of a step. A narrow model with the same number of blocks, experts and heads tells how much
a call takes:

    seconds = sum over distinct calls of (number * seconds alone) + calls * (T(narrow) - alone(narrow)) / calls(narrow)

No number comes from a run of the model itself. Prices are medians, as measurements are. They are stored in a file of
the user's cache, and measured again once the kernels' sources change. Prices of a busy or slow hour are not stored.

Simulated: experts are chosen at random, all alike likely.
"""

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsmini.config import ModelConfig
from dsmini.machine import once
from dsmini.measure.calls import Call, Operands
from dsmini.measure.cpu_time import watched
from dsmini.measure.dry import Dry, dry_count
from dsmini.measure.roofs import Roofs, Store, disturbance, key_of, load_or_measure, seconds_of, steadiness
from dsmini.measure.turns import TimeOverError
from dsmini.measure.workloads import StepShape
from dsmini.sources import hash_of, kernel_folders

VERSION = 2
"""Version of the measurement; prices stored by another version are measured again."""
CPU = torch.device("cpu")
ROUNDS, ROUND, MOST = 5, 5e-4, 0.05
"""Rounds of a call, least seconds of one, and seconds after which none begins."""
LONG = 0.05
"""Seconds of a call that is made only twice, of which the second counts."""
WIDTH, TOKENS = 16, 64
"""Width of all that is narrow in a narrow model, and its tokens."""
BETWEEN = "calls"
OnPart = Callable[[float, str], None]


def quiet(done: float, what: str) -> None:
    """Tell nobody."""


class Part(NamedTuple):
    """Equal calls of a step, or all that is between its calls."""

    kind: str
    """Kernel or kind of operation; "calls" for what is between them."""
    number: int
    seconds: float
    """Seconds of all of them, as for the other numbers."""
    roof: float = 0.0
    """Seconds of their bytes from memory, or of their products, whichever is longer."""
    flops: int = 0
    moved: int = 0
    """Bytes of operands and results."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Time and memory that a step will take here."""

    shape: StepShape
    parts: Sequence[Part]
    """Longest first."""
    peak: int
    """The most bytes that tensors take at a time in a step, weights and all else that stays included."""

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def flops(self) -> int:
        return sum(part.flops for part in self.parts)

    @property
    def calls(self) -> int:
        """Number of operations and views."""
        return next(part.number for part in self.parts if part.kind == BETWEEN)

    @property
    def by_class(self) -> dict[str, float]:
        """Seconds by kind of part, longest first."""
        found: dict[str, float] = {}
        for part in self.parts:
            found[part.kind] = found.get(part.kind, 0.0) + part.seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass
class Prices:
    """Seconds of calls on this machine's CPU, each measured once for a number of threads."""

    roofs: Roofs
    store: Store | None = None
    """File that keeps the prices; None: none does."""
    on_part: OnPart = quiet
    """Told the share of a forecast that is done, and what is next."""
    disturbed: str = ""
    """Sentence about what disturbed the first such forecast; "" for nothing."""
    until: float = math.inf
    """Moment of time.perf_counter after which nothing is timed."""
    known: dict[str, float] = field(default_factory=dict)
    """Seconds by the hash of a call and the number of threads."""
    pending: dict[str, float] = field(default_factory=dict)
    """Prices that were measured since it was written."""
    forecasts: dict[Any, Forecast] = field(default_factory=dict)
    """Forecasts that were made, by step, name and number of threads."""

    @classmethod
    def here(cls, keep: Path | None = None, on_part: OnPart = quiet, fresh: bool = False) -> "Prices":
        """Return this machine's prices, after its roofs are measured. Args: as of load_or_measure."""
        return cls.under(load_or_measure(CPU, keep, on_part, fresh), keep, on_part, fresh)

    @classmethod
    def under(cls, roofs: Roofs, keep: Path | None = None, on_part: OnPart = quiet, fresh: bool = False) -> "Prices":
        """Return the prices of a machine with these roofs: those that are stored, unless fresh ones are asked for."""
        store = Store.at(keep)
        known = {} if fresh else store.read(_key(), _of_these_kernels) or {}
        return cls(roofs=roofs, store=store, on_part=on_part, known=known)

    def forecast(
        self, shape: StepShape, make: Callable[[], Callable[[], object]] | None = None, name: str = ""
    ) -> Forecast:
        """Forecast a step on the CPU. Takes some seconds, the first time; holds nothing of the model.

        Args:
            make: makes the step, where it is not a plain one of this shape.
            name: of what `make` makes. One without a name is forecast again each time.

        Raises: TimeOverError if it would time a call after `until`; what was timed before is kept.
        """
        key = shape, name, torch.get_num_threads()
        if key in self.forecasts and (name or make is None):
            return self.forecasts[key]
        counted = dry_count(make or (lambda: shape.make(CPU)), self.roofs.cache_bytes)

        def parts() -> list[Part] | None:
            with suppress(TimeOverError):
                return self._parts(counted, shape)
            return None

        found, busy = watched(parts)
        self.operands.blocks.clear()  # some hundred megabytes
        self._store(busy)
        if found is None:
            raise TimeOverError
        found.sort(key=lambda part: -part.seconds)
        self.forecasts[key] = made = Forecast(shape=shape, parts=found, peak=counted.peak)
        return made

    def _store(self, busy: float) -> None:
        """Store new prices, unless something disturbed them: of that the first time warns."""
        new, self.pending = self.pending, {}
        disturbed = disturbance(busy, steadiness(self.roofs, CPU)) if new else ""
        if disturbed and not self.disturbed:
            warnings.warn(disturbed, stacklevel=3)
            self.disturbed = disturbed
        if new and not disturbed and self.store is not None:
            store, key = self.store, _key()
            before = lambda: store.read(key, _of_these_kernels) or {}  # noqa: E731
            store.write(key, lambda: {"kernels": hash_of(kernel_folders()), "seconds": before() | new})

    def _parts(self, counted: Dry, shape: StepShape) -> list[Part]:
        """Return the distinct calls of a step, and what is between them."""
        found: list[Part] = []
        for i, (call, n) in enumerate(counted.calls.values()):
            self.on_part(i / len(counted.calls), f"timing {call.kind}")
            roof = n * self.roofs.least_seconds(call.cold, call.flops, shape.dtype)
            found.append(Part(call.kind, n, n * self.alone(call), roof, n * call.flops, n * call.moved))
        calls = len(counted.operations) + counted.views
        return [*found, Part(BETWEEN, calls, calls * self.between(shape))]

    def alone(self, call: Call) -> float:
        """Return the seconds of a call, made again and again."""
        return self._once(repr(call.key), lambda: seconds_alone(call, self.operands))

    def between(self, shape: StepShape) -> float:
        """Return the seconds of a call beyond the operations, in a narrow model that does the same work."""
        config, rows = narrow(shape.config), shape.train.grad_accum if shape.work == "training" else 1
        config = replace(config, max_seq_len=max(config.max_seq_len, 2 * TOKENS))  # room for the tokens and a new one
        small = replace(shape, config=config, batch=rows, tokens=TOKENS)

        def measure() -> float:
            counted, step = dry_count(lambda: small.make(CPU), self.roofs.cache_bytes), small.make(CPU)
            within = sum(number * self.alone(call) for call, number in counted.calls.values())
            return max(0.0, seconds_of(step, CPU, 9, 0.02) - within) / (len(counted.operations) + counted.views)

        return self._once(repr(small), measure)

    @cached_property
    def operands(self) -> Operands:
        return Operands(self.roofs.cache_bytes)

    def _once(self, what: str, measure: Callable[[], float]) -> float:
        key = hashlib.sha1(f"{torch.get_num_threads()} {what}".encode()).hexdigest()
        if key not in self.known:
            if time.perf_counter() >= self.until:
                raise TimeOverError
            self.known[key] = self.pending[key] = measure()
        return self.known[key]


def _key() -> str:
    return json.dumps(["prices", VERSION, key_of(CPU), os.environ.get("DSMINI_CPU_ISA", "")])


def _of_these_kernels(raw: Any) -> dict[str, float]:
    """Return stored prices; none if the kernels had other sources."""
    return {str(k): float(v) for k, v in raw["seconds"].items()} if raw["kernels"] == hash_of(kernel_folders()) else {}


@torch.no_grad()
def seconds_alone(call: Call, operands: Operands) -> float:
    """Return the median seconds of a call that is made again with other operands."""
    turn, copies = operands.turn(call)
    if once(turn, CPU) > LONG:
        return once(turn, CPU)
    for _ in range(copies):  # results get memory that the process has had
        turn()
    return seconds_of(turn, CPU, ROUNDS, ROUND, MOST)


def narrow(config: ModelConfig) -> ModelConfig:
    """Return a config with the same blocks, experts and heads, whose matrices are as small as can be."""
    widths = ("dim", "inter_dim", "moe_inter_dim", "vocab_size")
    rank = None if config.q_lora_rank is None else min(WIDTH, config.q_lora_rank)
    return replace(config, q_lora_rank=rank, **{n: min(WIDTH, getattr(config, n)) for n in widths})
