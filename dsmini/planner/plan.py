"""Plan: all figures of a model on hardware, and what binds training, decode and prefill.

    >>> made = setup(PlanRequest(hardware="h800"), Model.from_file(find_config("deepseek-v3")), load_hardware("h800"))
    >>> plan(made).sheet.training_cost

A plan is a function of its setup alone. To vary, search or compare, change a request and plan it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsmini.planner.binding import Binding, in_turn, overlapping
from dsmini.planner.compressed import compressed_figures
from dsmini.planner.figure import Figure, Sheet
from dsmini.planner.hardware import Hardware
from dsmini.planner.model import (
    ModelSizes,
    cache_figures,
    model_figures,
    sparse_figures,
    weight_figures,
    without_indexer,
)
from dsmini.planner.reliability import FAILURES, reliability_figures
from dsmini.planner.request import PlanRequest
from dsmini.planner.serving import demands, deployment_figures, serving_figures
from dsmini.planner.setup import Setup, is_v3, presets, reference, setup
from dsmini.planner.training import WITHOUT, run_figures, training_figures

SECTIONS = ("model", "training", "inference", "attention", "reliability")
LAYOUT_INPUTS = ("gpus", "pipeline", "expert", "tensor", "micro_batch", "batch", "seq_len", "tokens")
V32 = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
"""V3.2's indexer. Source: its config.json."""


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
        stage = "prefill" if name.startswith("prefill") else "decode"
        if section == "inference":
            return stage in self.setup.misfit
        return section in ("training", "reliability") and not self.fits


def plan(made: Setup) -> Plan:
    """Return the plan of a setup.

    Raises: ValueError with one sentence for what the model or the hardware cannot have.
    """
    r, hardware, config, s = made.request, made.hardware, made.model.config, Sheet()
    c: Any = ModelSizes(config, s, made.sources.get("model", made.model.source))
    hardware.put(s)
    for name in LAYOUT_INPUTS:
        s.put(name, getattr(r, name), made.sources[name])
    model_figures(s, c)
    cache_figures(s, c, r.cache_dtype or "bfloat16")
    weight_figures(s, c, r.weight_dtype or "bfloat16")
    training_figures(s, c, hardware, made.layout)
    measured = None if r.utilization is None else (r.utilization, made.sources["utilization"])
    run_figures(s, hardware, made.layout, measured)
    without = {words: getattr(s, f"step_without_{name}") for name, words in WITHOUT.items()}
    binds = {"training": in_turn(s.roof_step_seconds, without, s.training_binding_ratio)}
    if s.memory_free >= 0:
        for name, (value, source) in FAILURES.items():
            given = getattr(r, name)
            s.put(name, value if given is None else given, source if given is None else made.sources[name])
        reliability_figures(s, made.layout)
    if made.served:
        binds |= _serving(s, c, made)
    if config.is_mla:
        context = s.context if made.served else s.seq_len
        own = config if config.attention == "dsa" else replace(reference("deepseek-v3"), attention="dsa", **V32)
        sparse_figures(s, c, context, own)
        if is_v3(without_indexer(config)):
            compressed_figures(s, context, presets()["v4"])
    return Plan(setup=made, sheet=s, binds=binds)


def _serving(s: Sheet, c: Any, made: Setup) -> dict[str, Binding]:
    """Name the figures of serving; return what binds each stage."""
    r, hardware = made.request, made.hardware
    names = ["context", "sequences", "prompt"]
    if made.model.config.n_mtp_layers and r.drafts:
        names += ["drafts", "acceptance"]
    for name in names:
        s.put(name, getattr(r, name), made.sources[name])
    decode, prefill = made.deployment("decode"), made.deployment("prefill")
    for stage, deployment in (("decode", decode), ("prefill", prefill)):
        deployment.check(made.model.config, hardware)
        deployment_figures(s, c, deployment, made.sources[stage])
    serving_figures(s, c, hardware, decode, prefill)
    stages = {stage: s.each(f"{stage}_{{}}") for stage in ("decode", "prefill")}
    return {stage: overlapping(demands(t), t.binding_ratio) for stage, t in stages.items()}


def changed(made: Setup, changes: Mapping[str, Any], hardware: Hardware, source: str = "--vary") -> Setup:
    """Return a setup with some changes of the request or of the model's sizes, all else as it is.

    A longer context leaves room for fewer sequences, unless the user chose their number; redundant experts follow the
    number of GPUs.

    Raises: ValueError for changes that the model or the hardware cannot have.
    """
    known = {field.name for field in dataclasses.fields(PlanRequest)}
    sources, model = dict(made.sources), made.model
    of_request = {name: value for name, value in changes.items() if name in known}
    if of_model := {name: value for name, value in changes.items() if name not in known}:
        model = replace(model, config=replace(model.config, **of_model))
        sources["model"] = f"{source} and {model.source}"
    follow = {"context": "sequences", "decode_gpus": "decode_redundant", "prefill_gpus": "prefill_redundant"}
    again = {other: None for name, other in follow.items() if name in changes and getattr(made.asked, other) is None}
    request = replace(made.request, **{**again, **of_request})
    sources |= dict.fromkeys(of_request, source)
    return setup(request, model, hardware, replace(made, sources=sources))
