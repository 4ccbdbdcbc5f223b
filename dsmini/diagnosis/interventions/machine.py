"""Machine: all cores, and the dtype that this machine multiplies fastest."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dsmini.diagnosis.interventions.intervention import Intervention, Step, StepSubject, Timed
from dsmini.diagnosis.subject import Subject
from dsmini.machine import pick_dtype
from dsmini.planner.binding import Axis


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def all_threads(subject: StepSubject[Timed]) -> Iterator[Step]:
    """Let products run on all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        yield lambda _base: subject.step().seconds
    finally:
        torch.set_num_threads(before)


@contextmanager
def fastest_dtype(subject: Subject) -> Iterator[Step]:
    """Let products run in the dtype that `auto` picks. Masters stay FP32."""
    model = subject.trainer.model
    before = model.compute_dtype
    model.compute_dtype = pick_dtype("auto", subject.trainer.device)
    try:
        yield lambda _base: subject.step().seconds
    finally:
        model.compute_dtype = before


def _threads_are_all(subject: StepSubject[Timed]) -> str | None:
    if subject.device.type != "cpu":
        return f"products run on {subject.device}"
    used = torch.get_num_threads()
    return f"all {used} cores are used already" if used >= cores() else None


def _dtype_is_fastest(subject: Subject) -> str | None:
    if subject.config.train.compile:
        return "the model is compiled; run without --train.compile"
    fastest = str(pick_dtype("auto", subject.trainer.device)).removeprefix("torch.")
    return f"{fastest} is the fastest dtype here, and used" if subject.config.train.dtype == fastest else None


THREADS = Intervention(
    name="all_threads",
    axis=Axis.MACHINE,
    words="products run on all cores",
    action="Leave train.threads out, so that all cores are used.",
    why_not=_threads_are_all,
    apply=all_threads,
)
DTYPE = Intervention(
    name="fastest_dtype",
    axis=Axis.MACHINE,
    words="products run in the dtype that this machine multiplies fastest",
    action="Leave train.dtype at auto.",
    why_not=_dtype_is_fastest,
    apply=fastest_dtype,
)
