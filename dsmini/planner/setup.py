"""Setup of a plan: a request with everything that it leaves open filled in, and where each choice comes from.

Sources of choices, the first that has one: the command line; the file's section [train]; DeepSeek-V3's published run.
Layout and deployments that are left open are chosen by layout_choice.py and deployment_choice.py.

Links count as reached, not as on data sheets, where a hardware file has both: an H800 sends 160 of 200 GB/s within a
node and 40 of 50 between nodes.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from dsmini.accounting.memory import WeightDtype
from dsmini.config import ModelConfig, RunConfig
from dsmini.planner.hardware import Hardware
from dsmini.planner.model.references import is_v3_family
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, DOLLARS_PER_SECOND, SECONDS
from dsmini.planner.reliability import HALT, NODE_FAILURES, RESTART, FailureInputs
from dsmini.planner.request import PlanRequest
from dsmini.planner.serving.decoding import decode_plan
from dsmini.planner.serving.deployment import ServingWorkload, serving_workload
from dsmini.planner.serving.deployment_choice import ChosenDeployment, Serving, choose_deployment, misfit
from dsmini.planner.training.assumptions import Assumptions
from dsmini.planner.training.layout import DTYPES, Layout, Precision
from dsmini.planner.training.layout_choice import ChosenLayout, Cluster, choose_layout
from dsmini.planner.training.workload import Workload
from dsmini.reading import read_table, read_toml

USER = "the command line"
V3_BATCH, V3_SEQ_LEN, V3_TOKENS = 15360, 4096, 14.8e12
V3_SOURCE = "as DeepSeek-V3: V3 report, section 4.2"
CONTEXT, SEQUENCES = 4096, 32
"""Tokens of a decoding sequence, and the most sequences of a GPU in a micro-batch, where the user leaves them open."""


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
    m: ModelInputs
    hardware: Hardware
    """Hardware with links as reached."""
    layout: ChosenLayout
    workload: Workload
    assumptions: Assumptions
    serving: "Served | None"
    unserved: str
    """Reason why nothing is planned of serving, in one sentence; "" if it is."""
    refused: str
    """Sentence about a plan that does not fit although it was asked for, or because nothing does; "" if all does."""
    failures: FailureInputs

    def with_layout(self, layout: Layout, how: str) -> "Setup":
        """Return the same with another layout."""
        return dataclasses.replace(self, layout=ChosenLayout(layout=layout, how=how))


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """Deployments, and what they serve."""

    decode: ChosenDeployment
    prefill: ChosenDeployment
    workload: ServingWorkload
    misfit: str = ""
    """Sentence about what does not fit; "" if both deployments do."""


def setup(request: PlanRequest, model: Model, hardware: Hardware) -> Setup:
    """Return a request with everything that it leaves open.

    Raises: ValueError for choices that the model or the hardware cannot have, and if nothing fits what was chosen.
    """
    if model.config.attention == "dsa" and model.run is not None and model.run.train.dsa_stage == "warmup":
        raise ValueError(f"{model.source} has train.dsa_stage='warmup', which has no plan; use dsa_stage='sparse'")
    m = ModelInputs.of(model.config, model.source)
    reached = hardware_of(request, hardware)
    precision = _precision(m, reached)
    workload = workload_of(request, model)
    measured = request.utilization
    assumptions = Assumptions.of(measured, USER) if measured is not None else Assumptions.of()
    defaults = _default_layout(model, precision)
    cluster = Cluster(m=m, hardware=reached, workload=workload, assumptions=assumptions, defaults=defaults)
    layout = choose_layout(cluster, request.layout_fields)
    serving, unserved, refused = None, "", ""
    try:
        serving = serve(request, m, reached, DTYPES[precision])
    except ValueError as error:
        if request.serving_fields:
            raise
        unserved = str(error)
    if serving is not None and serving.misfit:
        refused = serving.misfit
        if not request.serving_fields:
            serving, unserved, refused = None, refused, ""
    of_training = request.layout_fields or any((request.batch, request.seq_len, request.tokens, measured))
    if layout.misfit and (of_training or serving is None):
        refused = layout.misfit
    return Setup(
        model=model,
        m=m,
        hardware=reached,
        layout=layout,
        workload=workload,
        assumptions=assumptions,
        serving=serving,
        unserved=unserved,
        refused=refused,
        failures=failures_of(request),
    )


def with_reached_links(hardware: Hardware) -> Hardware:
    """Return hardware whose links are those that programs reach, where its file has them."""
    return dataclasses.replace(
        hardware,
        fast_link=hardware.fast_link_effective or hardware.fast_link,
        slow_link=hardware.slow_link_effective or hardware.slow_link,
    )


def hardware_of(request: PlanRequest, hardware: Hardware) -> Hardware:
    """Return hardware at the request's price, with links as reached."""
    return with_reached_links(_with_price(hardware, request.price))


