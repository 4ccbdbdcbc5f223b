"""Tolerances for machines without recorded bits, with their reasons.

Another CPU sums in another order and rounds differently. Between the instruction sets AVX-512 and AVX2 of one CPU the
differences were at most these, relative to the largest number of a tensor, to each loss, or to the norm of a tensor:

    logits in FP32                  2.5e-7          losses of FP32 runs     2.3e-7
    logits from a cache in BF16     2.3e-7          losses of FP8 runs      2.8e-3
    logits from a cache in FP8      8.6e-7          losses of BF16 runs     5.8e-3
    gradient norms of FP32 runs     1.1e-6          tensors of FP32 runs    2e-5, half of them 2e-6

A rounded cache or product is discontinuous: a number near the midpoint of two values may go to either.
"""

# 80 units in the last place: some 20 chained sums of at most 80 terms, each a unit or two off
FP32_LOGITS = 1e-5
# A difference of 1e-6 moves about one in 4000 numbers to the next value, 2^-7 of it away. It is one of 28 in a row, and
# the row is one of 35 on average: 2^-7 / sqrt(28) / 35 = 4e-5. Ten of them; keeping FP32 instead would change 7e-4.
BF16_CACHE_LOGITS = 4e-4
# The same in E4M3: 2^-3 / sqrt(20) / 35 = 8e-4 for each, and there is one at most. A cache in BF16 would change 1e-2.
FP8_CACHE_LOGITS = 2e-3
# The output is rounded to BF16: a number may go to the value next to it, 2^-8 of the largest at most.
FP8_PRODUCT = 2.0**-8
# Steps of training magnify differences, and a near tie may send a token to another expert. In 23 runs of the schedule's
# recipe with one token of one layer and step routed to its next expert, losses changed by at most 1.1e-3, the balance
# loss by 1.3e-2 and the gradient's norm by 2.3e-2: twice that. Other seeds, data orders or learning rates change a loss
# by 1e-2 and more.
FP32_RUN = {**dict.fromkeys(("loss", "mtp_loss", "val_loss"), 2.2e-3), "balance_loss": 2.6e-2, "grad_norm": 4.6e-2}
FP32_RUN |= {"lr": 1e-12}  # Python's own numbers, whose cosine may differ in the last place
# Once a number is rounded the other way, the weights of two runs differ by steps of E4M3 or BF16. The losses of the
# first three steps agreed within 1e-7, all twenty within 6e-3. Four times that is left for other machines.
ROUNDED_RUN = {**dict.fromkeys(("loss", "mtp_loss", "val_loss"), 3e-2), "lr": 1e-12}
NEAR = {"schedule": FP32_RUN, "resumed": FP32_RUN, "fp8": ROUNDED_RUN, "bf16": ROUNDED_RUN}
"""Relative tolerances of figures by run."""
FIRST_STEPS, FIRST = 3, 1e-5
"""The first steps of a run in FP32 agree as its tensors do: a tie so early is unlikely."""


def run_tolerance(name: str, key: str, step: int) -> float:
    """Return the relative tolerance of a figure of a run; steps count from zero."""
    exact = step < FIRST_STEPS and NEAR[name] is FP32_RUN
    return min(FIRST, NEAR[name][key]) if exact else NEAR[name][key]


def logits_tolerance(name: str) -> float:
    """Return the tolerance of a tensor in models.LOGITS, or of the logits of models.TOKENS, relative to the largest."""
    if "product" in name:
        return FP8_PRODUCT
    if "fp8 cache" in name:
        return FP8_CACHE_LOGITS
    return BF16_CACHE_LOGITS if "bf16 cache" in name else FP32_LOGITS
