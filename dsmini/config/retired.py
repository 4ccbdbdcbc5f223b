"""Keys that a version dropped. The run folders, checkpoints and config files that have them are read all the same.

A key at its old default is left out with a note, since all that is done now is what it stood for. Another value would
be another run, so it is refused, by name and with what to use instead.
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsmini.reading import brief


class Retired(NamedTuple):
    """A key that was dropped."""

    default: Any
    """Its old default, as TOML has it: "none" for None."""
    fix: str
    """Advice for another value, as "use train.lr"."""


RETIRED: Mapping[str, Mapping[str, Retired]] = {}
"""The keys by the class of their config, such as {"TrainConfig": {"warmup": Retired(0, "use train.lr_schedule")}}."""


def without_retired(kind: type, values: dict[str, Any], source: str, prefix: str) -> dict[str, Any]:
    """Return the parsed values of a config without the keys that were dropped.

    Raises: ValueError for one that is not at its old default.
    """
    retired = RETIRED.get(kind.__name__, {})
    for key in [key for key in values if key in retired]:
        default, fix = retired[key]
        name = f"{source} has {prefix}{key}={brief(values[key])}"
        if values[key] != default or isinstance(values[key], bool) != isinstance(default, bool):  # True == 1
            raise ValueError(f"{name}, which this version has no longer; {fix}, or read it with an earlier version")
        warnings.warn(f"{name}, which this version has no longer: it does what that value says", stacklevel=3)
    return {key: value for key, value in values.items() if key not in retired}
