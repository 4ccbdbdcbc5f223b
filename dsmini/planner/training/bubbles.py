"""Bubbles of pipeline schedules: the time that a GPU waits in an optimizer step.

    1F1B        (PP - 1) (F + B)
    ZB1P        (PP - 1) (F + B - 2 W)
    DualPipe    (PP / 2 - 1) (F&B + B - 3 W)      twice the parameters, PP + 1 activations in flight

F is the time of a micro-batch's forward through a stage, B of its whole backward, W of the part of backward that makes
the gradients of weights, F&B of a forward and a backward at the same time, which hide each other's communication.

With M micro-batches a GPU works M (F + B) in a step of 1F1B and ZB1P, and PP (F + B) + (M - PP) F&B in the middle of
DualPipe. On DualPipe's first GPU, with H = PP / 2, 3 H - 1 forwards and 3 H - 1 backwards run alone, 2 H - 1 of the
latter with W apart, and M - (3 H - 1) pairs F&B.

Worked example, DeepSeek-V3 with PP = 16 and M = 120, by the table's times and the first GPU's counts: 97 pairs in
13.95 s; 15 W in 0.48 s; 23 backwards, 15 of them without W, in 1.99 s. So F&B = 143.8 ms, W = 32 ms,
B = 2.47 s / 23 = 107.4 ms, and the bubble is 7 * (143.8 + 107.4 - 96) ms = 1.09 s. The table prints 2.06 s. The rest is
open: it may be stages of unequal work, or waiting for other nodes. The table prints forwards of 1.13 s and an optimizer
of 0.29 s too; all six times are 19.90 s, and the step 19.926 s.

Source: DeepSeek-V3 report, table 2; "Insights into DeepSeek-V3" (arXiv 2505.09343), table 4; the released DualPipe.
"""

from dataclasses import dataclass

from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.quantity import COUNT, SECONDS, Count, Seconds
from dsmini.planner.training.layout import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkTimes:
    """Times of one micro-batch in one stage."""

    forward: Seconds
    backward: Seconds
    """Whole backward: gradients of inputs and of weights."""
    weights: Seconds
    """Part of backward that makes the gradients of weights."""
    both: Seconds
    """A forward and a backward at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramCounts:
    """Number of chunks that DualPipe's first GPU runs in a step."""

    alone: Count
    """Forwards that run alone; as many backwards do."""
    weights: Count
    """Backwards that are split, and gradients of weights that run alone."""
    both: Count
    """Pairs of a forward and a backward."""


def bubble_seconds(schedule: Schedule, pipeline: Count, t: ChunkTimes) -> Seconds:
    """Return the time that a GPU waits in a step."""
    one = COUNT(1)
    if schedule == "dualpipe":
        return (pipeline / 2 - one) * (t.both + t.backward - 3 * t.weights)
    if schedule == "zb1p":
        return (pipeline - one) * (t.forward + t.backward - 2 * t.weights)
    return (pipeline - one) * (t.forward + t.backward)


def dualpipe_counts(pipeline: Count, micro_batches: Count) -> ProgramCounts:
    """Return how many chunks of each kind DualPipe's first GPU runs; micro_batches are at least 2 * pipeline."""
    one = COUNT(1)
    alone = 3 * pipeline / 2 - one
    return ProgramCounts(alone=alone, weights=pipeline - one, both=micro_batches - alone)


def schedule_seconds(schedule: Schedule, pipeline: Count, micro_batches: Count, t: ChunkTimes) -> Seconds:
    """Return the time of a step's forwards and backwards on a GPU, without the bubble."""
    alone = t.forward + t.backward
    if schedule == "dualpipe":
        return pipeline * alone + (micro_batches - pipeline) * t.both
    return micro_batches * alone


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedBubble(Figures):
    """DeepSeek-V3's bubble from the times of INS, table 4, next to the printed one."""

    table_pairs: Seconds
    table_backward: Seconds
    table_weights: Seconds
    table_bubble: Seconds
    pair: Seconds
    """Time of F&B."""
    backward: Seconds
    weights: Seconds
    bubble: Seconds
    residual: Seconds
    """Printed bubble without the predicted one: open."""


def published_bubble() -> PublishedBubble:
    """Return the prediction of DualPipe's formula for DeepSeek-V3's training, and what it leaves open."""
    source = "INS, table 4"

    def printed(value: float, name: str, title: str) -> Seconds:
        return SECONDS(value, name, title, source)

    pipeline = COUNT(16, "table_pipeline", "Pipeline stages of the table's run", "V3, section 3.2")
    number = COUNT(120, "table_micro_batches", "Micro-batches of the table's run", "V3, section 4.2: 15360 / 128")
    pairs = printed(13.95, "table_pairs", "Time of the pairs of a step (1F1B)")
    alone = printed(1.99, "table_backward", "Time of the backwards alone, without split W (1B)")
    weights = printed(0.48, "table_weights", "Time of the split W (1W)")
    bubble = printed(2.06, "table_bubble", "Bubble of a step")
    counts = dualpipe_counts(pipeline, number)
    times = ChunkTimes(
        forward=SECONDS(0),
        backward=((alone + weights) / counts.alone).named("published_backward", "Backward of a micro-batch", source),
        weights=(weights / counts.weights).named("published_weights", "Gradients of weights, a micro-batch", source),
        both=(pairs / counts.both).named("published_pair", "Forward with backward", source),
    )
    found = bubble_seconds("dualpipe", pipeline, times)
    found = found.named("published_bubble", "Bubble by DualPipe's formula", "V3, table 2")
    return PublishedBubble(
        table_pairs=pairs,
        table_backward=alone,
        table_weights=weights,
        table_bubble=bubble,
        pair=times.both,
        backward=times.backward,
        weights=times.weights,
        bubble=found,
        residual=(bubble - found).named("bubble_residual", "Printed bubble that the formula leaves open", source),
    )
