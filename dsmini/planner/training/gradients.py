"""Time of gradients and weights between data-parallel GPUs, and of the optimizer's update.

    ZeRO 0    all-reduce of FP32 gradients: twice 4 bytes a parameter, but for the own part
    ZeRO 1    gradients once, 4 bytes, and the new weights in the compute dtype, once a step
    ZeRO 2    gradients in every micro-batch, weights once
    ZeRO 3    gradients in every micro-batch, weights twice in every micro-batch

The update reads gradient, master weight and moments and writes the latter two and the weight: limited by memory.

Worked example, DeepSeek-V3, the first GPU: 4.87B parameters on 256 GPUs and 0.88B of experts on 4 GPUs. Their gradients
take (4.85 + 0.66)e9 * 4 / 40e9 = 0.55 s, the weights in FP8 0.14 s. The table prints 0.29 s for the optimizer.

Estimates: all weights are sent as wide as those of matrices. The exchange runs at the rate of the link between nodes.
With ZeRO 0 and 1 it runs after the last backward.

Source: ZeRO (arXiv 1910.02054), section 7; "Insights into DeepSeek-V3" (arXiv 2505.09343), table 4.
"""

from collections.abc import Iterable

from dsmini.planner.hardware import Hardware
from dsmini.planner.quantities.quantity import COUNT, SECONDS, Bytes, Count, D, N, Quantity, Seconds, largest
from dsmini.planner.training.layout import Layout, LayoutFigures
from dsmini.planner.training.memory import GpuMemory, TrainingMemory


def exchange_seconds(hardware: Hardware, layout: Layout, sizes: LayoutFigures, memory: TrainingMemory) -> Seconds:
    """Return the time of the exchange of a step, of which computing hides some from ZeRO 2 on.

    Raises: ValueError where the hardware has no link that the GPUs need.
    """
    if layout.gpus == 1:
        return SECONDS(0)
    link = hardware.fast_link if layout.gpus <= hardware.gpus_per_node.value else hardware.slow_link
    if link is None:
        most = 1 if hardware.fast_link is None else f"{hardware.gpus_per_node.value:g} or fewer"
        raise ValueError(f"{hardware.title} has no link that gpus={layout.gpus} need; use {most}")
    gradients = _most(_sent(layout, sizes, gpu, memory.state.gradient) for gpu in memory.gpus)
    weights = _most(_sent(layout, sizes, gpu, memory.state.weight) for gpu in memory.gpus)
    number = sizes.micro_batches
    sent = {
        0: 2 * gradients,
        1: gradients + weights,
        2: number * gradients + weights,
        3: number * (gradients + 2 * weights),
    }[layout.zero]
    return sent / link


def update_seconds(hardware: Hardware, layout: Layout, sizes: LayoutFigures, memory: TrainingMemory) -> Seconds:
    """Return the time in which the optimizer reads and writes the state that a GPU owns."""
    state = memory.state
    moved = state.gradient + 2 * state.master + 2 * state.moments + state.weight
    if layout.precision == "fp32":
        moved = moved + state.weight  # its own master: read too
    found = _most(_owned(layout, sizes, gpu) for gpu in memory.gpus) * moved / hardware.memory_bandwidth
    return found.named("update_seconds", "Update of the weights by the optimizer", "V3, section 3.3.3")


def _replicas(layout: Layout, sizes: LayoutFigures) -> tuple[Count, Count]:
    """Return the number of GPUs that hold the same matrices, and that hold the same experts."""
    copies = COUNT(layout.copies)
    return sizes.data * copies, sizes.expert_data * copies


def _sent(layout: Layout, sizes: LayoutFigures, gpu: GpuMemory, size: Bytes) -> Bytes:
    """Return the bytes that a GPU sends when a number of `size` for each parameter is reduced or gathered once."""
    one, (replicas, expert_replicas) = COUNT(1), _replicas(layout, sizes)
    rest = (gpu.parameters - gpu.experts) * (one - one / replicas)
    return (rest + gpu.experts * (one - one / expert_replicas)) * size


def _owned(layout: Layout, sizes: LayoutFigures, gpu: GpuMemory) -> Count:
    """Return the parameters that a GPU updates."""
    if layout.zero == 0:
        return gpu.parameters
    replicas, expert_replicas = _replicas(layout, sizes)
    return (gpu.parameters - gpu.experts) / replicas + gpu.experts / expert_replicas


def _most(amounts: Iterable[Quantity[N, D]]) -> Quantity[N, D]:
    found = list(amounts)
    return found[0] if len(found) == 1 else largest(*found)