def _with_price(hardware: Hardware, dollars_an_hour: float | None) -> Hardware:
    if dollars_an_hour is None:
        return hardware
    price = DOLLARS_PER_SECOND(dollars_an_hour / 3600, "gpu_price", "Rent of an accelerator", USER)
    return dataclasses.replace(hardware, price=price)


def _precision(m: ModelInputs, hardware: Hardware) -> Precision:
    """Return the precision of products where the user leaves it open: FP8 for V3 and for configs that say so."""
    if "fp8" in hardware.peaks and (m.config.precision == "fp8" or is_v3_family(m)):
        return "fp8"
    return "bf16" if "bfloat16" in hardware.peaks else "fp32"


def _default_layout(model: Model, precision: Precision) -> Layout:
    """Return precision, optimizer and moments where the user leaves them open."""
    if model.run is None:
        return Layout(precision=precision)
    train = model.run.train
    if train.dtype == "float32":
        precision = "fp32"
    return Layout(precision=precision, optimizer=train.optimizer, moments=train.moments)


def workload_of(request: PlanRequest, model: Model) -> Workload:
    """Return the training's sequences, steps and tokens."""
    r, source = request, V3_SOURCE
    seq_len, batch, tokens = min(V3_SEQ_LEN, model.config.max_seq_len), V3_BATCH, V3_TOKENS
    if model.run is not None:
        train, source = model.run.train, f"{model.source}: [train]"
        seq_len, batch = model.run.seq_len, train.batch_size
        fewer = (batch - (train.batch_start or batch)) / 2 * train.batch_ramp  # the batch grows in equal steps
        tokens = train.steps * (batch - fewer) * seq_len
    given = [r.seq_len, r.batch, r.tokens]
    if any(given) and not all(given):
        source = f"{USER}, and {source}"
    longest = model.config.max_seq_len
    if r.seq_len is not None and r.seq_len > longest:
        raise ValueError(f"seq_len={r.seq_len} is longer than max_seq_len={longest} of {model.source}; shorten it")
    return Workload.of(
        seq_len=r.seq_len or seq_len,
        batch=r.batch or batch,
        tokens=r.tokens or tokens,
        source=USER if all(given) else source,
    )


def serve(request: PlanRequest, m: ModelInputs, hardware: Hardware, weight_dtype: WeightDtype) -> Served:
    """Return both deployments and the workload; as many sequences as fit where the user leaves them open.

    Args:
        weight_dtype: where the user leaves it open.
    """
    r = request
    asked = served_workload(r, m, r.sequences or 1)
    serving = Serving(
        m=m,
        hardware=hardware,
        workload=asked,
        weight_dtype=r.weight_dtype or weight_dtype,
        cache_dtype=r.cache_dtype,
    )
    decode = choose_deployment(serving, "decode", r.decode_gpus, r.decode_tensor, r.decode_redundant)
    prefill = choose_deployment(serving, "prefill", r.prefill_gpus, r.prefill_tensor, r.prefill_redundant)
    if r.sequences is None:
        made = decode.deployment
        fit = decode_plan(m, hardware, asked, made).memory.sequences.value / made.micro_batches.value
        asked = served_workload(r, m, max(1, min(SEQUENCES, int(fit))))
    serving = dataclasses.replace(serving, workload=asked)
    wrong = misfit(serving, "decode", decode.deployment) or misfit(serving, "prefill", prefill.deployment)
    return Served(decode=decode, prefill=prefill, workload=asked, misfit=wrong)


def served_workload(request: PlanRequest, m: ModelInputs, sequences: int) -> ServingWorkload:
    """Return what is served. Raises: ValueError for a context or a prompt that is longer than the model takes."""
    r, longest = request, m.config.max_seq_len
    for name in ("context", "prompt"):
        tokens = getattr(r, name)
        if tokens is not None and tokens > longest:
            raise ValueError(f"{name}={tokens} is longer than the model's max_seq_len={longest}; shorten it")
    context = r.context or min(CONTEXT, longest)
    return serving_workload(
        sequences=sequences,
        context=context,
        prompt=r.prompt or context,
        drafts=r.drafts or 1,
        acceptance=r.acceptance,
    )


def failures_of(request: PlanRequest) -> FailureInputs:
    """Return the failures of nodes and their costs."""
    r = request
    return FailureInputs(
        failures_per_node_day=NODE_FAILURES
        if r.failures_per_node_day is None
        else COUNT(r.failures_per_node_day, NODE_FAILURES.name, NODE_FAILURES.title, USER),
        restart_time=RESTART if r.restart_time is None else SECONDS(r.restart_time, RESTART.name, RESTART.title, USER),
        write_time=HALT if r.checkpoint_halt is None else SECONDS(r.checkpoint_halt, HALT.name, HALT.title, USER),
    )
