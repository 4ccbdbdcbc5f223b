"""The origin of a run: nothing, another run's weights (--init), or where it stopped (--resume).

The origin has the values that the command line may change, and decides which of the changes are allowed. It reads
configs alone; start.py reads weights, once the processes have met.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dsmini.checkpoint.run_folder import find_model, is_model_folder, read_summary, run_config, tokenizer_file
from dsmini.config import DataConfig, ModelConfig, RunConfig
from dsmini.config.fields import Effect, plain, require
from dsmini.console.commandline import take_folder
from dsmini.reading import is_there, read_bytes
from dsmini.text.tokenizer import is_byte_tokenizer

FOLDER_SEQ_LEN = 512
"""Default of train.seq_len for a model's folder with a longer context: published ones would fill the memory."""


@dataclass(frozen=True, kw_only=True)
class RunOrigin:
    """The beginning of a run: drawn weights, those of another run or a folder, or the place where it stopped."""

    config: RunConfig
    """Values without flags: from the file, else from the run that is named, else the defaults. They may hold
    "auto", and no folder."""
    name: str = "toy"
    """Name in a new run's folder, runs/NAME-001."""
    resume: Path | None = None
    """The folder of the run to continue."""
    before: RunConfig | None = None
    """The config until now, of the run to continue or of the weights; None for drawn weights."""
    init: Path | None = None
    """The run, the checkpoint or the model's folder that the weights are from; None: they are drawn, or the run's."""

    def accept(self, config: RunConfig) -> RunConfig:
        """Return the config that this origin allows, after all flags, with absolute paths to compare.

        Raises: ValueError for what a resumed run or other weights do not allow.
        """
        if self.before is None:
            return config
        if self.resume is None:
            check_init(self.before.model, config.model, str(self.init))
            # a folder's context may be longer than memory allows in training
            if config.train.seq_len is None and self.init is not None and is_model_folder(self.init):
                seq_len = min(config.model.max_seq_len, FOLDER_SEQ_LEN)
                config = dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=seq_len))
            return config
        used = {key: getattr(self.before.train, key) for key in ("dtype", "threads")}
        if config.train.device == "auto":
            from dsmini.machine import pick_device

            if pick_device("auto").type == self.before.train.device.partition(":")[0]:
                used["device"] = self.before.train.device
        auto = {key: value for key, value in used.items() if getattr(config.train, key) in ("auto", None)}
        config = dataclasses.replace(absolute(config), train=dataclasses.replace(config.train, **auto))
        own, given = tokenizer_file(self.resume, self.before), config.data.tokenizer
        if own is not None and given is not None and given != self.before.data.tokenizer:
            require(given.is_file(), f"there is no file {given}; leave --data.tokenizer out: {own} is used")
            require(
                read_bytes(given) == read_bytes(own),
                f"{self.resume} was trained with {own}, {given} is another tokenizer; leave --data.tokenizer out, or "
                "start a new run",
            )
        return config

    def is_finished(self, steps: int) -> bool:
        """Return True if the run to continue has done this many steps, and all that follows them."""
        return self.resume is not None and read_summary(self.resume).get("steps") == steps

    def describe(self, config: RunConfig, found: Path | None, step: int) -> list[str]:
        """Return in lines where the run starts, and what one to continue does differently from here on.

        Args:
            found: the weights or the checkpoint that it starts from.
            step: number of steps done; 0 without a checkpoint.

        Raises: ValueError for changes that are not allowed, and for a run that has nothing left to do.
        """
        if self.resume is None or self.before is None:
            return [] if found is None else [f"weights {found}"]
        steps, changes = config.train.steps, check_resume(self.before, config)
        require(step <= steps, f"{self.resume} has done {step} steps, train.steps={steps} is fewer; use more")
        if step == 0:
            return [*changes, f"starting again from step 0 of {steps}: there is no checkpoint yet"]
        finished = step == steps and self.is_finished(steps)
        require(not finished, f"{self.resume} is finished: {step} of {steps} steps; to continue raise --train.steps")
        return [*changes, f"resuming after step {step} of {steps} from {found}"]


