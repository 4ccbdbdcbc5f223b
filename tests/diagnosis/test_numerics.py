"""Short formats: errors of products near the prediction, faults that are none, and the loss gap against its band."""

import dataclasses
import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import Transformer
from dsmini.diagnosis.evidence import loss_gap, numerics, products
from dsmini.diagnosis.evidence.gather import EVERY
from dsmini.diagnosis.evidence.loss_gap import LossGaps, Twin, loss_gaps, steps_that_fit
from dsmini.diagnosis.evidence.numerics import NUMERICS
from dsmini.diagnosis.evidence.products import Product, ProductErrors, collected, errors_of, product_errors, shared_twin
from dsmini.diagnosis.subject import Subject
from dsmini.numerics import fp8_matmul
from dsmini.training.trainer import Trainer
from tests.helpers.tolerances import BF16_UNIT, E4M3_UNIT, FP32_MODEL, relative_error


def found_of(x: Tensor, w: Tensor, dy: Tensor | None = None) -> dict[tuple[str, str], products.ProductError]:
    """Return the errors of three products by pass and format."""
    dy = torch.randn(len(x), len(w)) if dy is None else dy
    found = errors_of(Product(name="layers.0.attn.wo", x=x, w=w, dy=dy))
    return {(each.part.split()[0], each.format): each for each in found}


# --- products


@pytest.mark.parametrize("k", [128, 300, 1024])
def test_error_of_random_terms_is_as_predicted(k: int) -> None:
    """Check 3.8 % and 0.29 % whatever the number of terms, in all three products.

    Mean squares of 256 x 256 results or more agree within a few percent, and mantissas of normal numbers are nearly,
    not quite, log-uniform.
    """
    found = found_of(torch.randn(256, k), torch.randn(256, k))
    assert len(found) == 6
    for (_, format), each in found.items():
        unit, share = (E4M3_UNIT, 0.6006) if format == "fp8" else (BF16_UNIT, 0.7356)
        assert each.expected == pytest.approx(share * unit, rel=0.05) and each.finite and not each.wrong
        assert each.error == pytest.approx(each.expected, rel=0.1)


def test_error_of_terms_of_one_sign_falls_with_their_number() -> None:
    """Check uniform numbers: r = sqrt(k E[x^2]^2) / (k E[x]^2) = 4 / (3 sqrt(k))."""
    for k in (128, 1152):
        each = found_of(torch.rand(256, k), torch.rand(256, k))["forward", "fp8"]
        assert each.expected == pytest.approx(0.6006 * E4M3_UNIT * 4 / 3 / k**0.5, rel=0.05)
        assert not each.wrong


def test_repeated_numbers_stay_below_the_limit() -> None:
    """Check numbers whose errors are all alike, up to halfway between two codes: no right product is a fault."""
    for value in (1.0, 1.0625, 1.19, 1.4375):
        found = found_of(*(torch.full((128, 128), value) for _ in range(3)))
        for each in found.values():
            assert each.error <= (1 + products.UNITS[each.format]) ** 2 * (1 + products.UNITS["bfloat16"]) - 1
            assert not each.wrong
    assert found_of(torch.full((8, 128), 1.0625), torch.randn(8, 128))["forward", "fp8"].error > 0.05


def test_cancelling_terms_are_no_fault() -> None:
    x, w = torch.randn(64, 256), torch.randn(64, 256)
    w -= (w @ x.T) @ torch.linalg.pinv(x.T)  # orthogonal to all rows of x
    each = found_of(x, w + 1e-3 * torch.randn(64, 256))["forward", "fp8"]
    assert each.error > 1 and each.expected > 1 and not each.wrong


def test_wrong_scale_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "fp8_matmul", lambda x, w, **more: 2 * fp8_matmul(x, w, **more))
    found = found_of(torch.randn(64, 256), torch.randn(64, 256))
    assert "layers.0.attn.wo, forward, in fp8 errs by 100" in found["forward", "fp8"].wrong
    assert [bool(each.wrong) for each in found.values()] == [each.format == "fp8" for each in found.values()]


