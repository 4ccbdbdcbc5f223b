"""The stages of sparse attention: what learns and moves in each, how it is clipped, and what is recorded of it."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import Transformer
from dsmini.nn import IndexerLoss, dsa_layers
from dsmini.training.optim import begin_stage
from dsmini.training.plots import plot_run
from dsmini.training.trainer import Trainer
from tests.conftest import SMALL
from tests.helpers.configs import DSA, V4, V4_MODEL, refusal
from tests.helpers.models import set_stage, tokens_of
from tests.helpers.runs import new_run, read_records
from tests.helpers.tolerances import FP32_MODEL, relative_error
from tests.training.test_trainer import state

LAYERS = SMALL["n_layers"] + SMALL["n_mtp_layers"]
WARMUP: dict[str, Any] = {"dsa_stage": "warmup", "lr": 1e-3, "lr_schedule": ("constant 1.0",)}
New = Callable[..., Trainer]


@pytest.fixture
def new(tmp_path: Path) -> New:
    return lambda **changes: new_run(tmp_path, model=DSA, **changes).trainer


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_warmup_moves_the_indexers_alone(new: New, optimizer: str) -> None:
    trainer = new(optimizer=optimizer, bias_speed=0.1, ema_decay=0.9, **WARMUP)
    before = state(trainer)
    steps = [trainer.step() for _ in range(3)]
    indexers = {name for name, _ in trainer.model.named_parameters() if ".indexer." in name}
    assert len(indexers) == 5 * LAYERS
    moved = changed(before, state(trainer)) - {"updates"}
    assert {name for name in moved if ".indexer." not in name} == set()
    assert {f"model/{name}" for name in indexers} <= moved
    assert all(step.lr == 1e-3 and step.grad_norm > 0 and not step.skipped for step in steps)


def test_warmup_brings_the_indexers_nearer(new: New) -> None:
    trainer = new(**WARMUP | {"lr": 1e-2}, steps=40, grad_clip=10.0)
    with torch.no_grad():  # attention that is far from even
        for name, p in trainer.model.named_parameters():
            if "attn.w" in name and ".indexer." not in name:
                p *= 8
    kl = [sum(step.indexers["kl"]) for step in (trainer.step() for _ in range(40)) if step.indexers]
    assert sum(kl[-5:]) < 0.8 * sum(kl[:5])


def clipped(trainer: Trainer) -> dict[str, Tensor]:
    """Return the gradients that the optimizer sees in a step."""
    seen: dict[str, Tensor] = {}

    def look(*_: object) -> None:
        seen.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.optimizers[0].register_step_pre_hook(look)
    assert trainer.step().grad_norm > 0.1, "the norm before it is clipped"
    return seen


def test_loss_of_indexers_does_not_change_moves_of_the_model(new: New) -> None:
    """Both groups are clipped to the norm by themselves."""
    grads = clipped(new(grad_clip=1e-4))
    for of_indexers in (False, True):
        group = [g for name, g in grads.items() if (".indexer." in name) == of_indexers]
        assert torch.stack([g.norm() for g in group]).norm().item() == pytest.approx(1e-4, rel=2e-2)
    large = new(grad_clip=1e-4)
    with torch.no_grad():  # head weights of the indexers a hundred times as large, with the same order of keys
        for layer in dsa_layers(large.model):
            layer.indexer.weights_proj.weight *= 100
    others = clipped(large)
    main = [name for name in grads if ".indexer." not in name]
    assert all(relative_error(others[name], grads[name]) <= FP32_MODEL for name in main)
    assert any(relative_error(others[name], grads[name]) > 0.1 for name in grads if ".indexer." in name)


# what is recorded


@pytest.mark.parametrize(("model", "layers"), [(DSA, LAYERS), (V4_MODEL, 1)], ids=["DSA", "one layer of V4's is CSA"])
def test_metrics_and_picture_show_them(tmp_path: Path, model: dict[str, Any], layers: int) -> None:
    run = new_run(tmp_path, model=model, steps=4)
    assert run.train()
    records = read_records(tmp_path)
    assert len(records) == 4
    for row, name in itertools.product(records, IndexerLoss._fields):
        of_layers = row[f"layer_indexer_{name}"]
        assert len(of_layers) == layers and row[f"indexer_{name}"] == pytest.approx(sum(of_layers) / layers)
    plot_run(tmp_path, records, {})
    assert (tmp_path / "indexer.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_user_froze_stays_frozen(new: New) -> None:
    """Without a warm-up before it; after one all that the warm-up froze learns again."""
    model = new().model
    model.embed.weight.requires_grad_(False)
    begin_stage(model, "sparse")
    assert not model.embed.weight.requires_grad and model.head.weight.requires_grad
    begin_stage(model, "warmup")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".indexer." in name
    }
    begin_stage(model, "sparse")
    assert all(p.requires_grad for p in model.parameters())


def test_a_stage_that_is_none_is_refused() -> None:
    for kind in (DSA, V4):
        model = set_stage(Transformer(**(SMALL | kind)), "warm-up").train()
        assert "stage is 'warm-up'; use None, 'warmup' or 'sparse'" in refusal(model, tokens_of(1, 20))
