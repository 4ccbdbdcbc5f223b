"""The sentences of wrong configs; refusals.toml lists them."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from dsmini import ModelConfig, RunConfig
from dsmini.config.schedule import SPELLINGS
from tests.helpers.configs import DSA, V4, refusal, written
from tests.helpers.released_configs import HF_V3, HF_V32

REFUSALS = tomllib.loads((Path(__file__).parent / "refusals.toml").read_text(encoding="utf-8"))


def check(said: str, sentence: str, path: Path | None = None) -> None:
    sentence = sentence.replace("{path}", str(path)).replace("{spellings}", SPELLINGS)
    beginning = sentence.removesuffix("...")
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


@pytest.mark.parametrize(
    ("base", "toml", "sentence"),
    [
        (base, *case)
        for name, base in (("hugging_face", HF_V3), ("hugging_face_sparse", HF_V32))
        for case in REFUSALS[name].items()
    ],
)
def test_config_json_that_cannot_be_honoured_is_refused(tmp_path: Path, base: Any, toml: str, sentence: str) -> None:
    ((key, value),) = tomllib.loads(toml).items()
    if key == "rope_scaling" and isinstance(value, dict) and "type" not in value:  # changes of YaRN's keys
        value = base[key] | value
        value = {name: number for name, number in value.items() if number != "left out"}
    raw = base | {key: value}
    path = written(tmp_path, {name: each for name, each in raw.items() if each != "left out"})
    check(refusal(ModelConfig.from_file, path), f"{path} {sentence}")


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
