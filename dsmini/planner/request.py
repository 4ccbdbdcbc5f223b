"""Request: everything that a user may choose, and the model that is planned.

A field of a request that is None is left open, and the plan fills it in. Numbers that are hardware's are in a hardware
file, those that are the model's in its config. All else is here: how the model is trained, how it is served, which
shares of the peaks are reached, and how often the machines fail.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dsmini.accounting.memory import CacheDtype, Optimizer, Recompute
from dsmini.accounting.tensors import Dtype, WeightDtype
from dsmini.config import ModelConfig, RunConfig
from dsmini.config.fields import Bounds, build, check_types, setting
from dsmini.config.model import NO_INDEXER
from dsmini.console.commandline import field_docstrings
from dsmini.planner.figure import Figure
from dsmini.reading import find_config, read_table, read_toml

Zero = Literal[0, 1, 2, 3]
Precision = Literal["fp32", "bf16", "fp8"]
DTYPES: Mapping[Precision, WeightDtype] = {"fp32": "float32", "bf16": "bfloat16", "fp8": "fp8"}
"""Dtype of weights and of the products' peak, by precision."""
Schedule = Literal["1f1b", "zb1p", "dualpipe"]
LAYOUT = (
    *("gpus", "pipeline", "expert", "tensor", "context_parallel", "zero", "recompute", "precision"),
    *("micro_batch", "schedule", "optimizer", "moments"),
)
"""Fields of a request that are the layout of a training run."""
SERVING = (
    *("context", "sequences", "prompt", "weight_dtype", "cache_dtype", "indexer_dtype", "decode_gpus", "decode_tensor"),
    *("prefill_gpus", "prefill_tensor", "micro_batches", "drafts"),
)
"""Fields of a request that ask for serving."""
SIZES = (
    *("vocab_size", "dim", "inter_dim", "moe_inter_dim", "n_layers", "n_dense_layers", "n_heads", "n_kv_heads"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_n_heads"),
    *("index_head_dim", "index_topk", "n_routed_experts", "n_shared_experts", "n_activated_experts"),
    *("n_expert_groups", "n_limited_groups", "n_mtp_layers"),
)
"""Fields of a model that are sizes."""
UNITS = {
    **dict.fromkeys(("seq_len", "tokens", "context", "prompt"), "token"),
    **dict.fromkeys(("restart_time", "checkpoint_halt"), "s"),
}
"""Units of the fields of a request that have one."""
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
    """Number of GPUs of the training; left out: as DeepSeek-V3 was trained, or the fewest that train within --days."""
    days: float | None = None
    """Longest training in days, by which the number of GPUs is chosen where you leave it out; left out: 90."""
    pipeline: int | None = None
    """Number of pipeline stages; left out, as all of the layout: the fastest that fits."""
    expert: int | None = None
    """Number of GPUs that share the routed experts of a layer."""
    tensor: int | None = None
    """Number of GPUs that share each matrix, and with sequence parallelism the activations; experts are not divided."""
    context_parallel: int | None = None
    """Number of GPUs that divide each sequence, which gather its keys; left out: 1, or more where nothing else fits."""
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
    tokens: float | None = setting(None, least=1, most=LARGEST)
    """Number of tokens of the whole training, such as 14.8e12."""
    utilization: float | None = setting(None, above=0, below=1)
    """Share of the peak that your training reaches (MFU), such as 0.39; left out: what the parts of a step give."""

    bf16_efficiency: float | None = setting(None, above=0, most=1)
    """Share of the peak that training's BF16 or FP32 products reach while computing; left out: 0.52, from Llama 3."""
    fp8_efficiency: float | None = setting(None, above=0, most=1)
    """Share of the peak that training's FP8 products reach while computing; left out: fitted to DeepSeek-V3's step."""
    communication_share: float | None = setting(None, least=0, below=1)
    """Share of a GPU that carries rows of experts in place of computing; left out: 0.15, as DeepSeek-V3."""
    link_efficiency: float | None = setting(None, above=0, most=1)
    """Share of a link's data-sheet rate that is reached; left out: 0.8, measured on H800."""
    imbalance: float | None = setting(None, least=1)
    """Tokens of the fullest GPU's experts over the mean, in training; left out: 1, perfect balance."""
    memory_share: float | None = setting(None, above=0, most=1)
    """Share of a GPU's memory that a plan may fill; left out: 0.9."""

    context: int | None = None
    """Number of tokens that a decoding sequence holds; left out: 4096, or as many as the model takes."""
    sequences: int | None = None
    """Number of sequences that a GPU decodes; left out, as all of a deployment: searched."""
    prompt: int | None = None
    """Number of tokens of a prompt; left out: as context."""
    weight_dtype: WeightDtype | None = None
    """Dtype of weights in serving; left out: the narrowest that the config says and the hardware multiplies."""
    cache_dtype: CacheDtype | None = None
    """Dtype of the cache in serving; left out: the config's, else bfloat16. fp8 is for MLA and V4."""
    indexer_dtype: WeightDtype | None = None
    """Dtype of an indexer's scores in serving; left out: the config's, else bfloat16."""
    decode_gpus: int | None = None
    """Number of GPUs that decode together."""
    decode_tensor: int | None = None
    """Number of GPUs that share heads and sequences in decoding."""
    prefill_gpus: int | None = None
    """Number of GPUs that read prompts together."""
    prefill_tensor: int | None = None
    """Number of GPUs that share heads and prompts in reading prompts."""
    micro_batches: Literal[1, 2] | None = None
    """Number of parts of a served batch, 1 or 2, of which one communicates while another computes."""
    drafts: int | None = setting(None, least=0, most=16)
    """Number of tokens that multi-token prediction drafts in a step; 0: plain decoding."""
    acceptance: float = setting(0.85, above=0, below=1)
    """Probability that a draft is accepted, if those before it were (V3: 0.85 to 0.9)."""
    tpot: float | None = None
    """Longest time of an output token in milliseconds, that the main deployment keeps; left out: 50."""
    ttft: float | None = None
    """Longest time of reading a prompt in seconds, that the main deployment keeps; left out: 5."""

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

    def given(self, names: tuple[str, ...] = LAYOUT) -> dict[str, Any]:
        """Return the fields among some names, those of the layout, that are chosen."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@functools.cache
def titles_of(kind: type) -> Mapping[str, str]:
    """Return what the documentation below each field of a dataclass says first."""
    return {name: re.split(r"[.;:] |, such as|\.$", said)[0] for name, said in field_docstrings(kind).items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Numbers that a plan is computed from and no config or hardware file has, each with its source."""

    request: PlanRequest
    sources: dict[str, str]
    """Source of fields of the request, in words; of the layout, how it was chosen."""
    known: dict[str, Figure] = field(default_factory=dict[str, Figure])
    """Figures that were asked for."""

    def __getitem__(self, name: str) -> Figure:
        """Return a number of the request; what is left open is assumed."""
        if name not in self.known:
            value, source = getattr(self.request, name, None), self.sources.get(name, "")
            title, unit = titles_of(PlanRequest).get(name, ""), UNITS.get(name, "")
            if value is None:
                value, source, *more = presets()["assumed"][name]
                title, unit = [*more, unit][:2] if more else (title, unit)
            self.known[name] = Figure(name, value, unit, title, source)
        return self.known[name]

    def filled(self, source: str, **values: Any) -> "Inputs":
        """Return the same with values for the fields that are open. Fields with a source keep it."""
        open_ = {name: value for name, value in values.items() if getattr(self.request, name) is None}
        sources = {**dict.fromkeys(values, source), **self.sources}
        return Inputs(request=replace(self.request, **open_), sources=sources)


# --- models


@functools.cache
def presets() -> dict[str, Any]:
    """Return the published runs of presets.toml."""
    return read_toml(Path(__file__).parent / "presets.toml")


@functools.cache
def _v3() -> ModelConfig:
    return ModelConfig.from_file(find_config(Path("deepseek-v3")))


def is_v3(config: ModelConfig, indexer: bool = False) -> bool:
    """Return True for a model with DeepSeek-V3's sizes, whatever its training, context, RoPE and MTP.

    DeepSeek's inference JSON, for example, has no blocks of multi-token prediction.

    Args:
        indexer: also for V3.2, which has an indexer more.
    """
    if indexer and config.attention == "dsa":
        config = replace(config, attention="mla", **NO_INDEXER)
    v3 = _v3()
    return all(getattr(config, name) == getattr(v3, name) for name in ("attention", *SIZES) if name != "n_mtp_layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Released:
    """Dtypes that a model is released and served in: the section [serving] of its config."""

    weights: WeightDtype | None = None
    cache: CacheDtype | None = None
    indexer: WeightDtype | None = None

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A config and what its file says of training and serving."""

    config: ModelConfig
    source: str
    """Name of the file."""
    run: RunConfig | None = None
    """Recipe, where the file has the section [train]."""
    fp8: bool = False
    """The file says that the products or the weights are FP8."""
    released: Released = Released()
    defaults: tuple[str, ...] = ()
    """Sizes that an own TOML file leaves to dsmini's defaults."""

    @property
    def name(self) -> str:
        """Name for people: of the file, or of its folder for a config.json."""
        path = Path(self.source)
        return path.resolve().parent.name if path.name == "config.json" else path.stem

    @classmethod
    def from_file(cls, path: Path) -> "Model":
        """Read a TOML file, DeepSeek's inference JSON, or Hugging Face's config.json.

        Raises: ValueError for a file without sizes, and quantization that dsmini cannot honour, by its name.
        """
        config, is_toml = ModelConfig.from_file(path), path.suffix == ".toml"
        raw = read_toml(path) if is_toml else read_table(path)
        given = raw.get("model") if is_toml else raw
        if not given:
            raise ValueError(f"{path} has no size of a model; write some, or name a config, such as configs/toy.toml")
        run = RunConfig.from_file(path) if is_toml and "train" in raw else None
        fp8 = config.precision == "fp8" or raw.get("dtype") == "fp8" or bool(raw.get("quantization_config"))
        said = raw.get("serving", {}) if is_toml else {}
        if fp8 and "weights" not in said:
            said = {**said, "weights": "fp4" if raw.get("expert_dtype") == "fp4" else "fp8"}
        if config.compress_ratios is not None and "cache" not in said and fp8:
            said = {**said, "cache": "fp8", "indexer": "fp4"}
        own = is_toml and path != known_config(path.stem)
        left = tuple(n for n in SIZES if own and n not in given and getattr(config, n) is not None)
        released = build(Released, said, path.name, "serving.")
        return cls(config=config, source=str(path), run=run, fp8=fp8, released=released, defaults=left)


def known_config(name: str) -> Path | None:
    """Return the file of a config that dsmini comes with; None for any other name."""
    try:
        return find_config(Path(name))
    except ValueError:
        return None
