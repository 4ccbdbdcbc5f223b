"""The training loop: the effects of a step, and what validation and bad gradients leave unchanged."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer
from dsmini.distributed.world import World
from dsmini.nn.transformer import IGNORE
from dsmini.training.trainer import Trainer
from tests.conftest import randomise
from tests.distributed import runs
from tests.helpers.apple import OnApple
from tests.helpers.configs import DSA, GLM, V4_MODEL
from tests.helpers.tolerances import FP32_UNIT, relative_error, rounding

SERVED = GLM | {"indexer_target": "served"}


def new_trainer(model: dict[str, Any] | None = None, document_mask: bool = False, **train: Any) -> Trainer:
    """Return a trainer of a small model, always from the same seed. A document of its text has 61 bytes."""
    trainer = runs.new_trainer(World(), {}, model or {}, {"batch_size": 4} | train)
    data = dataclasses.replace(trainer.config.data, document_mask=document_mask)
    trainer.config = dataclasses.replace(trainer.config, data=data)
    return trainer


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Return every tensor that a step may change: parameters, biases, moments, the average, its count."""
    tensors = {f"{part}/{name}": t.detach().clone() for part, ts in trainer.tensors().items() for name, t in ts.items()}
    return tensors if trainer.average is None else {**tensors, "updates": torch.tensor(trainer.average.updates)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("grad_accum", [1, 4])
def test_loss_is_the_mean_over_targets_that_count(monkeypatch: pytest.MonkeyPatch, grad_accum: int) -> None:
    trainer = new_trainer(grad_accum=grad_accum)
    tokens, targets = trainer.loader.take([(0, 4)])
    targets = targets.clone()
    targets[0], targets[1, :5] = IGNORE, IGNORE
    with torch.no_grad():
        want = trainer.model.losses(tokens, targets).main
    monkeypatch.setattr(trainer.loader, "take", lambda requests: (tokens, targets))
    assert trainer.step().loss == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("grad_accum", [1, 2, 4])
def test_bias_moves_once_a_step_by_counts_of_all(grad_accum: int, recompute: bool) -> None:
    whole, parts = new_trainer(), new_trainer(grad_accum=grad_accum, recompute=recompute)
    want, got = whole.step(), parts.step()
    assert want.counts is not None and got.counts is not None and torch.equal(got.counts, want.counts)
    tokens = [4 * 16, 4 * 15, 4 * 14]  # one layer, then MTP of depth 1 and 2
    assert got.counts.sum(1).tolist() == [3 * n for n in tokens]
    for gate, counts in zip(parts.model.gates(), got.counts, strict=True):
        assert gate.bias is not None
        load = counts.double()
        assert gate.bias.tolist() == pytest.approx((0.01 * (load.mean() - load).sign()).tolist())
        assert gate.bias.abs().max() > 0


@pytest.mark.parametrize(
    ("model", "stage"), [({}, "sparse"), (SERVED, "sparse"), (V4_MODEL, "warmup"), (V4_MODEL, "sparse")], ids=str
)
def test_accumulated_gradients_are_those_of_the_whole_batch(model: dict[str, Any], stage: str) -> None:
    """The KL divergence of indexers is a mean over the micro-batches, and its gradient too."""
    whole, parts = (new_trainer(model, grad_accum=n, dsa_stage=stage, seq_len=32) for n in (1, 4))
    parts.model.load_state_dict(randomise(whole.model).state_dict())
    want, got = (trainer.forward_backward(4)[0] for trainer in (whole, parts))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert not model or want[3] > 0, "there is a KL divergence"
    tolerance = 1e-4 if model else rounding(FP32_UNIT, terms=64, chained=30)
    for (name, p), q in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        still = bool(model) and stage == "warmup" and ".indexer." not in name
        assert (p.grad is None) == (q.grad is None) == still, name
        assert still or relative_error(q.grad, p.grad) < tolerance, name


def test_the_optimizer_follows_the_schedule() -> None:
    trainer = new_trainer(lr_schedule=("warmup 0.15", "cosine to 0.1"))
    (optimizer,) = trainer.optimizers
    used: list[set[float]] = []
    optimizer.register_step_pre_hook(lambda *_: used.append({group["lr"] for group in optimizer.param_groups}))
    said = [trainer.step().lr for _ in range(3)]
    want = [0.01 * trainer.config.train.rate_share_at(i) for i in range(3)]
    assert said == want and used == [{lr} for lr in want] and len(set(want)) == 3


def test_the_losses_are_weighted_as_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"mtp_weight": 0.7, "balance_alpha": 0.2, "balance_counts": "routed", "recompute": True}
    trainer = new_trainer(**options)
    seen: list[dict[str, Any]] = []
    real = trainer.losses
    monkeypatch.setattr(trainer, "losses", lambda x, y, **kwargs: (seen.append(kwargs), real(x, y, **kwargs))[1])
    trainer.step()
    assert seen == [{**options, "documents": None, "n_targets": torch.tensor(64.0)}]


def test_validation_is_the_mean_and_changes_nothing() -> None:
    trainer = new_trainer()
    trainer.step()
    before = state(trainer)
    ((x, y),) = trainer.corpus.windows(16).blocks(100)
    with torch.no_grad():
        logits = trainer.model(x)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    assert [trainer.validate(), trainer.validate(tokens_at_a_time=16)] == pytest.approx([want, want], rel=1e-6)
    assert same(state(trainer), before) and trainer.model.training


