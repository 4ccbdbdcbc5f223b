"""Setup of a plan: a request with everything that it leaves open filled in, and where each choice comes from.

Sources of choices, the first that has one: the command line; the file's section [train]; DeepSeek-V3's published run
(presets.toml). Layouts that are left open are chosen by search.py. A deployment is the published one for
DeepSeek-V3's sizes, else the fewest GPUs whose memory holds weights and cache: with experts 1, 2, 4, 8 ... GPUs that
divide them, and if none hold it, GPUs that also share attention; without experts GPUs of a node that divide its
matrices.

A complete request is planned as it is. So another plan is a complete request with a change, completed again.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dsmini.config import ModelConfig, RunConfig
from dsmini.config.fields import build
from dsmini.planner.display import in_unit, shown
from dsmini.planner.figure import Sheet, titles
from dsmini.planner.hardware import USER, Hardware
from dsmini.planner.model import cache_figures, placed_tensors, weight_figures, without_indexer
from dsmini.planner.request import DTYPES, Layout, PlanRequest, Precision
from dsmini.planner.search import EVERY, Problem, choose_layout
from dsmini.planner.serving import Deployment, Stage, deployment_figures
from dsmini.reading import find_config, read_table, read_toml
from dsmini.report.units import plural

CONTEXT, SEQUENCES = 4096, 32
"""Tokens of a decoding sequence, and the most sequences of a GPU in a micro-batch, where the user leaves them open."""
NODES = (1, 2, 4, 8, 16, 32, 64)
STAGES: tuple[Stage, ...] = ("decode", "prefill")
SIZES = ("gpus", "tensor", "redundant")
"""Sizes of a deployment."""


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


def same_sizes(a: ModelConfig, b: ModelConfig) -> bool:
    """Return True for two models with equal sizes, whatever their training, context and RoPE."""
    sizes = ["attention", *(field.name for field in fields(a) if field.name in titles())]
    return all(getattr(a, name) == getattr(b, name) for name in sizes)


def is_v3(config: ModelConfig) -> bool:
    """Return True for a model with DeepSeek-V3's sizes."""
    return same_sizes(config, reference("deepseek-v3"))


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
        config = ModelConfig.from_file(path)
        raw = read_table(path) if path.suffix == ".json" else read_toml(path)
        if not (raw if path.suffix == ".json" else raw.get("model")):
            raise ValueError(f"{path} has no size of a model; write some, or name a config, such as configs/toy.toml")
        run = RunConfig.from_file(path) if path.suffix != ".json" and "train" in raw else None
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
    sources: Mapping[str, str]
    """Source of each field of the request that is an input of a figure, in words."""
    misfit: Mapping[str, str]
    """Sentences about what does not fit, with what would: of training, decode and prefill."""
    published: bool
    """Deployments of DeepSeek-V3's sizes send rows as its own do: it is the model, or one that is varied from it."""
    unserved: str = ""
    """Reason why serving has no plan, in one sentence; "" if it has one."""

    @property
    def layout(self) -> Layout:
        """Layout of training."""
        return self.request.layout

    def deployment(self, stage: Stage, **sizes: int) -> Deployment:
        """Return the deployment of a stage in the request, or one of other sizes: gpus, tensor, redundant.

        V3's own has its ways to send rows.
        """
        r, preset = self.request, presets()["deepseek-v3"][stage]
        sizes = sizes or {name: getattr(r, f"{stage}_{name}") for name in SIZES}
        ways = {"micro_batches": 1 if sizes["gpus"] == 1 else 2, "two_hop": stage == "prefill"}
        if self.published and sizes == {name: preset[name] for name in SIZES}:
            ways = {name: value for name, value in preset.items() if name not in SIZES}
        dtypes: dict[str, Any] = {"weight_dtype": r.weight_dtype, "cache_dtype": r.cache_dtype}
        return Deployment(stage=stage, **sizes, **ways, **dtypes)

    @property
    def served(self) -> bool:
        """True if serving has a plan."""
        return self.request.decode_gpus is not None

    @property
    def refused(self) -> str:
        """Sentence about a plan in which nothing fits; "" if training or serving does."""
        fits = "training" not in self.misfit or (self.served and not {"decode", "prefill"} & self.misfit.keys())
        return "" if fits else next(iter(self.misfit.values()))


