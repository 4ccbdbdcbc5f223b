"""Layouts for a number of GPUs: which fit a model in their memory, which is fastest, and what would fit if none does.

    sizes      pipeline, tensor, expert, micro_batch
    choices    schedule, ZeRO, recomputation, precision

Every allowed layout is planned by training.py: its memory, and the time of a step where that fits.

Where the user leaves the layout open it is the fastest of the usual layouts that fit. Where the number of GPUs is
open too, it is the fewest that train within `days`: 1, 2, 4, ... up to a node, then 1, 2, 4, ... nodes. Numbers are
skipped that would train too slowly if they divided the work of one GPU evenly. They are tried last, from the largest
on, where no other fits. If none fits, the layout is the one that needs least memory, with what would fit.

Estimates: the time is that of training.py. Memory is a lower bound, so a layout may fill memory_share of it. Sequences
are divided into parts (context_parallel) where no layout with whole ones fits.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dsmini.accounting.tensors import divisors
from dsmini.planner.hardware import Hardware, OnPart, quiet
from dsmini.planner.layout import Layout, check, rules
from dsmini.planner.model import ModelFigures
from dsmini.planner.request import LAYOUT, Inputs, Model, Precision, is_v3, presets
from dsmini.planner.run import Run
from dsmini.planner.training import Training
from dsmini.report.units import DAY, human, plural

SIZES = ("pipeline", "tensor", "expert", "context_parallel", "micro_batch")
PARTS = (2, 4, 8, 16, 32, 64)
"""Parts of a sequence that are tried where whole ones do not fit."""
CHOICES = ("schedule", "zero", "recompute", "precision")
Options = Mapping[str, tuple[Any, ...]]
"""Values of the fields of a layout that may be taken, those first that need more memory; of a size that is not in it,
all that divide the GPUs."""
EVERY: Options = {
    "context_parallel": (1,),
    "micro_batch": (1, 2, 4),
    "schedule": ("1f1b", "zb1p", "dualpipe"),
    "zero": (0, 1, 2, 3),
    "recompute": ("none", "selective", "full"),
    "precision": ("bf16", "fp8"),
}
SHORT: Options = {**EVERY, "micro_batch": (1,), "schedule": ("1f1b", "dualpipe"), "zero": (0, 1, 3)}
"""Options of a layout that the user leaves open."""
MOST_GPUS = 2**20
DAYS = 90.0
"""Days of the longest training, where the user leaves them open."""
Ranked = tuple[float, float, int, Training]
"""Layout that was planned: seconds of a step, memory, and place among all of the options, by which they are sorted."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Layouts of some options for a number of GPUs."""

    m: ModelFigures
    hardware: Hardware
    assumed: Inputs
    base: Layout
    """Number of GPUs, batch, optimizer and moments; the options replace all else."""
    options: Options

    def every(self) -> Iterator[Training]:
        """Yield all layouts that the rules allow."""
        c, gpus, node = self.m.config, self.base.gpus, self.hardware.gpus_per_node
        self.hardware.check_links(gpus)
        options = self.options
        most = {"pipeline": c.n_layers, "tensor": node, "expert": c.n_routed_experts}
        sizes = [options[name] if name in options else divisors(gpus, most[name]) for name in SIZES]
        ruled, free = ([options[name] for name in names] for names in (CHOICES[:2], CHOICES[2:]))
        for values in itertools.product(*sizes, *ruled):
            here = replace(self.base, **dict(zip((*SIZES, *CHOICES[:2]), values, strict=True)))
            if all(holds for holds, _ in rules(here, c, node)):
                for recompute, precision in itertools.product(*free):
                    layout = replace(here, recompute=recompute, precision=precision)
                    yield Training(self.m, self.hardware, self.assumed, layout)

    def fastest(self, most: int, on_part: OnPart = quiet) -> list[Ranked]:
        """Return the fastest layouts that fit, one for each combination of sizes, fastest first."""
        best: dict[tuple[int, ...], Ranked] = {}
        every = list(self.every())
        for i, t in enumerate(every):
            if t.fits:
                new = t.parts_seconds, t.memory_needed, i, t
                sizes = tuple(getattr(t.layout, name) for name in SIZES)
                best[sizes] = min(new, best.get(sizes, new))
            if i % 100 == 0:
                on_part(i / len(every), plural(len(every), "layout"))
        on_part(1.0, plural(len(every), "layout"))
        return sorted(best.values())[:most]

    def smallest(self) -> Training | None:
        """Return the layout of least memory, then the first one of the options; None if there is none.

        ZeRO is also tried at its first option, since 1 to 3 divide a batch.
        """
        schedules, zeros = self.options["schedule"], self.options["zero"]
        options = {**self.options, "schedule": schedules[:1], "zero": tuple(dict.fromkeys((zeros[0], zeros[-1])))}
        options |= {name: self.options[name][-1:] for name in ("recompute", "precision")}
        return min(replace(self, options=options).every(), key=lambda t: t.memory_needed, default=None)


