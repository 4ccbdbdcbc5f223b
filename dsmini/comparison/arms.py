"""Arms: what is compared. Each is a whole RunConfig, and perhaps a Python function that makes another model of it."""

import dataclasses
import hashlib
import inspect
import os
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from dsmini.config import ModelConfig, RunConfig, TrainConfig
from dsmini.config.fields import build, check_types, plain, require, setting
from dsmini.config.run import ParallelConfig
from dsmini.machine import pick_device
from dsmini.reading import TOO_DEEP, brief, find_config, read_bytes, read_toml

FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)")
"""An arm in Python: FILE.py:FUNCTION."""
EQUAL = ("train.final_eval_tokens=262144", "train.threads=1")
"""Settings of every run: each core has one, on one thread; the losses are of about 262,144 bytes."""
SMALL = ("train.steps=200", "train.final_eval_tokens=131072")
MARGIN = 0.01
"""Default margin in nats a byte. Paired differences have deviations of 0.006 (a small model whose training ends) to
0.04 (the toy after 200 steps), so 20 pairs know them within 0.003 to 0.02 (docs/claims)."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of a comparison."""

    name: str
    config: RunConfig
    function: str = ""
    """FILE.py:FUNCTION that makes the model from a ModelConfig; "" for dsmini.Transformer."""

    @property
    def tokens(self) -> int:
        """Number of tokens that all its steps train on, also where the batch grows."""
        return self.config.seq_len * sum(map(self.config.train.batch_size_at, range(self.config.train.steps)))

    def describe(self) -> dict[str, Any]:
        """Return what decides this arm's runs but the seed and the text, as JSON has it."""
        table = plain(dataclasses.asdict(self.config))
        table.pop("out", None)
        table["train"].pop("seed")
        table["train"]["device"] = table["train"]["device"].partition(":")[0]  # its number changes nothing
        table["data"].pop("path")
        tokenizer = self.config.data.tokenizer
        table["data"]["tokenizer"] = "bytes" if tokenizer is None else _hash(read_bytes(tokenizer))
        found: dict[str, Any] = {"config": table}
        if self.function:
            file = Path(self.function.rpartition(":")[0])
            content = _hash(b"".join(sources(file)))
            found |= {"function": Path(self.function).name, "sha256": content}  # the same from every folder
        return found


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sources(file: Path) -> list[bytes]:
    """Return the content of a Python file, and of each file of its folder that it imports, directly or not."""
    finder = ModuleFinder([str(file.parent)])
    with suppress(SyntaxError, ValueError):  # told when it is run
        finder.run_script(str(file))
    files: list[str | None] = [vars(module)["__file__"] for module in finder.modules.values()]
    return [read_bytes(path) for path in (file, *sorted({Path(name) for name in files if name} - {file}))]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A question: the first arm is the base, with which each other arm is compared."""

    name: str
    arms: list[Arm]
    margin: float
    """Difference in nats a byte below which two arms count as equal; it is stated before the first run."""
    question: str = ""
    source: str = ""
    hypothesis: str = ""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim's file."""

    question: str = ""
    source: str = ""
    hypothesis: str = ""
    margin: float | None = setting(None, above=0)
    """Nats a byte, such as 0.01."""
    base: str = "toy"
    base_name: str = ""
    set: tuple[str, ...] = ()
    """Settings of all arms, such as train.steps=200."""
    arms: dict[str, Any] = field(default_factory=dict)
    """For each arm a list of settings, or the name of a config or of a function."""

    def __post_init__(self) -> None:
        check_types(self)


