"""The changes that a resumed run may make, those that other weights allow, and where each setting comes from."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini import DataConfig, ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.config.fields import plain
from dsmini.config.parallel import ParallelConfig
from dsmini.training.origin import check_init, check_resume, differences
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
# another value for every key of the training, the data and the layout
TRAIN: dict[str, Any] = {
    **dict(steps=99, batch_size=8, batch_start=3, batch_ramp=0.1, grad_accum=2, seq_len=99, optimizer="adamw", lr=1.0),
    **dict(muon_lr=1.0, gate_lr=1.0, lr_schedule=("linear to 0",), beta1=0.5, beta2=0.5, moments="bfloat16"),
    **dict(muon_momentum=0.5, newton_schulz="polar-express", weight_decay=0.2, grad_clip=2.0, ema_decay=0.5),
    **dict(max_skipped=3, max_rewinds=3, bias_speed=1.0, bias_until=0.5, balance_alpha=1.0, balance_counts="routed"),
    **dict(mtp_weight=1.0, mtp_until=0.5, mtp_weight_after=1.0, dsa_stage="warmup", recompute=True, compile=True),
    **dict(eval_every=3, eval_tokens=3, final_eval_tokens=9, eval_context=9, save_every=3, save_in_background=True),
    **dict(keep=3, tensorboard=True, diagnose=True, sample_tokens=3, sample_prompt="x", seed=1, device="cpu"),
    **dict(dtype="float32", threads=3),
}
DATA: dict[str, Any] = {
    **dict(path=Path("x"), val_fraction=0.2, tokenizer=Path("x"), fim_rate=0.5, document_mask=True, workers=2)
}
PARALLEL: dict[str, Any] = dict(pp=2, dp=2, ep=4, nodes=1, zero=3, schedule="zbv", timeout=9.0, check_replicas=3)
JUDGED = {"train": TRAIN, "data": DATA, "parallel": PARALLEL}
SAME_RUN = {
    *("data.val_fraction", "data.fim_rate", "data.document_mask", "data.tokenizer"),
    *("train.seed", "train.seq_len", "train.optimizer", "train.moments", "train.dsa_stage", "train.ema_decay"),
}
"""Keys that a run may not change when it resumes."""
ROUNDING = {
    *("train.threads", "train.device", "train.dtype", "train.recompute", "train.grad_accum", "train.compile"),
    *("parallel.pp", "parallel.dp", "parallel.ep", "parallel.nodes", "parallel.zero", "parallel.schedule"),
}
"""Keys that change how numbers are rounded or summed."""
BESIDE = {
    *("data.path", "data.workers", "train.max_skipped", "train.max_rewinds", "train.eval_every", "train.eval_tokens"),
    *("train.eval_context", "train.final_eval_tokens", "train.save_every", "train.save_in_background", "train.keep"),
    *("train.tensorboard", "train.diagnose", "train.sample_tokens", "train.sample_prompt"),
    *("parallel.timeout", "parallel.check_replicas"),
}
"""Keys that change neither the numbers nor the schedule."""


def changed(part: str, old: RunConfig = OLD, **changes: Any) -> RunConfig:
    return dataclasses.replace(old, **{part: dataclasses.replace(getattr(old, part), **changes)})


def test_every_key_is_judged_here() -> None:
    """A new key must be thought about: may a run continue with another value of it?"""
    kinds = {ModelConfig: MODEL.keys() | SPARSE.keys() | {"n_kv_heads", "precision"}, TrainConfig: TRAIN.keys()}
    kinds |= {DataConfig: DATA.keys(), ParallelConfig: PARALLEL.keys()}
    for kind, judged in kinds.items():
        assert {f.name for f in dataclasses.fields(kind)} == judged
    assert {f"{part}.{key}" for part, of in JUDGED.items() for key in of} >= SAME_RUN | ROUNDING | BESIDE


@pytest.mark.parametrize("key", [f"{part}.{key}" for part, of in JUDGED.items() for key in of])
def test_what_a_resumed_run_may_change(key: str) -> None:
    part, name = key.split(".")
    old = dataclasses.replace(OLD, model=ModelConfig(**DSA)) if name == "dsa_stage" else OLD
    new = changed(part, old, **{name: JUDGED[part][name]})
    assert [change.key for change in differences(old, new)] == [key]
    if key in SAME_RUN:
        with pytest.raises(ValueError, match=rf"{key} \(.* -> .*\).*--init runs/x"):
            check_resume(old, new)
        return
    first, *rest = check_resume(old, new)
    assert first.startswith(f"{key}: ") and " -> " in first
    assert [line for line in rest if "bit-identical" in line] == [line for line in rest if key in ROUNDING]
    assert bool(rest) == (key not in BESIDE)


@pytest.mark.parametrize("key", MODEL)
def test_no_key_of_the_model_may_change_in_a_resumed_run(key: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.{key} \("):
        check_resume(OLD, changed("model", **{key: MODEL[key]}))


def test_every_refused_key_is_named() -> None:
    new = dataclasses.replace(changed("train", seed=3, lr=1.0, optimizer="adamw"), out=Path("runs/y"))
    with pytest.raises(ValueError, match=r"another train.optimizer .*, train.seed \(0 -> 3\), out .*: its") as error:
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
    sentence = r"^runs/x has no indexers, .* python -m dsmini.convert runs/x OUT --dsa, and start .* --init OUT$"
    with pytest.raises(ValueError, match=sentence):
        check_resume(OLD, dataclasses.replace(OLD, model=ModelConfig(**DSA)))
    with pytest.raises(ValueError, match=sentence):
        check_init(OLD.model, ModelConfig(**DSA), "runs/x")


def test_a_file_changes_a_base(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[model]\nmax_seq_len = 1024\n[train]\nlr = 0.5\n")
    base = RunConfig(model=ModelConfig(dim=64), train=TrainConfig(steps=3), out=Path("y"))
    config = RunConfig.from_file(tmp_path / "x.toml", base)
    assert config == RunConfig(
        model=ModelConfig(dim=64, max_seq_len=1024), train=TrainConfig(steps=3, lr=0.5), out=Path("y")
    )
