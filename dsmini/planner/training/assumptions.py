"""Assumptions of a plan of training: numbers that no config states, each an input with its source.

The efficiencies are shares of a peak while a GPU computes. They are calibrated, not derived:

    bf16_efficiency    0.43: Llama 3 trained at 430 of 989 TFLOP/s, bubbles and communication included
    fp8_efficiency     0.30: with it V3's forward and backward together take the 144 ms that its table implies

Worked example: with multi-token prediction, a token of V3 takes 217.0 GFLOP of products that are FP8, 43.6 of others,
and 6.8 that are computed again. At 1979 * 0.30 and 989 * 0.43 TFLOP/s, on 112 of 132 multiprocessors, 4096 tokens of
one of 16 stages take 145 ms. bubbles.py derives 143.8 ms from the table.
"""

from dataclasses import dataclass

from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.quantity import COUNT, SECONDS, TOKENS, Count

HOUR = SECONDS(3600, "hour", "Seconds of an hour", "definition")
DAY = SECONDS(86400, "day", "Seconds of a day", "definition")
TRILLION = TOKENS(1e12, "trillion_tokens", "A trillion tokens", "definition")


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions(Figures):
    """Shares of peaks and of multiprocessors."""

    utilization: Count
    """Share of the peak that a whole step reaches (MFU), with the operations of `training_flops`."""
    bf16_efficiency: Count
    """Share of the BF16 or FP32 peak that products reach while a GPU computes."""
    fp8_efficiency: Count
    """Share of the FP8 peak that products reach while a GPU computes."""
    multiprocessors: Count
    communication_multiprocessors: Count
    """Multiprocessors that carry the rows of experts and do not compute."""
    stated: bool = False
    """True if the utilization was measured, and is not V3's."""

    @classmethod
    def of(cls, utilization: float | None = None, source: str = "measured") -> "Assumptions":
        """Return the published assumptions, with a measured utilization if there is one."""
        return cls(
            stated=utilization is not None,
            utilization=COUNT(
                0.3894 if utilization is None else utilization,
                "utilization",
                "Share of the peak that a step reaches (MFU, causal)",
                "INS, table 4" if utilization is None else source,
            ),
            bf16_efficiency=COUNT(0.43, "bf16_efficiency", "Share of the BF16 peak while computing", "LL3, table 4"),
            fp8_efficiency=COUNT(0.30, "fp8_efficiency", "Share of the FP8 peak while computing", "from INS, table 4"),
            multiprocessors=COUNT(132, "multiprocessors", "Multiprocessors of a GPU", "H800 data sheet"),
            communication_multiprocessors=COUNT(
                20, "communication_multiprocessors", "Multiprocessors that carry rows of experts", "V3, section 3.2.2"
            ),
        )