def setup(request: PlanRequest, model: Model, hardware: Hardware, base: Setup | None = None) -> Setup:
    """Return a request with everything that it leaves open.

    Args:
        base: setup that this one is varied from, with the sources of the fields that are given; left out: these are of
            the command line.

    Raises: ValueError for choices that the model or the hardware cannot have.
    """
    if model.config.attention == "dsa" and model.run is not None and model.run.train.dsa_stage == "warmup":
        raise ValueError(f"{model.source} has train.dsa_stage='warmup', which has no plan; use dsa_stage='sparse'")
    hardware, sources = hardware.at_price(request.price), base.sources if base else {}
    said = {f.name: USER for f in fields(request) if getattr(request, f.name) is not None} | dict(sources)
    filled, found = _workload(request, model)
    said = found | said
    layout, how, misfit = _layout(filled, model, hardware)
    said = dict.fromkeys(Layout.__dataclass_fields__, how) | said
    said["layout"] = sources.get("layout", how)
    filled = replace(filled, **{name: getattr(layout, name) for name in Layout.__dataclass_fields__})
    made = Setup(
        model=model,
        hardware=hardware,
        request=filled,
        asked=base.asked if base else request,
        sources=said,
        misfit={"training": misfit} if misfit else {},
        published=base.published if base else is_v3(model.config),
    )
    try:
        return _served(made, sources)
    except ValueError as error:
        if request.serving_fields and base is None:
            raise
        open_ = dict.fromkeys(("decode_gpus", "prefill_gpus"))
        return replace(made, request=replace(filled, **open_), unserved=str(error))


def _workload(r: PlanRequest, model: Model) -> tuple[PlanRequest, dict[str, str]]:
    """Return the request with the training's sequences, steps and tokens, and their sources."""
    longest = model.config.max_seq_len
    if r.seq_len is not None and r.seq_len > longest:
        raise ValueError(f"seq_len={r.seq_len} is longer than max_seq_len={longest} of {model.source}; shorten it")
    preset = presets()["deepseek-v3"]
    work, source = dict(preset["workload"]), preset["sources"]["workload"]
    work["seq_len"] = min(work["seq_len"], longest)
    if model.run is not None:
        train, source = model.run.train, f"{model.source}: [train]"
        fewer = (train.batch_size - (train.batch_start or train.batch_size)) / 2 * train.batch_ramp  # in equal steps
        tokens = train.steps * (train.batch_size - fewer) * model.run.seq_len
        work = {"seq_len": model.run.seq_len, "batch": train.batch_size, "tokens": tokens}
    given = {name: getattr(r, name) or value for name, value in work.items()}
    return replace(r, **given), dict.fromkeys(work, source)


def _precision(config: ModelConfig, hardware: Hardware) -> Precision:
    """Return the precision of products where the user leaves it open: FP8 for V3 and for configs that say so."""
    if "fp8" in hardware.peaks and (config.precision == "fp8" or is_v3(without_indexer(config))):
        return "fp8"
    return "bf16" if "bfloat16" in hardware.peaks else "fp32"


def problem_of(r: PlanRequest, model: Model, hardware: Hardware) -> Problem:
    """Return the problem of a layout, with the optimizer and the precision that are given or the recipe's."""
    state = Layout(precision=_precision(model.config, hardware))
    if model.run is not None:
        train = model.run.train
        precision: Precision = "fp32" if train.dtype == "float32" else state.precision
        state = Layout(precision=precision, optimizer=train.optimizer, moments=train.moments)
    given = {name: value for name in ("precision", "optimizer", "moments") if (value := getattr(r, name)) is not None}
    work = {"batch": r.batch or 1, "seq_len": r.seq_len or 1}
    return Problem(config=model.config, hardware=hardware, **work, state=replace(state, **given), options=EVERY)


