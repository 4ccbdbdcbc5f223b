"""Choices of a plan: the layout of a training run, and the request, which is everything that a user may choose.

A field of a request that is None is left open; setup.py fills it in. Numbers that are hardware's are in a hardware
file, those that are the model's in its config. All else is here: how the model is trained, how it is served, and how
often the machines fail.

    gpus = pipeline * data * tensor       each GPU is in one pipeline stage, one part of the batch, one part of matrices
    experts: data * tensor GPUs of a stage are divided into groups of `expert`, each of which holds all experts once

Worked example, DeepSeek-V3: 2048 GPUs, 16 stages, no tensor parallelism: 2048 / 16 = 128 parts of the batch. 64 of them
share the 256 experts, 4 on each GPU, over 8 nodes; the experts exist 128 / 64 = 2 times. 15360 sequences a step are 120
micro-batches of one sequence for each part.

Source: DeepSeek-V3 report, section 3.2.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dsmini.accounting.activations import Recompute
from dsmini.accounting.kv_cache import CacheDtype
from dsmini.accounting.memory import Optimizer
from dsmini.accounting.tensors import Dtype, WeightDtype
from dsmini.config import ModelConfig
from dsmini.config.fields import Bounds, check_types, require
from dsmini.reading import brief

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
        check_types(self)
        for name in ("gpus", "pipeline", "expert", "tensor", "micro_batch"):
            Bounds(least=1).check(name, getattr(self, name))
        gpus, p, t = self.gpus, self.pipeline, self.tensor
        if gpus % (p * t):
            fit = [n for n in range(1, gpus // t + 1) if gpus % (n * t) == 0]
            fix = f"use a pipeline of {_listed(fit)}" if fit else f"use a tensor of {_listed(divisors(gpus))}"
            raise ValueError(f"pipeline={p} and tensor={t} do not divide gpus={gpus}; {fix}")
        if gpus // p % self.expert:
            fit = _listed(divisors(gpus // p))
            raise ValueError(
                f"expert={self.expert} does not divide the {gpus // p} GPUs of a stage; use an expert of {fit}"
            )
        require(
            self.schedule != "dualpipe" or p % 2 == 0,
            f"schedule='dualpipe' pairs stages, got pipeline={p}; use an even number, or 1f1b",
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


def check_layout(layout: Layout, config: ModelConfig, node: int, batch: int) -> None:
    """Refuse a layout that this model, nodes of this many GPUs or this batch cannot have, with one sentence.

    Args:
        batch: sequences in an optimizer step.
    """
    p, e, t, m, most = layout.pipeline, layout.expert, layout.tensor, layout.micro_batch, config.n_layers
    require(p <= most, f"pipeline={p} is more than n_layers={most}; use {most} or fewer stages")
    moe = config.n_dense_layers < config.n_layers + config.n_mtp_layers
    require(moe or e == 1, f"expert={e} but the model has no MoE layers; use expert=1")
    _check_divides("n_routed_experts", config.n_routed_experts, "expert", e)
    fills = e % node == 0 or node % e == 0
    require(fills, f"expert={e} neither fills nodes of {node} GPUs nor divides one; use a multiple or a divisor")
    require(t <= node, f"tensor={t} is more than the {node} GPUs of a node; use {node} or fewer")
    _check_divides("n_heads", config.n_heads, "tensor", t)
    _check_divides("n_kv_heads", config.kv_heads, "tensor", t)
    if batch % m:
        raise ValueError(f"micro_batch={m} does not divide batch={batch} sequences; use {_listed(divisors(batch))}")
    rows = layout.data * m
    whole = f"a step of batch={batch} sequences is not divisible by data={layout.data} parts of micro_batch={m}"
    require(batch % rows == 0, f"{whole}; use a batch of {max(rows, batch // rows * rows)}")
    number, fix = batch // rows, "use a larger batch, a smaller micro_batch or fewer stages"
    needs = f"schedule='dualpipe' with pipeline={p} needs an even number of micro-batches from {2 * p}, got {number}"
    fits = layout.schedule != "dualpipe" or (number >= 2 * p and number % 2 == 0)
    require(fits, f"{needs}; {fix}")
    require(number >= p, f"pipeline={p} needs at least {p} micro-batches a step, got {number}; {fix}")


def _check_divides(name: str, number: int, of: str, parts: int) -> None:
    if number % parts:
        raise ValueError(f"{name}={number} is not divisible by {of}={parts}; use {_listed(divisors(number))}")


def divisors(number: int, most: int | None = None) -> list[int]:
    """Return the divisors of a number, up to `most`."""
    return [n for n in range(1, min(number, most or number) + 1) if number % n == 0]


def _listed(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    shown = numbers if len(numbers) <= 8 else [*numbers[:7], numbers[-1]]
    return f"{', '.join(map(str, shown[:-1]))} or {shown[-1]}"


LARGEST = 1e18
"""Maximum of every number, so that products of some of them are floats."""
SHARES = {"utilization": "of the peak, such as 0.39", "acceptance": "that a draft is accepted, such as 0.85"}
"""Fields that are a share from 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """Choices of a plan.

    Raises: ValueError for numbers that are not positive or beyond a float, and choices that contradict each other.
    """

    hardware: str = "h800"
    """Hardware: a known name such as h800, your own .toml file, or this, which measures the machine at hand."""
    gpus: int | None = None
    """Number of GPUs of the training; left out: as DeepSeek-V3 was trained, or for other models the fewest that fit."""
    pipeline: int | None = None
    """Number of pipeline stages; left out, as all of the layout: the fastest that fits."""
    expert: int | None = None
    """Number of GPUs that share the routed experts of a layer."""
    tensor: int | None = None
    """Number of GPUs that share each matrix."""
    zero: Zero | None = None
    """Stage of ZeRO: 1 divides the optimizer's state, 2 gradients too, 3 weights too."""
    recompute: Recompute | None = None
    """Activations that backward computes again. selective (V3): norms, up-projections and SwiGLU; full: blocks."""
    precision: Precision | None = None
    """Precision of training's matrix products."""
    micro_batch: int | None = None
    """Number of sequences that go through a stage at a time."""
    schedule: Schedule | None = None
    """Pipeline schedule."""
    optimizer: Optimizer | None = None
    """Optimizer of the matrices in blocks; AdamW for all else."""
    moments: Dtype | None = None
    """Dtype of AdamW's moments."""
    batch: int | None = None
    """Number of sequences in an optimizer step; left out, as seq_len and tokens: the config's [train], or V3's."""
    seq_len: int | None = None
    """Length of a training sequence in tokens."""
    tokens: float | None = None
    """Number of tokens of the whole training, such as 14.8e12."""
    utilization: float | None = None
    """Share of the peak that your training reaches (MFU); left out: V3's 0.3894."""

    context: int | None = None
    """Number of tokens that a decoding sequence holds; left out: 4096, or as many as the model takes."""
    sequences: int | None = None
    """Number of sequences that a GPU decodes in a micro-batch; left out: as many as fit, at most 32."""
    prompt: int | None = None
    """Number of tokens of a prompt; left out: as context."""
    weight_dtype: WeightDtype | None = None
    """Dtype of weights in serving."""
    cache_dtype: CacheDtype | None = None
    """Dtype of the cache in serving; left out: bfloat16. fp8 is for MLA."""
    decode_gpus: int | None = None
    """Number of GPUs that decode together; left out: as DeepSeek-V3 was served, or the fewest that fit."""
    decode_tensor: int | None = None
    """Number of GPUs that share attention's heads in decoding."""
    decode_redundant: int | None = None
    """Number of redundant experts in decoding; left out: as many as make the experts divide."""
    prefill_gpus: int | None = None
    """Number of GPUs that read prompts together."""
    prefill_tensor: int | None = None
    """Number of GPUs that share attention's heads in reading prompts."""
    prefill_redundant: int | None = None
    """Number of redundant experts in reading prompts."""
    drafts: int = 1
    """Number of tokens that multi-token prediction drafts in a step; 0: plain decoding."""
    acceptance: float = 0.85
    """Probability that a draft is accepted, if those before it were (V3: 0.85 to 0.9)."""

    failures_per_node_day: float | None = None
    """Number of failures of a node of eight GPUs in a day; left out: Meta's 0.0065."""
    restart_time: float | None = None
    """Seconds from a failure until training runs again; left out: 300."""
    checkpoint_halt: float | None = None
    """Seconds that a checkpoint halts training; left out: 10."""
    price: float | None = None
    """Rent of a GPU in dollars an hour; left out: the hardware's."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or field.name == "zero":
                continue
            may_be_zero = field.name in ("decode_redundant", "prefill_redundant", "drafts")
            if not 0 <= value <= LARGEST or (value == 0 and not may_be_zero):
                fix = "0 or more" if may_be_zero else "more than 0"
                raise ValueError(f"{field.name}={brief(value)} is out of range; use {fix}, and at most {LARGEST:g}")
            if field.name in SHARES and value >= 1:
                raise ValueError(f"{field.name}={value} is no share below 1; give the share {SHARES[field.name]}")
        _refuse_contradictions(self)

    @property
    def layout_fields(self) -> dict[str, Any]:
        """Fields of the training layout that are chosen, by name."""
        names = (field.name for field in dataclasses.fields(Layout))
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def layout(self) -> Layout:
        """Layout of a complete request. Raises: ValueError for a layout that contradicts itself."""
        return Layout(**self.layout_fields)

    @property
    def serving_fields(self) -> list[str]:
        """Names of the fields of serving that are chosen."""
        names = ["context", "sequences", "prompt", "weight_dtype", "cache_dtype"]
        names += [f"{stage}_{name}" for stage in ("decode", "prefill") for name in ("gpus", "tensor", "redundant")]
        return [name for name in names if getattr(self, name) is not None]


def _refuse_contradictions(r: PlanRequest) -> None:
    sizes = {name: "gpus" for name in ("pipeline", "expert", "tensor")}
    sizes |= {f"{stage}_tensor": f"{stage}_gpus" for stage in ("decode", "prefill")}
    for name, whole in sizes.items():
        part, gpus = getattr(r, name), getattr(r, whole)
        if part is not None and gpus is not None and gpus % part:
            raise ValueError(f"{name}={part} does not divide {whole}={gpus}; change one of them")
    if r.schedule == "dualpipe" and (r.pipeline == 1 or r.gpus == 1):
        raise ValueError("schedule='dualpipe' needs pipeline stages, got one; use pipeline=2 or more, or leave it out")
    if r.zero and r.gpus == 1:
        raise ValueError(f"zero={r.zero} divides the state over GPUs, of which there is one; use zero=0 or more gpus")
