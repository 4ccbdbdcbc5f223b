"""All-to-all of experts: rows of a token that cross links in a MoE layer, their bytes and their time.

    dispatch    the token's row to the GPUs of its k experts: FP8 with scales, else as the results
    combine     the results back, added up on the way: BF16, or FP32 where all products are

In two hops (training, prefill) a row crosses the slow link once for each other node that has a chosen expert, and
inside the node the fast link takes it to each GPU with one. In one hop (V3's decoding) every chosen expert gets a row
of its own. The links work at the same time, so the slower one counts.

To see what another network gives, change the links of a hardware file (machines.toml), or --vary slow_link=100e9; for
another topology, the rows of `Exchange` are the one place that says how many cross which link.

Worked example, DeepSeek-V3's training, 64 GPUs in 8 nodes, k = 8: chosen freely a token's experts are on 5.29 nodes;
with 4 of 8 groups allowed it reaches 3.97, 3.47 of them remote. A row is 7392 bytes in FP8 and 14,336 in BF16: 75 KB
a token, layer and pass over InfiniBand, which take 1.9 us at 40 GB/s. Seven of eight separate rows are remote: 152
KB.

Estimates: all experts are equally likely, but for `imbalance`, by which the fullest GPU has more rows than the mean;
latency is left out.

Source: DeepSeek-V3 report, sections 2.1.2, 3.2.2 and 3.4; INS, section 2.3.2.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsmini.accounting.tensors import BLOCK, BLOCK_FP4, SIZES
from dsmini.config import ModelConfig
from dsmini.planner.figure import counted, figure

TOKENS = 8192
"""Random tokens that are routed where groups are limited."""


@functools.cache
def places_hit(experts: int, chosen: int, groups: int, limited: int, best: int, places: float) -> float:
    """Return the mean number of equal places that hold a token's experts, all experts being equally likely.

    Free choices miss a place that has `here` experts with (1 - here / e) (1 - here / (e - 1)) ... of k factors. A limit
    on groups has no such formula, because groups are chosen by their best experts: there it is the mean over tokens
    with random scores that are routed by the gate's rule, within half a percent.

    8 of 256 experts on 8 places hit 5.29. Limited to 4 of 8 groups by the best two they hit 3.97, and on 4 places 3.12.
    """
    if limited == groups or places >= experts:
        every = max(experts, places)  # a place has an expert or more: redundant ones fill it
        missed = math.prod(max(0.0, 1 - every / places / (every - i)) for i in range(chosen))
        return places * (1 - missed)
    there = np.sort(_routed(experts, chosen, groups, limited, best) * places // experts, axis=1)
    return float(1 + (np.diff(there, axis=1) > 0).sum(axis=1).mean())


@functools.cache
def _routed(experts: int, chosen: int, groups: int, limited: int, best: int) -> npt.NDArray[np.int64]:
    """Return the experts of tokens with random scores: the best of the groups with the largest sum of best scores."""
    logits = np.random.default_rng(0).standard_normal((TOKENS, groups, experts // groups), dtype=np.float32)
    scores = 1 / (1 + np.exp(-logits))
    of_group = np.partition(scores, -best, axis=2)[:, :, -best:].sum(axis=2)
    least = np.partition(of_group, -limited, axis=1)[:, -limited, None]
    allowed = np.where((of_group >= least)[:, :, None], scores, -np.inf).reshape(TOKENS, experts)
    return np.argpartition(allowed, -chosen, axis=1)[:, -chosen:]


@dataclass(frozen=True, eq=False)
class Exchange:
    """Bytes of a token in a MoE layer that cross the slow and the fast link, both ways."""

    c: ModelConfig
    gpus: int
    """GPUs that share the experts."""
    in_node: int
    """GPUs of them in one node."""
    dtype: str
    """Dtype of rows on their way to the experts, in FP8 codes with a scale for each tile."""
    one_hop: int = 0
    """Experts of a token, each of which gets a row of its own; 0: two hops."""
    stage: str = ""
    """Beginning of the names of figures, such as "decode_"."""
    narrow: bool = False
    """Results come back as narrow as rows go."""
    sharing: int = 1
    """GPUs of a node that have the same tokens, to which no row goes."""

    def reached(self, places: float) -> float:
        """Return how many of these places a token's rows reach."""
        c, best = self.c, 2 if self.c.topk_method == "noaux_tc" else 1
        if self.one_hop:
            return self.one_hop
        how = c.n_routed_experts, c.n_activated_experts, c.n_expert_groups, c.n_limited_groups, best
        return places_hit(*how, float(places))

    @counted()
    def expert_parallel(self) -> int:
        """GPUs that share a layer's experts. Source: the layout or the deployment."""
        return self.gpus

    @counted()
    def expert_in_node(self) -> int:
        """GPUs of a node that share experts, at most all of them. Source: the hardware, and what divides evenly."""
        return self.in_node

    @figure()
    def expert_nodes(self) -> float:
        """Nodes that share a layer's experts. Source: V3, sections 3.2.2 and 3.4."""
        return max(1, self.expert_parallel / self.expert_in_node)

    @counted()
    def nodes_reached(self) -> float:
        """Nodes that a token reaches, or rows of its own. Source: V3, sections 3.2.2 and 3.4: by the gate's rule."""
        return self.reached(self.expert_nodes)

    @counted()
    def gpus_reached(self) -> float:
        """GPUs of a token's experts, or rows of its own. Source: V3, sections 3.2.2 and 3.4: by the gate's rule."""
        return self.reached(self.gpus)

    @figure()
    def slow_copies(self) -> float:
        """Rows of a token over the slow link. Source: V3, sections 3.2.2 and 3.4."""
        return self.nodes_reached * (1 - 1 / self.expert_nodes)

    @figure()
    def fast_copies(self) -> float:
        """Rows of a token over the fast link. Source: V3, sections 3.2.2 and 3.4."""
        if self.one_hop:
            return self.gpus_reached * (1 / self.expert_nodes - self.sharing / self.expert_parallel)
        return self.gpus_reached * (1 - self.sharing / min(self.expert_parallel, self.expert_in_node))

    @figure("B")
    def combine_row(self) -> float:
        """Row on its way back. Source: V3, section 3.3.3."""
        return self.dispatch_row if self.narrow else SIZES[self.dtype] * self.c.dim

    @figure("B")
    def dispatch_row(self) -> float:
        """Row on its way to an expert. Source: V3, section 3.3.3."""
        if self.dtype in ("fp8", "int8"):
            return self.c.dim + 4 * math.ceil(self.c.dim / BLOCK)
        if self.dtype in ("fp4", "int4"):
            return self.c.dim / 2 + math.ceil(self.c.dim / BLOCK_FP4)
        return SIZES[self.dtype] * self.c.dim

    @figure("B/token")
    def slow_row_bytes(self) -> float:
        """Slow link: bytes of a token and layer. Source: V3, sections 3.2.2 and 3.4."""
        return self.slow_copies * (self.dispatch_row + self.combine_row)

    @figure("B/token")
    def fast_row_bytes(self) -> float:
        """Fast link: bytes of a token and layer. Source: V3, sections 3.2.2 and 3.4."""
        return self.fast_copies * (self.dispatch_row + self.combine_row)
