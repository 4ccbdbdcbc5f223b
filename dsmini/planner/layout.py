"""Layouts: how the GPUs of a training run divide a model and its batch.

    gpus = pipeline * data * tensor       each GPU is in one pipeline stage, one part of the batch, one part of matrices
    experts: data * tensor GPUs of a stage are divided into groups of `expert`, each of which holds all experts once

Worked example, DeepSeek-V3: 2048 GPUs, 16 stages, no tensor parallelism: 2048 / 16 = 128 parts of the batch. 64 of them
share the 256 experts, 4 on each GPU, over 8 nodes; the experts exist 128 / 64 = 2 times. 15360 sequences a step are 120
micro-batches of one sequence for each part.

Source: DeepSeek-V3 report, section 3.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dsmini.accounting.activations import Recompute
from dsmini.accounting.memory import Optimizer
from dsmini.accounting.tensors import Dtype, WeightDtype
from dsmini.config import ModelConfig
from dsmini.config.fields import check_types, require

Zero = Literal[0, 1, 2, 3]
Precision = Literal["fp32", "bf16", "fp8"]
DTYPES: Mapping[Precision, WeightDtype] = {"fp32": "float32", "bf16": "bfloat16", "fp8": "fp8"}
"""Dtype of weights and of the products' peak, by precision."""
Schedule = Literal["1f1b", "zb1p", "dualpipe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Parallelism, precision and recomputation of a training run. The defaults are one process.

    Raises: ValueError for numbers that do not divide each other, and options that contradict each other.
    """

    gpus: int = 1
    """Number of GPUs."""
    pipeline: int = 1
    """Number of pipeline stages."""
    expert: int = 1
    """Number of GPUs that share the routed experts of a layer."""
    tensor: int = 1
    """Number of GPUs that share each matrix, and with sequence parallelism the activations; experts are not divided."""
    zero: Zero = 0
    """Stage of ZeRO: 1 divides the optimizer's state over the data-parallel GPUs, 2 gradients too, 3 weights too."""
    recompute: Recompute = "none"
    """Activations computed again in backward. selective (V3): norms, MLA's up-projections and SwiGLU; full: blocks."""
    precision: Precision = "bf16"
    """Precision of matrix products. fp8: those of attention and feed-forwards; activations between them stay BF16."""
    micro_batch: int = 1
    """Number of sequences that go through a stage at a time."""
    schedule: Schedule = "1f1b"
    """Pipeline schedule."""
    optimizer: Optimizer = "adamw"
    """Optimizer of the matrices in blocks; AdamW for all else."""
    moments: Dtype = "float32"
    """Dtype of AdamW's moments."""

    def __post_init__(self) -> None:
        check_types(self, "layout.")
        for name in ("gpus", "pipeline", "expert", "tensor", "micro_batch"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value} is not positive; use 1 or more")
        if self.gpus % (self.pipeline * self.tensor):
            fit = [n for n in range(1, self.gpus // self.tensor + 1) if self.gpus % (n * self.tensor) == 0]
            fix = f"use a pipeline of {_listed(fit)}" if fit else f"use a tensor of {_listed(divisors(self.gpus))}"
            raise ValueError(f"pipeline={self.pipeline} and tensor={self.tensor} do not divide gpus={self.gpus}; {fix}")
        width = self.gpus // self.pipeline
        if width % self.expert:
            fit = _listed(divisors(width))
            raise ValueError(
                f"expert={self.expert} does not divide the {width} GPUs of a stage; use an expert of {fit}"
            )
        if self.schedule == "dualpipe":
            require(
                self.pipeline % 2 == 0,
                f"schedule='dualpipe' pairs stages, got pipeline={self.pipeline}; use an even number, or 1f1b",
            )
        require(
            self.zero == 0 or self.data * self.copies > 1,
            f"zero={self.zero} divides the state over data-parallel GPUs, of which there is one; use zero=0",
        )

    @property
    def data(self) -> int:
        """Number of parts of the batch that are computed at the same time."""
        return self.gpus // (self.pipeline * self.tensor)

    @property
    def copies(self) -> int:
        """Number of copies of the parameters in a pipeline: two with DualPipe, whose halves hold the same stages."""
        return 2 if self.schedule == "dualpipe" else 1


def check_layout(layout: Layout, config: ModelConfig, gpus_per_node: int, batch: int) -> None:
    """Refuse a layout that this model, these nodes or this batch cannot have, with one sentence.

    Args:
        batch: sequences in an optimizer step.
    """
    p, e, t, routed = layout.pipeline, layout.expert, layout.tensor, config.n_routed_experts
    most = config.n_layers
    require(p <= most, f"pipeline={p} is more than n_layers={most}; use {most} or fewer stages")
    moe = config.n_dense_layers < config.n_layers + config.n_mtp_layers
    require(moe or e == 1, f"expert={e} but the model has no MoE layers; use expert=1")
    if routed % e:
        raise ValueError(f"n_routed_experts={routed} is not divisible by expert={e}; use {_listed(divisors(routed))}")
    require(
        e % gpus_per_node == 0 or gpus_per_node % e == 0,
        f"expert={e} neither fills nodes of {gpus_per_node} GPUs nor divides one; use a multiple or a divisor",
    )
    require(
        t <= gpus_per_node,
        f"tensor={t} is more than the {gpus_per_node} GPUs of a node; use {gpus_per_node} or fewer",
    )
    for name, heads in (("n_heads", config.n_heads), ("n_kv_heads", config.kv_heads)):
        if heads % t:
            raise ValueError(f"{name}={heads} is not divisible by tensor={t}; use {_listed(divisors(heads))}")
    rows = layout.data * layout.micro_batch
    if batch % layout.micro_batch:
        fit = _listed(divisors(batch))
        raise ValueError(f"micro_batch={layout.micro_batch} does not divide batch={batch} sequences; use {fit}")
    require(
        batch % rows == 0,
        f"a step of batch={batch} sequences is not divisible by data={layout.data} parts of micro_batch="
        f"{layout.micro_batch}; use a batch of {max(rows, batch // rows * rows)}",
    )
    number, fix = batch // rows, "use a larger batch, a smaller micro_batch or fewer stages"
    if layout.schedule == "dualpipe":
        require(
            number >= 2 * p and number % 2 == 0,
            f"schedule='dualpipe' with pipeline={p} needs an even number of micro-batches from {2 * p}, got {number}; "
            f"{fix}",
        )
    require(number >= p, f"pipeline={p} needs at least {p} micro-batches a step, got {number}; {fix}")


def divisors(number: int, most: int | None = None) -> list[int]:
    """Return the divisors of a number, up to `most`."""
    return [n for n in range(1, min(number, most or number) + 1) if number % n == 0]


def _listed(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    shown = numbers if len(numbers) <= 8 else [*numbers[:7], numbers[-1]]
    return f"{', '.join(map(str, shown[:-1]))} or {shown[-1]}"
