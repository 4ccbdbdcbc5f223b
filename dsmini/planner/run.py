"""A whole run of training: its time, its cost, and its failures.

Operations are those of training_flops, without multi-token prediction and recomputation. The peak is that of BF16 also
where products are FP8. DeepSeek counts both like this.

Failures. Nodes of eight GPUs fail independently at a constant rate: mean time to failure M = 1 / (nodes * failures per
node and second). Meta counted 6.50 failures in 1000 node-days; on 16,384 GPUs, 2,048 nodes, that is one every 1.80
hours. A failure costs the restart u and the work since the last checkpoint, and a checkpoint halts training for w. With
an interval D, to first order best at sqrt(2 w M), the share of the time that trains is

    D / (M e^(u/M) (e^((D + w)/M) - 1))

V3 on 2048 H800: a node of 256 fails every 14.4 hours. Halting 10 s every 17 minutes and restarting in 300 s keep 97.5 %
of the time.

Source: Kokolis et al. (arXiv 2410.21680), Young (1974) and Daly (2006) for failures.
"""

from math import exp, sqrt

from dsmini.config.fields import require
from dsmini.planner.figure import Figure, figure
from dsmini.planner.request import DTYPES, Inputs
from dsmini.planner.training import Training
from dsmini.report.units import human

GPUS_OF_A_FAILURE = 8
"""GPUs of a node of Meta's, whose failures were counted."""
MOST_LOST = 7.0
"""Longest restart, checkpoint and work between two, in mean times to failure: less than 0.1 % would train."""


class Run:
    """Time and cost of a run: by the parts of a step, or by a utilization."""

    def __init__(self, t: Training, inputs: Inputs) -> None:
        self.t: Training = t
        self.peak: Figure = t.h.peak(t.dtype)
        self.tokens: Figure = inputs["tokens"]
        self.utilization: Figure | None = inputs["utilization"] if inputs.request.utilization is not None else None
        self.failures_per_node_day: Figure = inputs["failures_per_node_day"]
        self.restart: Figure = inputs["restart_time"]
        self.halt: Figure = inputs["checkpoint_halt"]

    def check_failures(self) -> None:
        """Raise ValueError for more failures than a run survives."""
        mean = self.mean_time_to_failure
        said = f"a failure every {human(mean, 's')} leaves no time to train, with {self.restart} "
        said += f"for a restart and {self.halt} for a checkpoint; lower one of the three"
        require(self.restart + self.halt + self.checkpoint_interval <= MOST_LOST * mean, said)

    @figure("token")
    def step_tokens(self) -> float:
        """Tokens of a step. Source: V3, section 4.2."""
        return self.t.layout.batch * self.t.m.seq_len

    @figure("FLOP")
    def step_flops(self) -> float:
        """Operations of a step. Source: INS, table 2."""
        return self.t.m.training_flops * self.step_tokens

    @figure("s", main=True)
    def step_seconds(self) -> float:
        """Time of a step."""
        if self.utilization is not None:
            return self.step_flops / (self.t.layout.gpus * self.peak * self.utilization)
        return self.t.parts_seconds

    @figure("s")
    def least_step_seconds(self) -> float:
        """Least time of a step: all products at their peaks, nothing computed again, all else hidden."""
        narrow, peak = 6 * self.t.m.parameters_narrow, self.t.h.peak(DTYPES[self.t.layout.precision])
        token = narrow / peak + (self.t.m.training_flops - narrow) / self.peak
        return self.step_tokens * token / self.t.layout.gpus

    @figure("s")
    def least_training_time(self) -> float:
        """Least time of the whole run without failures."""
        return self.tokens / self.step_tokens * self.least_step_seconds

    @figure(main=True)
    def mfu(self) -> float:
        """Share of the peak that a step reaches (MFU, causal). Source: INS, table 4."""
        return self.step_flops / (self.t.layout.gpus * self.peak * self.step_seconds)

    @figure("token/s", main=True)
    def training_tokens_per_second(self) -> float:
        """Tokens a second, all GPUs."""
        return self.step_tokens / self.step_seconds

    @figure("s", main=True)
    def training_time(self) -> float:
        """Time of the whole run without failures."""
        return self.tokens / self.training_tokens_per_second

    @figure(main=True)
    def training_gpu_hours(self) -> float:
        """GPU-hours of the whole run. Source: V3, table 1."""
        return self.t.layout.gpus * self.training_time / 3600

    @figure("$", main=True)
    def training_cost(self) -> float | None:
        """Rent of the whole run at the low end. Source: V3, table 1."""
        return self.t.layout.gpus * self.training_time * self.t.h.price if self.t.h.price is not None else None

    @figure("$", main=True)
    def training_cost_most(self) -> float | None:
        """Rent of the whole run at the high end. Source: V3, table 1."""
        return (
            self.t.layout.gpus * self.training_time * self.t.h.price_most if self.t.h.price_most is not None else None
        )

    @figure("s", main=True)
    def mean_time_to_failure(self) -> float:
        """Mean time between failures. Source: Kokolis et al. (arXiv 2410.21680)."""
        return 86400 / (self.t.layout.gpus / GPUS_OF_A_FAILURE * self.failures_per_node_day)

    @figure("s")
    def checkpoint_interval(self) -> float:
        """Time between checkpoints, best to first order. Source: Young (1974): sqrt(2 w M)."""
        return sqrt(2 * self.halt * self.mean_time_to_failure)

    @figure(main=True)
    def effective_share(self) -> float | None:
        """Share of the time that trains. Source: Daly (2006): the complete cost function."""
        if not self.t.fits:
            return None
        mean = self.mean_time_to_failure
        lost = exp((self.checkpoint_interval + self.halt) / mean) - 1
        return self.checkpoint_interval / (mean * exp(self.restart / mean) * lost)

    @figure("s", main=True)
    def elapsed_time(self) -> float | None:
        """Time of the run with failures. Source: Kokolis et al. (arXiv 2410.21680)."""
        return self.training_time / self.effective_share if self.effective_share is not None else None
