"""Loss gap: does another dtype change the loss by more than another order of the data does?

Twins of the run start from its state and train for a few steps, in each dtype on the same batches. Then all score the
same held-out text. It is done again for other orders of the data, each made by a seed:

    gap(dtype) = mean over seeds of loss(dtype, seed) - loss(run's dtype, seed)
    band       = largest - smallest loss of the run's dtype over the seeds

A gap inside the band means that the order of the data, which is chance, changes the loss more than the dtype does. It
does not prove that a long training ends alike: over so few steps a small gap may only begin to grow. A gap outside the
band is the dtype's.

Worked example: BF16 ends at 2.510, 2.522 and 2.504 with three orders, a band of 0.018. FP32 ends at 2.508, 2.521 and
2.503, so that its gap is -0.0013: inside.

The subject itself takes no step. FP8 is simulated.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence

import torch

from dsmini.data.corpus import Loader, Windows
from dsmini.diagnosis.evidence.dtypes import dtype_of, with_dtype
from dsmini.diagnosis.subject import Subject
from dsmini.machine import DTYPES, slow_bf16
from dsmini.nn import Transformer
from dsmini.training.trainer import Trainer

LEAST_STEPS, MOST_STEPS = 3, 60
ORDERS = 3
"""Seeds of the data's order."""
SCORED = 4096
"""Held-out tokens that are scored, the same for all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossGaps:
    """Held-out losses after a few steps, in nats a token."""

    now: str
    """Dtype of the run."""
    steps: int
    losses: Mapping[str, Sequence[float]]
    """Losses by dtype, in the order of the seeds."""
    why_not: str = ""
    """Reason why there are none."""
    left_out: Sequence[str] = ()
    """Dtypes for which there was no time."""

    @property
    def band(self) -> float:
        """Range over the seeds in the run's dtype."""
        return max(self.losses[self.now]) - min(self.losses[self.now])

    def gaps(self, dtype: str) -> list[float]:
        """Return the losses of a dtype minus those of the run's, in the order of the seeds."""
        return [other - own for other, own in zip(self.losses[dtype], self.losses[self.now], strict=True)]

    def is_inside(self, dtype: str) -> bool:
        """Return True if the mean gap is not larger than the band."""
        return abs(statistics.mean(self.gaps(dtype))) <= self.band

    @property
    def not_finite(self) -> list[str]:
        """Dtypes with a loss that is not finite."""
        return [dtype for dtype, losses in self.losses.items() if not all(map(math.isfinite, losses))]


def others_of(subject: Subject) -> list[str]:
    """Return the dtypes to compare the run's with, the most exact first."""
    bf16 = [] if slow_bf16(subject.trainer.device) else ["bfloat16"]
    return [dtype for dtype in ("float32", *bf16, "fp8") if dtype != dtype_of(subject.config)]


class Twin:
    """A run of its own that starts from the subject's state, in a dtype of its own."""

    def __init__(self, subject: Subject, dtype: str) -> None:
        self.subject = subject
        config = with_dtype(subject.config, dtype)
        plain = dataclasses.replace(config.train, ema_decay=None, compile=False)
        if slow_bf16(subject.trainer.device):
            plain = dataclasses.replace(plain, dtype="float32")
        self.config = dataclasses.replace(config, train=plain)
        source = subject.trainer
        with torch.random.fork_rng(devices=[]):
            model = Transformer(self.config.model, compute_dtype=DTYPES[plain.dtype]).to(source.device)
        trainer = Trainer(model, source.corpus, self.config, source.device)
        trainer.loader.close()
        self.run = Subject(trainer)
        self.run.at, self.run.rows = subject.at, subject.rows
        self.start(0)

    def start(self, order: int) -> None:
        """Go back to the subject's state, with another order of the data."""
        source, trainer, train = self.subject.trainer, self.run.trainer, self.config.train
        parts = {name: part for name, part in source.tensors().items() if name != "average"}
        trainer.load(parts, steps_done=self.subject.at, sequences=source.sequences, average_updates=0)
        trainer.loader = Loader(source.corpus, self.config.seq_len, train.seed + order, 0)

    def losses(self, steps: int, windows: Windows) -> list[float]:
        """Return the held-out loss after this many steps, for each order of the data."""
        found: list[float] = []
        for order in range(ORDERS):
            self.start(order)
            for _ in range(steps):
                self.run.step()
            found.append(self.run.trainer.validate(windows))
        return found

    def costs(self, windows: Windows) -> tuple[float, float]:
        """Return the seconds of a step, without those of the first, and of scoring."""
        self.run.step()
        start = time.perf_counter()
        self.run.step()
        taken = time.perf_counter() - start
        self.run.trainer.validate(windows)
        return taken, time.perf_counter() - start - taken


def loss_gaps(subject: Subject, seconds: float) -> LossGaps:
    """Train twins in as many dtypes, and for as many steps, as fit into the seconds."""
    end, now = time.perf_counter() + seconds, dtype_of(subject.config)
    windows = subject.trainer.corpus.windows(subject.config.seq_len, SCORED)
    dtypes, twins = [now, *others_of(subject)], dict[str, Twin]()
    costs: dict[str, tuple[float, float]] = {}
    for dtype in dtypes:
        if costs and steps_that_fit({**costs, dtype: costs[now]}, end - time.perf_counter()) < LEAST_STEPS:
            break  # not even if it were as fast as the run's own
        twins[dtype] = Twin(subject, dtype)
        costs[dtype] = twins[dtype].costs(windows)
    while len(costs) > 1:
        steps = steps_that_fit(costs, end - time.perf_counter())
        if steps >= LEAST_STEPS:
            losses = {dtype: twins[dtype].losses(steps, windows) for dtype in costs}
            left_out = [dtype for dtype in dtypes if dtype not in losses]
            return LossGaps(now=now, steps=steps, losses=losses, left_out=left_out)
        del costs[list(costs)[-1]]
    least = ORDERS * 2 * (LEAST_STEPS * costs[now][0] + costs[now][1])
    why = f"{ORDERS} times {LEAST_STEPS} steps in two dtypes take more than {least:.0f} s, and have {seconds:.0f}"
    return LossGaps(now=now, steps=0, losses={}, why_not=why)


def steps_that_fit(costs: Mapping[str, tuple[float, float]], seconds: float) -> int:
    """Return how many steps each dtype can take for each order of the data.

    Args:
        costs: seconds of a step and of scoring, by dtype.
    """
    steps, scoring = (sum(cost[i] for cost in costs.values()) for i in (0, 1))
    return max(0, min(MOST_STEPS, int((seconds / ORDERS - scoring) / steps)))