Spoil = Callable[[Trainer], object]
"""Makes a number of the second step not finite."""


def loss(name: str, value: float) -> Spoil:
    def spoil(trainer: Trainer) -> None:
        real = trainer.losses

        def losses(*x: Any, **more: Any) -> Any:
            out = real(*x, **more)
            return out._replace(**{name: getattr(out, name) * value}) if trainer.steps_done == 1 else out

        trainer.losses = losses

    return spoil


def gradient(name: str, value: float) -> Spoil:
    return lambda trainer: trainer.model.get_parameter(name).register_hook(
        lambda grad: grad * value if trainer.steps_done == 1 else grad
    )


def activation(trainer: Trainer) -> object:
    def hook(module: object, args: object, out: Any) -> Any:
        x = out[0].clone()
        x[-1, -1, 0] = torch.inf if trainer.steps_done == 1 else x[-1, -1, 0]
        return x, out[1]

    return trainer.model.layers[1].register_forward_hook(hook)


PLACES: dict[str, Spoil] = {
    "total": loss("total", torch.nan),
    "mtp": loss("mtp", torch.nan),
    "balance": loss("balance", -torch.inf),
    "embedding": gradient("embed.weight", torch.inf),
    "experts": gradient("layers.1.ffn.experts.w2", torch.nan),
    "activation": activation,
    "indexer": gradient("layers.1.attn.indexer.wk.weight", torch.nan),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"grad_accum": 2},
    "muon": {"optimizer": "muon", "moments": "bfloat16", "ema_decay": 0.9},
}


def test_figures_of_apples_gpu_become_fp64_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = new_trainer()
    trainer.forward_backward(4)
    want = trainer.validate(), trainer.mesh.squared_norms(trainer.model).tolist()
    score, norms = trainer._score, torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
    monkeypatch.setattr(trainer, "_score", lambda *given: OnApple(score(*given)))
    monkeypatch.setattr(torch, "_foreach_norm", lambda grads: [OnApple(norm) for norm in norms(grads)])
    assert (trainer.validate(), trainer.mesh.squared_norms(trainer.model).tolist()) == want


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_that_is_not_finite_changes_nothing(place: str, optimizer: str) -> None:
    trainer = new_trainer(DSA if place == "indexer" else None, **OPTIMIZERS[optimizer])
    trainer.step()
    before = state(trainer)
    PLACES[place](trainer)
    assert trainer.step().skipped
    assert same(state(trainer), before)
    assert (trainer.steps_done, trainer.sequences) == (2, 8)
    assert not trainer.step().skipped
    changed = state(trainer)
    assert {name for name in before if torch.equal(before[name], changed[name])} == set()


def test_document_mask_separates_documents_in_training() -> None:
    plain, masked = (new_trainer({"init_std": 0.1}, document_mask=mask) for mask in (False, True))
    tokens, targets = masked.loader.take([(0, 4)])
    documents = masked.corpus.documents(tokens)
    assert documents.max() > 0, "some sequences hold two documents"
    with torch.no_grad():
        want = masked.model.losses(tokens, targets, documents=documents).main.item()
    assert masked.step().loss == pytest.approx(want, rel=1e-5)
    assert plain.step().loss != pytest.approx(want, rel=1e-4)


def test_document_mask_separates_documents_in_validation() -> None:
    """Each document scored alone gives the same: RoPE knows differences of positions only."""
    plain, trainer = (new_trainer({"init_std": 0.1}, document_mask=mask) for mask in (False, True))
    total = 0.0
    for x, y in trainer.corpus.windows(16).blocks(1):
        ends = [i + 1 for i, token in enumerate(x[0].tolist()) if token == 0]
        with torch.no_grad():
            logits = torch.cat([trainer.model.eval()(part) for part in x.tensor_split(ends, 1) if part.numel()], 1)
        total += torch.nn.functional.cross_entropy(logits[0], y[0], reduction="sum").item()
    want = total / trainer.corpus.windows(16).tokens
    assert trainer.validate() == pytest.approx(want, rel=1e-5)
    assert plain.validate() != pytest.approx(want, rel=1e-4)


# zero_init, which DeepSeek does not have and small models gain from


def test_zero_init_zeroes_only_writers_to_the_residual_stream(small_config: Callable[..., ModelConfig]) -> None:
    zero = {n for n, p in Transformer(small_config(zero_init=True)).named_parameters() if p.abs().max() == 0}
    ends = ("head.weight", "wo.weight", "w2.weight", "experts.w2")
    assert zero == {n for n, _ in Transformer(small_config()).named_parameters() if n.endswith(ends)}
    assert not {n for n, p in Transformer(small_config()).named_parameters() if p.abs().max() == 0}


def test_qk_clip_holds_its_threshold_after_each_step() -> None:
    """A threshold that no logit reaches changes no bit."""
    plain, free = new_trainer(), new_trainer(qk_clip=1e6)
    clipped = new_trainer(qk_clip=1e-3)
    for trainer in (plain, free, clipped):
        trainer.step()
    assert same(state(plain), state(free)) and not same(state(plain), state(clipped))
    moved = {name for name, t in state(plain).items() if not torch.equal(t, state(clipped)[name])}
    assert {name.rpartition(".attn.")[2] for name in moved if "attn" in name} == {"wq_b.weight", "wkv_b.weight"}
