"""Layouts for a number of GPUs: which fit a model in their memory, which is fastest, and what would fit if none does.

    sizes      pipeline, tensor, expert, micro_batch
    choices    schedule, ZeRO, recomputation, precision

Every allowed layout gets two lower bounds in plain numbers: of its time, and of the memory of its mean GPU. Then
layouts are planned by training.py, in the order of the first bound, and only those whose second bound fits. The search
ends when the bound of the next one is above the times that were found. So it finds what planning all would find.

Where the user leaves the layout open it is the fastest of a short list that fits. Where the number of GPUs is open too,
it is the fewest that train within `days`: 1, 2, 4, ... up to a node, then 1, 2, 4, ... nodes. If none fits, the layout
is the one that needs least memory, with what would fit.

Estimates: the time is that of training.py. Memory is a lower bound: a layout that fills it will not run.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from dsmini.accounting.tensors import divisors
from dsmini.planner.hardware import Hardware, OnPart, quiet
from dsmini.planner.layout import Layout, check, rules
from dsmini.planner.model import ModelFigures
from dsmini.planner.request import LAYOUT, Assumptions, Model, PlanRequest, Precision, is_v3, presets
from dsmini.planner.training import (
    Links,
    Rates,
    Rows,
    State,
    Step,
    Training,
    check_links,
    placed,
    stage_operations,
    stages,
    state_sent,
    state_stays_in_node,
    waiting,
)
from dsmini.report.units import DAY, human, plural

SIZES = ("pipeline", "tensor", "expert", "micro_batch")
CHOICES = ("schedule", "zero", "recompute", "precision")
Options = Mapping[str, tuple[Any, ...]]
"""Values of the fields of a layout that may be taken, those first that need more memory; of a size that is not in it,
all that divide the GPUs."""
EVERY: Options = {
    "micro_batch": (1, 2, 4),
    "schedule": ("1f1b", "zb1p", "dualpipe"),
    "zero": (0, 1, 2, 3),
    "recompute": ("none", "selective", "full"),
    "precision": ("bf16", "fp8"),
}
SHORT: Options = {**EVERY, "micro_batch": (1,), "schedule": ("1f1b", "dualpipe"), "zero": (0, 1, 3)}
"""Options of a layout that the user leaves open."""
MOST_GPUS = 2**20
ROUNDING = 1 - 1e-9
"""Factor on bounds, which are computed in another order than figures."""
DEFAULTS: Mapping[str, Any] = {
    **{"gpus": 1, "pipeline": 1, "expert": 1, "tensor": 1, "zero": 0, "recompute": "none", "precision": "bf16"},
    **{"micro_batch": 1, "schedule": "1f1b", "optimizer": "adamw", "moments": "float32"},
}
"""Layout of one process."""


def lean(options: Options) -> Options:
    """Return the options that need least memory; ZeRO also 0, since 1 to 3 divide a batch."""
    zeros = tuple(dict.fromkeys((options["zero"][0], options["zero"][-1])))
    last = {name: options[name][-1:] for name in ("recompute", "precision")}
    return {**options, "schedule": options["schedule"][:1], "zero": zeros, **last}


class Bounded(NamedTuple):
    """Layout with its lower bounds; the order is that of time, then memory, then of the options."""

    seconds: float
    memory: float
    place: int
    """Place among all layouts of the options."""
    layout: Layout

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pipeline, tensor, expert and micro-batch."""
        return tuple(getattr(self.layout, name) for name in SIZES)


class Found(NamedTuple):
    """Layout that was planned; the order is that of time, then memory, then of the options."""

    seconds: float
    memory: float
    place: int
    training: Training
    step: Step

    @property
    def layout(self) -> Layout:
        """Layout that was planned."""
        return self.training.layout


