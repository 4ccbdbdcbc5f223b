"""A training run's folder.

runs/NAME/
    config.toml           the whole config, with the device, dtype and threads that were used
    config-until-step-000030.toml     the config until that step, if the run continued with another
    corpus.json           the corpus: size, hash, choice of the held-out part
    tokenizer.json        a copy of the tokenizer, if it was not bytes
    init.json             the checkpoint whose weights it started from, if it did
    metrics.jsonl         one line per step
    checkpoints/          see training_state.py
    summary.json, sample.txt, loss.png, expert_load.png     at the end
"""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from dsmini.atomic import lock as lock_file
from dsmini.atomic import write_text
from dsmini.config import RunConfig
from dsmini.reading import check_path, is_there, read_table, refusing
from dsmini.text.tokenizer import Tokenizer, load_tokenizer

BEFORE_CONFIG = ("corpus.json", "tokenizer.json", "init.json")
"""Files of a new run that are written before its config.toml."""
TOY = Path(__file__).parents[1] / "toy"
"""The folder of the model that dsmini comes with: the default run's, its matrices in FP8."""


def new_run_folder(out: Path | None, name: str, base: Path = Path("runs")) -> Path:
    """Make the folder of a new run: `out`, or the first free base/NAME-001, -002, ..."""
    check_path(base / name, "name of the run")
    with refusing(f"cannot make the folder {out or base / name}", "choose another with --out"):
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return out
        taken = [int(m[1]) for p in base.glob(f"{name}-*") if (m := re.fullmatch(rf"{re.escape(name)}-(\d+)", p.name))]
        number = max(taken, default=0) + 1
        while True:  # two runs that start at once get different ones
            with suppress(FileExistsError):
                (base / f"{name}-{number:03d}").mkdir(parents=True)
                return base / f"{name}-{number:03d}"
            number += 1


def refuse_taken(out: Path | None) -> None:
    """Raise ValueError if the folder of a new run holds anything already.

    The files of a run that was killed before it had a config.toml do not count.
    """
    if out is None:
        return
    with refusing(f"cannot make the folder {out}", "choose another with --out"):
        names = {path.name for path in out.iterdir()} if out.exists() else set()
    begun = any(name not in BEFORE_CONFIG and not name.startswith(".") for name in names)
    if begun or (names and ".lock" not in names):
        held = "another run" if "config.toml" in names else "other files"
        raise ValueError(f"--out {out} holds {held}; choose a new folder, or remove that one")


def lock_run(run: Path) -> IO[str]:
    """Lock a run's folder against other processes, until the file that it returns is closed, or this process ends.

    Raises: ValueError if another process holds it.
    """
    path = run / ".lock"
    with refusing(f"cannot write {path}", "a run is trained in a folder that can be written"):
        lock = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        lock_file(lock, path)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another process is training in {run}; wait for it, or stop it") from None
    return os.fdopen(lock, "w")


def check_run(run: Path) -> None:
    """Raise ValueError for a folder of a run that is not there."""
    check_path(run, "run")
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}; name a run that dsmini.train wrote, such as runs/toy-001")


def run_config(run: Path) -> RunConfig:
    """Return the config in a run's folder; raise ValueError for a folder that is not a run."""
    check_run(run)
    if not is_there(run / "config.toml"):
        raise ValueError(f"{run} has no config.toml, so it is not a training run; name one that dsmini.train wrote")
    return RunConfig.from_file(run / "config.toml")


def find_model(path: Path) -> Path:
    """Return a path as it is, and for the name toy, where nothing else has it, the model that dsmini comes with."""
    return TOY if path == Path("toy") and not is_there(path) else path


def is_model_folder(path: Path) -> bool:
    """Return True for a DeepSeek or Hugging Face folder, False for a training run or a checkpoint of one.

    Raises: ValueError for a path that is none of them.
    """
    check_path(path, "path")
    if not path.is_dir():
        raise ValueError(
            f"there is no folder {path}; name a training run, such as runs/toy-001, one of its checkpoints, or a "
            "DeepSeek or Hugging Face folder with config.json"
        )
    if is_there(path / "config.toml"):
        return False
    if not any(path.glob("config*.json")):
        raise ValueError(
            f"{path} has neither the config.toml of a training run nor the config.json of a model's folder; name one "
            "that has"
        )
    return True


def run_tokenizer(path: Path, config: RunConfig) -> Tokenizer:
    """Return the tokenizer that a run was trained with: its tokenizer.json, or bytes.

    Args:
        path: the run's folder, or that of one of its checkpoints, or a link to either.

    Raises: ValueError if that file is gone.
    """
    run = path if (path / "checkpoints").is_dir() else path.resolve().parent.parent
    return load_tokenizer(tokenizer_file(run, config))


def tokenizer_file(run: Path, config: RunConfig) -> Path | None:
    """Return the path of a run's copy of its tokenizer, None for bytes; raise ValueError if that file is gone."""
    if config.data.tokenizer is None:
        return None
    if not is_there(run / "tokenizer.json"):
        raise ValueError(f"{run} has no tokenizer.json, which it was trained with; copy {config.data.tokenizer} there")
    return run / "tokenizer.json"


def replace_config(run: Path, old: RunConfig, new: RunConfig, step: int) -> None:
    """Store the config that holds from this step; the config until then stays next to it."""
    until = run / f"config-until-step-{step:06d}.toml"
    if new != old and not until.exists():
        write_text(until, old.to_toml())
    write_text(run / "config.toml", new.to_toml())


def read_summary(run: Path) -> dict[str, Any]:
    """Return the figures of summary.json; empty while the run is not finished, and for a damaged file."""
    try:
        return read_table(run / "summary.json")
    except ValueError:
        return {}
