"""Our own configs: TOML files written and read again, and sizes that just fit. test_refusals.py has what does not."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmini import DataConfig, ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.config.published import config_to_json
from dsmini.config.schedule import SPELLINGS
from dsmini.reading import find_config
from tests.helpers.configs import CONFIGS, DSA, V4, refusal, released, written
from tests.helpers.released_configs import HF_V3, HF_V32, released_json
from tests.helpers.strategies import model_configs

HF_V4 = released_json("deepseek-v4-flash")
CASES = tomllib.loads((Path(__file__).parent / "cases.toml").read_text())
REFUSALS = tomllib.loads((Path(__file__).parent / "refusals.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_is_found_by_name_and_builds(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = ModelConfig.from_file(path.stem)
    assert RunConfig.from_file(path.stem).model == config == ModelConfig.from_file(path)
    with torch.device("meta"):
        assert Transformer(config).config == config


SHARE, ABOVE_0, PARTS = st.floats(0, 1), st.floats(1e-9, 1e9), st.integers(1, 4)
PATHS = st.none() | st.sampled_from(["book.txt", "a b/ü.txt", ".", 'quo"te\\', "[x]"]).map(Path)
TRAIN: dict[str, st.SearchStrategy[Any]] = {
    "steps": st.integers(1, 10**9),
    "seq_len": st.none() | st.just(3),
    "lr": st.none() | ABOVE_0,
    "lr_schedule": st.tuples(SHARE.map("warmup {}".format), SHARE.map("cosine to {}".format)),
    "beta1": st.floats(0, 0.999),
    "beta2": st.floats(0, 0.999),
    "weight_decay": st.just(0.0) | ABOVE_0,
    "grad_clip": ABOVE_0,
    "bias_speed": st.just(0.0) | ABOVE_0,
    "balance_counts": st.sampled_from(["published", "routed"]),
    "recompute": st.booleans(),
    "sample_prompt": st.text(min_size=1, max_size=9),
    "seed": st.integers(0, 2**63 - 1),
    "device": st.sampled_from(["auto", "cpu", "cuda:1"]),
    "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
    "threads": st.none() | PARTS,
}


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    """Draw any valid run, paths with spaces and umlauts among them."""
    grad_accum = draw(PARTS)
    drawn = {name: draw(values) for name, values in TRAIN.items()}
    train = TrainConfig(**drawn, grad_accum=grad_accum, batch_size=grad_accum * draw(PARTS))
    data = DataConfig(path=draw(PATHS), val_fraction=draw(st.floats(1e-6, 0.99)))
    return RunConfig(model=draw(model_configs()), data=data, train=train, out=draw(PATHS))


@given(run=runs())
def test_run_is_the_same_after_toml(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = written(tmp_path_factory.mktemp("run"), run.to_toml(), "x.toml")
    assert RunConfig.from_file(path) == run
    assert ModelConfig.from_file(path) == run.model


def test_empty_file_and_toy_file_are_the_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "", "x.toml")
    assert ModelConfig.from_file(path) == ModelConfig()
    assert RunConfig.from_file(path) == RunConfig.from_file(CONFIGS / "toy.toml") == RunConfig()


def test_unknown_name_of_a_config_lists_near_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, fix in REFUSALS["names"].items():
        assert refusal(find_config, Path(name)).startswith(f"there is no file {name}; {fix}")


@pytest.mark.parametrize("changes", CASES["fits"], ids=str)
def test_sizes_that_just_fit_build(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        Transformer(ModelConfig(**changes))


# what is refused


def check(said: str, sentence: str, path: Path | None = None) -> None:
    sentence = sentence.replace("{path}", str(path)).replace("{spellings}", SPELLINGS)
    beginning = sentence.removesuffix("...")
    if sentence.startswith("..."):
        assert sentence[3:] in said
    else:
        assert said.startswith(beginning) if sentence.endswith("...") else said == sentence


@pytest.mark.parametrize("kind", [RunConfig, ModelConfig])
@pytest.mark.parametrize("toml", REFUSALS["model"])
def test_wrong_model_is_refused(tmp_path: Path, toml: str, kind: Any) -> None:
    path = written(tmp_path, toml, "x.toml")
    check(refusal(kind.from_file, path), REFUSALS["model"][toml], path)


@pytest.mark.parametrize(("name", "base"), [("sparse", DSA), ("compressed", V4)])
def test_wrong_sizes_of_an_attention_are_refused(tmp_path: Path, name: str, base: dict[str, Any]) -> None:
    for toml, sentence in REFUSALS[name].items():
        path = written(tmp_path, tomli_w.dumps({"model": base | tomllib.loads(toml)}), "x.toml")
        check(refusal(ModelConfig.from_file, path), sentence)


@pytest.mark.parametrize("toml", REFUSALS["run"])
def test_wrong_run_is_refused(tmp_path: Path, toml: str) -> None:
    check(refusal(RunConfig.from_file, written(tmp_path, toml, "x.toml")), REFUSALS["run"][toml])


BASES = {"hugging_face": HF_V3, "hugging_face_sparse": HF_V32, "v4": HF_V4}


@pytest.mark.parametrize(("name", "toml"), [(name, toml) for name in BASES for toml in REFUSALS[name]])
def test_config_json_that_cannot_be_honoured_is_refused(tmp_path: Path, name: str, toml: str) -> None:
    raw, sentence = dict(BASES[name]), REFUSALS[name][toml]
    for key, value in tomllib.loads(toml).items():
        if isinstance(value, dict):
            known = {} if "type" in value else raw.get(key, {})  # changes of keys, or another kind of table
            value = {inner: each for inner, each in (known | value).items() if each != "left out"}
        raw[key] = value
    path = written(tmp_path, {key: value for key, value in raw.items() if value != "left out"})
    check(refusal(ModelConfig.from_file, path), sentence if sentence.startswith("...") else f"{path} {sentence}")


CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
RATIOS = HF_V4["compress_ratios"]


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"compress_ratios": [*RATIOS[:-1], 4]}, "for multi-token prediction"),
        ({"layer_types": ["sliding_attention"] * 43}, "in other words; keep one"),
        ({"layer_types": ["mamba"] * 43}, "cannot honour; want sliding_attention"),
        ({"mlp_layer_types": ["moe"] * 42 + ["hash_moe"]}, "want hash_moe for the first layers"),
        ({"mlp_layer_types": ["moe"] * 43}, "num_hash_layers=3, and 0 in other words"),
        ({"layer_types": [CSA] * 43, "compress_rates": {CSA: 8, HCA: 128}}, "a rate of 4 for the second"),
        ({"layer_types": [CSA] * 43, "compress_rates": {CSA: 4, HCA: 4}}, "a rate of 4 for the second"),
    ],
)
def test_lists_of_layers_without_a_meaning_are_refused(tmp_path: Path, changes: dict[str, Any], want: str) -> None:
    assert want in refusal(ModelConfig.from_file, written(tmp_path, HF_V4 | changes))


@pytest.mark.parametrize("content", REFUSALS["inference"])
def test_wrong_inference_json_is_refused(tmp_path: Path, content: str) -> None:
    path = written(tmp_path, content)
    check(refusal(ModelConfig.from_file, path), REFUSALS["inference"][content], path)


@pytest.mark.parametrize("value", ["'cosine to 0'", "[1]", "3", "'none'"])
def test_schedule_that_is_no_list_of_texts_is_refused(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, f"[train]\nlr_schedule = {value}", "x.toml")
    assert refusal(RunConfig.from_file, path).endswith(" is not a list of texts")


@pytest.mark.parametrize("kind", [RunConfig, ModelConfig])
def test_unreadable_file_is_refused(tmp_path: Path, kind: Any) -> None:
    missing, binary = tmp_path / "nope.toml", tmp_path / "y.toml"
    binary.write_bytes(b"\xff\xfe")
    assert refusal(kind.from_file, missing).startswith(
        f"there is no file {missing}; name a file, or one of chat, deepseek-v2, "
    )
    assert refusal(kind.from_file, tmp_path).startswith(f"cannot read {tmp_path}: it is a folder")
    assert refusal(kind.from_file, binary).startswith(f"cannot read {binary}: 'utf-8' codec")


@pytest.mark.parametrize("name", REFUSALS["unwritten"])
def test_parts_that_a_folder_has_no_words_for_are_not_written(name: str) -> None:
    for toml, sentence in REFUSALS["unwritten"][name].items():
        changes = {key: None if value == "none" else value for key, value in tomllib.loads(toml).items()}
        assert sentence in refusal(config_to_json, dataclasses.asdict(released(name)) | changes)
