"""The config of several processes: how the model, its experts and the batch are divided among them."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from dsmini.config.fields import check_types, require, require_multiple, setting
from dsmini.config.model import ModelConfig
from dsmini.config.train import TrainConfig

ScheduleName = Literal["1f1b", "interleaved1f1b", "zero_bubble", "zbv", "dualpipev"]
CHUNKS: Mapping[ScheduleName, int] = MappingProxyType(
    {"1f1b": 1, "interleaved1f1b": 2, "zero_bubble": 2, "zbv": 2, "dualpipev": 2}
)
"""Number of stages of a pipeline that each process has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Layout of the processes, pp x dp x ep of them. Without torchrun or another launcher there is one process."""

    pp: int = setting(1, least=1, resume="rounding")
    """Number of processes that the layers are divided among, as stages of a pipeline. The train.grad_accum parts of
    a step pass through them one after the other: pp parts or more with 1f1b, 2 pp or more with dualpipev. A multiple of
    pp goes with the other schedules."""
    dp: int | None = setting(None, least=1, resume="rounding")
    """Number of parts of the batch for each expert; left out: as many as there are processes for."""
    ep: int = setting(1, least=1, resume="rounding")
    """Number of processes that the experts of a layer are divided among. Each has its own part of the batch too."""
    nodes: int = setting(1, least=1, resume="rounding")
    """Number of machines that the ep processes are on. With more than one a token is sent once to each machine with an
    expert of its own, and passed on there (V3: section 3.2.2)."""
    zero: Literal[0, 1, 2, 3] = setting(0, resume="rounding")
    """Division among the processes with the same parameters: 0 nothing, 1 the optimizer state, 2 the gradients
    too, 3 the parameters too (FSDP2)."""
    schedule: ScheduleName = setting("1f1b", resume="rounding")
    """Order of the forwards and backwards of a pipeline."""
    timeout: float = setting(300.0, above=0, resume="none")
    """Seconds after which a process that does not answer ends the run."""
    check_replicas: int = setting(100, least=0, resume="none")
    """Number of steps between two comparisons of what several processes hold alike; 0: never."""

    def __post_init__(self) -> None:
        check_types(self, "parallel.")
        require_multiple("parallel.ep", self.ep, "parallel.nodes", self.nodes)

    def parts(self, world_size: int) -> int:
        """Return the number of parts of the batch, dp * ep.

        Raises: ValueError for a number of processes that the layout does not fit.
        """
        group = self.pp * self.ep
        dp = self.dp or max(1, world_size // group)
        want = group * dp
        if want != world_size:
            have = "1 process" if world_size == 1 else f"{world_size} processes"
            shape = f"pp={self.pp} x dp={dp} x ep={self.ep}"
            raise ValueError(
                f"parallel: {shape} needs {want} processes, there {'is' if world_size == 1 else 'are'} {have}; start "
                f"torchrun --nproc-per-node {want} -m dsmini.train, or change the layout"
            )
        return dp * self.ep

    def check(self, model: ModelConfig, train: TrainConfig, world_size: int) -> None:
        """Raise ValueError for a model or a batch that this layout does not divide."""
        parts = self.parts(world_size)
        if self.ep > 1:
            require(
                any(map(model.is_moe, range(model.n_layers + model.n_mtp_layers))),
                f"parallel.ep={self.ep}, but the model has no experts to divide; use parallel.dp",
            )
            require_multiple("model.n_routed_experts", model.n_routed_experts, "parallel.ep", self.ep)
        if self.nodes > 1:
            require_multiple("model.n_expert_groups", model.n_expert_groups, "parallel.nodes", self.nodes)
        if self.pp > 1:
            self._check_pipeline(model, train)
        frozen = model.attention == "dsa" and train.dsa_stage == "warmup"
        require(
            not frozen or self.zero == 0,
            f"parallel.zero={self.zero} does not go with train.dsa_stage='warmup', in which little has a gradient; "
            "leave it out",
        )
        if world_size == 1:
            return
        rows = parts * train.grad_accum
        for name in ("batch_size", "batch_start"):
            value = getattr(train, name)
            if value is not None and value % rows:
                raise ValueError(
                    f"train.{name}={value} is not divisible into {parts} processes' parts of train.grad_accum="
                    f"{train.grad_accum} each; use a multiple of {rows}"
                )
        require(not train.compile, "train.compile does not go with several processes; leave it out")

    def _check_pipeline(self, model: ModelConfig, train: TrainConfig) -> None:
        """Raise ValueError for layers or parts of a batch that a pipeline does not take."""
        require(
            model.attention != "dsa",
            f"parallel.pp={self.pp} does not go with model.attention='dsa', whose indexers' losses no stage passes on; "
            "use parallel.dp or parallel.ep",
        )
        name, parts = self.schedule, train.grad_accum
        stages = self.pp * CHUNKS[name]
        require(
            stages <= model.n_layers,
            f"parallel.pp={self.pp} with parallel.schedule={name} has {stages} stages, more than model.n_layers="
            f"{model.n_layers}; use fewer, since a stage has one layer or more",
        )
        least = {"1f1b": self.pp, "dualpipev": stages}.get(name, 1)
        require(
            parts >= least,
            f"train.grad_accum={parts} is too small for parallel.schedule={name} with parallel.pp={self.pp}; use "
            f"{least} or more",
        )
        rounds = max(1, parts // self.pp)
        require(
            name not in ("interleaved1f1b", "zero_bubble") or parts % rounds == 0,
            f"train.grad_accum={parts} does not go with parallel.schedule={name}, which has {rounds} equal rounds for "
            f"parallel.pp={self.pp}; use {rounds * self.pp}",
        )
        require(
            self.zero == 0,
            f"parallel.zero={self.zero} does not go with a pipeline, parallel.pp={self.pp}; leave it out",
        )
