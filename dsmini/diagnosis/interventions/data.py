"""Data: nothing waits for the next batch."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from dsmini.diagnosis.interventions.intervention import Intervention, Step
from dsmini.diagnosis.subject import Subject
from dsmini.planner.binding import Axis


@contextmanager
def replay(subject: Subject) -> Iterator[Step]:
    """Let every step take the same batch, which is in memory."""
    batch = subject.one_batch

    def take(_requests: object) -> tuple[Tensor, Tensor]:
        return batch

    with subject.loader(take):
        yield lambda _base: subject.step().seconds


REPLAY = Intervention(
    name="replay",
    axis=Axis.DATA,
    words="every step takes the same batch, which is in memory",
    action="Prepare batches earlier or faster: raise data.workers, read plain files, tokenize once.",
    why_not=lambda _: None,
    apply=replay,
)
