"""The origin of a run: nothing, another run's weights (--init), or where it stopped (--resume).

The origin has the values that the command line may change, and it says which of the changes it allows.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsmini.checkpoint.run_folder import run_config, tokenizer_file
from dsmini.checkpoint.trained_model import model_checkpoint
from dsmini.checkpoint.training_state import Checkpoint
from dsmini.config import RunConfig
from dsmini.training.changes import check_init, check_resume


@dataclass(frozen=True, kw_only=True)
class RunOrigin:
    """The beginning of a run, before the flags of the command line."""

    config: RunConfig
    """The values for what no flag sets: those of the file, where it has none those of the run that is named, else the
    defaults. Not resolved: "auto" may be in it, and no folder."""
    name: str = "toy"
    """Name in a new run's folder, runs/NAME-001."""
    resume: Path | None = None
    """The run to go on with."""
    init: Path | None = None
    """The run or checkpoint whose weights a new run starts from, as it was named."""
    weights: Checkpoint | None = None
    """Its checkpoint."""
    before: RunConfig | None = None
    """The config of the run to go on with."""

    def accept(self, config: RunConfig) -> RunConfig:
        """Return the config that this origin allows, after all flags.

        Raises: ValueError for what a resumed run or other weights do not allow.
        """
        if self.resume is not None:
            assert self.before is not None
            config = _as_before(config, self.before)
            check_resume(self.before, config)
            _check_tokenizer(self.resume, self.before, config)
        elif self.weights is not None:
            check_init(self.weights.config.model, config.model, str(self.init))
        return config


def find_origin(file: Path | None, resume: Path | None, init: Path | None, say: Callable[[str], None]) -> RunOrigin:
    """Find where a run comes from.

    Args:
        file: the config file, whose values go before those of the run that is named.
        say: told about each damaged checkpoint that is passed over.

    Raises: ValueError for what cannot go together, or is no run.
    """
    if resume and init:
        raise ValueError("--resume goes on with a run, --init starts a new one from its weights; use one of them")
    if resume:
        origin = _origin_of_stopped(resume)
    elif init:
        weights = model_checkpoint(init, say=say)
        config = RunConfig(model=weights.config.model, data=weights.config.data)
        name = re.sub(r"-\d+$", "", weights.folder.resolve().parent.parent.name)
        origin = RunOrigin(config=config, name=name, init=init, weights=weights)
    else:
        origin = RunOrigin(config=RunConfig())
    if file is None:
        return origin
    return dataclasses.replace(origin, config=RunConfig.from_file(file, origin.config), name=file.stem)


def _origin_of_stopped(run: Path) -> RunOrigin:
    if run.resolve().parent.name == "checkpoints":
        whole = run.resolve().parent.parent
        raise ValueError(
            f"{run} is a checkpoint, a run goes on from its last one: use --resume {whole}, or start a new run from "
            f"this one's weights with --init {run}"
        )
    before = dataclasses.replace(run_config(run), out=run)
    return RunOrigin(config=before, resume=run, before=before)


def _as_before(config: RunConfig, old: RunConfig) -> RunConfig:
    """Return the config with "auto" replaced by what the run has used so far, and with absolute paths to compare."""
    t, before = config.train, old.train
    train = dataclasses.replace(
        t,
        device=before.device if t.device == "auto" else t.device,
        dtype=before.dtype if t.dtype == "auto" else t.dtype,
        threads=t.threads or before.threads,
    )
    return dataclasses.replace(config, train=train, data=absolute(config).data)


def absolute(config: RunConfig) -> RunConfig:
    """Return the config with absolute paths of the text and the tokenizer."""
    path, tokenizer = (given and given.resolve() for given in (config.data.path, config.data.tokenizer))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path, tokenizer=tokenizer))


def _check_tokenizer(run: Path, old: RunConfig, config: RunConfig) -> None:
    """Refuse another tokenizer than the run's own, which is the one that is used."""
    own, given = tokenizer_file(run, config), config.data.tokenizer
    if own is None or given is None or given == old.data.tokenizer:
        return
    if not given.is_file():
        raise ValueError(f"there is no file {given}; leave --data.tokenizer out: {own} is used")
    if given.read_bytes() != own.read_bytes():
        raise ValueError(
            f"{run} was trained with {own}, {given} is another tokenizer; leave --data.tokenizer out, "
            "or start a new run"
        )