# --- the layout that a user leaves open


class Chosen(NamedTuple):
    """Layout that was chosen, and how."""

    training: Training
    how: str
    misfit: str = ""
    """Sentence about what does not fit, with what would."""


def usual_precision(model: Model, hardware: Hardware) -> Precision:
    """Return the precision of products where the user leaves it open: FP8 for V3, V4, and files that say so."""
    is_v4 = model.config.attention == "compressed"
    if "fp8" in hardware.peaks and (model.fp8 or is_v4 or is_v3(model.config, indexer=True)):
        return "fp8"
    return "bf16" if "bfloat16" in hardware.peaks else "fp32"


def choose_layout(inputs: Inputs, model: Model, m: ModelFigures, hardware: Hardware) -> Chosen:
    """Return a complete layout for a request with its batch, and how what is left open was chosen.

    Raises: ValueError for a layout that contradicts itself, the model, the nodes or the batch.
    """
    r, run = inputs.request, model.run
    given = r.given()

    def planned(**layout: Any) -> Training:
        made = Layout(**layout, batch=r.batch or 1)
        check(rules(made, model.config, hardware.gpus_per_node))
        return Training(m, hardware, inputs, made)

    if len(given) == len(LAYOUT):
        found = planned(**given)
        return Chosen(found, "as chosen", "" if found.fits else "use more GPUs, ZeRO, recomputation, or --search")
    state: dict[str, Any] = {"precision": usual_precision(model, hardware)}
    if run is not None:
        state |= {"optimizer": run.train.optimizer, "moments": run.train.moments}
        state |= {"precision": "fp32"} if run.train.dtype == "float32" else {}
    if is_v3(model.config) and hardware.networked:
        but = ", ".join(f"{name}={value}" for name, value in given.items())
        with contextlib.suppress(ValueError):  # the given numbers may allow no such layout
            found = planned(**{**state, **presets()["deepseek-v3"]["training"], **given})
            any_time = r.days is None or "gpus" in given
            if found.fits and (any_time or Run(found, inputs).training_time <= (r.days or DAYS) * DAY):
                return Chosen(found, f"as DeepSeek-V3 was trained{but and f', but {but}'}")
    base = Layout(**{**state, **given}, batch=r.batch or 1)
    options = {**SHORT, "precision": (base.precision,), **{name: (value,) for name, value in given.items()}}
    search = Search(m=m, hardware=hardware, assumed=inputs, base=base, options=options)
    counts = _counts(search, given)
    longest = math.inf if "gpus" in given else DAY * (r.days or DAYS)
    chosen = _by_gpus(search, counts, longest, inputs)
    if chosen is None and "context_parallel" not in given and r.seq_len != 1:
        search = replace(search, options={**options, "context_parallel": PARTS})
        chosen = _by_gpus(search, counts, longest, inputs)
    if chosen is not None:
        return chosen
    last = replace(search, base=replace(base, gpus=counts[-1]), options=options)
    smallest = last.smallest()
    if smallest is None:
        check(rules(replace(base, gpus=counts[0]), model.config, hardware.gpus_per_node))  # raises what contradicts
        raise ValueError(what_would_fit(last))
    return Chosen(smallest, "no layout fits, and this one needs the least memory", what_would_fit(last))


