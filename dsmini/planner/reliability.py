"""Failures of a long run: what they leave of its time, and what the run costs in the end.

Nodes fail independently at a constant rate: mean time to failure M = 1 / (nodes * failures per node and second). Meta
counted 6.50 failures in 1000 node-days; on 16,384 GPUs, 2,048 nodes, that is one every 1.80 hours. The rule is one of
large runs: on 1,024 GPUs it gives 28.8 hours, and Meta measured 7.9, because small jobs also fail for other reasons.

A failure costs the restart u and the work since the last checkpoint. A checkpoint halts training for w. With an
interval D the share of the time that trains is

    D / (M e^(u/M) (e^((D + w)/M) - 1))                          at any rate (Daly)
    (1 - (u + D / 2) / M) / (1 + w / D)                          to first order, best at D = sqrt(2 w M) (Young)

To first order no failure meets the recovery from another one: within 2 % while u + D + w is below a sixth of M.

Worked example, DeepSeek-V3 on 2048 H800: a node of 256 fails every 14.4 hours. A checkpoint of 683B parameters with 8
bytes each is 5.46 TB, or 1.99 s at 10 GiB/s a node. Halting 10 s every 17 minutes and restarting in 300 s keep 97.5 %
of the time.

Source: Kokolis et al. (arXiv 2410.21680); Young (1974); Daly (2006); Fire-Flyer (arXiv 2408.14158) for checkpoints.
"""

from typing import Any

import numpy as np

from dsmini.planner.display import shown
from dsmini.planner.figure import Sheet
from dsmini.planner.request import Layout

KOKOLIS = "Kokolis et al. (arXiv 2410.21680)"
FAILURES = {
    "failures_per_node_day": (6.50e-3, f"{KOKOLIS}: 6.50 in 1000 node-days of RSC-1"),
    "restart_time": (300.0, f"{KOKOLIS}: u0 of five minutes"),
    "checkpoint_halt": (10.0, f"{KOKOLIS}: about 10 s at 12,000 GPUs"),
}
"""Rate of failures and their costs where the user leaves them open."""
NODE_GPUS = (8, f"{KOKOLIS}: nodes of eight")
WRITE_RATE = (10 * 2.0**30, "FF: over 10 GiB/s")
MOST_LOST = 7.0
"""Longest restart, checkpoint and work between two, in mean times to failure: less than 0.1 % would train."""


def reliability_figures(s: Sheet, r: Layout) -> None:
    """Name what failures do to a run. Raises: ValueError for more of them than a run survives."""
    failure_rate(s)
    s.checkpoint_interval = np.sqrt(2 * s.checkpoint_halt * s.mean_time_to_failure)
    lost = s.restart_time + s.checkpoint_halt + s.checkpoint_interval
    if float(lost) > MOST_LOST * float(s.mean_time_to_failure):
        raise ValueError(
            f"a failure every {shown(s.mean_time_to_failure)} leaves no time to train, with {shown(s.restart_time)} "
            f"for a restart and {shown(s.checkpoint_halt)} for a checkpoint; lower one of the three"
        )
    checkpoint(s, r)
    times = s.mean_time_to_failure, s.checkpoint_interval, s.restart_time, s.checkpoint_halt
    s.effective_share_at_any_rate = share_at_any_rate(*times)
    s.effective_share = first_order_share(*times)
    s.elapsed_time = s.training_time / s.effective_share_at_any_rate
    s.failures = s.elapsed_time / s.mean_time_to_failure
    if s.get("gpu_price") is not None:
        s.elapsed_cost = s.gpus * s.elapsed_time * s.gpu_price
    if s.get("gpu_power") is not None:
        s.training_energy = s.gpus * s.gpu_power * s.elapsed_time


def failure_rate(s: Sheet) -> None:
    """Name the rate of failures of all nodes, and the mean time between two; what the sheet lacks is Meta's."""
    for name, default in FAILURES.items():
        s.put(name, *default)
    s.failure_rate = s.gpus / s.put("gpus_per_failing_node", *NODE_GPUS) * s.failures_per_node_day / 86400
    s.mean_time_to_failure = 1 / s.failure_rate


def checkpoint(s: Sheet, r: Layout) -> None:
    """Name the bytes of a checkpoint, FP32 weights and moments of all parameters, and the time to write it."""
    weights = s.state_weight if r.precision == "fp32" else s.state_master
    s.checkpoint_bytes = s.parameters_total * (weights + s.state_moments)
    nodes = np.ceil(s.gpus / s.gpus_per_node)
    s.checkpoint_write_time = s.checkpoint_bytes / (nodes * s.put("checkpoint_rate", *WRITE_RATE))


def share_at_any_rate(mean: Any, interval: Any, restart: Any, write: Any) -> Any:
    """Return the share of the time that trains if failures also interrupt restarts and writes."""
    return interval / (mean * np.exp(restart / mean) * (np.exp((interval + write) / mean) - 1))


def first_order_share(mean: Any, interval: Any, restart: Any, write: Any) -> Any:
    """Return the share of the time that trains, to first order; 0 where a failure costs more than the time to it."""
    return np.maximum((1 - (restart + interval / 2) / mean) / (1 + write / interval), 0.0)