def _layout(r: PlanRequest, model: Model, hardware: Hardware) -> tuple[Layout, str, str]:
    """Return the layout with the fields that are given and what is best for the others, why, and what would fit."""
    problem, given = problem_of(r, model, hardware), r.layout_fields
    if len(given) == len(Layout.__dataclass_fields__):  # complete
        layout = Layout(**given)
        fits = problem.planned(layout).memory_needed <= hardware.value("gpu_memory")
        return layout, "", "" if fits else "use more GPUs, ZeRO, recomputation, or --search"
    preset = presets()["deepseek-v3"] if is_v3(model.config) else {"training": {}, "sources": {"training": ""}}
    return choose_layout(problem, given, preset["training"], preset["sources"]["training"])


# --- serving


def _served(made: Setup, sources: Mapping[str, str]) -> Setup:
    """Return the setup with both deployments, and as many sequences as fit where the user leaves them open.

    Raises: ValueError for what the model or the hardware cannot have.
    """
    r, longest = made.request, made.model.config.max_seq_len
    for name in ("context", "prompt"):
        tokens = getattr(r, name)
        if tokens is not None and tokens > longest:
            raise ValueError(f"{name}={tokens} is longer than the model's max_seq_len={longest}; shorten it")
    context = r.context or min(CONTEXT, longest)
    weights = DTYPES[_precision(made.model.config, made.hardware)]  # however training multiplies
    open_ = {"context": context, "prompt": context, "weight_dtype": weights, "cache_dtype": "bfloat16"}
    r = replace(r, **{name: getattr(r, name) or value for name, value in open_.items()})
    said = dict.fromkeys(("context", "prompt", "sequences", "drafts", "acceptance"), "chosen") | dict(made.sources)
    made = replace(made, request=replace(r, sequences=r.sequences or 1))
    for stage in STAGES:
        deployment, how = _choose(made, stage)
        said[stage] = sources.get(stage, how)
        r = replace(r, **{f"{stage}_{name}": getattr(deployment, name) for name in SIZES})
    if r.sequences is None:
        decode = replace(made, request=replace(r, sequences=1)).deployment("decode")
        most = float(_memory(made, decode).sequences_that_fit) / decode.micro_batches
        r = replace(r, sequences=max(1, min(SEQUENCES, int(most))))
    made = replace(made, request=r, sources=said)
    misfit = {stage: sentence for stage in STAGES if (sentence := _misfit(made, stage))}
    return replace(made, misfit={**made.misfit, **misfit})


def _memory(made: Setup, d: Deployment) -> Sheet:
    """Return the memory of a deployment. Raises: ValueError for one that does not divide the model."""
    config, s = made.model.config, Sheet()
    d.check(config, made.hardware)
    made.hardware.put(s)
    placed_tensors(s, config)
    for name in ("context", "prompt", "sequences"):
        s.put(name, getattr(made.request, name), "")
    weight_figures(s, config, d.weight_dtype)
    cache_figures(s, config, d.cache_dtype)
    return deployment_figures(s, config, d, "")


def _fits(made: Setup, d: Deployment) -> bool:
    return _memory(made, d).memory_share <= 1