@dataclass(frozen=True, kw_only=True)
class Search:
    """Layouts of some options for a number of GPUs."""

    m: ModelFigures
    hardware: Hardware
    assumed: Assumptions
    base: Layout
    """Number of GPUs, batch, optimizer and moments; the options replace all else."""
    options: Options
    planned: dict[Layout, Training] = field(default_factory=dict)

    def every(self) -> list[Bounded]:
        """Return all layouts that the rules allow, with their bounds."""
        c, gpus, node = self.m.config, self.base.gpus, self.hardware.gpus_per_node
        check_links(self.hardware, gpus)
        most = {"pipeline": c.n_layers, "tensor": node, "expert": c.n_routed_experts}
        sizes = [self.options[name] if name in self.options else divisors(gpus, most[name]) for name in SIZES]
        ruled, free = ([self.options[name] for name in names] for names in (CHOICES[:2], CHOICES[2:]))
        bounds, found = _Bounds(self), list[Bounded]()
        for values in itertools.product(*sizes, *ruled):
            here = replace(self.base, **dict(zip((*SIZES, *CHOICES[:2]), values, strict=True)))
            if all(holds for holds, _ in rules(here, c, node)):
                for recompute, precision in itertools.product(*free):
                    layout = replace(here, recompute=recompute, precision=precision)
                    found.append(Bounded(*bounds.of(layout), len(found), layout))
        return found

    def training(self, layout: Layout) -> Training:
        """Return the figures of a layout, each planned once."""
        if layout not in self.planned:
            self.planned[layout] = Training(self.m, self.hardware, self.assumed, layout)
        return self.planned[layout]

    def fastest(self, most: int, on_part: OnPart = quiet) -> list[Found]:
        """Return the fastest layouts that fit, one for each combination of sizes, fastest first."""
        best: dict[tuple[int, ...], Found] = {}
        last = math.inf  # time of the slowest layout to return
        every = sorted(one for one in self.every() if one.memory <= self.hardware.memory)
        for i, one in enumerate(every):
            if i % 100 == 0:
                on_part(i / len(every), f"{plural(len(every), 'layout')}")
            if last < one.seconds:
                break
            old = best.get(one.sizes)
            if (old is None or one.seconds <= old.seconds) and (training := self.training(one.layout)).fits:
                step = Step(self.m, self.hardware, self.assumed, one.layout, training)
                new = Found(float(step.parts_seconds), float(training.memory_needed), one.place, training, step)
                best[one.sizes] = min(new, old or new)
                times = sorted(each.seconds for each in best.values())
                last = times[most - 1] if len(times) >= most else math.inf
        on_part(1.0, f"{plural(len(every), 'layout')}")
        return sorted(best.values())[:most]

    def fits_any(self) -> bool:
        """Return whether some layout fits."""
        smallest = self.smallest()
        return smallest is not None and smallest.fits

    def smallest(self) -> Training | None:
        """Return the layout of least memory, then the first one of the options; None if there is none."""
        best: Training | None = None
        for one in sorted(self.every(), key=lambda one: (one.memory, one.place)):
            if best is not None and best.memory_needed < one.memory:
                break
            training = self.training(one.layout)
            if best is None or training.memory_needed < best.memory_needed:
                best = training
        return best


class _Bounds:
    """Lower bounds of the time and the memory of layouts, in plain numbers."""

    def __init__(self, search: Search) -> None:
        self._m, self._h, self._a = search.m, search.hardware, search.assumed
        self._stage: dict[tuple[Any, ...], tuple[float, ...]] = {}
        self._row: dict[tuple[Any, ...], float] = {}
        self._state: dict[str, State] = {}
        self._links, c = Links(self._h, self._a), self._m.config
        self._moe = max(0, c.n_layers + c.n_mtp_layers - c.n_dense_layers)
        self._experts = self._moe * c.n_routed_experts * float(self._m.expert_parameters)
        self._rest = max(0.0, float(self._m.parameters_total) - self._experts)

    def of(self, r: Layout) -> tuple[float, float]:
        """Return the seconds of a step but for the update, and the bytes of the mean GPU."""
        key = (r.pipeline, r.schedule, r.recompute, r.precision, r.expert > 1)
        if key not in self._stage:
            self._stage[key] = self._seconds(r)
        if (r.expert, r.precision) not in self._row:
            rows = Rows(self._m, self._h, self._a, r.expert, r.precision).dispatch_seconds
            self._row[r.expert, r.precision] = float(rows) if r.expert > 1 else 0.0
        tokens, number = r.micro_batch * float(self._m.seq_len) / r.tensor, r.batch / (r.data * r.micro_batch)
        forward, backward, weights = (tokens * seconds for seconds in self._stage[key])
        rows = self._row[r.expert, r.precision] * tokens * self._moe / r.pipeline
        computing = number * (forward + backward)
        state, memory = self._held(r, tokens, number)
        if r.zero >= 2:
            state = max(0.0, state - computing)
        waits = sum(waiting(r, number, (forward, backward, weights), rows, 0.0))
        return ROUNDING * (computing + waits + state), ROUNDING * memory

    def _seconds(self, r: Layout) -> tuple[float, ...]:
        """Return the computing time of a token in the slowest stage: forward, backward, and gradients of weights."""
        rates, of = Rates(self._h, self._a, r), self._m.operations(r.recompute)
        last, place = placed(self._m.config, r.pipeline, r.schedule, rates.of_parts(of))
        mine = stage_operations(of, stages(self._m.config, r.pipeline, r.schedule, last)[place])
        return tuple(rates.seconds(mine, phase) for phase in ("forward", "backward", "weights"))

    def _held(self, r: Layout, tokens: float, number: float) -> tuple[float, float]:
        """Return the seconds of exchanging the mean GPU's state, and the bytes that it holds."""
        if r.gpus == 1:
            return 0.0, 0.0
        if r.precision not in self._state:
            self._state[r.precision] = State(r)
        state = self._state[r.precision]
        parts = (state.state_weight, 3), (state.state_gradient, 2), (state.state_optimizer, 1)
        whole = sum(float(n) for n, since in parts if r.zero < since)
        divided = state.state_parameter - whole
        by, p = r.data * r.copies, r.pipeline
        by_expert = by * r.tensor / r.expert
        rest, experts = (n * r.copies / p for n in (self._rest / r.tensor, self._experts / r.expert))
        numbers = rest * (1 - 1 / by) + experts * (1 - 1 / by_expert)
        sent = state_sent(r.zero, number, numbers * state.state_gradient, numbers * state.state_weight)
        inside = state_stays_in_node(r, self._h.gpus_per_node)
        saved = self._m.saved(4 if r.precision == "fp32" else 2, r.precision == "fp8", r.recompute)
        least = min(float(a) for a in (saved.activations_dense, saved.activations_moe) if a)
        in_flight = {"1f1b": (p + 1) / 2 / p, "zb1p": 1.0, "dualpipe": (p + 1) / p}[r.schedule]  # the mean of GPUs
        held = rest * (whole + divided / by) + experts * (whole + divided / by_expert)
        rate = self._links.fast_rate if inside else self._links.slow_rate
        return sent / rate, held + tokens * in_flight * self._m.config.n_layers * least


