"""Search of deployments: all that fit, of which none is better at once for a user and for the price; and three points.

    gpus            1, 2, 4, ... and 3 times these, of a node, then of nodes, up to one for each routed expert
    tensor          1, 2, 3, ... up to MOST_TENSOR that divide heads and GPUs
    batch           1, 2, 4, ... up to what fits in memory_share of the memory, smaller than the number of GPUs too
    micro_batches   1, or 2 where each GPU has a sequence for both
    drafts          0 to MOST_DRAFTS in decoding, where the model has multi-token prediction

Each is served as serving.py says. A choice is by its estimate; its bound stands next to it. The front has the deployments
of which no other gives a user and a GPU more tokens a second. The points are the cheapest one, which gives a GPU most
tokens; the cheapest one in time (tpot, ttft), with the largest batch that is; and the fastest one for a user.

The bound of a phase holds for more than was searched: on all numbers of GPUs up to two for each routed expert that the
rules allow, with every tensor, every batch that fits, and each number of drafts up to MOST_DRAFTS.

Rejected ones are counted by their reason. DeepSeek's own deployment (V3 report, section 3.4) is one candidate of V3 and V3.2.
"""  # noqa: E501

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsmini.accounting.tensors import divisors
from dsmini.config.fields import require
from dsmini.planner.hardware import Hardware
from dsmini.planner.request import Inputs, Model, PlanRequest, is_v3, presets
from dsmini.planner.search import gpu_counts
from dsmini.planner.serving import PRODUCTS, Deployment, Phase, Served, Service, ServingMemory, misfit
from dsmini.report.units import human

MOST_TENSOR, MOST_DRAFTS = 16, 3
MOST_PROMPTS = 64
"""Most prompts of a group of GPUs in a step."""
CHEAPEST, IN_TIME, FASTEST, OWN = "cheapest", "in time", "fastest", "DeepSeek's own"
CONTEXT = 4096
"""Tokens of a decoding sequence, where a user leaves them open."""
TPOT = 50.0
"""Milliseconds of an output token that the main deployment keeps, where a user leaves them open."""
TTFT = 5.0
"""Seconds to the first token, the same: SGLang's took 2 to 5 (LMSYS, 2025-05-05)."""


@dataclass(frozen=True, kw_only=True)
class Deployments:
    """Deployments of a phase that fit, and what was chosen among them."""

    phase: Phase
    limit: float
    """Seconds of an output token, or to the first one, that the main deployment keeps."""
    every: Sequence[Served]
    points: Mapping[str, Served]
    """Chosen ones by their name; the first is the main one."""
    rejected: Mapping[str, int]
    """Number of candidates by the reason why they were left out."""
    misfit: str
    """Sentence about what does not fit, where nothing does; "" elsewhere."""
    most_gpus: int
    """Number of GPUs up to which the bound holds."""
    least_time: float
    """Bound: least time of an output token, or to the first one."""
    most: float
    """Bound: most tokens/s of a GPU."""

    @property
    def main(self) -> Served:
        """Deployment that a plan has: the cheapest in time, else the fastest."""
        return self.points.get(IN_TIME) or self.points[FASTEST]

    @property
    def front(self) -> list[Served]:
        """Deployments of which no other gives a user and a GPU more, the fastest for a user first."""
        best, found = 0.0, list[Served]()
        for each in sorted(self.every, key=lambda each: (each.time, -each.gpu_tokens_per_second)):
            if each.gpu_tokens_per_second > best:
                best = each.gpu_tokens_per_second
                found.append(each)
        return found


def resolve(inputs: Inputs, model: Model, h: Hardware) -> Inputs:
    """Return the inputs with lengths and dtypes: of the request, as the model is released, or what hardware allows.

    Raises: ValueError for more tokens than the model takes.
    """
    r, longest, known = inputs.request, model.config.max_seq_len, model.released
    for name in ("context", "prompt"):
        tokens = getattr(r, name) or 1
        require(tokens <= longest, f"{name}={tokens} is longer than the model's max_seq_len={longest}; shorten it")
    context = r.context or min(CONTEXT, longest)
    no_drafts = f"drafts={r.drafts} need multi-token prediction, which {model.name} has not; use drafts=0"
    require(not r.drafts or model.config.n_mtp_layers > 0, no_drafts)
    inputs = inputs.filled("chosen", context=context, prompt=context)
    inputs = inputs.filled(f"[serving] of {model.name}", cache_dtype=known.cache, indexer_dtype=known.indexer)
    able = known.weights if known.weights and set(PRODUCTS[known.weights]) & set(h.peaks) else None
    inputs = inputs.filled("as released", weight_dtype=able)
    plain = "bfloat16" if "bfloat16" in h.peaks else "float32"
    return inputs.filled("chosen", weight_dtype=plain, cache_dtype="bfloat16", indexer_dtype="bfloat16")


