"""Damaged and hostile files: whatever they hold, they work or are refused in one sentence that names the file.

Every case is made from its number alone, so a failure names a seed that repeats it.
"""

import dataclasses
import json
import random
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dsmini import DataConfig, ModelConfig, RunConfig, Transformer, load_pretrained
from dsmini.atomic import as_json
from dsmini.checkpoint.run_folder import read_summary, run_config, run_tokenizer
from dsmini.checkpoint.training_state import MANIFEST, load_run, write_manifest
from dsmini.data.documents import Source
from dsmini.data.tokenized import CorpusCache
from dsmini.text.chat import read_text_side
from dsmini.text.tokenizer import BPETokenizer, ByteTokenizer
from tests.conftest import MODELS, randomise
from tests.helpers import folders
from tests.helpers.configs import refusal
from tests.helpers.corpora import Files, lay_out
from tests.helpers.runs import new_run, read_records
from tests.helpers.text_folders import save_text_side, save_tokenizer

SIZES = MODELS["tiny"]
SECONDS = 20.0
"""CPU time of this process that one case may take, some hundred times what any needs."""


class Target(NamedTuple):
    """Files, and what reads them."""

    files: Files
    use: Callable[[Path], object]
    names: Sequence[str] = ()
    """The files to damage, each as often as it is named; all where there are none."""
    least: float = 0.2
    """Share of all cases that must be refused; fewer would mean that the damage is not met."""


def files_of(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@cache
def model() -> Transformer:
    torch.manual_seed(0)
    return randomise(Transformer(ModelConfig(**SIZES)))


def published_folder(place: Path) -> Target:
    rope = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0}
    raw = folders.config_json(model().config, rope_scaling=rope, eos_token_id=3)
    return Target(files_of(folders.write(place, folders.tensors_of(model()), raw)), load_pretrained)


def sharded_fp8_folder(place: Path) -> Target:
    tensors, _ = folders.in_fp8(folders.tensors_of(model()))
    raw = folders.config_json(model().config, quantization_config=folders.QUANTIZED)
    files = files_of(folders.write(place, tensors, raw, shards=2))
    names = [name for name in files if name.endswith(".json")] * 2 + list(files)
    return Target(files, partial(load_pretrained, fp8="keep"), names)


def inference_json(place: Path) -> Target:
    raw = dataclasses.asdict(ModelConfig(**SIZES))
    known = {key: raw[key] for key in SIZES} | {"score_func": "sigmoid", "dtype": "fp8"}
    files = {"config_1B.json": json.dumps(known).encode()}
    return Target(files, lambda folder: ModelConfig.from_file(folder / "config_1B.json"))


def text_side(place: Path) -> Target:
    files = files_of(save_text_side(place)) | {
        "config.json": json.dumps({"vocab_size": 500, "eos_token_id": 1}).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [1, 2], "do_sample": True}).encode(),
    }
    names = [name for name in files if name != "tokenizer.json"]
    return Target(files, partial(read_text_side, tokenizer="bytes"), names)


def chat_template(place: Path) -> Target:
    return Target(files_of(save_text_side(place)), partial(read_text_side, chat=True), ["tokenizer_config.json"])


def tokenizer(place: Path) -> Target:
    def use(folder: Path) -> None:
        tokenizer = BPETokenizer(folder / "tokenizer.json")
        tokenizer.decode(tokenizer.encode("Hello <｜User｜> wörld").tolist())
        assert len(tokenizer.beginning) < 10

    place.mkdir()
    save_tokenizer(place / "tokenizer.json", 300, bos=True)
    return Target(files_of(place), use)


def small_tokenizer(place: Path) -> Target:
    """Return a tokenizer in which most damage meets a step."""
    whole = tokenizer(place)
    content = json.loads(whole.files["tokenizer.json"])
    content["model"] |= {"vocab": dict(list(content["model"]["vocab"].items())[:9]), "merges": []}
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}
    return whole._replace(files={"tokenizer.json": json.dumps(content).encode()})


def run_toml(place: Path) -> Target:
    text = RunConfig(out=Path("runs/x")).to_toml().encode()
    return Target({"x.toml": text}, lambda folder: RunConfig.from_file(folder / "x.toml"))


def run_files(place: Path) -> Files:
    """Return the files of a run with two checkpoints."""
    assert new_run(place, steps=4, eval_every=100).train()
    (place / "summary.json").write_text(as_json({"steps": 4, "val_loss": 1.0}))
    return files_of(place)


