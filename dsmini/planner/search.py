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

from dsmini.accounting.memory import Recompute
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
    """Layout with its lower bounds; the order is that of time, then memory, sizes and choices."""

    seconds: float
    memory: float
    sizes: tuple[int, ...]
    """Pipeline, tensor, expert and micro-batch."""
    choice: tuple[Any, ...]
    """Place of schedule, ZeRO, recomputation and precision among the options."""


class Found(NamedTuple):
    """Layout that was planned."""

    seconds: float
    memory: float
    layout: Layout
    training: Training
    step: Step


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

    def layout(self, one: Bounded) -> Layout:
        """Return the layout that bounds are of."""
        choice = (self.options[name][i] for name, i in zip(CHOICES, one.choice, strict=True))
        return replace(self.base, **dict(zip((*SIZES, *CHOICES), (*one.sizes, *choice), strict=True)))

    def every(self) -> list[Bounded]:
        """Return all layouts that the rules allow, with their bounds."""
        c, gpus, node = self.m.config, self.base.gpus, self.hardware.gpus_per_node
        check_links(self.hardware, gpus)
        most = {"pipeline": c.n_layers, "tensor": node, "expert": c.n_routed_experts}
        lists = [self.options[name] if name in self.options else divisors(gpus, most[name]) for name in SIZES]
        found: list[Bounded] = []
        bounds = _Bounds(self)
        places = [range(len(self.options[name])) for name in CHOICES]
        for sizes in itertools.product(*lists):
            for schedule, zero in itertools.product(*places[:2]):
                here = self.layout(Bounded(0.0, 0.0, sizes, (schedule, zero, 0, 0)))
                if all(holds for holds, _ in rules(here, c, node)):
                    for rest in itertools.product(*places[2:]):
                        choice = (schedule, zero, *rest)
                        found.append(Bounded(*bounds.of(here, rest), sizes, choice))
        return found

    def training(self, layout: Layout) -> Training:
        """Return the figures of a layout, each planned once."""
        if layout not in self.planned:
            self.planned[layout] = Training(self.m, self.hardware, self.assumed, layout)
        return self.planned[layout]

    def fastest(self, most: int, on_part: OnPart = quiet) -> list[Found]:
        """Return the fastest layouts that fit, one for each combination of sizes, fastest first."""
        best: dict[tuple[int, ...], tuple[tuple[Any, ...], Found]] = {}
        unfit: dict[Layout, int] = {}
        last = math.inf  # time of the slowest layout to return
        every = sorted(one for one in self.every() if one.memory <= self.hardware.memory)
        for i, one in enumerate(every):
            if i % 100 == 0:
                on_part(i / len(every), f"{plural(len(every), 'layout')}")
            if last < one.seconds:
                break
            if one.sizes in best and best[one.sizes][0][0] < one.seconds:
                continue
            layout = self.layout(one)
            same = replace(layout, zero=0)  # what does not fit with more of ZeRO does not with less
            if layout.zero <= unfit.get(same, -1):
                continue
            training = self.training(layout)
            if not training.fits and layout.zero < 3:  # which holds gathered weights besides
                unfit[same] = layout.zero
            if training.fits:
                step = Step(self.m, self.hardware, self.assumed, layout, training)
                seconds, memory = float(step.parts_seconds), float(training.memory_needed)
                key = (seconds, memory, one.choice)
                if one.sizes not in best or key < best[one.sizes][0]:
                    best[one.sizes] = key, Found(seconds, memory, layout, training, step)
                    times = sorted(key[0] for key, _ in best.values())
                    last = times[most - 1] if len(times) >= most else math.inf
        on_part(1.0, f"{plural(len(every), 'layout')}")
        order = sorted(best.items(), key=lambda item: (*item[1][0][:2], item[0], item[1][0][2]))
        return [found for _, (_, found) in order[:most]]

    def fits_any(self) -> bool:
        """Return whether some layout fits."""
        smallest = self.smallest()
        return smallest is not None and smallest.fits

    def smallest(self) -> Training | None:
        """Return the layout of least memory, then of first sizes and choices; None if there is none."""
        best: tuple[tuple[Any, ...], Training] | None = None
        for one in sorted(self.every(), key=lambda one: (one.memory, one.sizes, one.choice)):
            if best is not None and best[0][0] < one.memory:
                break
            training = self.training(self.layout(one))
            key = (float(training.memory_needed), one.sizes, one.choice)
            if best is None or key < best[0]:
                best = key, training
        return best[1] if best else None


