"""DeepSeek-V3's training as inputs of a plan, for tests: the cluster, the layout and the workload of its report."""

from dsmini.planner.hardware import Hardware
from dsmini.planner.quantities.quantity import (
    BYTES,
    BYTES_PER_SECOND,
    COUNT,
    DOLLARS_PER_SECOND,
    FLOPS_PER_SECOND,
    SECONDS,
    WATTS,
)
from dsmini.planner.training.layout import Layout
from dsmini.planner.training.workload import Workload

H800 = Hardware(
    name="h800",
    title="NVIDIA H800 SXM",
    peaks={
        "bfloat16": FLOPS_PER_SECOND(989e12, "bf16_peak", "Dense peak in BF16", "data sheet"),
        "fp8": FLOPS_PER_SECOND(1979e12, "fp8_peak", "Dense peak in FP8", "data sheet"),
    },
    memory=BYTES(80e9, "memory", "Memory of a GPU", "data sheet"),
    memory_bandwidth=BYTES_PER_SECOND(3.35e12, "memory_bandwidth", "Bandwidth of the memory", "data sheet"),
    gpus_per_node=COUNT(8, "gpus_per_node", "GPUs of a node", "V3, section 3.1"),
    fast_link=BYTES_PER_SECOND(160e9, "fast_link", "NVLink of a GPU, one direction, effective", "INS, section 4.3"),
    slow_link=BYTES_PER_SECOND(40e9, "slow_link", "InfiniBand of a GPU, one direction, effective", "INS, section 4.3"),
    link_latency=SECONDS(3.7e-6, "link_latency", "Latency of the slow link", "INS, table 5"),
    price=DOLLARS_PER_SECOND(2 / 3600, "price", "Rent of a GPU", "V3, table 1: $2 an hour"),
    power=WATTS(700, "power", "Power of a GPU", "data sheet"),
)
V3_LAYOUT = Layout(
    gpus=2048,
    pipeline=16,
    expert=64,
    zero=1,
    recompute="selective",
    precision="fp8",
    schedule="dualpipe",
    moments="bfloat16",
)
"""Layout of DeepSeek-V3 (report, section 3.2)."""
V3_WORKLOAD = Workload.of(seq_len=4096, batch=15360, tokens=14.8e12, source="V3, section 4.2")
