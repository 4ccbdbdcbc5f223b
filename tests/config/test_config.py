"""Our own configs: TOML files written and read again, and sizes that just fit. test_refusals.py has what does not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmini import DataConfig, ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.reading import find_config
from tests.helpers.configs import CONFIGS, refusal, written
from tests.helpers.strategies import model_configs


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_is_found_by_name_from_anywhere_and_builds(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("toy-dens", "did you mean toy-dense or toy-dsa?"),
        ("configs/toy-dsa.toml", "did you mean toy-dsa or toy-dense or toy-mha?"),
        ("deepseek-v3.1", "did you mean deepseek-v3.2 or deepseek-v3 or deepseek-v2?"),
        ("qqq", "name a file, or one of chat, deepseek-v2, deepseek-v2-lite, "),
    ],
)
def test_unknown_name_of_a_config_lists_near_ones(
    name: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(find_config, Path(name)).startswith(f"there is no file {name}; {fix}")


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 2**26, "dim": 2**24},
        {"n_limited_groups": 4, "n_activated_experts": 16},
        {"attention": "mha", "qk_rope_head_dim": 7},
        {"original_seq_len": 256, "beta_fast": 0.5},
        {"n_expert_groups": 1, "n_limited_groups": 1, "topk_method": "greedy"},
        {"n_expert_groups": 16, "n_limited_groups": 4, "topk_method": "group_limited_greedy"},
        {"n_routed_experts": 1, "n_activated_experts": 1, "n_expert_groups": 1, "n_limited_groups": 1},
        {"mscale": 0, "mscale_all_dim": 0},
    ],
)
def test_sizes_that_just_fit_build(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        Transformer(ModelConfig(**changes))
