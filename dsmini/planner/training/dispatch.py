"""Traffic of expert parallelism: bytes that a token's rows take between GPUs, in a MoE layer and pass.

    dispatch    the token's row to the GPUs of its k experts: FP8 with scales, or BF16
    combine     the results back, added up on the way: BF16

A pass has both: forward, and backward with the roles exchanged. A row crosses the slow link once for each other node
that has a chosen expert. Inside the node the fast link takes it to each GPU with a chosen one. With N nodes and k
different experts, drawn evenly,

    nodes reached    those hit by k experts (model/routing.py), at most what node-limited routing allows
    of them remote   all but 1/N, and likewise of separate rows, one for each expert

Worked example, DeepSeek-V3, 64 GPUs in 8 nodes, k = 8: without a limit a token reaches 5.29 nodes, with it 4, 3.5 of
them remote. A row is 7392 bytes in FP8 and 14,336 in BF16: 76 KB a token, layer and pass over InfiniBand at 40 GB/s,
1.9 us. Of eight separate rows seven are remote: 152 KB.

Estimates: routing is uniform; the two links work at the same time, so the slower one counts; latency is left out.

Source: DeepSeek-V3 report, sections 2.1.2 and 3.2.2.
"""

from dataclasses import dataclass
from typing import Literal

from dsmini.planner.hardware import Hardware
from dsmini.planner.model.routing import node_limit, places_hit
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import (
    COUNT,
    TOKENS,
    Bytes,
    BytesPerToken,
    Count,
    SecondsPerToken,
    largest,
    per,
    smallest,
)
from dsmini.planner.quantities.sizes import BF16, fp8_row

DispatchDtype = Literal["bf16", "fp8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchFigures(Figures):
    """Copies, bytes and times of a token's rows in one MoE layer and one pass."""

    expert_nodes: Count
    """Nodes that share the experts of a layer."""
    nodes_drawn: Count
    """Expected nodes of k free choices."""
    node_limit: Count
    """Most nodes that the routing's groups allow."""
    nodes_reached: Count
    slow_copies: Count
    """Rows that cross the slow link."""
    slow_copies_unlimited: Count
    """The same if each chosen expert were sent a row of its own."""
    gpus_reached: Count
    fast_copies: Count
    """Rows that cross the fast link."""
    dispatch_row: Bytes
    combine_row: Bytes
    slow_bytes: BytesPerToken
    slow_bytes_unlimited: BytesPerToken
    """Bytes of these."""
    fast_bytes: BytesPerToken
    slow_seconds: SecondsPerToken
    fast_seconds: SecondsPerToken
    dispatch_seconds: SecondsPerToken
    """Time of the slower link."""


def dispatch_figures(
    m: ModelInputs, hardware: Hardware, expert: Count, dispatch: DispatchDtype = "fp8"
) -> DispatchFigures:
    """Return the traffic of a token among `expert` GPUs that share the experts.

    Args:
        dispatch: dtype of the rows on their way to the experts.

    Raises: ValueError where the hardware has no link that the GPUs need.
    """
    source = "V3, section 3.2.2"
    k, one = m.n_activated_experts, COUNT(1)
    nodes = largest(one, expert / hardware.gpus_per_node).named("expert_nodes", "Nodes that share a layer's experts")
    drawn = places_hit(m, nodes).named("nodes_drawn", "Nodes of a token's experts, chosen freely", source)
    limit = node_limit(m, nodes).named("node_limit", "Nodes that a token may reach", "V3, section 2.1.2")
    reached = smallest(drawn, limit).named("nodes_reached", "Nodes that a token reaches", source)
    remote = one - one / nodes
    slow_copies = (reached * remote).named("slow_copies", "Rows of a token over the slow link", source)
    copies = (k * remote).named("slow_copies_unlimited", "The same with a row for each expert", source)
    gpus = places_hit(m, expert).named("gpus_reached", "GPUs of a token's experts", source)
    inside = smallest(expert, hardware.gpus_per_node)
    fast_copies = (gpus * (one - one / inside)).named("fast_copies", "Rows of a token over the fast link", source)
    row = fp8_row(m.dim) if dispatch == "fp8" else m.dim * BF16
    row = row.named("dispatch_row", "Row on its way to an expert", "V3, section 3.3.3")
    back = (m.dim * BF16).named("combine_row", "Row on its way back", "V3, section 3.3.3")
    both = per(row + back, TOKENS)
    slow = (slow_copies * both).named("slow_bytes", "Slow link: bytes of a token and layer", source)
    fast = (fast_copies * both).named("fast_bytes", "Fast link: bytes of a token, a layer and pass", source)
    slow_seconds, fast_seconds = _seconds(hardware, nodes, slow, fast)
    return DispatchFigures(
        expert_nodes=nodes,
        nodes_drawn=drawn,
        node_limit=limit,
        nodes_reached=reached,
        slow_copies=slow_copies,
        slow_copies_unlimited=copies,
        gpus_reached=gpus,
        fast_copies=fast_copies,
        dispatch_row=row,
        combine_row=back,
        slow_bytes=slow,
        slow_bytes_unlimited=(copies * both).named("slow_bytes_unlimited", "Bytes of a row for each expert", source),
        fast_bytes=fast,
        slow_seconds=slow_seconds.named("dispatch_slow_seconds", "Slow link: time of a token's rows, a layer and pass"),
        fast_seconds=fast_seconds.named("dispatch_fast_seconds", "Fast link: time of a token's rows, a layer and pass"),
        dispatch_seconds=largest(slow_seconds, fast_seconds).named(
            "dispatch_seconds", "Time of a token's rows, a layer and pass", source
        ),
    )


def _seconds(
    hardware: Hardware, nodes: Count, slow: BytesPerToken, fast: BytesPerToken
) -> tuple[SecondsPerToken, SecondsPerToken]:
    """Return the times of the slow and of the fast link."""
    if hardware.fast_link is None:
        raise ValueError(f"{hardware.title} has no fast link between GPUs, which experts on several need; use expert=1")
    if hardware.slow_link is None and nodes.value > 1:
        raise ValueError(f"{hardware.title} has no link between nodes, which experts on several need; use fewer GPUs")
    inside = fast / hardware.fast_link
    return 0 * inside if hardware.slow_link is None else slow / hardware.slow_link, inside
