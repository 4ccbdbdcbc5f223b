"""Plan: all figures of a model on hardware, and what binds training, decode and prefill.

    >>> made = setup(PlanRequest(hardware="h800"), Model.from_file(find_config("deepseek-v3")), load_hardware("h800"))
    >>> plan(made).sheet.training_cost

A plan is a function of its setup alone. To vary, search or compare, change a request and plan it.

What binds. Where the parts of a step overlap (serving), it takes as long as the slowest one, which binds. Making the
binding one faster gains at most its ratio to the second, which begins to bind then. The parts of a training step run
one after the other, and some hide others, so the step is computed again without each part: what binds is the part
whose absence gains most.

Worked example: 14 ms on links, 7 ms in memory, 2 ms of compute. Links bind, 2 times the memory's time. Links that are
three times as fast give a step of 7 ms, not 4.7, since memory binds then.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsmini.planner.figure import Figure, Sheet
from dsmini.planner.model import ModelSizes, cache_figures, model_figures, sparse_figures, weight_figures
from dsmini.planner.reliability import FAILURES, reliability_figures
from dsmini.planner.request import Setup, check, reference
from dsmini.planner.serving import STAGES, demands, deployment_figures, deployment_rules, serving_figures
from dsmini.planner.training import WITHOUT, run_figures, training_figures

SECTIONS = ("model", "training", "inference", "attention", "reliability")
LAYOUT_INPUTS = ("gpus", "pipeline", "expert", "tensor", "micro_batch", "batch", "seq_len", "tokens")
V32 = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
"""V3.2's indexer. Source: its config.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """Resource that binds, and the one that binds next."""

    first: str
    second: str
    """ "" where the first one takes all of the time."""
    ratio: float
    """Largest speedup of a step, if the first took no time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All figures of a plan."""

    setup: Setup
    sheet: Sheet
    binds: Mapping[str, Binding]
    """Bindings of training, and of decode and prefill if serving has a plan."""

    @property
    def fits(self) -> bool:
        """True if every GPU has the memory for training. The need is a lower bound, so leave room."""
        return self.sheet.memory_free >= 0

    @property
    def figures(self) -> dict[str, Figure]:
        """All figures by name, inputs not among them."""
        return {name: f for section in SECTIONS for name, f in self.sheet.section(section).items()}

    @property
    def is_slowed(self) -> bool:
        """True if time and cost are by the parts of a step, since these take longer than the assumed utilization."""
        return self.sheet.step_seconds > self.sheet.assumed_step_seconds

    def unfit(self, name: str) -> bool:
        """Return whether a figure is of training or of a deployment that the memory of a GPU does not hold."""
        section = self.sheet.get(name).title.section
        if section == "inference":
            return ("prefill" if name.startswith("prefill") else "decode") in self.setup.misfit
        return section in ("training", "reliability") and not self.fits


def plan(made: Setup) -> Plan:
    """Return the plan of a setup.

    Raises: ValueError with one sentence for what the model or the hardware cannot have.
    """
    r, hardware, config, s = made.request, made.hardware, made.model.config, Sheet()
    c: Any = ModelSizes(config, s, made.sources.get("model", made.model.source))

    def put(*names: str) -> None:
        for name in names:
            s.put(name, getattr(r, name), made.sources[name])

    hardware.put(s)
    put(*LAYOUT_INPUTS)
    model_figures(s, c)
    cache_figures(s, c, r.cache_dtype or "bfloat16")
    weight_figures(s, c, r.weight_dtype or "bfloat16")
    training_figures(s, c, hardware, r)
    run_figures(s, hardware, r, None if r.utilization is None else (r.utilization, made.sources["utilization"]))
    without = {words: getattr(s, f"step_without_{name}") for name, words in WITHOUT.items()}
    first, second, *_ = sorted(without, key=lambda words: float(without[words]))
    second = second if without[second] < s.roof_step_seconds else ""
    binds = {"training": Binding(first=first, second=second, ratio=float(s.training_binding_ratio))}
    if s.memory_free >= 0:
        put(*r.given(tuple(FAILURES)))
        reliability_figures(s, r)
    if made.served:
        put("context", "sequences", "prompt", *(("drafts", "acceptance") if config.n_mtp_layers and r.drafts else ()))
        binds |= _serving(s, c, made)
    if config.is_mla:
        own = config if config.attention == "dsa" else replace(reference("deepseek-v3"), attention="dsa", **V32)
        sparse_figures(s, c, s.context if made.served else s.seq_len, own)
    return Plan(setup=made, sheet=s, binds=binds)


def _serving(s: Sheet, c: Any, made: Setup) -> dict[str, Binding]:
    """Name the figures of serving; return what binds each stage."""
    deployments = {stage: made.deployment(stage) for stage in STAGES}
    for stage, deployment in deployments.items():
        check(deployment_rules(deployment, made.model.config, made.hardware))
        deployment_figures(s, c, deployment, made.sources[stage])
    serving_figures(s, c, made.hardware, *deployments.values())
    binds: dict[str, Binding] = {}
    for stage in STAGES:
        t = s.each(f"{stage}_{{}}")
        times = demands(t)
        first, second, *_ = sorted(times, key=lambda words: -float(times[words]))
        second = second if float(times[second]) else ""
        binds[stage] = Binding(first=first, second=second, ratio=float(t.binding_ratio))
    return binds
