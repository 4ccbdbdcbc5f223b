"""Formulas evaluated for many values of their inputs at once.

    evaluate_many([step, memory], {"pipeline": array([1, 2, 4]), "tensor": array([1, 1, 2])})

returns for each figure an array of its values, one for each row of the inputs. A figure holds its own formula, so a
search over thousands of layouts builds a plan once for each formula, and cannot differ from the plans that it finds.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmini.planner.quantities.formula import walk
from dsmini.planner.quantities.quantity import Anything

Values = npt.NDArray[np.float64]


def _largest(*x: Values) -> Values:
    return functools.reduce(np.maximum, x)


def _smallest(*x: Values) -> Values:
    return functools.reduce(np.minimum, x)


OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "+": lambda *x: sum(x),
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "max": _largest,
    "min": _smallest,
    "ceil": np.ceil,
    "floor": np.floor,
    "**": np.power,
    "exp": np.exp,
    "sqrt": np.sqrt,
    "name": lambda a: a,
}
"""Operations of quantities on arrays."""


def evaluate_many(figures: Sequence[Anything], changed: Mapping[str, Values]) -> list[Values]:
    """Return the values of some figures for rows of values of some inputs.

    Args:
        changed: arrays of one length by the name of an input.
    """
    (length,) = {len(values) for values in changed.values()}
    known: dict[int, Any] = {}
    for node in walk(*figures):
        if node.op in OPERATIONS:
            known[id(node)] = OPERATIONS[node.op](*[known[id(arg)] for arg in node.args])
        else:
            known[id(node)] = changed.get(node.name, node.value) if node.name else node.value
    return [np.broadcast_to(np.asarray(known[id(figure)], dtype=np.float64), (length,)) for figure in figures]
