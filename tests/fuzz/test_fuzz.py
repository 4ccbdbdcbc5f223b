"""Damaged and hostile files: whatever they hold, they work or are refused in one sentence that names the file.

Every case is made from its number alone, so a failure names a seed that repeats it.
"""

import dataclasses
import json
import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer, load_pretrained
from dsmini.atomic import as_json
from dsmini.checkpoint.manifest import MANIFEST, _fingerprint
from dsmini.checkpoint.run_folder import read_summary, run_config, run_tokenizer
from dsmini.checkpoint.trained_model import load_run
from dsmini.checkpoint.training_state import RunState, save_checkpoint
from dsmini.data.cache import _damage
from dsmini.text.text_side import read_text_side
from dsmini.text.tokenizer import BPETokenizer
from dsmini.training.record import StepRecord, read_records
from tests.conftest import randomise
from tests.helpers import folders
from tests.helpers.commands import run_all
from tests.helpers.mutations import damaged, edited, edited_toml, with_edited_header
from tests.helpers.text_folders import save_text_side, save_tokenizer

SIZES = {
    **{"vocab_size": 13, "dim": 8, "inter_dim": 8, "moe_inter_dim": 4, "n_layers": 2, "n_heads": 1, "q_lora_rank": 4},
    **{"kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "n_routed_experts": 4},
    **{"n_activated_experts": 2, "n_expert_groups": 2, "n_limited_groups": 1, "max_seq_len": 16},
}
SECONDS = 3.0
"""Time of this process that one case may take, far more than any needs."""
Files = dict[str, bytes]


def files_of(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lay_out(files: Files, folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def mutate(name: str, content: bytes, draw: random.Random) -> bytes:
    """Damage a file by its kind: half of the time as bytes, else as what it holds."""
    kinds = {".json": edited, ".safetensors": with_edited_header, ".toml": edited_toml}
    return draw.choice([damaged, kinds.get(Path(name).suffix, damaged)])(content, draw)


def hold(
    files: Files, names: list[str], folder: Path, seeds: range, use: Callable[[Path], object], least: float = 0.2
) -> None:
    """Damage one of the named files for each seed, use the folder, and fail for every outcome that is not known.

    Args:
        least: share of the cases that must be refused; fewer would mean that the damage is not met.
    """
    lay_out(files, folder)
    unknown, refused = [], 0
    for seed in seeds:
        draw = random.Random(seed)
        name = draw.choice(names)
        (folder / name).write_bytes(mutate(name, files[name], draw))
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                use(folder)
        except ValueError as error:
            refused += 1
            said = str(error)
            named = any(part in said for part in (str(folder), Path(name).name, Path(name).parent.name or name))
            if not named or len(said) > 10_000 or not said.replace("\n", " ").isprintable():
                unknown.append(f"seed {seed}, {name}: {said[:300]!r}")
        except BaseException as error:  # a panic of a library is not an Exception
            unknown.append(f"seed {seed}, {name}: {type(error).__name__}: {str(error)[:300]!r}")
        if time.process_time() - start > SECONDS:
            unknown.append(f"seed {seed}, {name}: {time.process_time() - start:.1f} s")
        (folder / name).write_bytes(files[name])
    assert not unknown, "\n".join(unknown)
    assert refused >= least * len(seeds)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return randomise(Transformer(ModelConfig(**SIZES)))


@pytest.fixture(scope="module")
def plain(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Files:
    place = tmp_path_factory.mktemp("plain") / "m"
    rope = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0}
    raw = folders.config_json(model.config, rope_scaling=rope, eos_token_id=3)
    return files_of(folders.write(place, folders.tensors_of(model), raw))


def test_published_folder(plain: Files, tmp_path: Path) -> None:
    hold(plain, list(plain), tmp_path, range(100), load_pretrained)


def test_sharded_fp8_folder(model: Transformer, tmp_path: Path) -> None:
    tensors, _ = folders.in_fp8(folders.tensors_of(model))
    raw = folders.config_json(model.config, quantization_config=folders.QUANTIZED)
    files = files_of(folders.write(tmp_path / "m", tensors, raw, shards=2))
    names = [name for name in files if name.endswith(".json")] * 2 + list(files)
    hold(files, names, tmp_path / "m", range(50), lambda folder: load_pretrained(folder, fp8="keep"))


def test_inference_json(tmp_path: Path) -> None:
    raw = dataclasses.asdict(ModelConfig(**SIZES))
    known = {key: raw[key] for key in SIZES} | {"score_func": "sigmoid", "dtype": "fp8"}
    files = {"config_1B.json": json.dumps(known).encode()}
    hold(files, list(files), tmp_path, range(60), lambda folder: ModelConfig.from_file(folder / "config_1B.json"))


def test_text_side(tmp_path: Path) -> None:
    files = files_of(save_text_side(tmp_path / "m"))
    files |= {
        "config.json": json.dumps({"vocab_size": 500, "eos_token_id": 1}).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [1, 2], "do_sample": True}).encode(),
    }
    names = [name for name in files if name != "tokenizer.json"]
    side = lambda folder: read_text_side(folder, tokenizer="bytes")  # noqa: E731
    hold(files, names, tmp_path / "m", range(50), side)
    hold(files, ["tokenizer_config.json"], tmp_path / "m", range(12), lambda folder: read_text_side(folder, chat=True))


def test_tokenizer(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer.json", 300, bos=True)
    files = files_of(tmp_path)
    content = json.loads(files["tokenizer.json"])
    content["model"] |= {"vocab": dict(list(content["model"]["vocab"].items())[:9]), "merges": []}
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}
    small = {"tokenizer.json": json.dumps(content).encode()}  # in which most damage meets a step

    def use(folder: Path) -> None:
        tokenizer = BPETokenizer(folder / "tokenizer.json")
        tokenizer.decode(tokenizer.encode("Hello <｜User｜> wörld").tolist())
        assert len(tokenizer.beginning) < 10

    hold(files, list(files), tmp_path, range(40), use)
    hold(small, list(small), tmp_path, range(200), use)


def test_toml(tmp_path: Path) -> None:
    text = RunConfig(out=Path("runs/x")).to_toml().encode()
    hold({"x.toml": text}, ["x.toml"], tmp_path, range(120), lambda folder: RunConfig.from_file(folder / "x.toml"))
    hold({"x.toml": text}, ["x.toml"], tmp_path, range(40), lambda folder: ModelConfig.from_file(folder / "x.toml"))


@pytest.fixture(scope="module")
def run_files(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Return the files of a run with two checkpoints."""
    place = tmp_path_factory.mktemp("run") / "x"
    place.mkdir()
    config = RunConfig(model=model.config, train=TrainConfig(steps=4, dtype="float32", device="cpu"), out=place)
    fields = {field.name: 1 for field in dataclasses.fields(StepRecord) if field.name != "scores"}
    row = fields | {"skipped": False, "layer_max_vio": [1.0], "loads": [[1]], "val_loss": None}
    for step in (2, 4):
        state = RunState(
            step=step,
            sequences=step,
            average_updates=0,
            skipped=0,
            skipped_in_a_row=0,
            best_val_loss=1.0,
            best_val_step=1,
            seconds=1.0,
            corpus_sha256="0",
            row=row,
        )
        save_checkpoint(config, {"model": model.state_dict(), "rng": {"cpu": torch.get_rng_state()}}, state)
    (place / "config.toml").write_text(config.to_toml())
    (place / "metrics.jsonl").write_text("".join(json.dumps(row | {"step": step}) + "\n" for step in range(1, 5)))
    (place / "summary.json").write_text(as_json({"steps": 4, "val_loss": 1.0}))
    return files_of(place)


def look_at(run: Path) -> None:
    """Do all that is done with a run's folder, apart from training."""
    read_summary(run).get("steps")
    assert len(read_records(run)) <= 4
    run_tokenizer(run, run_config(run))
    load_run(run, say=lambda line: None)


def test_run_folder(run_files: Files, tmp_path: Path) -> None:
    hold(run_files, [*run_files, *["config.toml"] * 3], tmp_path, range(30), look_at, least=0.1)
    own = [name for name in run_files if name in ("summary.json", "metrics.jsonl")]
    lay_out(run_files, tmp_path)
    for seed in range(40):  # what is derived is never in the way
        name = random.Random(seed).choice(own)
        (tmp_path / name).write_bytes(mutate(name, run_files[name], random.Random(seed)))
        assert read_summary(tmp_path) is not None
        assert len(read_records(tmp_path)) <= 5
        (tmp_path / name).write_bytes(run_files[name])


def test_checkpoint_whose_checksums_are_right(run_files: Files, tmp_path: Path) -> None:
    """The damage is older than the manifest, so that the readers meet it; the earlier checkpoint serves."""
    inside = [name for name in run_files if "step-000004" in name and not name.endswith(MANIFEST)]
    last = tmp_path / "checkpoints" / "step-000004"

    def use(folder: Path) -> None:
        listed = json.loads((last / MANIFEST).read_text())["files"]
        files = {name: _fingerprint(last / name) for name in listed}
        (last / MANIFEST).write_text(as_json({"format": 1, "files": files}))
        load_run(folder, say=lambda line: None)
        load_run(last, say=lambda line: None)

    hold(run_files, inside, tmp_path, range(24), use)


def test_corpus_meta_is_rebuilt_whatever_it_holds(tmp_path: Path) -> None:
    meta = {
        **{"format": 1, "files": 1, "skipped": 0, "split": "x", "train_tokens": 4, "val_tokens": 2, "val_bytes": 2},
        **{"rearranged": 0, "dtype": "uint8", "sha256": "0"},
    }
    for seed in range(40):
        content = json.dumps(meta).encode()
        (tmp_path / "meta.json").write_bytes(mutate("meta.json", content, random.Random(seed)))
        (tmp_path / "train.bin").write_bytes(b"1234")
        (tmp_path / "val.bin").write_bytes(b"12")
        assert isinstance(_damage(tmp_path), str)


@pytest.mark.parametrize("kind", ["fifo", "folder", "null", "broken"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer_config.json", "generation_config.json"]
)
def test_what_is_not_a_regular_file_is_refused(plain: Files, tmp_path: Path, kind: str, name: str) -> None:
    lay_out(plain, tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    makers: dict[str, Callable[[Path], object]] = {
        "fifo": os.mkfifo,
        "folder": Path.mkdir,
        "null": lambda path: path.symlink_to("/dev/null"),
        "broken": lambda path: path.symlink_to("nothing"),
    }
    makers[kind](tmp_path / name)
    with pytest.raises(ValueError, match=name):
        load_pretrained(tmp_path) if name in plain else read_text_side(tmp_path, tokenizer="bytes")


def test_command_lines(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[model]\nn_shared_experts = 1000000000000000000\n")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    (tmp_path / "nul.toml").write_text('out = "a\\u0000b"\n')
    huge, name = 10**18, "a" * 5000
    cases = {
        "dsmini.train": [
            *(f"--model.{key} {huge}" for key in ("dim", "n-layers", "n-routed-experts")),
            *(f"--model.{key} 2000000000" for key in ("vocab-size", "moe-inter-dim")),
            *(f"--train.batch-size {huge}", "--train.batch-size 100000000", f"--model.dim {'9' * 5000}"),
            *("--train.lr 1e999", f"--train.lr {'9' * 400}", "x.toml", "deep.toml", "nul.toml", f"{name}.toml"),
            *(f"--out {name}", f"--data.path {name}", f"--resume {name}", "--model.n-layers 9999 --model.dim 100000"),
        ],
        "dsmini.generate": [name, f"x.toml --seed {'9' * 5000}", f". --tokenizer {name}"],
        "dsmini.convert": [f"{name} b", f". {name}", f". b --shard-size {10**12}GB", f". b --shard-size {'9' * 5000}"],
    }
    listed = [(module, arguments) for module, several in cases.items() for arguments in several]
    for (module, arguments), (status, said) in zip(listed, run_all(listed, tmp_path), strict=True):
        assert status == 2, (module, arguments[:80], said[-2000:])
        assert "Traceback" not in said
        assert len(said) < 20_000