def search(s: Service, r: PlanRequest, phase: Phase) -> Deployments:
    """Return all deployments of a phase that a request leaves open.

    Raises: ValueError for numbers that no deployment can have, and for a time that none keeps, with the nearest.
    """
    rejected, every, refused = Counter[str](), list[Served](), ""
    unfit: tuple[float, str] = math.inf, ""
    gpus, tensor = (r.decode_gpus, r.decode_tensor) if phase == "decode" else (r.prefill_gpus, r.prefill_tensor)
    least, most = (gpus, gpus) if gpus else (1, _most_gpus(s, 2))
    bounds = _bound(s, r, _shapes(s, phase, range(least, most + 1), tensor, s.h.node))
    counts = [n for n in gpu_counts(s.h.node, _most_gpus(s, 1), (1, 3)) if n % (tensor or 1) == 0] or [tensor or 1]
    for shape in _shapes(s, phase, [gpus] if gpus else counts, tensor, MOST_TENSOR):
        if said := misfit(shape, s.c, s.h):
            refused = refused or said
            rejected["not divisible"] += 1
            continue
        for held in _candidates(s, r, shape):
            if held.misfit:
                unfit = min(unfit, (held.gpu_memory, held.misfit))
                rejected["more than the memory"] += 1
            else:
                every.append(Served(held))
    limit = (r.ttft or TTFT) if phase == "prefill" else (r.tpot or TPOT) / 1000
    how: dict[str, Any] = {"phase": phase, "limit": limit, "rejected": rejected, "most_gpus": most, **bounds}
    if not every:
        few = f"micro_batches={r.micro_batches} need as many sequences of each GPU; use 1, or more sequences"
        require(bool(unfit[1]), refused or few)
        return Deployments(**how, every=[], points={}, misfit=unfit[1])
    fastest = min(every, key=lambda each: each.time)
    timely = [each for each in every if each.time <= limit]
    rejected["too slow"] = len(every) - len(timely)
    asked = r.ttft if phase == "prefill" else r.tpot
    what = "an output token" if phase == "decode" else f"a prompt of {s.tokens[phase]:,.0f} tokens"
    near = f"the nearest, {fastest.d.words}, takes {human(fastest.time, 's')}"
    require(bool(timely) or asked is None, f"no deployment gives {what} in {human(limit, 's')}; {near}")

    def rate(each: Served) -> float:
        return each.gpu_tokens_per_second

    if r.sequences is None and phase == "decode":
        largest = {replace(each.d, batch=1): each for each in timely}.values()  # batches are in order
        best = max(map(rate, timely), default=0.0)
        timely += [_fuller(each, limit) for each in largest if rate(each) > best / 2]
    points = {IN_TIME: max(timely, key=rate)} if timely else {}
    every += [each for each in points.values() if each not in every]
    points |= {CHEAPEST: max(every, key=rate), FASTEST: fastest}
    if is_v3(s.c, indexer=True) and s.h.networked:
        own, why_not = _own(s, r, phase)
        if own:
            best = max(own, key=lambda each: (each.time <= limit, rate(each)))
            points[OWN] = best if r.sequences or phase == "prefill" else _fuller(best, limit)
        else:
            rejected[f"{OWN}, {why_not}"] = 1
    return Deployments(**how, every=every, points=points, misfit="")


def _most_gpus(s: Service, of_expert: int) -> int:
    """Return the most GPUs of a deployment: a node's, or some for each routed expert."""
    return max(s.h.node, of_expert * s.c.n_routed_experts) if s.m.moe_layers and s.h.networked else s.h.node


