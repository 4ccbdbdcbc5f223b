"""save_pretrained: write a folder that transformers loads. An unchanged model gives the folder it was loaded from."""

import dataclasses
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from rich.console import Console

from dsmini.atomic import as_json, new_folder
from dsmini.checkpoint.pretrained import PretrainedOrigin, check_dtype, origin_of
from dsmini.checkpoint.safetensors_file import Entry, write_safetensors
from dsmini.checkpoint.safetensors_folder import INDEX, index_of, plan_shards
from dsmini.checkpoint.save_plan import SavePlan
from dsmini.checkpoint.tensor_names import hf_name
from dsmini.config import ModelConfig
from dsmini.config.fields import require
from dsmini.config.huggingface import (
    UNKNOWN_IDS,
    config_from_json,
    config_to_json,
    is_hugging_face,
    with_dtypes,
    with_mtp_layers,
)
from dsmini.console.messages import rate
from dsmini.console.progress import Progress
from dsmini.nn import Transformer
from dsmini.reading import brief, check_path

# files of a model's folder apart from its tensors and config.json; code is copied and never run
BESIDE = re.compile(
    r".*token.*|.*\.tiktoken|special_tokens_map\.json|added_tokens\.json|chat_template.*|generation_config\.json|vocab\..*|"
    r"merges\.txt|.*\.model|.*\.py|LICENSE.*"
)
METADATA = MappingProxyType({"format": "pt"})
"""Texts in the header of each file, which transformers asks for."""
TENSORS = (".safetensors", ".bin", ".pt", ".pth")
LOST = ", which no config says: the folder would be read as another model; save model.state_dict() with your code"
LARGEST_FILE = 2**60
"""Maximum size of a file in bytes; no file system takes more."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class Saved(NamedTuple):
    """The result of save_pretrained."""

    nbytes: int
    """Bytes of tensors."""
    seconds: float
    files: list[str]
    """Names of the files with tensors."""


def save_pretrained(
    model: Transformer,
    path: str | Path,
    fp8: bool = False,
    *,
    dtype: torch.dtype | None = None,
    shard_size: int | str = "5GB",
    files: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> Saved:
    """Write the model as a new Hugging Face folder: safetensors, config.json, and the small files it came with.

    The tensors of a loaded model are written in their stored dtypes, whatever they are held in, so a folder that is
    loaded and saved has the same tensors. Its tokenizer and other small files are copied. A model that was not loaded
    is written as it is held. The folder is written whole or not at all.

    Args:
        fp8: write the matrices of attention and feed-forwards as E4M3 codes with FP32 scales for 128x128 blocks.
            Matrices held in FP8 are written as they are, also without it.
        dtype: dtype of all that is not FP8, except gates, which stay FP32; without `fp8` of all. None: see above.
        shard_size: maximum size of a file in bytes, or a text such as "5GB"; a larger tensor has a file of its own.
        files: texts of further files, by name; they replace copied ones of the same name.
        config: further keys of config.json, such as eos_token_id.
        say: told how many bytes were written, and how fast. A long save shows a bar on the standard error.

    Warns: if a tensor holds infinities or NaN; the first one is named.

    Raises: ValueError if the folder holds anything already, if neither deepseek_v2 nor deepseek_v3 describes the
        model, if a layer computes what no config says, or if values to quantize are not finite.
    """
    path = Path(path)
    limit = parse_size(shard_size)
    refuse_filled(path)
    planned = plan_folder(model, fp8, dtype, limit)
    saved = write_folder(path, planned.shards, lambda folder: planned.write_beside(folder, files or {}, config or {}))
    if planned.plan.not_finite is not None:
        warnings.warn(not_finite(path, planned.plan.not_finite), stacklevel=2)
    if say is not None:
        say(rate("wrote", saved.nbytes, saved.seconds))
    return saved


def write_folder(path: Path, shards: Mapping[str, Sequence[Entry]], write_beside: Callable[[Path], None]) -> Saved:
    """Write a new folder, whole or not at all: the tensors of each file, and what `write_beside` writes into it."""
    nbytes = sum(entry.nbytes for entries in shards.values() for entry in entries)
    with ExitStack() as stack:
        folder = stack.enter_context(made(path, new_folder))
        console = Console(stderr=True)
        with Progress(console, nbytes, f"writing {path.name}", unit="bytes") as progress, torch.no_grad():
            for name, entries in shards.items():
                write_safetensors(folder / name, entries, METADATA, progress.add)
        write_beside(folder)
    return Saved(nbytes, progress.seconds, list(shards))


class PlannedFolder(NamedTuple):
    """A model's folder before it is written."""

    plan: SavePlan
    shards: Mapping[str, Sequence[Entry]]
    """Tensors of each file."""
    raw: dict[str, Any]
    """Content of config.json."""

    @property
    def nbytes(self) -> int:
        """Bytes of tensors."""
        return sum(entry.nbytes for entries in self.shards.values() for entry in entries)

    def write_beside(self, folder: Path, files: Mapping[str, str], config: Mapping[str, Any]) -> None:
        """Write all but the tensors: config.json, the index, what the model came with, and further texts and keys."""
        copy_beside(origin_of(self.plan.model), folder)
        texts = {**files, "config.json": as_json(self.raw | dict(config))}
        texts |= {INDEX: as_json(index_of(self.shards))} if len(self.shards) > 1 else {}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def plan_folder(model: Transformer, fp8: bool, dtype: torch.dtype | None, shard_size: int) -> PlannedFolder:
    """Plan the folder of a model with files of at most shard_size bytes. See save_pretrained.

    A model with a part of the experts has the plan of the whole one.

    Raises: ValueError if neither deepseek_v2 nor deepseek_v3 describes the model.
    """
    check_dtype(dtype)
    refuse_changed_ideas(model)
    described = _described(model)
    plan = SavePlan(model, fp8, dtype)
    shards = plan_shards(plan.units(), shard_size)
    return PlannedFolder(plan, shards, _with_dtypes(described, plan, shards))


