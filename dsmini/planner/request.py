"""Request of a plan: everything that a user may choose, each with a check. A field that is None is left open.

setup.py fills in what is left open, and returns a complete request. Numbers that are hardware's are in a hardware file,
numbers that are the model's in its config. All else is here: how the model is trained, how it is served, and how
often the machines fail.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dsmini.accounting.activations import Recompute
from dsmini.accounting.kv_cache import CacheDtype
from dsmini.accounting.memory import Optimizer
from dsmini.accounting.tensors import Dtype, WeightDtype
from dsmini.planner.layout import Layout, Precision, Schedule, Zero
from dsmini.reading import brief

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


def _refuse_contradictions(request: PlanRequest) -> None:
    r = request
    if r.gpus is not None:
        for name in ("pipeline", "expert", "tensor"):
            size = getattr(r, name)
            if size is not None and r.gpus % size:
                raise ValueError(f"{name}={size} does not divide gpus={r.gpus}; change one of them")
    for stage in ("decode", "prefill"):
        gpus, tensor = getattr(r, f"{stage}_gpus"), getattr(r, f"{stage}_tensor")
        if gpus is not None and tensor is not None and gpus % tensor:
            raise ValueError(f"{stage}_tensor={tensor} does not divide {stage}_gpus={gpus}; change one of them")
    if r.schedule == "dualpipe" and (r.pipeline == 1 or r.gpus == 1):
        raise ValueError("schedule='dualpipe' needs pipeline stages, got one; use pipeline=2 or more, or leave it out")
    if r.zero and r.gpus == 1:
        raise ValueError(f"zero={r.zero} divides the state over GPUs, of which there is one; use zero=0 or more gpus")
