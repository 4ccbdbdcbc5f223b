"""python -m dsmini.convert: write a trained or a published model as a folder that others load.

Usage, then examples:

    python -m dsmini.convert SRC DST [FLAGS], or SRC --check

    python -m dsmini.convert runs/toy-001 exported
    python -m dsmini.convert runs/toy-001/checkpoints/step-001450 exported --dtype bfloat16
    python -m dsmini.convert DeepSeek-V2-Lite v2-lite-fp8 --fp8 --shard-size 2GB
    python -m dsmini.convert runs/toy-001 sparse --dsa
    python -m dsmini.convert DeepSeek-V3 --check --report v3.json
"""

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from dsmini.atomic import as_json
from dsmini.checkpoint.run_folder import find_model, is_model_folder, run_tokenizer
from dsmini.config import RunConfig
from dsmini.config.fields import require
from dsmini.console.command import run
from dsmini.console.commandline import parse
from dsmini.console.messages import say
from dsmini.console.progress import Progress
from dsmini.reading import listed, read_text
from dsmini.report.units import plural
from dsmini.text.tokenizer import BPETokenizer, byte_tokenizer_json

if TYPE_CHECKING:
    from dsmini.nn import Transformer

BEGIN_TOKEN = "<｜begin▁of▁sentence｜>"


@dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """Write a trained or a published model as a new folder: safetensors, config.json, tokenizer.

    SRC is a run that dsmini.train wrote, or one of its checkpoints; a DeepSeek or Hugging Face folder; or a folder that
    DeepSeek's inference code reads (model0-mp8.safetensors, ...), the files of all ranks next to its config JSON.
    """

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """The model to read."""
    dst: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DST")] = None
    """The folder to write, which must be new or empty."""
    check: bool = False
    """Write no folder: check SRC, a DeepSeek or Hugging Face folder, layer by layer in the memory of one layer."""
    report: Path | None = None
    """A file for the findings of --check, with which the same command continues after an interruption."""
    fp8: bool = False
    """Write the matrices of attention and feed-forwards in FP8: E4M3 codes, an FP32 scale for each 128x128 block."""
    fp4: bool = False
    """Write the routed experts of DeepSeek-V4 in FP4, and its other matrices in FP8, as its own folder has them."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Dtype of all that is not FP8, except gates, which stay float32; stored: as in SRC, FP8 included."""
    shard_size: str = "5GB"
    """Maximum size of a file, such as 5GB or 500MB."""
    average: bool = False
    """Use the EMA of a run's parameters; the run must have one, by --train.ema-decay."""
    dsa: bool = False
    """Add a fresh indexer to every layer: V3 becomes V3.2."""
    index_n_heads: int | None = None
    """Number of heads of a fresh indexer; left out: half of attention's, for V3 V3.2's 64."""
    index_head_dim: int | None = None
    """Width of a head of a fresh indexer, a power of two; left out: that of attention, for V3 V3.2's 128."""
    index_topk: int | None = None
    """Number of keys that a query attends to with a fresh indexer; left out: a quarter of the context, 2048 at most."""
    json: bool = False
    """Print the figures as a line of JSON, and everything else on the standard error."""


WRITING = ("fp8", "fp4", "shard_size", "average", "dsa", "index_n_heads", "index_head_dim", "index_topk", "json")
"""Fields that have no meaning with --check."""

MAIN = ("src", "dst", "check", "report", "fp8", "dtype", "shard_size", "average", "dsa", "json")
"""Fields that --help lists."""


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    command = parse(ConvertCommand, "dsmini.convert", args, main=MAIN)
    # what loads torch is imported after --help
    import torch

    from dsmini import accounting, ops
    from dsmini.checkpoint.load import add_indexers
    from dsmini.checkpoint.save import parse_size, refuse_filled, save_pretrained
    from dsmini.checkpoint.tensor_files import is_v4, mtp_prefixes

    ops.check_forced()
    tell = partial(say, Console(stderr=command.json))
    require(command.check or command.report is None, "--report is for --check; add that, or leave it out")
    if command.check:
        require(command.dst is None, f"--check writes no folder; leave {command.dst} out")
        plain = ConvertCommand(src=command.src)
        idle = [name for name in WRITING if getattr(command, name) != getattr(plain, name)]
        idle = [f"--{name.replace('_', '-')}" for name in idle]
        idle += [] if command.dtype != "float16" else ["--dtype float16"]
        require(not idle, f"{', '.join(idle)}: --check does not know it; leave it out")
        return _check(command)
    require(command.dst is not None, "an argument is missing: DST, the folder to write; or use --check")
    assert command.dst is not None
    refuse_filled(command.dst)
    parse_size(command.shard_size)
    sizes = _indexer_sizes(command)
    dtype = None if command.dtype == "stored" else getattr(torch, command.dtype)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: tell(str(message))
        model, files, ids = _read(command, tell)
        if command.dsa:
            add_indexers(model, **sizes)
            topk, most = model.config.index_topk or 0, model.config.max_seq_len
            if topk >= most:
                tell(f"no token will have a choice: index_topk={topk} of at most {most} tokens; lower --index-topk")
        saved = save_pretrained(
            model,
            command.dst,
            command.fp8,
            fp4=command.fp4,
            dtype=dtype,
            shard_size=command.shard_size,
            files=files,
            config=ids,
        )
    n_parameters = accounting.parameters(model.config).total
    written = f"{len(saved.files)} file" + "s" * (len(saved.files) != 1)
    tell(
        f"{command.dst}: {written} with {n_parameters:,} parameters in {saved.nbytes:,} bytes, for dsmini and "
        "transformers"
    )
    prefixes = mtp_prefixes(model.config)
    if prefixes and not is_v4(model.config):
        tell(
            f"transformers will list the tensors of {', '.join(prefix[:-1] for prefix in prefixes)} as unexpected and "
            "load the others: it has no multi-token prediction, dsmini has"
        )
    if command.json:
        figures = {"parameters": n_parameters, "bytes_written": saved.nbytes, "files": saved.files}
        print(json.dumps({"src": str(command.src), "dst": str(command.dst), **figures}))
    return 0