def candidates(search: Search, on_part: OnPart = quiet, most: int = 12) -> list[Found]:
    """Return the fastest layouts that fit. Raises: ValueError if no layout fits, with what would fit."""
    found = search.fastest(most, on_part)
    if not found:
        raise ValueError(what_would_fit(search))
    return found


# --- the layout that a user leaves open


class Chosen(NamedTuple):
    """Layout that was chosen, and how."""

    layout: Layout
    training: Training
    how: str
    misfit: str = ""
    """Sentence about what does not fit, with what would."""


def usual_precision(model: Model, hardware: Hardware) -> Precision:
    """Return the precision of products where the user leaves it open: FP8 for V3 and for files that say so."""
    if "fp8" in hardware.peaks and (model.fp8 or is_v3(model.config, indexer=True)):
        return "fp8"
    return "bf16" if "bfloat16" in hardware.peaks else "fp32"


def choose_layout(
    r: PlanRequest,
    model: Model,
    m: ModelFigures,
    hardware: Hardware,
    assumed: Assumptions,
    seconds: Callable[[Found], float],
) -> Chosen:
    """Return a complete layout for a request, and how what is left open was chosen.

    Args:
        r: request with its batch.
        seconds: time of the whole run in a layout.

    Raises: ValueError for a layout that contradicts itself, the model, the nodes or the batch.
    """
    given, run, node = r.given(), model.run, hardware.gpus_per_node
    batch = r.batch or 1
    if len(given) == len(LAYOUT):
        layout = Layout(**given, batch=batch)
        check(rules(layout, model.config, node))
        training = Training(m, hardware, assumed, layout)
        misfit = "" if training.fits else "use more GPUs, ZeRO, recomputation, or --search"
        return Chosen(layout, training, "as chosen", misfit)
    state: dict[str, Any] = {"precision": usual_precision(model, hardware)}
    if run is not None:
        state |= {"optimizer": run.train.optimizer, "moments": run.train.moments}
        state |= {"precision": "fp32"} if run.train.dtype == "float32" else {}
    why_not = ""
    if is_v3(model.config) and hardware.networked:
        layout = Layout(**{**DEFAULTS, **state, **presets()["deepseek-v3"]["training"], **given}, batch=batch)
        but = ", ".join(f"{name}={value}" for name, value in given.items())
        try:
            check(rules(layout, model.config, node))
            training = Training(m, hardware, assumed, layout)
            if training.fits:
                return Chosen(layout, training, f"as DeepSeek-V3 was trained{but and f', but {but}'}")
            why_not = f"it needs {training.memory_needed} of {human(hardware.memory, 'B')}"
        except ValueError as error:  # the given numbers allow no such layout
            why_not = str(error)
        why_not = f"; not as DeepSeek-V3 was trained: {why_not}"
    base, held = Layout(**{**DEFAULTS, **state, **given}, batch=batch), {n: (value,) for n, value in given.items()}
    options = {**SHORT, "precision": (base.precision,), **held}
    search = Search(m=m, hardware=hardware, assumed=assumed, base=base, options=options)
    counts = _counts(search, given)
    chosen = _by_gpus(search, counts, r.days * DAY if "gpus" not in given else math.inf, seconds)
    if chosen is not None:
        return chosen._replace(how=chosen.how + why_not)
    last = replace(search, base=replace(base, gpus=counts[-1]), options=lean(options))
    smallest = last.smallest()
    if smallest is None:
        check(rules(replace(base, gpus=counts[0]), model.config, node))  # raises what contradicts
        raise ValueError(what_would_fit(last))
    how = "no layout fits, and this one needs the least memory"
    return Chosen(smallest.layout, smallest, how + why_not, what_would_fit(last))


