"""Parameters of a model: all of them, and those that a token meets.

Worked example, DeepSeek-V3 without multi-token prediction: 61 layers, the first 3 of them dense.

    embedding, head       2 * 129280 * 7168                                                 1,853,358,080
    attention             61 * (7168 * 1536 + 1536 * 24576 + 7168 * 576
                                + 512 * 32768 + 16384 * 7168)                              11,413,422,080
    dense feed-forward    3 * 3 * 7168 * 18432                                              1,189,085,184
    gates                 58 * 256 * 7168                                                     106,430,464
    routed experts        58 * 256 * 3 * 7168 * 2048                                      653,908,770,816
    shared experts        58 * 3 * 7168 * 2048                                              2,554,331,136
    norms                 61 * (2 * 7168 + 1536 + 512) + 7168                                   1,006,592
    main                                                                                  671,026,404,352

A token meets 8 of the 256 routed experts, no embedding and no norm: 36.62B parameters are active.

Source: DeepSeek-V3 report (arXiv 2412.19437), section 4.2: 671B parameters, 37B activated.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dsmini.accounting.tensors import MTP, sums, tensors
from dsmini.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Number of parameters of a Transformer, and of those that a token meets in matrix products."""

    total: int
    """All parameters, those of the multi-token prediction blocks included."""
    mtp: int
    """Parameters of the multi-token prediction blocks. V3: 11.610B, printed as 11.5B (11.507B without its
    "mtp projection")."""
    active: int
    """Parameters of the main model that a token is multiplied with: n_activated_experts of the routed experts, and the
    head, but neither the embedding, of which it reads one row, nor norms. V3: 36.62B, printed as 37B; 37.55B with the
    embedding."""
    buffers: int
    """Routing biases, which are state but no parameters and in none of the other counts."""
    by_module: Mapping[str, int]
    """Parameters of each kind of module in the order of the model; they sum to total. In multi-token prediction
    blocks the names begin with "mtp "; the embedding and the head that these share are counted once, without it."""
    active_by_module: Mapping[str, int]
    """Active parameters of each kind of module, with the multi-token prediction blocks and their use of the head:
    V3's block is printed with 2.4B (2.44B with embedding and head and without "mtp projection")."""

    @property
    def main(self) -> int:
        """Parameters without multi-token prediction: V3 671,026,404,352."""
        return self.total - self.mtp


def parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of Transformer(config), exactly. V3 without MTP: 671,026,404,352, and 14,848 routing biases.

    Source: the shapes of the released checkpoints; DeepSeek-V3 report, section 4.2 (671B, 37B activated).
    """
    by_module = sums(tensors(config), lambda use: use.parameters)
    active = sums(tensors(config), lambda use: use.per_token)
    return Parameters(
        total=sum(by_module.values()),
        mtp=sum(count for module, count in by_module.items() if module.startswith(MTP)),
        active=sum(count for module, count in active.items() if not module.startswith(MTP)),
        buffers=sum(use.times * use.buffers for use in tensors(config)),
        by_module=by_module,
        active_by_module=active,
    )
