"""python -m benchmarks kernels: every kernel is measured, correct, and below its roof."""

import dataclasses

import pytest
import torch

from benchmarks import kernel_calls, shapes, steps
from benchmarks.case import pick
from benchmarks.questions import kernels, questions_here
from dsmini import ops
from dsmini.numerics.orthogonalize import MuonMatrices
from dsmini.ops.explanation import instruction_set, operations
from tests.helpers.questions import TINY, setting


def test_every_kernel_has_calls_to_measure() -> None:
    """Add a function to CALLS of benchmarks/kernel_calls.py for a new kernel."""
    cpu = pytest.importorskip("dsmini_kernels.cpu")
    assert set(kernel_calls.CALLS) == set(cpu.OPERATIONS) <= set(operations())


def test_every_call_is_measured_with_its_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := kernels.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(kernel_calls, "CACHES", 0.01)
    monkeypatch.setattr(kernel_calls, "QUICK_ACTIVATIONS", (64, 256))
    monkeypatch.setattr(kernels, "QUICK_TURN", 0.0)
    monkeypatch.setattr(
        shapes, "QUICK_WIDE", dataclasses.replace(TINY, max_seq_len=32768, inter_dim=1024, vocab_size=128)
    )
    figures = [
        figure
        for case in kernels.cases(setting(bandwidth=1e12, peak={"float32": 1e12, "bfloat16": 1e13}))
        for figure in case.run()
    ]
    shares = [f for f in pick(figures, "share_of_roof") if f.measured is not None]
    assert {f.case["kernel"] for f in shares} == set(kernel_calls.CALLS)
    assert {f.case["instructions"] for f in shares} == {instruction_set()}
    told = questions_here()["kernels"].finding(figures)
    assert told.startswith(f"With {instruction_set()}, kernels reach these shares of the roof: linear ")
    for f in shares:
        (seconds,) = pick(figures, "seconds", **f.case)
        assert f.measured and seconds.predicted and seconds.low and seconds.high
        # medians of the same turns: of two in the middle the share takes the harmonic mean
        assert seconds.low <= seconds.predicted / f.measured * (1 + 1e-9) <= seconds.high * (1 + 2e-9)
    (left,) = {f.note for f in pick(figures, "share_of_roof") if f.measured is None}
    assert left == "left out: plain PyTorch serves these calls", "a head in FP32 is small here"


def test_kernels_that_cannot_be_built_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "why_not", lambda: "there is no C++ compiler")
    figures = [figure for case in kernels.cases(setting()) for figure in case.run()]
    assert len(figures) == len(kernel_calls.CALLS)
    assert {(f.measured, f.note) for f in figures} == {(None, "left out: there is no C++ compiler")}
    assert questions_here()["kernels"].finding(figures) == "Nothing was measured yet." and kernels.plots(figures) == []


@pytest.mark.parametrize(
    ("moved", "flops", "dtypes", "seconds"),
    [
        (2e10, 0, "float32", 1.0),
        (1e10, 1e11, "float32", 1.0),
        (1e10, 1e11, "float32 bfloat16", 0.5),
        (1, 1.5e11, "float32 products", 0.5),  # products in BF16
        (2.6e10, 0, "float32", "kernels x: 26.0 GB/s from memory is above the roof of 20.0"),
        (1, 1.3e11, "float32", "kernels x: 130 GFLOP/s are above the measured matrix peak"),
    ],
)
def test_roof_is_the_slower_of_memory_and_arithmetic(
    monkeypatch: pytest.MonkeyPatch, moved: float, flops: float, dtypes: str, seconds: float | str
) -> None:
    """Expect 20 GB/s and 100 GFLOP/s in FP32, 300 in BF16, of the invented machine, for a call of a second."""
    monkeypatch.setattr(steps, "read_bandwidth", lambda device: 2e10)
    kinds = {"float32": torch.ones(1), "bfloat16": torch.ones(1, dtype=torch.bfloat16), "products": torch.bfloat16}
    operands = [kinds[name] for name in dtypes.split()]
    if isinstance(seconds, str):
        with pytest.raises(ValueError, match=seconds):
            kernels.roof_seconds("x", moved, flops, operands, 1.0, setting())
    else:
        assert kernels.roof_seconds("x", moved, flops, operands, 1.0, setting()) == seconds


def test_kernel_that_differs_from_the_reference_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.Operation, "declared", {**ops.Operation.declared})

    @ops.operation("linear")
    def off(x: torch.Tensor) -> torch.Tensor:
        return x * (1.01 if ops.chosen() == "reference" else 1.0)

    @ops.operation("quantize")
    def flips(x: torch.Tensor) -> torch.Tensor:
        return x + (2**-23 if ops.chosen() == "reference" else 0)

    for operation, words in ((off, "differs from the reference by 0.0099"), (flips, "bits are not the reference's")):
        monkeypatch.setattr(operation, "_try_kernel", lambda backend, x, f=operation: f.reference(x))
        with pytest.raises(AssertionError, match=words):
            kernels.check(operation, kernel_calls.Calls("ones", 2, [(torch.ones(2, 2),)]))


def test_wrong_update_in_place_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.Operation, "declared", {**ops.Operation.declared})

    @ops.operation("muon_update")
    def off(x: MuonMatrices) -> None:
        x.params[0].mul_(1.51 if ops.chosen() == "reference" else 1.5)

    monkeypatch.setattr(off, "_try_kernel", lambda backend, x: off.reference(x))
    ones = [torch.ones(2, 2)]
    calls = kernel_calls.Calls("ones", 2, [(MuonMatrices(params=ones, grads=ones, momenta=ones),)], in_place=True)
    with pytest.raises(AssertionError, match=r"differs from the reference by 0\.02"):
        kernels.check(off, calls)


def test_operands_that_take_turns_fit_into_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expect four times a last-level cache of 1 MiB."""
    monkeypatch.setattr(
        shapes, "QUICK_WIDE", dataclasses.replace(TINY, max_seq_len=2048, inter_dim=256, vocab_size=512)
    )
    here = setting(cache_bytes=1 << 20)
    for name in ("linear", "attention_step"):
        for calls in kernel_calls.CALLS[name](here):
            weights = {}
            for _, part, *_ in calls.turns:
                tensors = (part,) if isinstance(part, torch.Tensor) else part.tensors
                weights |= {t.data_ptr(): t.nbytes for t in tensors}
            assert sum(weights.values()) >= 4 << 18