class _Bounds:
    """Lower bounds of the time and the memory of layouts, in plain numbers."""

    def __init__(self, search: Search) -> None:
        self._search, self._m = search, search.m
        self._stage: dict[tuple[Any, ...], tuple[float, float, float]] = {}
        self._row: dict[tuple[Any, ...], float] = {}
        self._state: dict[tuple[Any, ...], tuple[float, float, float, float]] = {}
        self._links = Links(search.hardware, search.assumed)
        c, parameters = self._m.config, self._m
        self._layers, self._moe = c.n_layers, max(0, c.n_layers + c.n_mtp_layers - c.n_dense_layers)
        self._experts = self._moe * c.n_routed_experts * float(parameters.expert_parameters)
        self._rest = max(0.0, float(parameters.parameters_total) - self._experts)

    def of(self, here: Layout, rest: tuple[int, ...]) -> tuple[float, float]:
        """Return the seconds of a step but for the update, and the bytes of the mean GPU.

        Args:
            here: layout, of which the next are chosen anew.
            rest: places of recomputation and precision among the options.
        """
        recompute, precision = (self._search.options[name][i] for name, i in zip(CHOICES[2:], rest, strict=True))
        key = (here.pipeline, here.schedule, recompute, precision, here.expert > 1)
        if key not in self._stage:
            self._stage[key] = self._seconds(replace(here, recompute=recompute, precision=precision, zero=0))
        tokens = here.micro_batch * float(self._m.seq_len) / here.tensor
        forward, backward, weights = (tokens * seconds for seconds in self._stage[key])
        rows = self._rows(here, precision) * tokens * self._moe / here.pipeline
        number, alone = here.batch / (here.data * here.micro_batch), forward + backward
        p, pair, hidden = here.pipeline, alone + 2 * rows, 0.0
        if here.schedule == "dualpipe":
            hidden = (number - p) * min(alone, 2 * rows)
            bubble = (p / 2 - 1) * (max(alone, 2 * rows) + backward + rows - 3 * weights)
        else:
            bubble = (p - 1) * (pair - 2 * weights if here.schedule == "zb1p" else pair)
        state, memory = self._held(here, recompute, precision, number)
        if here.zero >= 2:
            state = max(0.0, state - number * alone)
        return ROUNDING * (number * pair - hidden + bubble + state), ROUNDING * memory

    def _seconds(self, layout: Layout) -> tuple[float, float, float]:
        """Return the computing time of a token in the slowest stage: forward, backward, and gradients of weights."""
        rates, of = Rates(self._search.hardware, self._search.assumed, layout), self._m.operations(layout.recompute)
        last, place = placed(self._m.config, layout.pipeline, layout.schedule, rates.of_parts(of))
        mine = stage_operations(of, stages(self._m.config, layout.pipeline, layout.schedule, last)[place])
        return rates.seconds(mine, "forward"), rates.seconds(mine, "backward"), rates.seconds(mine, "weights")

    def _rows(self, layout: Layout, precision: Precision) -> float:
        """Return the time of a token's rows in a layer and pass."""
        key = (layout.expert, precision)
        if key not in self._row:
            rows = Rows(self._m, self._search.hardware, self._search.assumed, layout.expert, precision)
            self._row[key] = float(rows.dispatch_seconds) if layout.expert > 1 else 0.0
        return self._row[key]

    def _held(self, r: Layout, recompute: Recompute, precision: Precision, number: float) -> tuple[float, float]:
        """Return the seconds of exchanging the mean GPU's state, and the bytes that it holds."""
        if r.gpus == 1:
            return 0.0, 0.0
        key = (precision, r.zero)
        if key not in self._state:
            state = State(replace(r, precision=precision))
            parts = (state.state_weight, 3), (state.state_gradient, 2), (state.state_optimizer, 1)
            whole, divided = (sum(float(n) for n, since in parts if (r.zero >= since) == is_) for is_ in (False, True))
            self._state[key] = whole, divided, float(state.state_gradient), float(state.state_weight)
        whole, divided, gradient, weight = self._state[key]
        by, p = r.data * r.copies, r.pipeline
        by_expert = by * r.tensor / r.expert
        rest, experts = (n * r.copies / p for n in (self._rest / r.tensor, self._experts / r.expert))
        held = rest * (whole + divided / by) + experts * (whole + divided / by_expert)
        numbers = rest * (1 - 1 / by) + experts * (1 - 1 / by_expert)
        inside = state_stays_in_node(r, self._search.hardware.gpus_per_node)
        rate = self._links.fast_rate if inside else self._links.slow_rate
        sent = state_sent(r.zero, number, numbers * gradient, numbers * weight)
        saved = self._m.saved(4 if precision == "fp32" else 2, precision == "fp8", recompute)
        kinds = [float(a) for a in (saved.activations_dense, saved.activations_moe) if a]
        tokens = r.micro_batch * float(self._m.seq_len) / r.tensor
        in_flight = {"1f1b": (p + 1) / 2 / p, "zb1p": 1.0, "dualpipe": (p + 1) / p}[r.schedule]  # the mean of GPUs
        return sent / rate, held + tokens * in_flight * self._layers * min(kinds)


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
