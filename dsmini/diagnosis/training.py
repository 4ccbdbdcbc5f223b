"""Training as the work that is diagnosed: steps of a run, each the same work, and the arms that make one thing free.

    replay            Data       every step takes the same batch, which is in memory
    uniform_routing   Algorithm  all experts get equally many tokens
    dense_active      Algorithm  a dense feed-forward with as many active parameters
    all_threads       Machine    products run on all cores
    fastest_dtype     Machine    products run in the dtype that this machine multiplies fastest
    quiet_machine     Machine    other programs take nothing (contention.py)

Data binds by what its arm saves, within what the plain steps of the same turn have seen: at least the time that they
waited, and at most that and the CPU time in which batches were prepared, since threads that prepare take a core from
the products. The other arms leave the wait as it is, and gain no more than what is not waited. Waiting comes in stalls,
so that its mean counts, not its median.

    T - waited - preparing  <=  T_replay  <=  T - waited

Without routing, each mixture of experts is a dense feed-forward with as many active parameters. Both do the same
multiplications, so the difference is what routing costs: choosing, sorting, many small products. The optimizer is left
out, as it moves all experts, also those that no token has chosen.

Predictions are made before any step runs. A forecast of this machine prices the operations of a step. A batch is timed
alone, without the model: its seconds, and the CPU seconds among them. A thread that prepares batches takes these from
the products, whose threads all wait for the one that shares its core:

    wait = max(CPU seconds of a batch where products use all cores, seconds of a batch / workers - computing)

and is all of the batch's seconds without workers. A plain step takes computing + wait, and the wait stays in all arms
but the one that replays a batch.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from dsmini.config import ModelConfig, RunConfig
from dsmini.config.schedule import batch_size
from dsmini.diagnosis.arms import Arm, Step, arm_of, patched
from dsmini.diagnosis.contention import Contention, cores, quiet, watch
from dsmini.diagnosis.findings import Finding, load, other_programs, padding, waiting
from dsmini.diagnosis.prices import seconds_with_threads, threads_put_back
from dsmini.diagnosis.texts import duplicates, held_out_leak, label_damage
from dsmini.machine import DTYPES, pick_dtype
from dsmini.measure.forecast import Forecast, forecast
from dsmini.measure.step_rates import Rates
from dsmini.measure.workloads import StepDtype, StepShape
from dsmini.nn import Block, FeedForward, Gate, Routing
from dsmini.training.trainer import StepResult, Trainer

BATCHES = 4
"""Batches whose targets are looked at, and which are timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainTurn:
    """What was seen of the plain steps of a turn."""

    steps: Sequence[StepResult]
    """The steps that are counted."""
    contention: Contention
    preparing: float
    """CPU seconds of preparing a step's batch, by threads or by the step itself."""

    @property
    def seconds(self) -> float:
        """Mean seconds of a step."""
        return statistics.fmean(step.seconds for step in self.steps)

    @property
    def waited(self) -> float:
        """Mean seconds that a step waited for its batch."""
        return statistics.fmean(step.data_wait * step.seconds for step in self.steps)

    def quiet(self) -> AbstractContextManager[Step]:
        """Return the arm without other programs: a wait in which no batch is prepared stays."""
        return quiet(self.contention, max(0.0, self.waited - self.preparing))


