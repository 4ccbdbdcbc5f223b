"""Whole plan: all figures of a model on hardware, in sections.

    >>> plan = whole_plan(setup(PlanRequest(hardware="h800"), Model.from_file(path), load_hardware("h800")))
    >>> plan.all["training_cost"]

Sections: model, training, inference, attention, reliability. Training, decode and prefill each tell what binds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dsmini.planner.binding import Binding, Demand, Resource, serial_binding
from dsmini.planner.model.attention_savings import AttentionSavings, attention_savings
from dsmini.planner.model.kv_cache import CachePlan, cache_plan
from dsmini.planner.model.weights import Weights, weights
from dsmini.planner.outcome import ReliabilityPlan, ServingCost, reliability_plan, serving_cost
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.quantity import Anything
from dsmini.planner.serving.decoding import DecodePlan, decode_plan
from dsmini.planner.serving.prefill import PrefillPlan, prefill_plan
from dsmini.planner.serving.speculation import SpeculationPlan, speculation_plan
from dsmini.planner.setup import Served, Setup
from dsmini.planner.training.training_plan import TrainingPlan, training_plan

PARTS = (Resource.COMPUTE, Resource.LINKS_BETWEEN, Resource.LINKS_WITHIN, Resource.LATENCY, Resource.MEMORY)
"""Resources without which a step is computed again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingPlan(Figures):
    """All figures of serving."""

    decode: DecodePlan
    prefill: PrefillPlan
    speculation: SpeculationPlan | None
    """Decoding with drafts; None for a model without multi-token prediction."""
    cost: ServingCost | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(Figures):
    """All figures of a plan."""

    setup: Setup
    cache: CachePlan
    weights: Weights
    training: TrainingPlan
    training_binding: Binding
    serving: ServingPlan | None
    """None where the setup says why not."""
    savings: AttentionSavings | None
    """None for attention that is not MLA."""
    reliability: ReliabilityPlan

    @property
    def sections(self) -> Mapping[str, dict[str, Anything]]:
        """Figures by name in each section, of which each figure is in one."""
        parts: dict[str, tuple[Figures | None, ...]] = {
            "model": (self.training.model, self.cache, self.weights),
            "training": (self.training, self.training_binding),
            "inference": (self.serving,),
            "attention": (self.savings,),
            "reliability": (self.reliability,),
        }
        seen: set[str] = set()
        found: dict[str, dict[str, Anything]] = {}
        for name, plans in parts.items():
            named = {key: figure for plan in plans if plan is not None for key, figure in plan.figures().items()}
            found[name] = {key: figure for key, figure in named.items() if key not in seen}
            seen |= named.keys()
        return found

    @property
    def all(self) -> dict[str, Anything]:
        """All figures by name."""
        return {name: figure for section in self.sections.values() for name, figure in section.items()}


def whole_plan(setup: Setup) -> Plan:
    """Return the plan of a setup.

    Raises: ValueError with one sentence for what the model or the hardware cannot have.
    """
    s = setup
    training = training_plan(s.m, s.hardware, s.layout.layout, s.workload, s.assumptions)
    pairs = zip(PARTS, training.step.without, strict=True)
    without = [Demand(resource=resource, time=time) for resource, time in pairs]
    served = s.serving
    weight_dtype = served.decode.deployment.weight_dtype if served else "bfloat16"
    cache_dtype = served.decode.deployment.cache_dtype if served else "bfloat16"
    return Plan(
        setup=s,
        cache=cache_plan(s.m, cache_dtype),
        weights=weights(s.m, weight_dtype),
        training=training,
        training_binding=serial_binding(training.step.roof_step, without, "training_"),
        serving=_serving(s, served) if served else None,
        savings=attention_savings(s.m, served.workload.context if served else s.workload.seq_len),
        reliability=reliability_plan(training, s.hardware, s.failures),
    )


def _serving(s: Setup, served: Served) -> ServingPlan:
    made, read, workload = served.decode.deployment, served.prefill.deployment, served.workload
    decode = decode_plan(s.m, s.hardware, workload, made)
    prefill = prefill_plan(s.m, s.hardware, workload, read)
    drafts = s.m.config.n_mtp_layers > 0
    return ServingPlan(
        decode=decode,
        prefill=prefill,
        speculation=speculation_plan(s.m, s.hardware, workload, made) if drafts else None,
        cost=serving_cost(decode, prefill, s.hardware),
    )