def run_folder(place: Path) -> Target:
    def use(run: Path) -> None:
        """Do all that is done with a run's folder, apart from training."""
        read_summary(run).get("steps")
        assert len(read_records(run)) <= 4
        run_tokenizer(run, run_config(run))
        load_run(run, say=lambda line: None)

    files = run_files(place)
    return Target(files, use, [*files, *["config.toml"] * 3], least=0.1)


def checkpoint_whose_checksums_are_right(place: Path) -> Target:
    """Return a checkpoint with damage older than its manifest, so that the readers meet it; the earlier one serves."""

    def use(run: Path) -> None:
        last = run / "checkpoints/step-000004"
        write_manifest(last, json.loads((last / MANIFEST).read_text())["files"])
        load_run(run, say=lambda line: None)
        load_run(last, say=lambda line: None)

    files = run_files(place)
    left_out = (MANIFEST, "optimizer.safetensors")
    return Target(files, use, [name for name in files if "step-000004" in name and not name.endswith(left_out)])


def corpus_meta(place: Path) -> Target:
    """Return an entry of the cache of corpora; it is rebuilt, whatever meta.json holds."""
    counts = dict.fromkeys(("files", "rearranged"), 1) | {"train_tokens": 4, "val_tokens": 2, "val_bytes": 2}
    meta = json.dumps(counts | {"source": "x", "split": "x", "sha256": "0"}).encode()

    def use(folder: Path) -> None:
        source = Source(root=folder, words="", kind="file", documents=[])
        cache = CorpusCache(folder, source, ByteTokenizer(), DataConfig(), seed=0)
        cache.entry = folder
        assert refusal(cache._read)

    return Target({"meta.json": meta, "train.bin": b"1234", "val.bin": b"12"}, use, ["meta.json"], least=0)


SEEDS: dict[Callable[[Path], Target], int] = {
    **{published_folder: 100, sharded_fp8_folder: 50, inference_json: 60, text_side: 50, chat_template: 12},
    **{tokenizer: 40, small_tokenizer: 200, run_toml: 120, run_folder: 30},
    **{checkpoint_whose_checksums_are_right: 24, corpus_meta: 40},
}
FEW = 12
"""Seeds of the default part."""


def mutate(name: str, content: bytes, draw: random.Random) -> bytes:
    """Damage a file by its kind: half of the time as bytes, else as what it holds."""
    kinds = {".json": edited, ".safetensors": with_edited_header, ".toml": edited_toml}
    return draw.choice([damaged, kinds.get(Path(name).suffix, damaged)])(content, draw)


def outcome(target: Target, folder: Path, name: str) -> str:
    """Return "works", "refused" for a sentence that names the file, or what happened otherwise."""
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.use(folder)
        what = "works"
    except ValueError as error:
        said = str(error)
        named = any(part in said for part in (str(folder), Path(name).name, Path(name).parent.name or name))
        one_line = len(said) <= 10_000 and said.replace("\n", " ").isprintable()
        what = "refused" if named and one_line else repr(said[:300])
    except BaseException as error:  # a panic of a library is not an Exception
        what = f"{type(error).__name__}: {str(error)[:300]!r}"
    seconds = time.process_time() - start
    return what if seconds < SECONDS else f"{what} after {seconds:.1f} s"


