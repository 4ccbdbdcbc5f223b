"""Binding: which resource limits a workload on a machine, by how much, and which one is next.

A step computes, moves bytes between memory and the units that compute, sends bytes to other GPUs, and waits for data.
Where all of these overlap, a step takes as long as the slowest one, which binds. Making another one faster gains
nothing. Making the binding one faster gains at most its ratio to the second: there the second begins to bind.

The parts of a training step run one after the other, and some hide others: rows of experts wait where computing no
longer hides them. So the step is computed again without each part. What binds is the part whose absence gains most.

Worked example: 14 ms on links, 7 ms in memory, 2 ms of compute. Links bind, 2 times the memory's time. Links that are
three times as fast give a step of 7 ms, not 4.7, since memory binds then.

Data, Algorithm and Machine are three words for what to change, and two vocabularies disagree on them:

    resource      article      textbook     why they differ
    waiting       Data         Data         both: the data do not arrive
    memory        Machine      Data         article: the bandwidth of the hardware is the limit;
                                            textbook: moving bytes over a bandwidth is the data term of the iron law
    links         Machine      Machine      both: communication belongs to the machine, in a node and between nodes
    compute       Algorithm    Machine      article: the algorithm asks for this many operations;
                                            textbook: an accelerator that is saturated is at the machine's limit
    latency       Machine      Algorithm    article: the hardware is the limit;
                                            textbook: operations that wait for each other are the algorithm's depth

Neither is wrong. The article asks who owns the limit, the textbook asks which term of the iron law is largest:
time = bytes / bandwidth + operations / (peak * utilisation) + latency. A verdict names its resource, so that a reader
of either vocabulary can act: the resource is measured, the word is a convention.

Source of the textbook's words: Machine Learning Systems (Harvard, CS249r), appendix "The D-A-M taxonomy".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations

from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.quantity import Count, Seconds, largest, smallest


class Resource(Enum):
    """Resource that a step can wait for."""

    WAITING = "waiting for data"
    MEMORY = "memory traffic"
    LINKS_BETWEEN = "links between nodes"
    LINKS_WITHIN = "links within a node"
    COMPUTE = "compute"
    LATENCY = "latency"


class Axis(Enum):
    """Word of a verdict."""

    DATA = "Data"
    ALGORITHM = "Algorithm"
    MACHINE = "Machine"


class Vocabulary(Enum):
    """Convention by which a resource gets its word."""

    ARTICLE = "article"
    TEXTBOOK = "textbook"


AXES = {
    Vocabulary.ARTICLE: {
        Resource.WAITING: Axis.DATA,
        Resource.MEMORY: Axis.MACHINE,
        Resource.LINKS_BETWEEN: Axis.MACHINE,
        Resource.LINKS_WITHIN: Axis.MACHINE,
        Resource.COMPUTE: Axis.ALGORITHM,
        Resource.LATENCY: Axis.MACHINE,
    },
    Vocabulary.TEXTBOOK: {
        Resource.WAITING: Axis.DATA,
        Resource.MEMORY: Axis.DATA,
        Resource.LINKS_BETWEEN: Axis.MACHINE,
        Resource.LINKS_WITHIN: Axis.MACHINE,
        Resource.COMPUTE: Axis.MACHINE,
        Resource.LATENCY: Axis.ALGORITHM,
    },
}
"""Word of each resource in each vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """Time that a step needs one resource."""

    resource: Resource
    time: Seconds
    """Named time, such as decode_memory_time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding(Figures):
    """Resource that binds, and the one that binds next."""

    first: Demand
    """Largest demand; of parts one after the other, the one without which a step is fastest."""
    second: Demand | None
    """Second of them; None where there is only one."""
    ratio: Count | None
    """How many times faster a step is at most if the first took no time: where parts overlap, first over second."""

    def axis(self, vocabulary: Vocabulary) -> Axis:
        """Return the word for the binding resource."""
        return AXES[vocabulary][self.first.resource]


def binding(demands: Sequence[Demand], name: str) -> Binding:
    """Return which of some demands binds; the first one of equal demands.

    Args:
        name: prefix of the ratio's name, such as "decode_".

    Raises: ValueError where no demand takes any time.
    """
    real = sorted((d for d in demands if d.time.value > 0), key=lambda demand: -demand.time.value)
    if not real:
        raise ValueError(f"{len(demands)} demands and no time in them; give at least one time above 0 s")
    if len(real) == 1:
        return Binding(first=real[0], second=None, ratio=None)
    times = [demand.time for demand in real]
    # not first over second: with other inputs other demands are the largest two
    smaller = [smallest(a, b) for a, b in combinations(times, 2)]
    second = largest(*smaller) if len(smaller) > 1 else smaller[0]
    ratio = (largest(*times) / second).named(
        f"{name}binding_ratio", "Largest time over the second largest", "the larger of a pair, and the smaller"
    )
    return Binding(first=real[0], second=real[1], ratio=ratio)


def serial_binding(step: Seconds, without: Sequence[Demand], name: str) -> Binding:
    """Return which part binds of a step whose parts run one after the other, from its time without each resource."""
    real = sorted(without, key=lambda left: left.time.value)
    ratio = (step / smallest(*(left.time for left in without))).named(
        f"{name}binding_ratio", "Speedup if what binds took no time", "the step computed again without each resource"
    )
    return Binding(first=real[0], second=real[1] if real[1].time < step else None, ratio=ratio)
