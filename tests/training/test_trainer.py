"""The training loop: the effects of a step, and what validation and bad gradients leave unchanged."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dsmini import ModelConfig, Transformer
from dsmini.distributed.world import World
from dsmini.machine import sent
from dsmini.nn import IndexerLoss, dsa_layers
from dsmini.nn.transformer import IGNORE
from dsmini.training.optim import begin_stage
from dsmini.training.plots import plot_run
from dsmini.training.trainer import Trainer
from tests.conftest import SMALL, randomise
from tests.distributed import runs
from tests.helpers.configs import DSA, GLM, V4, V4_MODEL, refusal
from tests.helpers.models import set_stage, tokens_of
from tests.helpers.runs import new_run, read_records
from tests.helpers.tolerances import FP32_MODEL, FP32_UNIT, relative_error, rounding

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


class OnApple(Tensor):
    """A tensor of the device mps whose numbers are on the CPU. It can be copied there, but not become FP64."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "OnApple":
        made = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype, device="mps")  # pyright: ignore[reportAttributeAccessIssue]
        made.numbers = numbers.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        options = kwargs or {}
        if options.get("dtype") == torch.float64:  # to the CPU too: the cast comes before the copy
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        leaves = options.get("device") == torch.device("cpu")
        result = func(*tree_map_only(OnApple, lambda t: t.numbers, args), **options)
        return result if leaves else tree_map_only(Tensor, cls, result)


def test_figures_of_apples_gpu_become_fp64_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = new_trainer()
    trainer.forward_backward(4)
    want = trainer.validate(), trainer.mesh.squared_norms(trainer.model).tolist()
    score, norms = trainer._score, torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
    monkeypatch.setattr(trainer, "_score", lambda *given: OnApple(score(*given)))
    monkeypatch.setattr(torch, "_foreach_norm", lambda grads: [OnApple(norm) for norm in norms(grads)])
    assert (trainer.validate(), trainer.mesh.squared_norms(trainer.model).tolist()) == want


@pytest.mark.parametrize(("device", "told"), [("cpu", 2), ("cuda", 0)])
def test_work_of_a_gpu_is_not_told(monkeypatch: pytest.MonkeyPatch, device: str, told: int) -> None:
    """This thread only starts it, so its CPU seconds say nothing. The GPU is a name here; the sums are on the CPU."""
    trainer = new_trainer()
    sums = trainer.forward_backward(4)
    trainer.mesh.parts, trainer.device = 2, torch.device(device)
    monkeypatch.setattr(trainer, "forward_backward", lambda rows: sums)
    monkeypatch.setattr(trainer, "_clip", lambda names, norm: None)
    monkeypatch.setattr("dsmini.training.trainer.synchronize", lambda device: None)
    step = trainer.step()
    assert len(step.work) == told and (step.spread is None) == (told == 0)


def test_rows_of_a_larger_tensor_are_pinned_as_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided ones would be copied once more, from memory that is not pinned. The GPU is a name here."""
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(Tensor, "to", lambda tensor, device, non_blocking: tensor)
    rows = torch.arange(12).view(3, 4)[:, :-1]
    assert not rows.is_contiguous() and torch.equal(sent(rows, torch.device("cuda")), rows)
    assert [tensor.is_contiguous() for tensor in pinned] == [True]


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


# --- the stages of sparse attention: what learns and moves in each, how it is clipped, and what is recorded of it

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
