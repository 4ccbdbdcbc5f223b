"""Algorithm: balanced routing, and no routing at all.

Without routing, each mixture of experts is a dense feed-forward with as many active parameters. Both do the same
multiplications, so the difference is what routing costs: choosing, sorting, many small products. The optimizer is left
out, as it moves all experts, also those that a token does not visit.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from dsmini.config import ModelConfig
from dsmini.diagnosis.interventions.data import replay
from dsmini.diagnosis.interventions.intervention import Intervention, Step
from dsmini.diagnosis.subject import Subject
from dsmini.nn import FeedForward, Gate, Routing
from dsmini.planner.binding import Axis


@contextmanager
def uniform_routing(subject: Subject) -> Iterator[Step]:
    """Let all experts get equally many tokens. Everything else, the gate's own work too, stays."""
    gates = subject.trainer.model.gates()
    for gate in gates:
        gate.forward = partial(uniformly, gate, gate.forward)
    try:
        yield lambda _base: subject.step().seconds
    finally:
        for gate in gates:
            del gate.forward


def uniformly(gate: Gate, forward: object, x: Tensor) -> Routing:
    """Route as a gate does, but to all experts in turn."""
    chosen: Routing = forward(x)  # pyright: ignore[reportCallIssue]
    n, k = chosen.indices.shape
    e = chosen.scores.shape[1]
    indices = (torch.arange(n * k, device=x.device) % e).view(n, k)
    weights = chosen.scores.gather(1, indices)
    if gate.options["norm_topk_prob"]:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    counts = torch.bincount(indices.flatten(), minlength=e)
    return Routing(indices, weights * gate.options["route_scale"], chosen.scores, counts)


def dense_twin(config: ModelConfig, total: bool) -> FeedForward:
    """Make the dense feed-forward that stands in for a mixture of experts.

    Args:
        total: as many parameters as all experts have, instead of those that a token visits.
    """
    experts = config.n_routed_experts if total else config.n_activated_experts
    return FeedForward(config, inter_dim=(experts + config.n_shared_experts) * config.moe_inter_dim)


@contextmanager
def dense(subject: Subject, total: bool = False) -> Iterator[Step]:
    """Let a dense feed-forward stand in for each mixture of experts, forward and backward. Args: as of dense_twin."""

    def step(base: float) -> float:
        with_routing, without = pair()
        # the pair may have had a slower moment than the plain step, of which it is a part
        return base - min(base, with_routing) * (1 - without / with_routing)

    with dense_pair(subject, total) as pair:
        yield step


@contextmanager
def dense_pair(subject: Subject, total: bool = False) -> Iterator[Callable[[], tuple[float, float]]]:
    """Yield what takes a forward and backward with experts and one with dense twins, and returns both seconds."""
    blocks = list(subject.blocks())
    routed = [block.ffn for block in blocks]
    plain = [dense_twin(subject.config.model, total).to(subject.trainer.device) for _ in blocks]

    def put(parts: list[torch.nn.Module]) -> None:
        for block, part in zip(blocks, parts, strict=True):
            block.ffn = part

    def pair() -> tuple[float, float]:
        with_routing = subject.forward_backward()
        put([*plain])
        try:
            without = subject.forward_backward()
            for part in plain:
                part.zero_grad(set_to_none=True)
        finally:
            put([*routed])
        return with_routing, without

    with ExitStack() as stack:
        stack.enter_context(replay(subject))  # neither side waits
        yield pair


def no_experts(subject: Subject) -> str | None:
    """Return why experts cannot be replaced; None if they can."""
    if subject.config.train.compile:
        return "the model is compiled; run without --train.compile"
    return None if subject.trainer.model.gates() else "the model has no routed experts"


UNIFORM = Intervention(
    name="uniform_routing",
    axis=Axis.ALGORITHM,
    words="all experts get equally many tokens",
    action="Balance the experts: raise train.bias_speed, or the weight of the balance loss.",
    why_not=no_experts,
    apply=uniform_routing,
)
DENSE = Intervention(
    name="dense_active",
    axis=Axis.ALGORITHM,
    words="a dense feed-forward with as many active parameters stands in for the experts",
    action="Make fewer and wider experts, or larger batches, so that each product has more rows.",
    why_not=no_experts,
    apply=dense,
)
