"""Roofline of a decoding step: which limits each operation, memory or arithmetic, and are bytes and FLOPs as counted?

As in training, an operation with F FLOPs that must move b bytes is at most as fast as min(peak, F / b * bandwidth).
Decoding one sequence does two FLOPs with each weight that it reads, far below the ridge.

FLOPs and bytes of a token are also known by formula (dsmini.accounting). The formula of bytes counts inputs and results
of every product; kernels that run several products in one call save some of these.
"""

from dsmini import accounting
from dsmini.diagnosis.decoding.steps import steps_with
from dsmini.diagnosis.decoding.subject import DecodingSubject
from dsmini.diagnosis.evidence.evidence import Evidence, none_of
from dsmini.diagnosis.evidence.roofline import points_of, section_of
from dsmini.measure.counting import count
from dsmini.measure.step_rates import Rates
from dsmini.report import Figure, Section

PASSES = 5


def run(subject: DecodingSubject, rates: Rates | None, seconds: float) -> Section:
    """Return the section of a page."""
    assert rates is not None, "without rates there is no roof"
    step = steps_with(subject.model, subject.cache, subject.tokens)
    passes = [count(step, rates.roofs.cache_bytes) for _ in range(1 + PASSES)][1:]
    points = points_of([each.operations for each in passes], rates)
    c, keys, batch = subject.config, subject.context + 1, subject.batch
    flops = accounting.decode_flops_per_token(c, context=keys).total
    nbytes = accounting.decode_bytes_per_token(
        c, context=keys, batch=batch, dtype=subject.weight_dtype, cache_dtype=subject.compute_dtype
    ).total
    figures = [
        Figure(
            question="roofline",
            case={"of": "a token"},
            metric=metric,
            unit=unit,
            measured=measured / batch,
            predicted=predicted,
        )
        for metric, unit, measured, predicted in (
            ("flops", "FLOP", passes[0].flops, flops),
            ("bytes", "bytes", passes[0].bytes, nbytes),
        )
    ]
    said = (
        f"A token takes {passes[0].flops / batch / 1e6:.2f} MFLOP, {flops / 1e6:.2f} by formula, and moves "
        f"{passes[0].bytes / batch / 1e6:.2f} MB, {nbytes / 1e6:.2f} by formula."
    )
    about = " Each block's operations are timed apart, which takes longer than the one call that decodes."
    return section_of(points, rates, subject.compute_dtype, figures, said, about)


DECODING_ROOFLINE = Evidence[DecodingSubject](
    name="roofline", why_not=none_of, run=run, weight=4.0, steps=14, needs_rates=True
)