class Subject:
    """A Trainer whose steps are taken for their time. Its schedules stand still: every step is the same work."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.at = trainer.steps_done
        self.rows = batch_size(self.at, trainer.config.train)
        self.prices: TrainingPrices | None = None
        self.turns: list[PlainTurn] = []
        """Turns of plain steps, the one to warm up included."""

    @property
    def config(self) -> RunConfig:
        return self.trainer.config

    @property
    def device(self) -> torch.device:
        return self.trainer.device

    @property
    def seen(self) -> Sequence[PlainTurn]:
        """Turns of plain steps without the one to warm up, if there are others."""
        return self.turns[1:] or self.turns

    def arms(self, rates: Rates | None) -> list[Arm]:
        """Return all arms, plain steps first."""
        self.prices = None if rates is None else TrainingPrices(self, rates)
        return training_arms(self, self.prices)

    @property
    def facts(self) -> dict[str, str]:
        """The subject in words."""
        return {
            "batch": f"{self.rows} x {self.config.seq_len} tokens",
            "products": f"{self.config.train.dtype}, threads: {torch.get_num_threads()}",
            "text": self.trainer.corpus.source,
            "weights": f"after step {self.at}" if self.at else "random",
        }

    def forecast(self) -> Forecast | None:
        """Return the forecast of a step that waits for nothing; None without rates."""
        return None if self.prices is None else self.prices.computing

    def look(self) -> list[Finding]:
        """Return findings of the text and of the first batches."""
        batches = [self.trainer.loader.prepared((i * self.rows, self.rows)) for i in range(BATCHES)]
        corpus = self.trainer.corpus
        of_batches = [label_damage(batches), padding([targets for _, targets in batches])]
        return [duplicates(corpus), held_out_leak(corpus), *of_batches]

    def look_back(self) -> list[Finding]:
        """Return findings of the plain steps that were taken."""
        idle = load([step for turn in self.seen for step in turn.steps])
        return [
            waiting([turn.waited for turn in self.seen], [turn.seconds for turn in self.seen]),
            *([] if idle is None else [idle]),
            other_programs([turn.contention for turn in self.seen], "training"),
        ]

    def step(self) -> StepResult:
        """Take one optimizer step, and return to the same place of the schedules."""
        result = self.trainer.step()
        self.trainer.steps_done = self.at
        return result

    def forward_backward(self) -> float:
        """Return the seconds of a forward and backward without an update."""
        start = time.perf_counter()
        self.trainer.forward_backward(self.rows)
        seconds = time.perf_counter() - start
        self.trainer.model.zero_grad(set_to_none=True)
        return seconds

    @cached_property
    def one_batch(self) -> tuple[Tensor, Tensor]:
        """Batch that is prepared once."""
        return self.trainer.loader.prepared((self.trainer.sequences, self.rows))

    @contextmanager
    def plain(self) -> Iterator[Step]:
        """Yield plain steps, and add a turn of what was seen of them."""
        roofs = None if self.prices is None else self.prices.rates.roofs
        steps, cpu, ended = list[StepResult](), list[float](), watch(roofs, self.device)
        prepared = self.trainer.loader.prepared

        def timed(request: tuple[int, int]) -> tuple[Tensor, Tensor]:
            start = time.thread_time()
            batch = prepared(request)
            cpu.append(time.thread_time() - start)
            return batch

        def step(_base: float) -> float:
            steps.append(self.step())
            return steps[-1].seconds

        with patched(self.trainer.loader, "prepared", timed):
            yield step
        counted = steps[-self.counted :]
        self.turns.append(PlainTurn(steps=counted, contention=ended(), preparing=sum(cpu) / len(steps)))

    @property
    def counted(self) -> int:
        """Plain steps of a turn that count. After arms that take no batches each worker has one ready, and of as many
        steps one waits for all."""
        return max(2, self.config.data.workers)

    def changed(self, _base: float = 0.0) -> float:
        """Take a step of an arm that leaves the loader as it is; return its seconds with the wait of plain steps."""
        result = self.step()
        return self.turns[-1].waited + result.seconds * (1 - result.data_wait)

    @contextmanager
    def replayed(self) -> Iterator[Step]:
        """Let every step take the same batch, which is in memory. Their seconds are as measured."""
        batch = self.one_batch
        with patched(self.trainer, "loader", Stub(lambda _: batch)):
            yield lambda _base: self.step().seconds

    @contextmanager
    def replay(self) -> Iterator[Step]:
        """Let every step take the same batch; its seconds are within what plain steps have seen."""
        with self.replayed() as step:
            seen = self.turns[-1]
            most = seen.seconds - seen.waited
            yield lambda base: min(max(step(base), most - seen.preparing), most)

    @contextmanager
    def threads(self, number: int) -> Iterator[Step]:
        """Let products run on a number of cores."""
        with threads_put_back():
            torch.set_num_threads(number)
            yield self.changed

    @contextmanager
    def dtype(self, name: str) -> Iterator[Step]:
        """Let products run in a dtype. Masters stay FP32."""
        with patched(self.trainer.model, "compute_dtype", DTYPES[name]):
            yield self.changed

    @contextmanager
    def uniform_routing(self) -> Iterator[Step]:
        """Let all experts get equally many tokens. Everything else, the gate's own work too, stays."""
        gates = self.trainer.model.gates()
        for gate in gates:
            gate.forward = partial(uniformly, gate, gate.forward)
        try:
            yield self.changed
        finally:
            for gate in gates:
                del gate.forward

    @contextmanager
    def dense(self) -> Iterator[Step]:
        """Let a dense feed-forward stand in for each mixture of experts, forward and backward."""
        blocks = routed_blocks(self.trainer.model)
        routed: list[nn.Module] = [block.ffn for block in blocks]
        plain = [dense_baseline(self.config.model).to(self.device) for _ in blocks]

        def step(base: float) -> float:
            with_routing = self.forward_backward()
            for block, part in zip(blocks, plain, strict=True):
                block.ffn = part
            try:
                without = self.forward_backward()
            finally:
                for block, part in zip(blocks, routed, strict=True):
                    block.ffn = part
            # the pair may have had a slower moment than the plain step, whose computing it is a part of
            return base - min(base - self.turns[-1].waited, with_routing) * (1 - without / with_routing)

        with self.replayed():  # neither side waits
            yield step


