"""Layout: how a training run is divided over GPUs, and the rules that it must meet.

    gpus = pipeline * data * context_parallel * tensor
        each GPU is in one pipeline stage, one part of the batch, one part of sequences, one part of matrices
    experts: all other GPUs of a stage are divided into groups of `expert`, each of which holds all experts once

Worked example, DeepSeek-V3: 2048 GPUs, 16 stages, no tensor parallelism: 2048 / 16 = 128 parts of the batch. 64 of them
share the 256 experts, 4 on each GPU, over 8 nodes; the experts exist 128 / 64 = 2 times. 15360 sequences a step are 120
micro-batches of one sequence for each part.

A group of experts fits a node, or takes equally many GPUs of several. With 72 GPUs in a node, 64 share the experts of
V3 inside one node; the other 8 are not in the group. Groups inside a node leave less than a quarter of it idle.

Source: DeepSeek-V3 report, section 3.2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsmini.accounting.memory import Optimizer, Recompute
from dsmini.accounting.tensors import Dtype, divisors
from dsmini.config import ModelConfig
from dsmini.planner.request import Precision, Schedule, Zero
from dsmini.reading import listed
from dsmini.report.units import plural


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Complete layout of a training run, that of one process by default, and its step."""

    batch: int
    """Sequences of an optimizer step."""
    gpus: int = 1
    pipeline: int = 1
    expert: int = 1
    tensor: int = 1
    zero: Zero = 0
    recompute: Recompute = "none"
    precision: Precision = "bf16"
    micro_batch: int = 1
    schedule: Schedule = "1f1b"
    optimizer: Optimizer = "adamw"
    moments: Dtype = "float32"
    context_parallel: int = 1
    """Parts of each sequence, on GPUs that gather the keys of all."""

    @property
    def data(self) -> int:
        """Parts of the batch."""
        return self.gpus // (self.pipeline * self.tensor * self.context_parallel)

    @property
    def holders(self) -> int:
        """GPUs that hold the same matrices, but those of a pipeline's other half."""
        return self.data * self.context_parallel

    @property
    def copies(self) -> int:
        """Copies of the parameters in a pipeline: two with DualPipe, whose halves hold the same stages."""
        return 2 if self.schedule == "dualpipe" else 1


Rule = tuple[bool, Callable[[], str]]
"""Condition, and the sentence for what does not meet it."""


def gpus_in_node(expert: int, node: int) -> int:
    """Return how many GPUs of a node a group of experts takes, where a node has enough."""
    return divisors(expert, node)[-1]


def fits_node(group: int, gpus: int, node: int) -> bool:
    """Return whether groups of GPUs leave less than a quarter of each node idle, or there is one node alone."""
    return gpus <= node or 4 * (node % group) < node


def rules(r: Layout, c: ModelConfig, node: int) -> Iterator[Rule]:
    """Yield what a layout must meet: in itself, with the model, with nodes of this many GPUs, and with the batch."""
    gpus, p, e, t, m, batch = r.gpus, r.pipeline, r.expert, r.tensor, r.micro_batch, r.batch
    moe, dual = c.n_dense_layers < c.n_layers + c.n_mtp_layers, r.schedule == "dualpipe"
    parts = r.context_parallel
    divided, named = gpus % (p * t * parts) == 0, f", tensor={t} and context_parallel={parts}"
    named = f" and tensor={t}" if parts == 1 else named
    yield divided, lambda: f"pipeline={p}{named} do not divide gpus={gpus}; change one of them"
    yield _divides("expert", e, "gpus/pipeline", gpus // p)
    yield p <= c.n_layers, lambda: f"pipeline={p} is more than n_layers={c.n_layers}; use {c.n_layers} or fewer stages"
    yield e == 1 or moe, lambda: f"expert={e} but the model has no MoE layers; use expert=1"
    yield _divides("expert", e, "n_routed_experts", c.n_routed_experts)
    in_node = gpus_in_node(e, node)
    whole = e <= node or 2 * in_node > node
    yield whole, lambda: f"expert={e} takes {in_node} of the {node} GPUs of a node; use a multiple of {node}"
    idle = f"of the {plural(node, 'GPU')} of a node idle; use one of {listed([str(n) for n in divisors(node)], 8)}"
    yield e > node or fits_node(e, gpus, node), lambda: f"expert={e} leaves {node % e} {idle}"
    yield t <= node, lambda: f"tensor={t} is more than the {plural(node, 'GPU')} of a node; use {node} or fewer"
    yield fits_node(t, gpus, node), lambda: f"tensor={t} leaves {node % t} {idle}"
    yield _divides("tensor", t, "n_heads", c.n_heads)
    yield _divides("tensor", t, "n_kv_heads", c.kv_heads)
    paired = p % 2 == 0 or not dual
    yield paired, lambda: f"schedule='dualpipe' pairs stages, got pipeline={p}; use an even number, or 1f1b"
    shared = r.holders * r.copies > 1 or r.zero == 0
    alone = "divides the state over data-parallel GPUs, of which there is one"
    yield shared, lambda: f"zero={r.zero} {alone}; use zero=0"
    yield _divides("micro_batch", m, "batch", batch)
    rows = max(1, r.data * m)
    number, near = batch // rows, max(rows, batch // rows * rows)
    fix = f"data={r.data} parts of micro_batch={m}; use a batch of {near}"
    fix += f", or context_parallel={r.data // batch * parts}" if batch < r.data and r.data % batch == 0 else ""
    yield batch % rows == 0, lambda: f"a step of batch={batch} sequences is not divisible by {fix}"
    more = "use a larger batch, a smaller micro_batch or fewer stages"
    even = number >= 2 * p and number % 2 == 0
    want = f"an even number of micro-batches from {2 * p}"
    yield even or not dual, lambda: f"schedule='dualpipe' with pipeline={p} needs {want}, got {number}; {more}"
    yield number >= p, lambda: f"pipeline={p} needs at least {p} micro-batches a step, got {number}; {more}"


def _divides(name: str, part: int, of: str, whole: int) -> Rule:
    def sentence() -> str:
        return f"{name}={part} does not divide {of}={whole}; use one of {listed([str(n) for n in divisors(whole)], 8)}"

    return whole % part == 0, sentence


def check(found: Iterator[Rule]) -> None:
    """Raise ValueError with the sentence of the first rule that is broken."""
    for holds, sentence in found:
        if not holds:
            raise ValueError(sentence())
