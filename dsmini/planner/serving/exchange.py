"""Exchange between GPUs in serving: bytes that a GPU sends in a step, and the limit that its link sets.

In each MoE block a token goes to k experts and comes back. A GPU with n tokens sends

    n * k * dim * (dispatch bytes + combine bytes)

Worked example, DeepSeek-V3 in decode: 32 tokens, 9 experts with the shared one, FP8 out and BF16 back:
32 * 9 * 7168 * 3 = 6.19 MB a block. 50 GB/s take 123.9 us; two micro-batches and 61 layers make 15.11 ms a token. The
paper rounds the width to 7000 and prints 120.96 us and 14.76 ms; GB200's 900 GB/s give 6.72 us and 0.82 ms.

That limit, which only the published figures are compared with, counts every layer, every copy as if it left the node,
and links as on data sheets. A plan's own time counts links as reached, the MoE blocks, of which V3 has 58, and only the
share that leaves. A token's copies go to its experts one by one, or in two hops: once to each chosen node, then once to
each chosen GPU within it. Even choices hit 3.61 of 4 nodes with 8 of 256 experts, and at most
the nodes of n_limited_groups.

Tensor parallelism gathers a group's hidden states before attention and scatters sums after it, in BF16, over the fast
link: 2 (tp - 1) rows for each row of the GPU.

Source: "Insights into DeepSeek-V3" (arXiv 2505.09343), section 2.3.2; DeepSeek-V3 report, sections 3.2.2 and 3.4.
"""

from dataclasses import dataclass

from dsmini.planner.hardware import Hardware
from dsmini.planner.model.routing import node_limit, places_hit
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import (
    COUNT,
    TOKENS,
    Bytes,
    BytesPerSecond,
    Count,
    Seconds,
    TokensPerSecond,
    smallest,
    total,
)
from dsmini.planner.quantities.sizes import BF16
from dsmini.planner.serving.deployment import Deployment

ONE = COUNT(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange(Figures):
    """Bytes that a GPU sends in a step; None where it sends nothing over a link."""

    slow: Bytes | None
    """To other nodes."""
    fast: Bytes | None
    """To others of its node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeLimit(Figures):
    """Limit of the link as the paper counts it: all layers, all copies, nothing else takes time."""

    block_time: Seconds
    """Time of dispatch and combine of one micro-batch in one layer."""
    token_time: Seconds
    """Time of an output token: all layers and micro-batches."""
    tokens_per_second: TokensPerSecond
    """Output tokens of one sequence."""


def exchange(
    model: ModelInputs,
    hardware: Hardware,
    deployment: Deployment,
    *,
    stage: str,
    layers: Count,
    moe_blocks: Count,
    rows: Count,
) -> Exchange:
    """Return the bytes that a GPU sends in a step of these layers.

    Args:
        stage: prefix of the figures' names.
        rows: tokens of the GPU in a micro-batch.
    """
    ep, node = deployment.expert_parallel, hardware.gpus_per_node
    block = rows * deployment.micro_batches * model.dim
    copy = moe_blocks * block * deployment.imbalance * (deployment.dispatch_number + deployment.combine_number)
    copies = copy * (places_hit(model, ep) if deployment.two_hop else deployment.copies(model))
    slow: list[Bytes] = []
    fast: list[Bytes] = []
    if not deployment.spans_nodes(hardware):
        fast += [copies * (ONE - 1 / ep)] if ep.value > 1 else []
    elif deployment.two_hop:
        nodes = ep / node
        slow += [copy * smallest(places_hit(model, nodes), node_limit(model, nodes)) * (ONE - 1 / nodes)]
        fast += [copies * (ONE - 1 / node)]
    else:
        slow += [copies * (ONE - node / ep)]
    tp = deployment.tensor_parallel
    if tp.value > 1:
        fast += [layers * block * BF16 * (2 * (tp - ONE))]
    return Exchange(
        slow=total(slow).named(f"{stage}_slow_bytes", "Bytes to other nodes, a step", "V3, 3.4") if slow else None,
        fast=total(fast).named(f"{stage}_fast_bytes", "Bytes that a GPU sends in its node in a step", "V3, 3.4")
        if fast
        else None,
    )


def exchange_limit(model: ModelInputs, hardware: Hardware, deployment: Deployment, rows: Count) -> ExchangeLimit | None:
    """Return the limit that the experts' link sets, or None for one GPU."""
    if deployment.expert_parallel.value <= 1:
        return None
    stage, source = deployment.stage, "INS, section 2.3.2"
    number = deployment.dispatch_number + deployment.combine_number
    sent = number * rows * deployment.copies(model) * model.dim
    block = (sent / expert_link(hardware, deployment)).named(
        f"{stage}_block_exchange_time", "Dispatch and combine of a micro-batch in one layer", source
    )
    token = (deployment.micro_batches * model.n_layers * block).named(
        f"{stage}_exchange_limit", "Time of a token by links alone, as INS counts", source
    )
    rate = TOKENS(1) / token
    return ExchangeLimit(
        block_time=block,
        token_time=token,
        tokens_per_second=rate.named(f"{stage}_exchange_rate", "Tokens/s of a sequence by links alone", source),
    )


def expert_link(hardware: Hardware, deployment: Deployment) -> BytesPerSecond:
    """Return the link that experts are reached by: the slow one where they are on more than one node."""
    return slow_link(hardware) if deployment.spans_nodes(hardware) else fast_link(hardware)


def fast_link(hardware: Hardware) -> BytesPerSecond:
    """Return the link within a node. Raises: ValueError for hardware without one."""
    if hardware.fast_link is None:
        raise ValueError(f"{hardware.title} has no fast link, want one for several GPUs in a node; plan one GPU")
    return hardware.fast_link


def slow_link(hardware: Hardware) -> BytesPerSecond:
    """Return the link between nodes. Raises: ValueError for hardware without one."""
    if hardware.slow_link is None:
        raise ValueError(f"{hardware.title} has no slow link, want one for several nodes; plan one node")
    return hardware.slow_link