def test_one_wrong_tile_in_four_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, w: Tensor, **more: Any) -> Tensor:
        scale = torch.ones(x.shape[1])
        scale[:128] = 2
        return fp8_matmul(x * scale, w, **more)

    monkeypatch.setattr(products, "fp8_matmul", wrong)
    assert found_of(torch.randn(64, 512), torch.randn(64, 512))["forward", "fp8"].wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_a_fault(value: float) -> None:
    """Check a number of x, which two of the three products read."""
    x, w = torch.randn(4, 128), torch.randn(4, 128)
    x[1, 3] = value
    found = found_of(x, w)
    assert {key for key, each in found.items() if "not all numbers are finite" in each.wrong} == {
        (part, format) for part in ("forward", "weight's") for format in products.UNITS
    }


def test_product_of_zeros_has_no_error() -> None:
    assert set(found_of(torch.zeros(4, 128), torch.randn(4, 128))) == {("input's", "fp8"), ("input's", "bfloat16")}


def test_every_product_of_a_step_is_looked_at(subject: Subject) -> None:
    """Check the names: all linear layers, three matrices of each visited expert, and the head."""
    found = product_errors(subject, 60.0)
    names = {each.name for each in found.errors}
    linears = {name for name, m in subject.trainer.model.named_modules() if isinstance(m, products.Projection)}
    assert linears <= names and found.left_out == 0 and not found.wrong
    assert {name.split(".w")[0] for name in names - linears} == {"layers.1.ffn.experts", "mtp.0.block.ffn.experts"}
    assert {each.group for each in found.errors} == {group for _, group in products.GROUPS}
    assert {each.part for each in found.errors} == set(products.PASSES)
    assert statistics.median(each.error / each.expected for each in found.errors) == pytest.approx(1.0, abs=0.1)


def test_products_are_left_out_when_the_time_is_over(subject: Subject) -> None:
    found = product_errors(subject, 0.0)
    assert len({each.name for each in found.errors}) == 1 and found.left_out > 10


def test_collected_products_are_those_of_the_step(subject: Subject) -> None:
    """Check that dy^T x of each matrix is the gradient that a step in FP32 computes for it."""
    model = subject.trainer.model
    model.losses(*subject.one_batch).total.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    found: dict[str, Tensor] = {}
    for each in collected(subject):  # the head multiplies twice, once for the guesses
        found[each.name] = found.get(each.name, torch.zeros(())) + each.dy.T @ each.x
    for name, got in found.items():
        whole, _, number = name.partition("[")
        grad = grads[whole] if number else grads[f"{name}.weight"]
        assert grad is not None
        assert relative_error(got, grad[int(number[:-1])] if number else grad) < FP32_MODEL, name


def test_twin_shares_the_parameters_of_any_precision(subject: Subject) -> None:
    random = torch.get_rng_state()
    twin = shared_twin(subject)
    mine = dict(subject.trainer.model.named_parameters())
    assert all(p.data_ptr() == mine[name].data_ptr() for name, p in twin.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)
    c = dataclasses.replace(subject.config.model, precision="fp8")
    config = dataclasses.replace(subject.config, model=c)
    trainer = Trainer(Transformer(c), subject.trainer.corpus, config, torch.device("cpu"))
    assert not product_errors(Subject(trainer), 60.0).wrong
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.loader.close()


# --- loss gap


def gaps_of(own: list[float], other: list[float]) -> LossGaps:
    return LossGaps(now="bfloat16", steps=5, losses={"bfloat16": own, "float32": other})


def test_gap_inside_and_outside_of_the_band() -> None:
    """Check the worked example, and the same with a gap of 0.03."""
    inside = gaps_of([2.510, 2.522, 2.504], [2.508, 2.521, 2.503])
    assert inside.band == pytest.approx(0.018) and statistics.mean(inside.gaps("float32")) == pytest.approx(
        -0.00133, abs=1e-5
    )
    assert inside.is_inside("float32") and "-0.0013 nats, inside the band of 0.0180" in numerics._gaps_in_words(inside)
    outside = gaps_of([2.510, 2.522, 2.504], [2.540, 2.552, 2.534])
    assert not outside.is_inside("float32") and "+0.0300 nats, outside" in numerics._gaps_in_words(outside)


def test_loss_that_is_not_finite_is_named() -> None:
    found = gaps_of([2.5, 2.6], [2.5, math.nan])
    assert found.not_finite == ["float32"] and not found.is_inside("float32")