def _choose(made: Setup, stage: Stage) -> tuple[Deployment, str]:
    """Return the deployment with the given numbers and what is best for the others, and how it was chosen.

    Raises: ValueError for a deployment that does not divide the model or that the hardware has no links or units for.
    """
    experts, preset = made.model.config.n_routed_experts, presets()["deepseek-v3"]
    gpus, tensor, redundant = (getattr(made.request, f"{stage}_{name}") for name in SIZES)
    if made.published and made.hardware.networked and gpus is None and tensor is None and redundant is None:
        published = made.deployment(stage, **{name: preset[stage][name] for name in SIZES})
        if _fits(made, published):
            return published, preset["sources"][stage]

    def of(count: int, shared: int) -> Deployment:
        spare = -experts % count if redundant is None else redundant
        return made.deployment(stage, gpus=count, tensor=shared, redundant=spare)

    if gpus is not None:
        of(gpus, tensor or 1).check(made.model.config, made.hardware)
        return of(gpus, tensor or 1), "as chosen"
    counts = list(_counts(made, tensor))
    if not counts:
        raise ValueError(_cannot_share(made, stage, tensor))
    slots = experts + (redundant or 0)
    tried = [of(count, shared) for count, shared in counts if redundant is None or slots % count == 0]
    for deployment in tried:
        if _fits(made, deployment):
            return deployment, "the fewest GPUs that hold weights and cache"
    if len(tried) < len(counts):
        whole = f"{stage}_redundant={redundant} makes {slots} experts of a layer"
        fix = f"leave it out, or name {stage}_gpus too"
        raise ValueError(f"{whole}, which no number of GPUs that holds the model divides; {fix}")
    memory = [_memory(made, deployment) for deployment in tried]
    best = max(range(len(tried)), key=lambda i: (float(memory[i].sequences_that_fit), -float(memory[i].memory_share)))
    return tried[best], "what has memory for most sequences, since none fits"


def _cannot_share(made: Setup, stage: Stage, tensor: int | None) -> str:
    """Return why this many GPUs cannot share the heads, and how many can."""
    node, heads = made.hardware.node, made.model.config.n_heads
    possible = ", ".join(str(n) for n in range(1, node + 1) if any(_counts(made, n)))
    why = f"is more than {plural(node, 'GPU')} of a node"
    if tensor and heads % tensor:
        why = f"does not divide n_heads={heads}"
    return f"{stage}_tensor={tensor} {why}; use {possible}"


def _counts(made: Setup, tensor: int | None) -> Iterator[tuple[int, int]]:
    """Yield numbers of GPUs to try, and how many of them share heads."""
    config, hardware, most = made.model.config, made.hardware, made.hardware.node
    node, moe = round(hardware.value("gpus_per_node")), config.n_dense_layers < config.n_layers
    if moe and hardware.networked:
        most = max(node, config.n_routed_experts)
    few = [2**i for i in range(node.bit_length()) if 2**i < node] + [node]
    for width in [tensor] if tensor else few if moe else [None]:
        for count in (*few[:-1], *(node * nodes for nodes in NODES)):
            shared = width or count
            divides = count % shared == 0 and shared <= node and config.n_heads % shared == 0
            if count <= most and divides:
                yield count, shared


def _misfit(made: Setup, stage: Stage) -> str:
    """Return one sentence for a deployment that does not hold weights and cache, with what would; "" if it does."""
    d, experts = made.deployment(stage), made.model.config.n_routed_experts
    memory, fixes = _memory(made, d), list[str]()
    if memory.memory_share <= 1:
        return ""
    if stage == "decode" and (fit := int(float(memory.sequences_that_fit) / d.micro_batches)):
        fixes.append(f"use sequences={fit}")
    elif memory.longest_context >= 1:
        fixes.append(f"use {'context' if stage == 'decode' else 'prompt'}={float(memory.longest_context):.0f}")
    for count, shared in _counts(made, None if d.tensor == 1 else d.tensor):
        more = made.deployment(stage, gpus=count, tensor=shared, redundant=-experts % count)
        if count > d.gpus and _fits(made, more):
            fixes.append(f"use {stage}_gpus={count}" + (f" and {stage}_tensor={shared}" if shared != d.tensor else ""))
            break
    return (
        f"{stage} on {plural(d.gpus, 'GPU')} does not fit: weights and cache take {shown(memory.gpu_memory)} of "
        f"{in_unit(made.hardware.value('gpu_memory'), 'B')}; {' or '.join(fixes) or 'use hardware with more memory'}"
    )