def refuse_changed_ideas(model: Transformer) -> None:
    """Raise ValueError for a model that computes what no config says, since it would be read back as another.

    That is a method of a layer that is not dsmini's or torch's, such as a subclass's forward, a mask, and options of a
    gate. A folder never holds code.
    """
    with torch.device("meta"):
        plain = dict(Transformer(model.config).named_modules())
    for name, module in model.named_modules():
        if (usual := plain.get(name)) is None:
            continue
        for method in (n for n, value in vars(type(usual)).items() if callable(value) and n != "__init__"):
            own = getattr(module, method, None)  # None: torch's Linear has fewer methods than dsmini's
            home = (getattr(own, "__module__", None) or "").split(".")[0]
            said = f"its {method} is that of {getattr(own, '__qualname__', own)}"
            require(own is None or home in ("dsmini", "torch"), f"{name or 'the model'}: {said}{LOST}")
        for option in ("mask", "options"):
            given = getattr(module, option, None)
            require(given == getattr(usual, option, None), f"{name}.{option} is {brief(given)}{LOST}")


@contextmanager
def made(path: Path, make: Callable[[Path], AbstractContextManager[Path]]) -> Iterator[Path]:
    """Yield the folder of make(path). Raises: ValueError if it cannot be made."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(make(path))
        except OSError as error:
            raise ValueError(f"cannot make the folder {path}: {error.strerror}; choose another") from None
        yield folder


def not_finite(path: Path, name: str) -> str:
    """Return the warning about a tensor that was written with infinities or NaN."""
    return f"{path} has infinities or NaN in {name}, as the model has; check it"


def parse_size(size: int | str) -> int:
    """Return bytes from a number or a text such as "5GB", "500MB" or "2GiB"."""
    text = str(size).strip().upper() if isinstance(size, str) or abs(size) < LARGEST_FILE else ""
    part = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMG]I?|)B?", text)
    nbytes = 0 if part is None else int(float(part[1]) * UNITS[part[2]])
    require(
        0 < nbytes <= LARGEST_FILE, f"shard size {brief(size)} is not the size of a file; use for example 5GB or 500MB"
    )
    return nbytes


def refuse_filled(path: Path) -> None:
    """Raise ValueError unless `path` is a new or an empty folder that can be made."""
    check_path(path, "folder")
    try:
        filled = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise ValueError(f"cannot look into {path}: {error.strerror}; choose another folder") from None
    require(not filled, f"{path} holds files already; choose a new folder, or remove that one")


def _described(model: Transformer) -> dict[str, Any]:
    """Return a config.json without the dtypes of tensors: the one that was loaded, if it still fits the model."""
    origin = origin_of(model)
    if origin is None or not _describes(origin.raw, model.config):
        return {**UNKNOWN_IDS, **config_to_json(dataclasses.asdict(model.config))}
    return with_mtp_layers(origin.raw, model.config.n_mtp_layers)


def _with_dtypes(raw: dict[str, Any], plan: SavePlan, shards: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    written = {entry.name: entry.dtype for entries in shards.values() for entry in entries}
    return with_dtypes(
        raw,
        str(written[hf_name("embed.weight", 0)]).removeprefix("torch."),
        replace=plan.dtype is not None,
        fp8=torch.float8_e4m3fn in written.values(),
        keep_quantization=not plan.quantizes,
    )


def _describes(raw: Mapping[str, Any], config: ModelConfig) -> bool:
    """Return whether a config.json fits the model, which may have been loaded without its MTP blocks."""
    if not is_hugging_face(raw):
        return False
    read = ModelConfig(**config_from_json(raw, "config.json"))
    return dataclasses.replace(read, n_mtp_layers=config.n_mtp_layers) == config


def copy_beside(origin: PretrainedOrigin | None, folder: Path) -> None:
    """Copy the tokenizer and the other small files that a model came with."""
    if origin is None:
        return
    if not origin.folder.is_dir():
        warnings.warn(
            f"{origin.folder}, from which the model was loaded, is gone; its tokenizer is not copied",
            stacklevel=3,
        )
        return
    for path in sorted(origin.folder.iterdir()):
        if path.is_file() and BESIDE.fullmatch(path.name) and path.suffix not in TENSORS:
            shutil.copyfile(path, folder / path.name)