def test_same_dtype_has_no_gap(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that twins of one dtype end at the same bits, and that other seeds end elsewhere."""
    monkeypatch.setattr(loss_gap, "MOST_STEPS", 3)
    monkeypatch.setattr(loss_gap, "others_of", lambda _: ["float32 again"])
    monkeypatch.setattr(loss_gap, "with_dtype", lambda config, _: config)
    found = loss_gaps(subject, 60.0)
    assert found.steps == 3 and found.gaps("float32 again") == [0.0] * 3 and found.band > 0


def test_twin_starts_where_the_subject_is(subject: Subject) -> None:
    """Check that a twin's steps are the subject's own, from its weights and moments and its place in the data."""
    for _ in range(2):
        subject.step()
    twin = Twin(subject, "float32")
    windows = subject.trainer.corpus.windows(subject.config.seq_len, 64)
    loss, *others = twin.losses(3, windows)
    assert twin.losses(3, windows) == [loss, *others], "each time from the subject's state"
    for _ in range(3):
        subject.step()
    assert loss == subject.trainer.validate(windows)


def test_steps_fit_into_the_time() -> None:
    costs = {"a": (0.1, 0.5), "b": (0.3, 0.5)}
    assert steps_that_fit(costs, 15.1) == 10, "3 x (10 x 0.4 + 1) s"
    assert steps_that_fit(costs, 1.0) == 0 and steps_that_fit(costs, 1e6) == loss_gap.MOST_STEPS


def test_short_time_leaves_the_gap_out(subject: Subject) -> None:
    found = loss_gaps(subject, 0.0)
    assert not found.losses and "have 0" in found.why_not
    section = NUMERICS.run(subject, None, 0.0)
    assert "The loss was not compared: 3 times 3 steps" in section.finding and section.figures and not section.warnings


def test_last_dtype_is_dropped_first(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check costs by a clock: FP8 takes far longer than there is time for, and BF16 and FP32 are compared."""
    costs = {"float32": (0.1, 0.1), "bfloat16": (0.1, 0.1), "fp8": (9.0, 0.1)}
    monkeypatch.setattr(loss_gap, "others_of", lambda _: ["bfloat16", "fp8"])
    monkeypatch.setattr(Twin, "costs", lambda self, _: costs[self.name])
    monkeypatch.setattr(Twin, "losses", lambda self, steps, _: [1.0] * loss_gap.ORDERS)
    monkeypatch.setattr(Twin, "__init__", lambda self, _subject, dtype: setattr(self, "name", dtype))
    found = loss_gaps(subject, 5.0)
    assert set(found.losses) == {"float32", "bfloat16"} and len(found.losses["float32"]) == 3 and found.steps > 4
    assert "There was no time for fp8." in numerics._gaps_in_words(found)


# --- the section


def test_section_of_a_whole_look_leaves_the_subject_as_it_is(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check parameters, optimizer state, places and the random state, after steps of twins that move."""
    monkeypatch.setattr(loss_gap, "MOST_STEPS", 3)
    subject.step()
    whole: Any = subject.trainer.tensors()
    tensors = {part: {name: t.clone() for name, t in whole[part].items()} for part in ("model", "optimizer")}
    random, sequences = torch.get_rng_state(), subject.trainer.sequences
    section = NUMERICS.run(subject, None, 60.0)
    for part, now in whole.items():
        assert now.keys() == tensors[part].keys()
        assert all(torch.equal(t, tensors[part][name]) for name, t in now.items())
    assert torch.equal(torch.get_rng_state(), random) and subject.trainer.sequences == sequences
    assert NUMERICS in EVERY and section.name == "numerics" and not section.warnings
    assert "FP8 products err by" in section.finding and "After 3 steps" in section.finding
    metrics = {figure.metric for figure in section.figures}
    assert metrics == {"relative_error", "held_out_loss", "loss_gap", "band_of_orders"}
    compared = {figure.case["dtype"] for figure in section.figures if figure.metric == "loss_gap"}
    assert "fp8" in compared and section.plots[0].labels
    assert section.prose[0][1].startswith("A gap inside the band means")


def test_faults_are_warnings(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = products.ProductError(
        name="head", group="head", part="forward", format="fp8", error=1.0, expected=0.04, finite=True
    )
    nothing = LossGaps(now="float32", steps=0, losses={}, why_not="no time")
    monkeypatch.setattr(numerics, "product_errors", lambda *_: ProductErrors(errors=[bad] * 5, left_out=2))
    monkeypatch.setattr(numerics, "loss_gaps", lambda *_: nothing)
    section = NUMERICS.run(subject, None, 1.0)
    assert section.warnings[0] == "head, forward, in fp8 errs by 100.0%; rounding allows 28.9%"
    assert len(section.warnings) == 4 and "2 matrices were left out" in section.about
