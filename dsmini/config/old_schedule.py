"""The learning-rate schedule in the keys of version 0.1.0, as in old files, run folders and commands.

    warmup | constant | decay: cosine or linear, down to lr_final | final, at lr_final | last, at lr_last

They become the phases of lr_schedule, with the same learning rate in every step.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsmini.config.fields import build, check_types, require
from dsmini.config.lr_schedule import NUMBER, number
from dsmini.reading import read_toml

LIKE_OLD = re.compile(
    rf"(?:warmup (?P<warmup>{NUMBER}), )?(?:constant (?P<constant>{NUMBER}), )?"
    rf"(?P<decay>cosine|linear) to (?P<lr_final>{NUMBER})"
    rf"(?:, constant (?P<final>{NUMBER}))?(?:, constant (?P<last>{NUMBER}) at (?P<lr_last>{NUMBER}))?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class OldSchedule:
    """Schedule of the learning rates in five named phases."""

    warmup: float = 0.0
    """Share of the steps in which the learning rates rise linearly from 0."""
    constant: float = 0.0
    """Share of the steps at the peak, after the warm-up."""
    decay: Literal["cosine", "linear"] = "cosine"
    """Shape of the decay to lr_final; it takes the remaining steps."""
    lr_final: float = 0.1
    """Learning rate after the decay, as a share of the peak."""
    final: float = 0.0
    """Share of the steps at lr_final, after the decay."""
    lr_last: float = 0.1
    """Learning rate of the last steps, as a share of the peak."""
    last: float = 0.0
    """Share of the steps at lr_last, at the end."""

    def __post_init__(self) -> None:
        check_types(self, "train.")
        for name in ("warmup", "constant", "final", "last", "lr_final", "lr_last"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"train.{name}={value} is not between 0 and 1; use a share of one")
        taken = self.warmup + self.constant + self.final + self.last
        require(
            taken <= 1 + 1e-9,
            f"train.warmup, constant, final and last are {taken:g} of the steps together; want 1 or less, "
            "what is left is the decay",
        )

    @classmethod
    def from_phases(cls, lr_schedule: tuple[str, ...], key: str) -> "OldSchedule":
        """Return the old keys of a schedule.

        Args:
            key: the key to change, for the error.

        Raises: ValueError for a schedule that the old keys cannot express.
        """
        written = ", ".join(lr_schedule)
        match = LIKE_OLD.fullmatch(written)
        if match is None:
            raise ValueError(f"{key} has no place in train.lr_schedule={written!r}; write the phases of lr_schedule")
        found = {name: text for name, text in match.groupdict().items() if text is not None}
        return cls(**{name: text if name == "decay" else float(text) for name, text in found.items()})  # pyright: ignore[reportArgumentType]

    def phases(self) -> tuple[str, ...]:
        """Return the phases of lr_schedule that have the same learning rates; those without a step are left out."""
        return (
            *([f"warmup {number(self.warmup)}"] if self.warmup else []),
            *([f"constant {number(self.constant)}"] if self.constant else []),
            f"{self.decay} to {number(self.lr_final)}",
            *([f"constant {number(self.final)}"] if self.final else []),
            *([f"constant {number(self.last)} at {number(self.lr_last)}"] if self.last else []),
        )


KEYS = tuple(f.name for f in dataclasses.fields(OldSchedule))


def with_phases(train: Any, base: tuple[str, ...], source: str) -> Any:
    """Return the keys of a file's section train, with lr_schedule in the place of the old keys.

    Args:
        base: the schedule with the phases for which the file has no key.
        source: the name of the file, for errors.

    Raises: ValueError for old keys with a wrong value, next to lr_schedule, or on a schedule they do not fit.
    """
    if not isinstance(train, dict) or not train.keys() & set(KEYS):
        return train
    old = {key: train[key] for key in KEYS if key in train}
    listed = ", ".join(f"train.{key}" for key in old)
    if "lr_schedule" in train:
        raise ValueError(f"{source} has both {listed} and train.lr_schedule; leave out {listed}, the old spelling")
    complete = old.keys() == set(KEYS)
    before = OldSchedule() if complete else OldSchedule.from_phases(base, f"{listed} of {source}")
    new = build(OldSchedule, old, source, "train.", before)
    return {key: train[key] for key in train.keys() - old.keys()} | {"lr_schedule": list(new.phases())}


def without_old_flags(args: Sequence[str], base: tuple[str, ...], files: Sequence[Path] = ()) -> list[str]:
    """Return a command line with --train.lr-schedule in the place of old flags such as --train.warmup 0.1.

    Args:
        base: the schedule that the flags change.
        files: the files that base was read from; a later one overrules. With last = 0 their lr_last is in no phase,
            and --train.last needs it.

    Raises: ValueError for old flags with a wrong value, next to --train.lr-schedule, or on a schedule they do not fit.
    """
    old, rest, words = {}, [], list(args)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        key = flag.removeprefix("--train.").replace("-", "_")
        if not flag.startswith("--train.") or key not in KEYS:
            rest.append(flag + equals + value)
            continue
        if not equals:
            require(len(words) > 0, f"{flag} needs a value")
            value = words.pop(0)
        old[key] = value if key == "decay" else _float(value)
    if not old:
        return rest
    if "last" in old and "lr_last" not in old:
        for file in files:
            train = read_toml(file).get("train", {})
            old |= {"lr_last": train["lr_last"]} if "lr_last" in train else {}
    if any(re.match(r"--train\.lr[-_]schedule\b", word) for word in rest):
        old["lr_schedule"] = base
    changed = with_phases(old, base, "the command line")
    return [*rest, "--train.lr-schedule", *changed["lr_schedule"]]


def _float(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
