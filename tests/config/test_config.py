"""Our own configs: TOML files written and read again, sizes that fit, and the errors for those that do not."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmini import DataConfig, ModelConfig, RunConfig, TrainConfig, Transformer
from tests.helpers.configs import CONFIGS, DSA, refusal, written
from tests.helpers.strategies import model_configs

# TOML


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_file_builds(path: Path) -> None:
    config = ModelConfig.from_file(path)
    assert RunConfig.from_file(path).model == config
    with torch.device("meta"):
        assert Transformer(config).config == config


def runs() -> st.SearchStrategy[RunConfig]:
    """Any valid run, paths with spaces and umlauts among them."""
    share = st.floats(0, 1)
    above_0 = st.floats(1e-9, 1e9)
    paths = st.none() | st.sampled_from(["book.txt", "a b/ü.txt", ".", 'quo"te\\', "[x]"]).map(Path)
    parts = st.integers(1, 4)

    @st.composite
    def train(draw: st.DrawFn) -> TrainConfig:
        grad_accum = draw(parts)
        return TrainConfig(
            steps=draw(st.integers(1, 10**9)),
            batch_size=grad_accum * draw(parts),
            grad_accum=grad_accum,
            seq_len=draw(st.none() | st.just(3)),
            lr=draw(above_0),
            lr_schedule=(f"warmup {draw(share)}", f"cosine to {draw(share)}"),
            beta1=draw(st.floats(0, 0.999)),
            beta2=draw(st.floats(0, 0.999)),
            weight_decay=draw(st.just(0.0) | above_0),
            grad_clip=draw(above_0),
            bias_speed=draw(st.just(0.0) | above_0),
            balance_counts=draw(st.sampled_from(["published", "routed"])),
            recompute=draw(st.booleans()),
            sample_prompt=draw(st.text(min_size=1, max_size=9)),
            seed=draw(st.integers(0, 2**63 - 1)),
            device=draw(st.sampled_from(["auto", "cpu", "cuda:1"])),
            dtype=draw(st.sampled_from(["auto", "float32", "bfloat16"])),
            threads=draw(st.none() | parts),
        )

    data = st.builds(DataConfig, path=paths, val_fraction=st.floats(1e-6, 0.99))
    return st.builds(RunConfig, model=model_configs(), data=data, train=train(), out=paths)


@given(run=runs())
def test_run_is_the_same_after_toml(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = written(tmp_path_factory.mktemp("run"), run.to_toml(), "x.toml")
    assert RunConfig.from_file(path) == run
    assert ModelConfig.from_file(path) == run.model


def test_toml_has_every_field() -> None:
    text = RunConfig(out=Path("runs/x")).to_toml()
    for part in (ModelConfig, DataConfig, TrainConfig):
        for f in dataclasses.fields(part):
            assert re.search(rf"^{f.name} = ", text, re.MULTILINE), f.name
    assert 'out = "runs/x"' in text


def test_empty_file_is_the_toy(tmp_path: Path) -> None:
    path = written(tmp_path, "", "x.toml")
    assert ModelConfig.from_file(path) == ModelConfig()
    assert RunConfig.from_file(path) == RunConfig()


@pytest.mark.parametrize("kind", [RunConfig, ModelConfig])
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[model]\nn_layer = 3", "unknown key 'model.n_layer' in x.toml; did you mean 'model.n_layers'?"),
        ("[model]\nqqq = 3", "unknown key 'model.qqq' in x.toml; known are vocab_size, dim, "),
        ("model = 3", "'model' in x.toml is 3, want a table [model]"),
        ("[model]\nn_layers = '3'", "x.toml: n_layers='3' is not a whole number"),
        ("[model]\nn_layers = 3.0", "x.toml: n_layers=3.0 is not a whole number"),
        ("[model]\nn_layers = true", "x.toml: n_layers=True is not a whole number"),
        ("[model]\nn_layers = 'none'", "x.toml: n_layers='none' is not a whole number"),
        ("[model]\nq_lora_rank = 1.5", 'x.toml: q_lora_rank=1.5 is not a whole number or "none"'),
        ("[model]\nrope_theta = 'x'", "x.toml: rope_theta='x' is not a finite number"),
        ("[model]\nrope_theta = inf", "x.toml: rope_theta=inf is not a finite number"),
        ("[model]\nrope_theta = nan", "x.toml: rope_theta=nan is not a finite number"),
        ("[model]\nnorm_topk_prob = 1", "x.toml: norm_topk_prob=1 is not true or false"),
        (
            "[model]\nattention = 'gqaa'",
            "x.toml: attention='gqaa' is not one of 'mla', 'dsa', 'mha', 'gqa', 'mqa'; did you mean 'gqa'?",
        ),
        ("[model]\nn_routed_experts = 10", "x.toml: n_routed_experts=10 is not divisible by n_expert_groups=4; use 8"),
        ("[model", "cannot read {path}: Expected ']'"),
    ],
)
def test_wrong_model_in_toml_is_refused(tmp_path: Path, kind: Any, text: str, sentence: str) -> None:
    path = written(tmp_path, text, "x.toml")
    assert refusal(kind.from_file, path).startswith(sentence.format(path=path))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[modell]\nn_layers = 3", "unknown key 'modell' in x.toml; did you mean 'model'?"),
        ("n_layers = 3", "unknown key 'n_layers' in x.toml; known are model, data, train, parallel, out"),
        ("[train]\nstep = 4", "unknown key 'train.step' in x.toml; did you mean 'train.steps'?"),
        ("[data]\npaths = 'a'", "unknown key 'data.paths' in x.toml; did you mean 'data.path'?"),
        ("[data]\npath = 3", 'x.toml: data.path=3 is not a path or "none"'),
        ("[data]\nval_fraction = 1.0", "x.toml: data.val_fraction=1.0 is not between 0 and 1; use for example 0.1"),
        ("[train]\nlr = 'x'", "x.toml: train.lr='x' is not a finite number"),
        ("[train]\nsteps = 0", "x.toml: train.steps=0 is not positive; use more than 0"),
        ("[train]\nsteps = 1000000000001", "x.toml: train.steps=1000000000001 is too many; use 10^12 or fewer"),
        ("[train]\nseed = -1", "x.toml: train.seed=-1 is negative; use 0 or more"),
        ("[train]\nbeta1 = 2", "x.toml: train.beta1=2.0 is not from 0 to below 1; use for example 0.9"),
        ("[train]\nsample_prompt = ''", "x.toml: train.sample_prompt is empty; give it a character or more"),
        ("[train]\nthreads = 0", "x.toml: train.threads=0 is not positive; use 1 or more, or leave it out"),
        (
            "[train]\nbatch_size = 3\ngrad_accum = 2",
            "x.toml: train.batch_size=3 is not divisible by train.grad_accum=2; use 2 or 4",
        ),
        (
            "[train]\nseq_len = 999",
            "x.toml: train.seq_len=999 is longer than model.max_seq_len=256; shorten the one or raise the other",
        ),
        (
            "[train]\nseq_len = 1",
            "x.toml: a sequence of 1 tokens is too short for model.n_mtp_layers=1; use at least 2",
        ),
    ],
)
def test_wrong_run_in_toml_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    assert refusal(RunConfig.from_file, written(tmp_path, text, "x.toml")) == sentence


@pytest.mark.parametrize("kind", [RunConfig, ModelConfig])
def test_unreadable_file_is_refused(tmp_path: Path, kind: Any) -> None:
    missing = tmp_path / "nope.toml"
    assert refusal(kind.from_file, missing) == f"there is no file {missing}; check the name"
    assert refusal(kind.from_file, tmp_path).startswith(f"cannot read {tmp_path}: it is a folder")
    binary = tmp_path / "y.toml"
    binary.write_bytes(b"\xff\xfe")
    assert refusal(kind.from_file, binary).startswith(f"cannot read {binary}: 'utf-8' codec")


# Sizes that do not fit


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_layers": 0}, "n_layers=0 is not positive; use 1 or more"),
        ({"kv_lora_rank": -4}, "kv_lora_rank=-4 is not positive; use 1 or more"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1 is negative; use 0 or more"),
        ({"norm_eps": 1e22}, "norm_eps=1e+22 is too large; use 1 or less"),
        ({"init_std": 1e22}, "init_std=1e+22 is too large; use 10 or less"),
        ({"rope_theta": 1e31}, "rope_theta=1e+31 is too large; use 1e+30 or less"),
        (
            {"vocab_size": 2**26, "dim": 2**25},
            "dim=33554432, inter_dim=512, n_heads=4 and the other sizes make a matrix of 2,251,799,813,685,248 "
            "numbers; use smaller ones, which make at most 1,125,899,906,842,624",
        ),
        ({"mscale": -0.5}, "mscale=-0.5 is negative; use 0 or more"),
        (
            {"n_dense_layers": 6},
            "n_dense_layers=6 is more than the 5 blocks there are (n_layers + n_mtp_layers); use 5 or fewer",
        ),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7 is odd; RoPE turns pairs, use 8"),
        ({"attention": "mha", "qk_nope_head_dim": 33}, "qk_nope_head_dim=33 is odd; RoPE turns pairs, use 34"),
        ({"attention": "gqa"}, "attention='gqa' needs n_kv_heads; set it to a divisor of n_heads"),
        ({"attention": "gqa", "n_kv_heads": 3}, "n_heads=4 is not divisible by n_kv_heads=3; use 3 or 6"),
        (
            {"n_kv_heads": 2},
            "n_kv_heads=2 has no meaning with attention='mla'; leave it out, or use attention='gqa'",
        ),
        (
            {"attention": "dsa"},
            "attention='dsa' needs index_n_heads, index_head_dim, index_topk; "
            "V3.2 has 64 heads of 128 and a top-k of 2048",
        ),
        (
            DSA | {"index_topk": None},
            "attention='dsa' needs index_topk; V3.2 has 64 heads of 128 and a top-k of 2048",
        ),
        (DSA | {"index_topk": 0}, "index_topk=0 is not positive; use 1 or more"),
        (DSA | {"index_n_heads": -2}, "index_n_heads=-2 is not positive; use 1 or more"),
        (
            DSA | {"index_head_dim": 24},
            "index_head_dim=24 is not a power of two, as the Hadamard transform needs; use 32",
        ),
        (
            DSA | {"index_head_dim": 17},
            "index_head_dim=17 is not a power of two, as the Hadamard transform needs; use 32",
        ),
        (
            DSA | {"index_head_dim": 8},
            "index_head_dim=8 is smaller than qk_rope_head_dim=16, which it holds; use 16",
        ),
        (
            DSA | {"qk_norm": True},
            "attention='dsa' with qk_norm: DSA is MLA in its absorbed form, which normed heads have not; leave one out",
        ),
        (
            {"index_topk": 8},
            "index_topk=8: only attention='dsa' has an indexer, got attention='mla'; "
            "leave it out, or use attention='dsa'",
        ),
        (
            {"attention": "mqa", "index_n_heads": 4, "indexer_fp8": True},
            "index_n_heads=4 and indexer_fp8=True: only attention='dsa' has an indexer, got attention='mqa'; "
            "leave it out, or use attention='dsa'",
        ),
        (
            DSA | {"n_kv_heads": 2},
            "n_kv_heads=2 has no meaning with attention='dsa'; leave it out, or use attention='gqa'",
        ),
        (
            {"original_seq_len": 64, "rope_factor": 0.5},
            "rope_factor=0.5 shrinks the context; use 1 or more",
        ),
        ({"original_seq_len": 64, "beta_fast": 0.5}, "beta_fast=0.5 is below beta_slow=1.0; swap them"),
        ({"n_routed_experts": 10}, "n_routed_experts=10 is not divisible by n_expert_groups=4; use 8 or 12"),
        (
            {"n_routed_experts": 2, "n_activated_experts": 1},
            "n_routed_experts=2 is not divisible by n_expert_groups=4; use 4",
        ),
        ({"n_limited_groups": 5}, "n_limited_groups=5 is more than n_expert_groups=4; use 4 or fewer"),
        (
            {"n_activated_experts": 17, "n_limited_groups": 4},
            "n_activated_experts=17 is more than n_routed_experts=16; use 16 or fewer",
        ),
        (
            {"n_activated_experts": 9},
            "n_activated_experts=9 is more than the 8 experts in n_limited_groups=2 groups of 4; "
            "use 8 or fewer, or allow more groups",
        ),
        (
            {"topk_method": "greedy"},
            "topk_method='greedy' ignores groups, got n_expert_groups=4; use 1, or another method",
        ),
        (
            {"n_expert_groups": 16, "n_limited_groups": 4},
            "noaux_tc scores a group by its best two, got groups of 1; use fewer groups",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    assert refusal(ModelConfig, **changes) == sentence


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 2**26, "dim": 2**24},
        {"n_dense_layers": 5},
        {"n_activated_experts": 8},
        {"n_limited_groups": 4, "n_activated_experts": 16},
        {"attention": "mha", "qk_rope_head_dim": 7},
        {"qk_nope_head_dim": 33, "v_head_dim": 31},
        {"rope_factor": 0.5},
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


@pytest.mark.parametrize("text", ["n_layers = 3", "[modell]\ndim = 64"])
def test_model_outside_its_section_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    assert "unknown key" in refusal(ModelConfig.from_file, path)


def test_none_is_a_text_where_none_may_not_be(tmp_path: Path) -> None:
    config = RunConfig(data=DataConfig(path=None), train=TrainConfig(sample_prompt="none"))
    path = tmp_path / "x.toml"
    path.write_text(config.to_toml())
    assert RunConfig.from_file(path) == config


def test_toy_file_is_the_defaults() -> None:
    assert RunConfig.from_file(CONFIGS / "toy.toml") == RunConfig()