def _counts(search: Search, given: Mapping[str, Any]) -> list[int]:
    """Return the numbers of GPUs to try."""
    node, least = search.hardware.gpus_per_node, given.get("pipeline", 1)
    least *= math.lcm(given.get("tensor", 1), given.get("expert", 1))
    # a step has a sequence for each pipeline stage and part of the batch
    most = min(MOST_GPUS, search.hardware.most_gpus, search.base.batch * given.get("tensor", node))
    counts = {math.lcm(count, least) for count in gpu_counts(node)}
    return [given["gpus"]] if "gpus" in given else sorted(n for n in counts if n <= most) or [least]


def _by_gpus(search: Search, counts: list[int], longest: float, inputs: Inputs) -> Chosen | None:
    """Return the fastest layout on the fewest GPUs that train in time, else on the most that fit; None if none fits."""
    one = Training(search.m, search.hardware, inputs, replace(search.base, **dict.fromkeys(("gpus", *SIZES[:4]), 1)))
    least = Run(one, inputs).training_time  # of one GPU that would hold all: no layout divides it better than evenly
    able = [gpus for gpus in counts if least <= gpus * longest]
    best: Training | None = None
    for gpus in [*able, *(gpus for gpus in reversed(counts) if gpus not in able)]:
        if best is not None and gpus not in able:
            break
        found = replace(search, base=replace(search.base, gpus=gpus)).fastest(1)
        best = found[0][-1] if found else best
        if found and Run(found[0][-1], inputs).training_time <= longest:
            break
    if best is None:
        return None
    how, of = "the fastest of the usual layouts that fit", f"{human(longest, 's')} (--days)"
    if Run(best, inputs).training_time > longest:
        how += f"; no number of GPUs that was tried trains within {of}"
    elif longest < math.inf:
        how += f", on the fewest GPUs that train within {of}"
    return Chosen(best, how)


def gpu_counts(node: int, most: int = MOST_GPUS, factors: tuple[int, ...] = (1,)) -> list[int]:
    """Return numbers of GPUs to try: 1, 2, 4, ... of a node, then 1, 2, 4, ... nodes, and some times as many."""
    few = {n for i in range(node.bit_length()) for f in factors if (n := f * 2**i) < node}
    return sorted(
        few | {n for i in range(most.bit_length()) for f in factors if (n := f * 2**i * node) <= most or n == node}
    )


def what_would_fit(found: Search) -> str:
    """Return one sentence for a search that no layout fits: the least memory there is, and how many GPUs would do."""
    gpus, batch = found.base.gpus, found.base.batch
    smallest = found.smallest()
    if smallest is None:
        return f"gpus={gpus} allow no layout for a step of batch={batch} sequences; use a batch that they divide"
    fix = "use hardware with more memory, or leave out a choice"
    factors = [2**i for i in range(1, 21) if 2**i * gpus <= found.hardware.most_gpus]
    more = [(f, 1) for f in factors if f <= batch * found.m.config.n_layers / gpus] + [(f, f) for f in factors]
    for f, rows in more:
        base = replace(found.base, gpus=f * gpus, batch=rows * batch)
        larger = replace(found, base=base).smallest()
        if larger is not None and larger.fits:
            fix = f"use gpus={f * gpus}" + (f" and batch={rows * batch}" if rows > 1 else "")
            break
    least = smallest.layout
    sizes = ", ".join(f"{n}={getattr(least, n)!r}" for n in ("pipeline", "tensor", "expert", *CHOICES[1:]))
    share = f"{100 * found.assumed['memory_share']:.3g} % of {human(found.hardware.memory, 'B')}"
    return (
        f"no layout on gpus={gpus} fits {share} a GPU: "
        f"the smallest needs {human(smallest.memory_needed, 'B')}, with {sizes}; {fix}"
    )