def _shapes(s: Service, phase: Phase, counts: Iterable[int], tensor: int | None, most: int) -> Iterator[Deployment]:
    """Yield deployments on some numbers of GPUs, of which up to `most` share sequences; without experts all do."""
    every = [n for n in divisors(s.c.n_heads, most) if n <= s.h.node]
    for gpus in counts:
        shared = [n for n in every if n <= gpus] if s.m.moe_layers else [gpus]
        for each in [tensor] if tensor else shared:
            yield Deployment(phase=phase, gpus=gpus, tensor=each, redundant=-s.c.n_routed_experts % gpus)


def _bound(s: Service, r: PlanRequest, shapes: Iterable[Deployment]) -> Mapping[str, float]:
    """Return the least time, and the most tokens/s of a GPU, of all deployments that fit.

    A larger batch never takes less time nor gives a GPU less, so one sequence and as many as fit decide.
    """
    least, most = math.inf, 0.0
    for shape in shapes:
        if misfit(shape, s.c, s.h):
            continue
        for drafts in _drafts(s, r, shape.phase):
            room = ServingMemory(s, replace(shape, drafts=drafts))
            batches = {1, max(1, int(room.sequences_that_fit))}
            if r.sequences is not None and shape.phase == "decode":
                batches = {r.sequences * shape.gpus}
            held = [ServingMemory(s, replace(room.d, batch=batch)) for batch in batches]
            for each in (Served(one) for one in held if not one.misfit):
                least, most = min(least, each.least_time), max(most, each.most_gpu_tokens_per_second)
    return {"least_time": least, "most": most}


def _drafts(s: Service, r: PlanRequest, phase: Phase) -> Iterable[int]:
    """Return the numbers of drafts to try."""
    if phase == "prefill" or not s.c.n_mtp_layers:
        return [0]
    return range(MOST_DRAFTS + 1) if r.drafts is None else [r.drafts]


def _candidates(s: Service, r: PlanRequest, shape: Deployment) -> Iterator[ServingMemory]:
    """Yield the memory of GPUs with each number of drafts and each batch that fits, or the smallest."""
    for drafts in _drafts(s, r, shape.phase):
        for d in _batches(ServingMemory(s, replace(shape, drafts=drafts)), r):
            yield ServingMemory(s, d)


def _batches(room: ServingMemory, r: PlanRequest) -> Iterator[Deployment]:
    """Yield a deployment with each batch that fits, or the smallest if none does, in one and two micro-batches."""
    d, groups = room.d, room.d.gpus // room.d.tensor
    most = int(room.sequences_that_fit)
    if d.phase == "prefill":
        most = min(most, MOST_PROMPTS * groups)
    sizes = [2**i for i in range(max(most, 1).bit_length())]
    sizes = [n for n in sizes if n <= groups] + [groups * n for n in sizes if groups * n <= most] + [most]
    if r.sequences is not None and d.phase == "decode":
        sizes = [r.sequences * d.gpus]
    for batch in sorted({max(1, n) for n in sizes}):
        for parts in (1, 2) if r.micro_batches is None else (r.micro_batches,):
            if parts == 1 or (d.gpus > 1 and batch >= parts * groups) or (r.micro_batches and room.misfit):
                yield replace(d, batch=batch, micro_batches=parts)


def _fuller(served: Served, limit: float) -> Served:
    """Return a deployment in time with its largest batch in time, below twice the one that it has."""
    groups = served.d.gpus // served.d.tensor
    low, high = served.d.batch // groups, 2 * served.d.batch // groups
    while high - low > 1:
        middle = (low + high) // 2
        held = ServingMemory(served.s, replace(served.d, batch=middle * groups))
        more = Served(held)
        if held.misfit or more.time > limit:
            high = middle
        else:
            low, served = middle, more
    return served


def _own(s: Service, r: PlanRequest, phase: Phase) -> tuple[list[Served], str]:
    """Return DeepSeek's own deployment with each batch and number of drafts that fits, or why it cannot be."""
    d = Deployment(**presets()["deepseek-v3"][phase], phase=phase, label="V3 report, section 3.4")
    asked = r.given((f"{phase}_gpus", f"{phase}_tensor"))
    if any(value != getattr(d, name.removeprefix(f"{phase}_")) for name, value in asked.items()):
        return [], "of other sizes than asked"
    if said := misfit(d, s.c, s.h):
        return [], said
    return [Served(held) for held in _candidates(s, r, d) if not held.misfit], "which does not fit"