def find_origin(file: Path | None, resume: Path | None, init: Path | None) -> RunOrigin:
    """Find where a run comes from.

    Args:
        file: config file, whose values take precedence over those of the run that is named.

    Raises: ValueError for what cannot go together, or is not a run.
    """
    require(
        not (resume and init), "--resume continues a run, --init starts a new one from its weights; use one of them"
    )
    origin = RunOrigin(config=RunConfig())
    if resume:
        whole = resume.resolve().parent
        require(
            whole.name != "checkpoints",
            f"{resume} is a checkpoint, a run continues from its last one: use --resume {whole.parent}, or start a new "
            f"run from this one's weights with --init {resume}",
        )
        before = dataclasses.replace(run_config(resume), out=resume)
        origin = RunOrigin(config=before, resume=resume, before=before)
    elif init:
        origin = _origin_of_weights(init)
    if file is None:
        return origin
    return dataclasses.replace(origin, config=RunConfig.from_file(file, origin.config), name=file.stem)


def resume_automatically(args: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the run to continue and the rest of a command line with `--resume auto`: the run in --out, if one began.

    Raises: ValueError without --out.
    """
    out, rest = take_folder(args, "--out")
    if out is None:
        raise ValueError("--resume auto continues the run in --out if there is one; name its folder, as --out runs/x")
    begun = is_there(out / "config.toml")
    return (out, rest) if begun else (None, [*rest, "--out", str(out)])


def _origin_of_weights(path: Path) -> RunOrigin:
    """Return the origin of a run with the weights of a run, a checkpoint, or a DeepSeek or Hugging Face folder."""
    path = find_model(path)
    if is_model_folder(path):
        from dsmini.checkpoint.load import PretrainedTensors

        tokenizer = path / "tokenizer.json"
        own = is_there(tokenizer) and not is_byte_tokenizer(tokenizer)
        run = RunConfig(model=PretrainedTensors(path).config, data=DataConfig(tokenizer=tokenizer if own else None))
        return RunOrigin(config=run, name=path.resolve().name or "model", before=run, init=path)
    found, folder = run_config(path), path.resolve()
    folder = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    data = found.data
    if data.tokenizer is not None and is_there(folder / "tokenizer.json"):  # the original may have changed, or be gone
        data = dataclasses.replace(data, tokenizer=folder / "tokenizer.json")
    run, name = RunConfig(model=found.model, data=data), re.sub(r"-\d+$", "", folder.name)
    return RunOrigin(config=run, name=name or "model", before=run, init=path)


def absolute(config: RunConfig) -> RunConfig:
    """Return the config with absolute paths of the text and the tokenizer. A link keeps its name, which is a text's."""
    path, tokenizer = (given and given.absolute() for given in (config.data.path, config.data.tokenizer))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path, tokenizer=tokenizer))


# --- the changes that are allowed


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
            effect = f.metadata.get("resume", "recipe")
            another_model = isinstance(old, ModelConfig)
            begins_or_ends = f.metadata.get("none_stays", False) and None in (before, after)
            yield Change(prefix + f.name, before, after, "refused" if another_model or begins_or_ends else effect)


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
    for effect, words in (
        ("rounding", "the result is no longer bit-identical to an unstopped run's"),
        ("recipe", "the schedule changes from here on"),
    ):
        if keys := [change.key for change in changes if change.effect == effect]:
            lines.append(f"with another {', '.join(keys)} {words}")
    return lines


def check_init(old: ModelConfig, new: ModelConfig, source: str) -> None:
    """Refuse a model whose tensors the weights of another do not fit, by the keys that change them."""
    _refuse_missing_indexers(old, new, source)
    if _shapes(new) == _shapes(old):
        return
    changes = list(differences(old, new))
    several = [change for change in changes if _changes_shapes(old, change)] or changes  # or those only together
    got = [f"model.{change.key}={plain(change.after)} (there {plain(change.before)})" for change in several]
    raise ValueError(
        f"the weights of {source} do not fit {', '.join(got)}; leave out what changes shapes. The context may "
        "change: max_seq_len, original_seq_len, rope_theta, rope_factor, beta_fast, beta_slow, mscale and "
        "mscale_all_dim"
    )


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    from dsmini.checkpoint.load import meta_model  # it loads torch: --help is instant

    return {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}


def _changes_shapes(old: ModelConfig, change: Change) -> bool:
    """Return whether a key changes the tensors of a model, or belongs to another one."""
    try:
        return _shapes(dataclasses.replace(old, **{change.key: change.after})) != _shapes(old)
    except ValueError:
        return True


def _refuse_missing_indexers(old: ModelConfig, new: ModelConfig, source: str) -> None:
    """Refuse sparse attention with the weights of dense attention."""
    require(
        (old.attention, new.attention) != ("mla", "dsa"),
        f"{source} has no indexers, which model.attention='dsa' needs; give it some with python -m dsmini.convert "
        f"{source} OUT --dsa, and start a new run from that with --init OUT",
    )
