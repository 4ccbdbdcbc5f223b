"""Request: everything that a user may choose; the rules of a layout; and the setup, which a plan is computed from.

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

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from dsmini.accounting.memory import CacheDtype, Optimizer, Recompute
from dsmini.accounting.tensors import Dtype, WeightDtype, divisors
from dsmini.config import ModelConfig, RunConfig
from dsmini.config.fields import Bounds, build, check_types, setting
from dsmini.config.model import NO_INDEXER
from dsmini.planner.figure import titles
from dsmini.planner.hardware import Hardware
from dsmini.planner.serving import STAGES, Deployment, Stage
from dsmini.reading import find_config, listed, read_table, read_toml
from dsmini.report.units import plural

Zero = Literal[0, 1, 2, 3]
Precision = Literal["fp32", "bf16", "fp8"]
DTYPES: Mapping[Precision, WeightDtype] = {"fp32": "float32", "bf16": "bfloat16", "fp8": "fp8"}
"""Dtype of weights and of the products' peak, by precision."""
Schedule = Literal["1f1b", "zb1p", "dualpipe"]
ONE_PROCESS: Mapping[str, Any] = {
    **{"gpus": 1, "pipeline": 1, "expert": 1, "tensor": 1, "zero": 0, "recompute": "none", "precision": "bf16"},
    **{"micro_batch": 1, "schedule": "1f1b", "optimizer": "adamw", "moments": "float32"},
}
"""Fields of a request that are the layout of a training run, with their values in one process."""
SMALLEST, LARGEST = 1e-9, 10**18
"""Ends of every number, so that products and differences of some of them are floats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """Choices of a plan.

    Raises: ValueError for a value of a wrong type, and for numbers that are not positive or beyond a float.
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
    """Number of GPUs that share each matrix, and with sequence parallelism the activations; experts are not divided."""
    zero: Zero | None = setting(None, least=0)
    """Stage of ZeRO: 1 divides the optimizer's state over the data-parallel GPUs, 2 gradients too, 3 weights too."""
    recompute: Recompute | None = None
    """Activations that backward computes again. selective (V3): norms, up-projections and SwiGLU; full: blocks."""
    precision: Precision | None = None
    """Precision of training's products. fp8: those of attention and feed-forwards; activations between stay BF16."""
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
    utilization: float | None = setting(None, above=0, below=1)
    """Share of the peak that your training reaches (MFU), such as 0.39; left out: what the parts of a step give."""

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
    prefill_gpus: int | None = None
    """Number of GPUs that read prompts together."""
    prefill_tensor: int | None = None
    """Number of GPUs that share attention's heads in reading prompts."""
    drafts: int = setting(1, least=0)
    """Number of tokens that multi-token prediction drafts in a step; 0: plain decoding."""
    acceptance: float = setting(0.85, above=0, below=1)
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
        check_types(self, whole=Bounds(least=1, most=LARGEST), real=Bounds(least=SMALLEST, most=LARGEST))

    def given(self, names: Mapping[str, Any] | tuple[str, ...] = ONE_PROCESS) -> dict[str, Any]:
        """Return the fields among some names, those of the layout, that are chosen."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def serving(self) -> dict[str, Any]:
        """Fields of serving that are chosen."""
        stages = (f"{stage}_{name}" for stage in STAGES for name in ("gpus", "tensor"))
        return self.given(("context", "sequences", "prompt", "weight_dtype", "cache_dtype", *stages))


Layout = Any
"""Complete request: every field of its layout has a value. In a search sizes may be arrays of layouts."""


def copies(r: Layout) -> int:
    """Return the copies of the parameters in a pipeline: two with DualPipe, whose halves hold the same stages."""
    return 2 if r.schedule == "dualpipe" else 1


Rule = tuple[Any, Callable[[], str]]
"""Condition, and the sentence for what does not meet it."""


def rules(r: Layout, c: ModelConfig, node: int) -> Iterator[Rule]:
    """Yield what a layout must meet: in itself, with the model, with nodes of this many GPUs, and with the batch.

    Args:
        r: complete layout with its batch; sizes may be arrays of layouts, for which the rest is the same.
    """
    gpus, p, e, t, m, batch = r.gpus, r.pipeline, r.expert, r.tensor, r.micro_batch, r.batch
    moe, dual = c.n_dense_layers < c.n_layers + c.n_mtp_layers, r.schedule == "dualpipe"
    yield (
        gpus % (p * t) == 0,
        lambda: f"pipeline={p} and tensor={t} do not divide gpus={gpus}; change one of the three",
    )
    yield _divides("expert", e, "gpus/pipeline", gpus // p)
    yield p <= c.n_layers, lambda: f"pipeline={p} is more than n_layers={c.n_layers}; use {c.n_layers} or fewer stages"
    yield (e == 1) | moe, lambda: f"expert={e} but the model has no MoE layers; use expert=1"
    yield _divides("expert", e, "n_routed_experts", c.n_routed_experts)
    yield (
        (e % node == 0) | (node % e == 0),
        lambda: f"expert={e} neither fills nodes of {node} GPUs nor divides one; use a multiple or a divisor",
    )
    yield t <= node, lambda: f"tensor={t} is more than the {plural(node, 'GPU')} of a node; use {node} or fewer"
    yield _divides("tensor", t, "n_heads", c.n_heads)
    yield _divides("tensor", t, "n_kv_heads", c.kv_heads)
    yield (
        (p % 2 == 0) | (not dual),
        lambda: f"schedule='dualpipe' pairs stages, got pipeline={p}; use an even number, or 1f1b",
    )
    data = gpus // (p * t)
    yield (
        (data * copies(r) > 1) | (r.zero == 0),
        lambda: f"zero={r.zero} divides the state over data-parallel GPUs, of which there is one; use zero=0",
    )
    yield _divides("micro_batch", m, "batch", batch)
    rows = data * m
    yield (
        batch % rows == 0,
        lambda: (
            f"a step of batch={batch} sequences is not divisible by data={data} parts of micro_batch={m}; "
            f"use a batch of {max(rows, batch // rows * rows)}"
        ),
    )
    number, fix = batch // rows, "use a larger batch, a smaller micro_batch or fewer stages"
    yield (
        (number >= 2 * p) & (number % 2 == 0) | (not dual),
        lambda: (
            f"schedule='dualpipe' with pipeline={p} needs an even number of micro-batches from {2 * p}, "
            f"got {number}; {fix}"
        ),
    )
    yield number >= p, lambda: f"pipeline={p} needs at least {p} micro-batches a step, got {number}; {fix}"


def _divides(name: str, part: Any, of: str, whole: Any) -> Rule:
    return (
        whole % part == 0,
        lambda: (
            f"{name}={part} does not divide {of}={whole}; use one of {listed([str(n) for n in divisors(whole)], 8)}"
        ),
    )


def check(found: Iterator[Rule]) -> None:
    """Raise ValueError with the sentence of the first rule that is broken."""
    for holds, sentence in found:
        if not holds:
            raise ValueError(sentence())


# --- models, and the setup of a plan


@functools.cache
def presets() -> dict[str, Any]:
    """Return the published runs and models of presets.toml."""
    return read_toml(Path(__file__).parent / "presets.toml")


@functools.cache
def reference(name: str) -> ModelConfig:
    """Return a model of published figures by name: of configs/, or a dense one of presets.toml."""
    if name in presets()["models"]:
        return build(ModelConfig, presets()["models"][name], "presets.toml", f"models.{name}.")
    return ModelConfig.from_file(find_config(Path(name)))


def is_v3(config: ModelConfig, indexer: bool = False) -> bool:
    """Return True for a model with DeepSeek-V3's sizes, whatever its training, context and RoPE.

    Args:
        indexer: also for V3.2, which has an indexer more.
    """
    if indexer and config.attention == "dsa":
        config = replace(config, attention="mla", **NO_INDEXER)
    sizes = ["attention", *(field.name for field in fields(config) if field.name in titles())]
    return all(getattr(config, name) == getattr(reference("deepseek-v3"), name) for name in sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A config and what its file says of training."""

    config: ModelConfig
    source: str
    """Name of the file."""
    run: RunConfig | None = None
    """Recipe, where the file has the section [train]."""

    @property
    def name(self) -> str:
        """Name for people: of the file, or of its folder for a config.json."""
        path = Path(self.source)
        return path.resolve().parent.name if path.name == "config.json" else path.stem

    @classmethod
    def from_file(cls, path: Path) -> "Model":
        """Read a TOML file, DeepSeek's inference JSON, or Hugging Face's config.json."""
        config, is_toml = ModelConfig.from_file(path), path.suffix == ".toml"
        raw = read_toml(path) if is_toml else read_table(path)
        if not (raw.get("model") if is_toml else raw):
            raise ValueError(f"{path} has no size of a model; write some, or name a config, such as configs/toy.toml")
        run = RunConfig.from_file(path) if is_toml and "train" in raw else None
        return cls(config=config, source=str(path), run=run)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Everything that a plan is computed from."""

    model: Model
    hardware: Hardware
    request: PlanRequest
    """Complete request. Where serving has no plan, decode_gpus is None."""
    asked: PlanRequest
    """Request as it was before it was completed."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Source of each field of the request that is an input of a figure, in words."""
    misfit: Mapping[str, str] = field(default_factory=dict)
    """Sentences about what does not fit, with what would: of training, decode and prefill."""
    published: bool = False
    """Deployments of DeepSeek-V3's sizes send rows as its own do: it is the model, or one that is varied from it."""
    unserved: str = ""
    """Reason why serving has no plan, in one sentence; "" if it has one."""

    def asking(self, **changes: Any) -> "Setup":
        """Return the setup with some fields of its request changed."""
        return replace(self, request=replace(self.request, **changes))

    def check_layout(self) -> None:
        """Raise ValueError for a layout that the model, the nodes or the batch cannot have."""
        check(rules(self.request, self.model.config, self.hardware.gpus_per_node))

    def deployment(self, stage: Stage) -> Deployment:
        """Return the deployment of a stage in the request, with as many redundant experts as make the experts divide.

        V3's own has its own ways.
        """
        gpus, tensor = getattr(self.request, f"{stage}_gpus"), getattr(self.request, f"{stage}_tensor")
        preset = presets()["deepseek-v3"][stage]
        if self.published and (gpus, tensor) == (preset["gpus"], preset["tensor"]):
            return Deployment(stage=stage, **preset)
        spare = -self.model.config.n_routed_experts % gpus
        ways = {"micro_batches": 1 if gpus == 1 else 2, "two_hop": stage == "prefill"}
        return Deployment(stage=stage, gpus=gpus, tensor=tensor, redundant=spare, **ways)

    @property
    def memory(self) -> float:
        """Bytes of a GPU's memory."""
        return self.hardware.value("gpu_memory")

    @property
    def usual_precision(self) -> Precision:
        """Precision of products where the user leaves it open: FP8 for V3 and for configs that say so."""
        config, peaks = self.model.config, self.hardware.peaks
        if "fp8" in peaks and (config.precision == "fp8" or is_v3(config, indexer=True)):
            return "fp8"
        return "bf16" if "bfloat16" in peaks else "fp32"

    @property
    def served(self) -> bool:
        """True if serving has a plan."""
        return self.request.decode_gpus is not None

    @property
    def refused(self) -> str:
        """Sentence about a plan in which nothing fits; "" if training or serving does."""
        fits = "training" not in self.misfit or (self.served and not {*STAGES} & self.misfit.keys())
        return "" if fits else next(iter(self.misfit.values()))
