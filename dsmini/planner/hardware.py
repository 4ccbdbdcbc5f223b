"""Hardware of a plan: what one accelerator can hold and do, and the links to the others."""

from collections.abc import Mapping
from dataclasses import dataclass

from dsmini.planner.quantity import Bytes, BytesPerSecond, Count, DollarsPerSecond, FlopsPerSecond, Seconds, Watts


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One accelerator of a cluster. Every quantity is an input with its source; None where nothing is published."""

    name: str
    """Name on the command line, such as "h800"."""
    title: str
    """Name for people, such as "NVIDIA H800 SXM"."""
    peaks: Mapping[str, FlopsPerSecond]
    """Dense peak of matrix products by dtype: "float32", "bfloat16", "fp8", those that the hardware has."""
    memory: Bytes
    memory_bandwidth: BytesPerSecond
    gpus_per_node: Count
    """Accelerators that the fast link connects."""
    fast_link: BytesPerSecond | None
    """Bytes per second that one accelerator sends to others of its node, one direction."""
    slow_link: BytesPerSecond | None
    """Bytes per second that one accelerator sends to other nodes, one direction."""
    link_latency: Seconds | None
    price: DollarsPerSecond | None
    """Rent of one accelerator."""
    power: Watts | None
    """Power of one accelerator with its share of the node."""

    def peak(self, dtype: str) -> FlopsPerSecond:
        """Return the dense peak of a dtype. Raises: ValueError for a dtype that the hardware has no units for."""
        if dtype not in self.peaks:
            raise ValueError(f"{self.title} has no {dtype} units; use one of {', '.join(self.peaks)}")
        return self.peaks[dtype]
