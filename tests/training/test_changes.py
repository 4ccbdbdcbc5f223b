"""The changes that a resumed run may make, those that other weights allow, and where each setting comes from."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini import DataConfig, ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.checkpoint.run_folder import run_config
from dsmini.config.fields import plain
from dsmini.config.parallel import ParallelConfig
from dsmini.training.changes import BESIDE, ROUNDING, SAME_RUN, check_init, check_resume, differences
from tests.helpers.configs import DSA

OLD = RunConfig(
    train=TrainConfig(batch_start=2, batch_ramp=0.5), parallel=ParallelConfig(ep=2, nodes=2), out=Path("runs/x")
)
# another valid value for every key of the model; and of the indexer, in a model that has one
SPARSE: dict[str, Any] = {
    **dict(index_n_heads=5, index_head_dim=64, index_topk=9, indexer_rope_interleave=True, indexer_fp8=True),
}
MODEL: dict[str, Any] = {
    **dict(vocab_size=257, dim=96, inter_dim=96, moe_inter_dim=64, n_layers=5, n_dense_layers=2, n_heads=2),
    **dict(attention="mqa", q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16),
    **dict(n_routed_experts=32, n_shared_experts=2, n_activated_experts=2, n_expert_groups=2, n_limited_groups=3),
    **dict(score_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False, route_scale=1.0),
    **dict(
        n_mtp_layers=0, mtp_input="pre_norm", max_seq_len=512, original_seq_len=128, rope_theta=5e4, rope_factor=4.0
    ),
    **dict(beta_fast=16.0, beta_slow=2.0, mscale=0.5, mscale_all_dim=0.5, norm_eps=1e-5, init_std=0.01),
    **dict(zero_init=True, embed_norm=True, qk_norm=True),
}
# and for every key of the training and the data; True: it may change
TRAIN: dict[str, tuple[Any, bool]] = {
    **dict(steps=(99, True), batch_size=(8, True), batch_start=(3, True), batch_ramp=(0.1, True), grad_accum=(2, True)),
    **dict(seq_len=(99, False), optimizer=("adamw", False), lr=(1.0, True), muon_lr=(1.0, True), gate_lr=(1.0, True)),
    **dict(lr_schedule=(("linear to 0",), True), beta1=(0.5, True), beta2=(0.5, True), moments=("bfloat16", False)),
    **dict(
        muon_momentum=(0.5, True),
        newton_schulz=("polar-express", True),
        weight_decay=(0.2, True),
        grad_clip=(2.0, True),
        ema_decay=(0.5, False),
    ),
    **dict(newton_schulz=("polar-express", True)),
    **dict(
        max_skipped=(3, True),
        max_rewinds=(3, True),
        bias_speed=(1.0, True),
        bias_until=(0.5, True),
        balance_alpha=(1.0, True),
    ),
    **dict(
        balance_counts=("routed", True), mtp_weight=(1.0, True), mtp_until=(0.5, True), mtp_weight_after=(1.0, True)
    ),
    **dict(recompute=(True, True), compile=(True, True), eval_every=(3, True), eval_tokens=(3, True)),
    **dict(
        final_eval_tokens=(9, True),
        eval_context=(9, True),
        save_every=(3, True),
        save_in_background=(True, True),
        keep=(3, True),
        tensorboard=(True, True),
        diagnose=(True, True),
    ),
    **dict(sample_tokens=(3, True), sample_prompt=("x", True), seed=(1, False), device=("cpu", True)),
    **dict(dtype=("float32", True), threads=(3, True)),
}
DATA: dict[str, tuple[Any, bool]] = {
    **dict(path=(Path("x"), True), val_fraction=(0.2, False), tokenizer=(Path("x"), False), fim_rate=(0.5, False)),
    **dict(document_mask=(True, False), workers=(2, True)),
}

PARALLEL: dict[str, tuple[Any, bool]] = {
    **dict(pp=(2, True), dp=(2, True), ep=(4, True), nodes=(1, True), zero=(3, True), schedule=("zbv", True)),
    **dict(timeout=(9.0, True), check_replicas=(3, True)),
}
JUDGED = {"train": TRAIN, "data": DATA, "parallel": PARALLEL}


def changed(part: str, **changes: Any) -> RunConfig:
    return dataclasses.replace(OLD, **{part: dataclasses.replace(getattr(OLD, part), **changes)})


def test_every_key_is_judged_here() -> None:
    """A new key must be thought about: may a run continue with another value of it?"""
    judged = (ModelConfig, TrainConfig, DataConfig, ParallelConfig)
    fields = {cls: {f.name for f in dataclasses.fields(cls)} for cls in judged}
    assert fields[ModelConfig] == MODEL.keys() | SPARSE.keys() | {"n_kv_heads", "precision"}
    assert fields[TrainConfig] == TRAIN.keys()
    assert fields[DataConfig] == DATA.keys()
    assert fields[ParallelConfig] == PARALLEL.keys()
    keys = {f"{part}.{key}" for part, of in JUDGED.items() for key in of} | {"out"}
    assert {*SAME_RUN, *ROUNDING, *BESIDE} <= keys


@pytest.mark.parametrize("key", [f"{part}.{key}" for part, of in JUDGED.items() for key in of])
def test_what_a_resumed_run_may_change(key: str) -> None:
    part, name = key.split(".")
    value, allowed = JUDGED[part][name]
    new = changed(part, **{name: value})
    assert differences(OLD, new).keys() == {key}
    if allowed:
        first, *rest = check_resume(OLD, new)
        assert first.startswith(f"{key}: ") and " -> " in first
        assert [line for line in rest if "bit-identical" in line] == [line for line in rest if key in ROUNDING]
        assert bool(rest) == (key not in BESIDE)
    else:
        with pytest.raises(ValueError, match=rf"{key} \(.* -> .*\).*--init runs/x"):
            check_resume(OLD, new)


@pytest.mark.parametrize("key", MODEL)
def test_no_key_of_the_model_may_change_in_a_resumed_run(key: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.{key} \("):
        check_resume(OLD, changed("model", **{key: MODEL[key]}))


def test_every_refused_key_is_named() -> None:
    new = dataclasses.replace(changed("train", seed=3, lr=1.0, optimizer="adamw"), out=Path("runs/y"))
    with pytest.raises(ValueError, match=r"another out .*, train.optimizer .*, train.seed \(0 -> 3\): its") as error:
        check_resume(OLD, new)
    assert "train.lr" not in str(error.value)


def test_an_average_may_change_its_decay_but_not_begin_or_end() -> None:
    with_average = changed("train", ema_decay=0.9)
    assert check_resume(with_average, changed("train", ema_decay=0.99))
    with pytest.raises(ValueError, match=r"ema_decay \(0.9 -> none\)"):
        check_resume(with_average, OLD)


def test_a_tokenizer_may_be_elsewhere_but_not_begin_or_end() -> None:
    with_tokenizer = changed("data", tokenizer=Path("x"))
    assert check_resume(with_tokenizer, changed("data", tokenizer=Path("y"))) == ["data.tokenizer: x -> y"]
    with pytest.raises(ValueError, match=r"data.tokenizer \(x -> none\)"):
        check_resume(with_tokenizer, OLD)


def test_an_unchanged_config_says_nothing() -> None:
    assert check_resume(OLD, OLD) == []


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}


@pytest.mark.parametrize("key", MODEL)
def test_weights_fit_what_keeps_their_shapes_and_nothing_else(key: str) -> None:
    old = ModelConfig()
    new = dataclasses.replace(old, **{key: MODEL[key]})
    if shapes(new) == shapes(old):
        check_init(old, new, "runs/x")
    else:
        with pytest.raises(ValueError, match=rf"weights of runs/x do not fit model\.{key}={plain(MODEL[key])} \(there"):
            check_init(old, new, "runs/x")


def test_weights_of_another_number_of_key_heads_do_not_fit() -> None:
    old = ModelConfig(attention="gqa", n_kv_heads=2)
    with pytest.raises(ValueError, match=r"model.n_kv_heads=1 \(there 2\)"):
        check_init(old, dataclasses.replace(old, n_kv_heads=1), "runs/x")


@pytest.mark.parametrize("key", SPARSE)
def test_the_indexer_of_a_sparse_run_is_judged(key: str) -> None:
    """Its sizes decide shapes; the number of picks and its arithmetic may be others in a run from its weights."""
    old = ModelConfig(**DSA)
    new = dataclasses.replace(old, **{key: SPARSE[key]})
    with pytest.raises(ValueError, match=rf"another model\.{key} \("):
        check_resume(RunConfig(model=old, out=Path("runs/x")), RunConfig(model=new, out=Path("runs/x")))
    if key in ("index_n_heads", "index_head_dim"):
        with pytest.raises(ValueError, match=rf"weights of runs/x do not fit model\.{key}="):
            check_init(old, new, "runs/x")
    else:
        check_init(old, new, "runs/x")


def test_a_dense_run_is_not_resumed_as_sparse() -> None:
    with pytest.raises(ValueError, match=r"model\.attention \(mla -> dsa\).*--init runs/x"):
        check_resume(OLD, dataclasses.replace(OLD, model=ModelConfig(**DSA)))


def test_a_file_changes_a_base(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[model]\nmax_seq_len = 1024\n[train]\nlr = 0.5\n")
    base = RunConfig(model=ModelConfig(dim=64), train=TrainConfig(steps=3), out=Path("y"))
    config = RunConfig.from_file(tmp_path / "x.toml", base)
    assert config == RunConfig(
        model=ModelConfig(dim=64, max_seq_len=1024), train=TrainConfig(steps=3, lr=0.5), out=Path("y")
    )


def test_a_run_from_before_the_choice_of_coefficients_keeps_jordans(tmp_path: Path) -> None:
    """Its config.toml lacks the key. In a recipe a missing key is the default of today."""
    for value in ("jordan", "polar-express"):
        text = RunConfig(train=TrainConfig(newton_schulz=value)).to_toml()  # pyright: ignore[reportArgumentType]
        (tmp_path / "config.toml").write_text(text)
        assert run_config(tmp_path).train.newton_schulz == value
        (tmp_path / "config.toml").write_text(text.replace(f'newton_schulz = "{value}"\n', ""))
        assert run_config(tmp_path).train.newton_schulz == "jordan"
        assert RunConfig.from_file(tmp_path / "config.toml").train.newton_schulz == TrainConfig().newton_schulz
    assert run_config(Path(__file__).parents[1] / "golden/old_run/run").train.newton_schulz == "jordan"