@dataclasses.dataclass(frozen=True)
class Stub:
    """The part of a loader that a trainer asks for."""

    take: Callable[..., tuple[Tensor, Tensor]]


def routed_blocks(model: nn.Module) -> list[Block]:
    """Return all blocks with a mixture of experts, those of multi-token prediction too."""
    return [m for m in model.modules() if isinstance(m, Block) and hasattr(m.ffn, "gate")]


def dense_baseline(config: ModelConfig) -> FeedForward:
    """Make the dense feed-forward with the active parameters of a mixture of experts."""
    active = config.n_activated_experts + config.n_shared_experts
    return FeedForward(config, inter_dim=active * config.moe_inter_dim)


def uniformly(gate: Gate, forward: Callable[[Tensor], Routing], x: Tensor) -> Routing:
    """Route as a gate does, but to all experts in turn."""
    chosen = forward(x)
    n, k = chosen.indices.shape
    e = chosen.scores.shape[1]
    indices = (torch.arange(n * k, device=x.device) % e).view(n, k)
    weights = chosen.scores.gather(1, indices)
    if gate.options["norm_topk_prob"]:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    counts = torch.bincount(indices.flatten(), minlength=e)
    return Routing(indices, weights * gate.options["route_scale"], chosen.scores, counts)


def fastest_dtype(device: torch.device) -> str:
    """Return the name of the dtype that a device multiplies fastest."""
    return str(pick_dtype("auto", device)).removeprefix("torch.")


# --- predictions