@pytest.mark.parametrize("part", ["few", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", SEEDS, ids=lambda make: make.__name__)
def test_damaged_files_work_or_are_refused(tmp_path: Path, make: Callable[[Path], Target], part: str) -> None:
    target = make(tmp_path / "original")
    seeds = range(FEW if part == "few" else SEEDS[make])
    folder = lay_out(tmp_path / "m", target.files)
    outcomes: dict[str, str] = {}
    for seed in seeds:
        draw = random.Random(seed)
        name = draw.choice(target.names or list(target.files))
        (folder / name).write_bytes(mutate(name, target.files[name], draw))
        outcomes[f"seed {seed}, {name}"] = outcome(target, folder, name)
        lay_out(folder, target.files)
    assert not {seed: what for seed, what in outcomes.items() if what not in ("works", "refused")}
    assert part == "few" or list(outcomes.values()).count("refused") >= target.least * len(seeds)


HUGE, NAME = 10**18, "a" * 5000
COMMANDS = {
    "train": [
        *(f"--model.{key} {HUGE}" for key in ("dim", "n-layers", "n-routed-experts")),
        *(f"--model.{key} 2000000000" for key in ("vocab-size", "moe-inter-dim")),
        *(f"--train.batch-size {HUGE}", "--train.batch-size 100000000", f"--model.dim {'9' * 5000}"),
        *("--train.lr 1e999", f"--train.lr {'9' * 400}", "x.toml", "deep.toml", "nul.toml", f"{NAME}.toml"),
        *(f"--out {NAME}", f"--data.path {NAME}", f"--resume {NAME}", "--model.n-layers 999 --model.dim 1000000"),
    ],
    "generate": [NAME, f"x.toml --seed {'9' * 5000}", f". --tokenizer {NAME}"],
    "convert": [f"{NAME} b", f". {NAME}", f". b --shard-size {10**12}GB", f". b --shard-size {'9' * 5000}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_hostile_command_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    (tmp_path / "x.toml").write_text("[model]\nn_shared_experts = 1000000000000000000\n")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    (tmp_path / "nul.toml").write_text('out = "a\\u0000b"\n')
    monkeypatch.chdir(tmp_path)
    main = import_module(f"dsmini.{command}").main
    for arguments in COMMANDS[command]:
        assert len(refusal(main, arguments.split())) < 20_000, arguments[:80]


# seeded damage to files: flipped bits, lost and repeated parts, and hostile values inside JSON and TOML

RAW = [
    *("NaN", "1e999", "-1e999", "9" * 5000, "1" + "0" * 400, "[" * 300 + "]" * 300),
    *("[" * 100_000, '{"a":' * 100_000),  # which are not JSON
]
"""Texts in the place of a value."""
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 0.5, -0.5, 1e308, 10**9, 10**18, 10**30, 2**31 - 1, 2**63 - 1, 2**63, 2**64),
    *("", "x", "1", "none", "a\0b", "a" * 5000, "\ud800", "\x1b[31m\x07", "../../x", "é\u202e", [], {}, [1, 2], [[]]),
    *([0.5], ["a"], {"a": 1}, {"type": "yarn"}, {"type": []}, [10**30], [-1, None], [2**31] * 4),
]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return a file's bytes with one kind of damage."""
    n = max(1, len(content))
    i, j = sorted((draw.randrange(n), draw.randrange(n)))
    flipped = bytearray(content)
    for _ in range(draw.choice([1, 20]) if content else 0):
        flipped[draw.randrange(n)] ^= 1 << draw.randrange(8)
    kinds = [
        *(b"", content[:i], content[:i] + content[j:], content[:j] + content[i:], content + draw.randbytes(9)),
        *(content[:i] + draw.randbytes(8) + content[i:], content[:i] + b"\xff\xfe" + content[i:]),
        *(content[:i] + bytes(min(40, n - i)) + content[i + 40 :], bytes(flipped), bytes(flipped), draw.randbytes(100)),
    ]
    return draw.choice(kinds)


def edited(content: bytes, draw: random.Random) -> bytes:
    """Return JSON with a hostile value, a lost, renamed or repeated key somewhere in it."""
    value = json.loads(content)
    if draw.random() < 0.1:
        return draw.choice([*RAW, *map(json.dumps, VALUES)]).encode()
    holder = draw.choice([one for one in _holders(value) if one])
    key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    kind, text = draw.randrange(10), None
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):
        text = f"{json.dumps(holder[key])}, {json.dumps(key)}: {json.dumps(holder[key])}"
    elif kind in (3, 4):
        text = draw.choice(RAW)
    else:
        holder[key] = draw.choice(VALUES)
    if text is not None:
        holder[key] = "\x01"
    return json.dumps(value).replace('"\\u0001"', text or "").encode()


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _holders(part)


def with_edited_header(content: bytes, draw: random.Random) -> bytes:
    """Return a safetensors file whose header is edited as JSON, and whose length of it is right."""
    (length,) = struct.unpack("<Q", content[:8])
    header = edited(content[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def edited_toml(content: bytes, draw: random.Random) -> bytes:
    """Return TOML with a hostile value, a lost or repeated line."""
    lines = content.decode().splitlines()
    i = draw.randrange(len(lines))
    kind = draw.randrange(8)
    if kind == 0:
        del lines[i]
    elif kind == 1:
        lines.insert(draw.randrange(len(lines)), lines[i])
    elif kind == 2:
        new = ["[" * 2000, "a." * 90000 + "a = 1", "a = " + "[" * 100_000, "[a]\n" * 9, "=", "["]
        lines.insert(i, draw.choice(new))
    else:
        texts = [*RAW, "inf", "nan", "0x" + "f" * 5000, "1979-05-27", *map(json.dumps, VALUES)]
        lines[i] = f"{lines[i].partition('=')[0]} = {draw.choice(texts)}"
    return "\n".join(lines).encode()