@contextmanager
def _to_stderr() -> Iterator[None]:
    """Send what a block prints to the standard error, that of programs and libraries that it runs too."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def make_model_of(function: str) -> Callable[[ModelConfig], Any]:
    """Return the function FILE.py:FUNCTION.

    Raises: ValueError for a file that cannot be run and a name that is not a function of one argument in it.
    """
    file, _, name = function.rpartition(":")
    require(Path(file).is_file(), f"there is no file {file}; name a function as my_idea.py:make_model")
    folder = str(Path(file).resolve().parent)
    if folder not in sys.path:  # for what it imports, as where Python runs the file
        sys.path.insert(0, folder)
    try:
        with _to_stderr():  # what it prints is not the answer
            found = runpy.run_path(file).get(name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{file} ended with {type(error).__name__}: {brief(str(error))}") from error
    require(callable(found), f"{file} has no function {name}; it takes a ModelConfig and returns a model")
    assert callable(found)
    try:
        inspect.signature(found).bind(ModelConfig())
    except TypeError:
        raise ValueError(f"{function} takes other arguments than one ModelConfig; give the others defaults") from None
    return found


def changed(config: RunConfig, settings: Sequence[str], source: str) -> RunConfig:
    """Return a config with settings such as model.n_mtp_layers=0.

    Raises: ValueError for one without "=", an unknown key, or a wrong value.
    """
    table: dict[str, Any] = {}
    for each in settings:
        key, equals, text = each.partition("=")
        section, dot, name = key.strip().partition(".")
        homes = [part for part in ("model", "data", "train") if hasattr(getattr(config, part), key.strip())]
        example = f"{homes[0]}.{each}" if homes and equals else "model.n_mtp_layers=0"
        require(bool(equals and dot), f"{source} has {brief(each)}; want SECTION.KEY=VALUE, such as {example}")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()  # a word, such as dense, needs no quotes
        except RecursionError:
            raise ValueError(f"{brief(each)} {TOO_DEEP}") from None
        table.setdefault(section, {})[name.replace("-", "_")] = value
    return build(RunConfig, table, source, "", config)


def arm_of(words: Sequence[str], base: RunConfig, common: Sequence[str], name: str = "", folder: Path = Path()) -> Arm:
    """Return the arm that words describe: a config (else the base), perhaps a function, and settings.

    Args:
        common: settings of all arms, which those of the words may change.
        name: of the arm; "" takes it from the words.
        folder: in which functions' files are looked for.
    """
    config, function, settings = base, "", []
    for word in words:
        if FUNCTION.fullmatch(word):
            function = str(folder / word)
            make_model_of(function)
        elif word.endswith(".py"):
            raise ValueError(f"{word} is Python; name the function in it that makes a model: {word}:make_model")
        elif "=" in word:
            settings.append(word)
        else:
            config = RunConfig.from_file(find_config(Path(word)))
    short = words[0].rpartition(":")[2] if function else Path(words[0]).stem if words else "base"
    name = name or (" ".join(words) if settings else short)
    config = changed(config, [*EQUAL, *common], "--set")
    return Arm(name=name, config=changed(config, settings, name), function=function)


def arms_of(words: Sequence[str], ideas: Sequence[str], common: Sequence[str]) -> list[Arm]:
    """Return the base, the first of the words (the toy without one), and the arms that other words and ideas name.

    Args:
        common: settings of all arms.

    Raises: ValueError for fewer than two arms, for two of one name, and for two that differ in nothing.
    """
    named = bool(words) and not FUNCTION.fullmatch(words[0])
    base = RunConfig.from_file(find_config(Path(words[0]))) if named else RunConfig()
    arms, asked = [arm_of(words[:1] if named else [], base, common)], [[word] for word in words[named:]]
    for idea in ideas:
        require(bool(idea.strip()), "--idea '' changes nothing; want settings, such as model.n_mtp_layers=0")
        try:
            asked.append(shlex.split(idea))
        except ValueError as error:
            raise ValueError(f"--idea {brief(idea)}: {str(error).lower()}; close its quotes") from None
    for each in asked:
        arm = arm_of(each, base, common)
        taken = any(other.name == arm.name for other in arms) and bool(arm.function)
        arms.append(replace(arm, name=f"{Path(each[0]).stem}:{arm.name}") if taken else arm)
    return checked(arms)


def checked(arms: Sequence[Arm]) -> list[Arm]:
    """Return arms as they run here; raise ValueError as arms_of does."""
    require(len(arms) > 1, 'there is nothing to compare; name another config, or --idea "model.n_mtp_layers=0"')
    done: list[Arm] = []
    for arm in arms:
        train, device = arm.config.train, pick_device(arm.config.train.device)
        dtype = "float32" if train.dtype == "auto" else train.dtype  # the same on all machines
        train = replace(train, device=str(device), dtype=dtype, seed=0)
        arm = replace(arm, config=replace(arm.config, train=train, out=None))
        for other in done:
            require(other.name != arm.name, f"two arms are called {arm.name}; give their files other names")
            same = _measured(other) == _measured(arm)
            require(not same, f"{other.name} and {arm.name} differ in nothing that a run measures; change one of them")
            of = "data.path, data.val_fraction or train.final_eval_tokens"
            texts = [
                (each.config.data.path, each.config.data.val_fraction, each.config.train.final_eval_tokens)
                for each in (other, arm)
            ]
            why = "losses of other texts cannot be compared; use --set for all of them"
            require(texts[0] == texts[1], f"{other.name} and {arm.name} differ in {of}: {why}")
        done.append(arm)
    return done


def _measured(arm: Arm) -> tuple[RunConfig, str]:
    """Return what a run measures follows from: one process, no average, rewind, checkpoint, sample or validation."""
    plain = TrainConfig()
    apart = [name for name in TrainConfig.__dataclass_fields__ if name.startswith(("save_", "sample_", "eval_"))]
    train = replace(arm.config.train, ema_decay=None, max_rewinds=0, **{name: getattr(plain, name) for name in apart})
    return replace(arm.config, train=train, parallel=ParallelConfig()), arm.function


def read_claim(path: Path, settings: Sequence[str], margin: float | None) -> Comparison:
    """Read a claim: a TOML file with a question, its source, a hypothesis, a margin, a base, its name and [arms].

    Raises: ValueError for unknown keys and for what arms_of refuses.
    """
    claim = build(Claim, read_toml(path), path.name, "")
    require(bool(claim.arms), f"{path} has no [arms]; give each a list of settings")
    base, common = RunConfig.from_file(find_config(Path(claim.base))), [*claim.set, *settings]
    arms = [arm_of([], base, common, claim.base_name)]
    for name, of in claim.arms.items():
        words = [of] if isinstance(of, str) else of
        require(isinstance(words, list) and bool(words), f"{path}: arms.{name} is {brief(of)}; want a list of settings")
        arms.append(arm_of([str(word) for word in words], base, common, name, path.parent))
    stated = claim.margin
    require(stated is None or margin in (None, stated), f"{path} states the margin {stated}; leave --margin out")
    return Comparison(
        name=path.stem,
        arms=checked(arms),
        margin=stated or margin or MARGIN,
        question=claim.question,
        source=claim.source,
        hypothesis=claim.hypothesis,
    )