class TrainingPrices:
    """Predicted seconds of a subject's steps. Parts that several of them need are computed once."""

    def __init__(self, subject: Subject, rates: Rates) -> None:
        self.subject, self.rates = subject, rates

    @cached_property
    def computing(self) -> Forecast:
        """Forecast of a step that waits for nothing."""
        return forecast(self.shape(), self.rates)

    @cached_property
    def wait(self) -> float:
        """Seconds that the loader adds to a step."""
        subject = self.subject
        return waiting_seconds(*time_batches(subject), self.computing.seconds, subject.config.data.workers)

    def plain(self) -> float:
        return self.computing.seconds + self.wait

    def dense(self) -> float:
        """Return the seconds without what routing adds to a forward and backward."""
        shape, device = self.shape(), torch.device("cpu")

        def put_dense(model: nn.Module) -> None:
            for block in routed_blocks(model):
                block.ffn = dense_baseline(shape.config)

        routed, dense = (
            forecast(shape, self.rates, partial(shape.make, device, change=change, update=False)).seconds
            for change in (lambda model: None, put_dense)
        )
        return self.plain() - (routed - dense)

    def dtype(self, name: str) -> float:
        return forecast(self.shape(dtype=name), self.rates).seconds + self.wait

    def batch(self, rows: int) -> float:
        return forecast(self.shape(rows), self.rates).seconds

    def threads(self, number: int) -> float:
        """Return the seconds of a step that waits for nothing, on a number of threads."""
        return seconds_with_threads(self.computing, number, self.rates)

    def shape(self, rows: int | None = None, dtype: str | None = None) -> StepShape:
        """Return a step of the run with other rows, or another dtype; in FP8 if that is the model's precision."""
        config = self.subject.config
        name: StepDtype = "float32" if (dtype or config.train.dtype) == "float32" else "bfloat16"
        name = "fp8" if config.model.precision == "fp8" else name
        sizes = {"batch": rows or self.subject.rows, "tokens": config.seq_len}
        return StepShape(work="training", config=config.model, dtype=name, train=config.train, **sizes)


def time_batches(subject: Subject) -> tuple[float, float]:
    """Return the seconds to prepare a batch, and the CPU seconds: means of a few batches, as a stall counts."""
    start, busy = time.perf_counter(), time.thread_time()
    for i in range(BATCHES):
        subject.trainer.loader.prepared((subject.trainer.sequences + i * subject.rows, subject.rows))
    return (time.perf_counter() - start) / BATCHES, (time.thread_time() - busy) / BATCHES


def waiting_seconds(batch: float, cpu: float, computing: float, workers: int) -> float:
    """Return what the loader adds to a step.

    Args:
        batch, cpu: seconds to prepare a batch with nothing else at work, and CPU seconds.
        computing: seconds of a step that waits for nothing.
    """
    if workers == 0:
        return batch
    shared = torch.get_num_threads() >= cores()
    return max(cpu if shared else 0.0, batch / workers - computing)


# --- arms


def training_arms(subject: Subject, prices: TrainingPrices | None) -> list[Arm]:
    """Return all arms of training, the plain steps first. Without prices nothing is predicted."""
    config, device, used = subject.config, subject.device, torch.get_num_threads()
    fastest = fastest_dtype(device)
    no_experts = None if subject.trainer.model.gates() else "the model has no routed experts"
    compiled = "the model is compiled; run without --train.compile" if config.train.compile else None
    same_dtype = f"{fastest} is the fastest dtype here, and used" if config.train.dtype == fastest else None
    arm = partial(arm_of, "training")
    return [
        Arm(name="plain", apply=subject.plain, counted=subject.counted, predict=prices and prices.plain),
        arm("replay", subject.replay, is_rare=True, predict=prices and (lambda: prices.computing.seconds)),
        # in one process all experts run on the same cores: only the sum of their tokens counts
        arm(
            "uniform_routing",
            subject.uniform_routing,
            why_not=compiled or no_experts,
            predict=prices and prices.plain,
        ),
        arm("dense_active", subject.dense, why_not=compiled or no_experts, predict=prices and prices.dense),
        arm(
            "all_threads",
            lambda: subject.threads(cores()),
            why_not=no_more_threads(device, used),
            predict=prices and (lambda: prices.threads(cores()) + prices.wait),
        ),
        arm(
            "fastest_dtype",
            lambda: subject.dtype(fastest),
            why_not=compiled or same_dtype,
            predict=prices and (lambda: prices.dtype(fastest)),
        ),
        arm("quiet_machine", lambda: subject.turns[-1].quiet(), uncounted=0, counted=1),
    ]


def no_more_threads(device: torch.device, used: int) -> str | None:
    """Return why more threads cannot be tried; None if they can."""
    if device.type != "cpu":
        return f"products run on {device}"
    return f"all {used} cores are used already" if used >= cores() else None
