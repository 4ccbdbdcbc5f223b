"""The changes that a run may make when it resumes (--resume), or a new run to the weights it starts from (--init)."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from dsmini.config import ModelConfig, RunConfig
from dsmini.config.fields import Effect, plain


class Change(NamedTuple):
    """A key with another value."""

    key: str
    """Name such as train.lr."""
    before: Any
    after: Any
    effect: Effect
    """Effect on a run that resumes."""

    def __str__(self) -> str:
        return f"{self.key} ({plain(self.before)} -> {plain(self.after)})"


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[Change]:
    """Yield the keys that differ in two configs, those of inner configs included."""
    for f in dataclasses.fields(RunConfig if isinstance(old, RunConfig) else old):
        before, after = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(before):
            yield from differences(before, after, f"{f.name}.")
        elif before != after:
            begins = None in (before, after) and f.metadata.get("none_stays", False)
            same = begins or isinstance(old, ModelConfig)  # another model is another run
            yield Change(prefix + f.name, before, after, "refused" if same else f.metadata.get("resume", "recipe"))


def check_resume(old: RunConfig, new: RunConfig) -> list[str]:
    """Return in lines what a resumed run does differently from here on; none for an unchanged config.

    Raises: ValueError naming every key that may not change, and why.
    """
    _refuse_missing_indexers(old.model, new.model, str(old.out))
    changes = list(differences(old, new))
    if refused := [str(change) for change in changes if change.effect == "refused"]:
        raise ValueError(
            f"a run cannot be resumed with another {', '.join(refused)}: its weights, data order or optimizer "
            f"state would not fit what it did before; leave that as it was, or start a new run from its weights with "
            f"--init {old.out}"
        )
    lines = [f"{change.key}: {plain(change.before)} -> {plain(change.after)}" for change in changes]
    if rounding := [change.key for change in changes if change.effect == "rounding"]:
        lines.append(f"with another {', '.join(rounding)} the result is no longer bit-identical to an unstopped run's")
    if recipe := [change.key for change in changes if change.effect == "recipe"]:
        lines.append(f"with another {', '.join(recipe)} the schedule changes from here on")
    return lines


def check_init(old: ModelConfig, new: ModelConfig, source: str) -> None:
    """Refuse a model that the weights of another do not fit, by its keys."""
    _refuse_missing_indexers(old, new, source)
    shapes = {f.name for f in dataclasses.fields(ModelConfig) if f.metadata.get("shapes")}
    changed = [change for change in differences(old, new) if change.key in shapes]
    if changed:
        got = [f"model.{change.key}={plain(change.after)} (there {plain(change.before)})" for change in changed]
        raise ValueError(
            f"the weights of {source} do not fit {', '.join(got)}; leave out what changes shapes. The context may "
            "change: max_seq_len, original_seq_len, rope_theta, rope_factor, beta_fast, beta_slow, mscale and "
            "mscale_all_dim"
        )


def _refuse_missing_indexers(old: ModelConfig, new: ModelConfig, source: str) -> None:
    """Refuse sparse attention with the weights of dense attention."""
    if old.attention == "mla" and new.attention == "dsa":
        raise ValueError(
            f"{source} has no indexers, which model.attention='dsa' needs; give it some with python -m dsmini.convert "
            f"{source} OUT --dsa, and start a new run from that with --init OUT"
        )
