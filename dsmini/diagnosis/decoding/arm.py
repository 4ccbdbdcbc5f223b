"""An arm: other decoding steps at the same point, to be priced before and timed in turns with plain ones.

An alternative says what an arm's time stands for. Kernels serve plain steps, and not every arm. Then two arms that both
run by modules are compared, and a plain step is taken to change by the same ratio:

    T_X = T(instead)                      both by kernels
    T_X = T * T(instead) / T(of)          both arms by modules
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dsmini.diagnosis.decoding.steps import Maker, Point, Run, kernel_steps
from dsmini.measure.workloads import StepDtype
from dsmini.nn import Transformer


def same_model(model: Transformer) -> Transformer:
    """Return the model as it is."""
    return model


def same_point(point: Point) -> Point:
    """Return the point as it is."""
    return point


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Steps of a variant of a model."""

    change: Callable[[Transformer], Transformer] = same_model
    make: Maker = kernel_steps
    point: Callable[[Point], Point] = same_point
    dtype: StepDtype | None = None
    """Dtype in which the variant holds its weights; None: the model's."""
    keeps_attention: bool = False
    """Attention is that of plain steps, as long as the cache has the same dtype."""
    rates_of: Literal["decode", "prefill"] = "decode"
    """Work whose rates price it: what runs by modules is priced as in prefill."""

    def steps(self, model: Transformer, point: Point) -> Run:
        """Return the steps of this model's variant."""
        return self.make(self.change(model), self.point(point))


PLAIN = Arm()


@dataclass(frozen=True, kw_only=True)
class Narrow:
    """An arm's step of a narrow model, which predictions rest on."""

    beyond: float
    """Seconds beyond its price, after few cached tokens."""
    slope: float
    """Seconds of one more cached token of each sequence."""


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Steps whose time stands for that of a plain step with one thing made free."""

    instead: Arm
    of: Arm | None = None
    """Arm that runs in the same way and does what plain steps do; None: plain steps."""

    def seconds(self, base: float, timed: Callable[[Arm], float], tokens: float = 1.0) -> float:
        """Return the seconds of a token with the thing made free.

        Args:
            base: seconds of a plain step.
            timed: returns the seconds of an arm's step, measured or predicted.
            tokens: tokens of a sequence that the arm's step makes.
        """
        if self.of is None:
            return timed(self.instead) / tokens
        return base * timed(self.instead) / timed(self.of)