def _check(command: ConvertCommand) -> int:
    """Check SRC, print the report, and return 1 if it names a fault, else 0."""
    import torch

    import dsmini
    from dsmini import accounting
    from dsmini.checkpoint.inspection import Inspection
    from dsmini.machine import peak_memory, processor

    start, dtype = time.perf_counter(), torch.bfloat16 if command.dtype == "bfloat16" else torch.float32
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        inspection = Inspection(command.src, dtype, command.report, dsmini.__version__)
    there, layers = inspection.there, []
    counted = accounting.parameters(there.config).total
    faults = [] if counted == there.n_parameters else [f"{there.n_parameters:,} parameters, accounting {counted:,}"]
    with Progress(Console(stderr=True), len(inspection.names), f"checking {command.src.name}") as progress:
        for layer in inspection:
            layers.append(layer)
            progress.update(len(layers), layer.name)
    stored = Counter(tensor.dtype for tensor in there.reader.tensors.values())
    lines = [
        f"{command.src.name}, {there.raw.get('model_type', 'inference layout')}: {plural(inspection.files, 'file')}, "
        f"{counted:,} parameters; tensors: {', '.join(f'{n:,} {name}' for name, n in sorted(stored.items()))}"
    ]
    lines += [f"WARNING {str(each.message).removeprefix(f'{command.src} ')}" for each in warned]
    if inspection.stray:
        lines.append(f"WARNING these files are not the model's, and were not read: {listed(inspection.stray)}")
    for kind in dict.fromkeys(layer.kind for layer in layers):
        same = [layer for layer in layers if layer.kind == kind]
        errors = [layer.error for layer in same if layer.error is not None]
        scales = [scale for layer in same for scale in layer.scales]
        halves = [layer.upper_half for layer in same if layer.upper_half is not None]
        words = [f"{sum(not layer.faults for layer in same)} of {len(same)} sound"]
        words += [f"scales {min(scales):.2g} to {max(scales):.2g}"] if scales else []
        words += [f"blocks in FP4 with a number of 3 or more: {min(halves):.0%}"] if halves else []
        words += [f"error {max(errors):.1g} at most"] if errors else []
        lines.append(f"{kind}: {', '.join(words)}")
    faults += [fault for layer in layers for fault in layer.faults]
    more = [f"{len(faults) - 10} more faults, which --report FILE has"] if len(faults) > 10 else []
    lines += [f"FAULT {fault}" for fault in faults[:10]] + more
    seconds, memory = time.perf_counter() - start, peak_memory(torch.device("cpu"))
    lines += [
        f"blocks compared in {str(dtype).removeprefix('torch.')} with: {inspection.why_not}",
        f"dsmini {dsmini.__version__}, torch {torch.__version__}, {processor()}; {memory / 2**30:.1f} GiB of memory at "
        f"most, {seconds:.0f} s",
    ]
    print("\n".join(["### dsmini.convert --check", *(f"- {line}" for line in lines)]))
    return int(bool(faults))


def _indexer_sizes(command: ConvertCommand) -> dict[str, int]:
    """Return the given sizes of fresh indexers. Raises: ValueError if none are made."""
    sizes = {name: getattr(command, f"index_{name}") for name in ("n_heads", "head_dim", "topk")}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    flags = ", ".join(f"--index-{name.replace('_', '-')}" for name in sizes)
    require(command.dsa or not sizes, f"{flags}: these are sizes of fresh indexers; add --dsa, or leave them out")
    return sizes


def _read(command: ConvertCommand, tell: Callable[[str], None]) -> "tuple[Transformer, dict[str, str], dict[str, Any]]":
    """Read SRC; return its model, and a run's tokenizer files and special ids."""
    from dsmini.checkpoint.load import load_pretrained
    from dsmini.checkpoint.training_state import load_run

    src = find_model(command.src)
    if not is_model_folder(src):
        model, config = load_run(src, average=command.average, say=tell)
        return model, *_tokenizer_files(src, config)
    require(not command.average, f"--average is for a training run, and {src} is not one; leave it out")
    return load_pretrained(src, fp8="keep"), {}, {}


def _tokenizer_files(src: Path, config: RunConfig) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the files of a run's tokenizer as transformers reads them, and the special ids of config.json."""
    tokenizer = run_tokenizer(src, config)
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.model.max_seq_len,
    }
    ids: dict[str, Any] = {"eos_token_id": tokenizer.end_of_document}
    content = byte_tokenizer_json()
    if isinstance(tokenizer, BPETokenizer):
        content = read_text(tokenizer.path)
        about["eos_token"] = tokenizer.decode([tokenizer.end_of_document])
        if BEGIN_TOKEN in tokenizer.added:
            about["bos_token"] = BEGIN_TOKEN
            ids["bos_token_id"] = tokenizer.added[BEGIN_TOKEN]
    return {"tokenizer.json": content, "tokenizer_config.json": as_json(about)}, ids


if __name__ == "__main__":
    run(main)
