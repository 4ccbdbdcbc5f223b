"""Search for the layouts of a setup: all that fit its GPUs, with the choices that the user made held fixed."""

from collections.abc import Callable
from typing import Any

from dsmini.planner.setup import Setup
from dsmini.planner.training.layout_table import Choices
from dsmini.planner.training.search import Candidate, search


def search_layouts(
    setup: Setup, given: dict[str, Any], on_part: Callable[[float, str], None], most: int = 12
) -> list[Candidate]:
    """Return the fastest layouts that fit, fastest first, with the given choices, such as precision.

    Optimizer states count as AdamW's.

    Args:
        given: fields of a layout that the user chose. Without a number of GPUs it is the setup's.

    Raises: ValueError if no layout fits, with what would.
    """
    every, layout = Choices(), setup.layout.layout

    def of(name: str, all_: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[name],) if name in given else all_

    choices = Choices(
        schedules=of("schedule", every.schedules),
        zeros=of("zero", every.zeros),
        recomputes=of("recompute", every.recomputes),
        precisions=of("precision", (layout.precision,) if layout.precision == "fp32" else every.precisions),
        micro_batches=of("micro_batch", every.micro_batches),
        moments=layout.moments,
    )
    gpus = layout.gpus
    return search(
        setup.m,
        setup.hardware,
        setup.workload,
        gpus,
        choices=choices,
        assumptions=setup.assumptions,
        most=most,
        on_part=on_part,
    )