def _counts(search: Search, given: Mapping[str, Any]) -> list[int]:
    """Return the numbers of GPUs to try."""
    node, least = search.hardware.gpus_per_node, given.get("pipeline", 1)
    least *= math.lcm(given.get("tensor", 1), given.get("expert", 1))
    # a step has a sequence for each pipeline stage and part of the batch
    most = min(MOST_GPUS, search.hardware.most_gpus, search.base.batch * given.get("tensor", node))
    counts = {math.lcm(count, least) for count in gpu_counts(node)}
    return [given["gpus"]] if "gpus" in given else sorted(n for n in counts if n <= most) or [least]


def _by_gpus(search: Search, counts: list[int], longest: float, seconds: Callable[[Found], float]) -> Chosen | None:
    """Return the fastest layout on the first number of GPUs that trains in time, or on the most; None if none fits."""
    best, wanted = None, 0.0
    for gpus in counts:
        here = replace(search, base=replace(search.base, gpus=gpus))
        if gpus < wanted or not replace(here, options=lean(search.options)).fits_any():
            continue
        if found := here.fastest(1):
            (best,) = found
            wanted = gpus * seconds(best) / longest  # more GPUs are at most so many times as fast
            if wanted <= gpus:
                break
    if best is None:
        return None
    how = "the fastest of a short list that fits"
    if longest < math.inf:
        late = wanted > best.layout.gpus
        of = f"{human(longest, 's')} (--days)"
        how += (
            f"; no number of GPUs that was tried trains within {of}"
            if late
            else f", on the fewest GPUs that train within {of}"
        )
    return Chosen(best.layout, best.training, how)


def gpu_counts(node: int) -> list[int]:
    """Return numbers of GPUs to try: 1, 2, 4, ... of a node, then 1, 2, 4, ... nodes."""
    few = [2**i for i in range(node.bit_length()) if 2**i < node]
    return few + [node * 2**i for i in range(MOST_GPUS.bit_length())]


def what_would_fit(found: Search) -> str:
    """Return one sentence for a search that no layout fits: the least memory there is, and how many GPUs would do."""
    gpus, batch = found.base.gpus, found.base.batch
    smallest = replace(found, options=lean(found.options)).smallest()
    if smallest is None:
        return f"gpus={gpus} allow no layout for a step of batch={batch} sequences; use a batch that they divide"
    fix = "use hardware with more memory, or leave out a choice"
    factors = [2**i for i in range(1, 21) if 2**i * gpus <= found.hardware.most_gpus]
    more = [(f, 1) for f in factors if f <= batch * found.m.config.n_layers / gpus] + [(f, f) for f in factors]
    for f, rows in more:
        base = replace(found.base, gpus=f * gpus, batch=rows * batch)
        if replace(found, base=base, options=lean(found.options)).fits_any():
            fix = f"use gpus={f * gpus}" + (f" and batch={rows * batch}" if rows > 1 else "")
            break
    least = smallest.layout
    sizes = ", ".join(f"{n}={getattr(least, n)!r}" for n in ("pipeline", "tensor", "expert", *CHOICES[1:]))
    return (
        f"no layout on gpus={gpus} fits {human(found.hardware.memory, 'B')} a GPU: "
        f"the smallest needs {human(smallest.memory_needed, 'B')}, with {sizes}; {fix}"
    )
