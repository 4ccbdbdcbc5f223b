"""Training as the work that is diagnosed: steps of a run, each the same work, and the arms that make one thing free.

    replay            Data       every step takes the same batch, which is in memory
    uniform_routing   Algorithm  all experts get equally many tokens
    dense_active      Algorithm  a dense feed-forward with as many active parameters stands in for the experts
    all_threads       Machine    products run on all cores
    fastest_dtype     Machine    products run in the dtype that this machine multiplies fastest
    quiet_machine     Machine    other programs take nothing (contention.py)

Data binds by what its arm saves, within what the plain steps of the same turn have seen: at least the time that they
waited, and at most that and the CPU time in which batches were prepared, since threads that prepare take a core from
the products. The other arms leave the wait as it is. Waiting comes in stalls, so that its mean counts, not its median.

    T - waited - preparing  <=  T_replay  <=  T - waited

Without routing, each mixture of experts is a dense feed-forward with as many active parameters. Both do the same
multiplications, so the difference is what routing costs: choosing, sorting, many small products. The optimizer is left
out, as it moves all experts, also those that no token has chosen.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from dsmini.config import RunConfig
from dsmini.diagnosis.arms import Arm, Step, patched
from dsmini.diagnosis.contention import Contention, cores, quiet_arm, watch
from dsmini.diagnosis.findings import Finding, imbalance_loss, load, other_programs, padding, waiting
from dsmini.diagnosis.prices import TrainingPrices, dense_baseline, fastest_dtype, threads_put_back
from dsmini.diagnosis.texts import text_findings
from dsmini.machine import DTYPES
from dsmini.measure.forecast import Forecast
from dsmini.measure.rates import Roofs
from dsmini.measure.step_rates import Rates
from dsmini.nn import Block, Gate, Routing
from dsmini.training.schedule import batch_size
from dsmini.training.trainer import StepResult, Trainer

BATCHES = 4
"""Batches whose targets are looked at."""
STOP_OTHERS = "Stop other programs, or leave them a core and set train.threads to the rest."


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainTurn:
    """What was seen of the plain steps of a turn."""

    steps: Sequence[StepResult]
    """Those that are counted."""
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
        return training_arms(self, rates, self.prices)

    def forecast(self) -> Forecast | None:
        """Return the forecast of a step that waits for nothing; None without rates."""
        return None if self.prices is None else self.prices.computing

    def look(self) -> list[Finding]:
        """Return findings of the text and of the first batches."""
        batches = [self.trainer.loader.prepared((i * self.rows, self.rows)) for i in range(BATCHES)]
        return [*text_findings(self.trainer.corpus, batches), padding([targets for _, targets in batches])]

    def look_back(self) -> list[Finding]:
        """Return findings of the plain steps that were taken."""
        steps = [step for turn in self.seen for step in turn.steps]
        found = [
            waiting([turn.waited for turn in self.seen], [turn.seconds for turn in self.seen]),
            load(steps),
            imbalance_loss(steps, self.forecast()),
            other_programs([turn.contention for turn in self.seen], STOP_OTHERS),
        ]
        return [each for each in found if each is not None]

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
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return seconds

    def blocks(self) -> Iterator[Block]:
        """Yield all blocks with a mixture of experts, those of multi-token prediction too."""
        yield from (m for m in self.trainer.model.modules() if isinstance(m, Block) and hasattr(m.ffn, "gate"))

    @cached_property
    def one_batch(self) -> tuple[Tensor, Tensor]:
        """Batch that is prepared once."""
        return self.trainer.loader.prepared((self.trainer.sequences, self.rows))

    @contextmanager
    def plain(self, roofs: Roofs | None) -> Iterator[Step]:
        """Yield plain steps, and add a turn of what was seen of them."""
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
        with self.dense_pair() as pair:

            def step(base: float) -> float:
                routed, dense = pair()
                # the pair may have had a slower moment than the plain step, of which it is a part
                return base - min(base, routed) * (1 - dense / routed)

            yield step

    @contextmanager
    def dense_pair(self, total: bool = False) -> Iterator[Callable[[], tuple[float, float]]]:
        """Yield what takes a forward and backward with experts and one without, and returns both seconds.

        Args: as of dense_baseline.
        """
        blocks = list(self.blocks())
        routed: list[nn.Module] = [block.ffn for block in blocks]
        plain: list[nn.Module] = [dense_baseline(self.config.model, total).to(self.device) for _ in blocks]

        def put(parts: Sequence[nn.Module]) -> None:
            for block, part in zip(blocks, parts, strict=True):
                block.ffn = part

        def pair() -> tuple[float, float]:
            with_routing = self.forward_backward()
            put(plain)
            try:
                without = self.forward_backward()
                for part in plain:
                    part.zero_grad(set_to_none=True)
            finally:
                put(routed)
            return with_routing, without

        with self.replayed():  # neither side waits
            yield pair


@dataclasses.dataclass(frozen=True)
class Stub:
    """The part of a loader that a trainer asks for."""

    take: Callable[..., tuple[Tensor, Tensor]]


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


def training_arms(subject: Subject, rates: Rates | None, prices: TrainingPrices | None) -> list[Arm]:
    """Return all arms of training, the plain steps first. Without prices nothing is predicted."""
    config, device, used = subject.config, subject.device, torch.get_num_threads()
    fastest = fastest_dtype(device)
    no_experts = None if subject.trainer.model.gates() else "the model has no routed experts"
    compiled = "the model is compiled; run without --train.compile" if config.train.compile else None
    same_dtype = f"{fastest} is the fastest dtype here, and used" if config.train.dtype == fastest else None
    all_cores = f"all {used} cores are used already" if used >= cores() else None

    @contextmanager
    def replay() -> Iterator[Step]:
        with subject.replayed() as step:
            seen = subject.turns[-1]
            most = seen.seconds - seen.waited
            yield lambda base: min(max(step(base), most - seen.preparing), most)

    return [
        Arm(
            name="plain",
            apply=lambda: subject.plain(None if rates is None else rates.roofs),
            counted=subject.counted,
            predict=prices and prices.plain,
        ),
        Arm(
            name="replay",
            axis="Data",
            words="every step takes the same batch, which is in memory",
            advice="Prepare batches earlier or faster: raise data.workers, read plain files, tokenize once.",
            apply=replay,
            predict=prices and prices.without_waiting,
            is_rare=True,
        ),
        Arm(
            name="uniform_routing",
            axis="Algorithm",
            words="all experts get equally many tokens",
            advice="Balance the experts: raise train.bias_speed, or the weight of the balance loss.",
            why_not=compiled or no_experts,
            apply=subject.uniform_routing,
            predict=prices and prices.plain,  # in one process all experts run on the same cores: only their sum counts
        ),
        Arm(
            name="dense_active",
            axis="Algorithm",
            words="a dense feed-forward with as many active parameters stands in for the experts",
            advice="Make fewer and wider experts, or larger batches, so that each product has more rows.",
            why_not=compiled or no_experts,
            apply=subject.dense,
            predict=prices and prices.dense,
        ),
        Arm(
            name="all_threads",
            words="products run on all cores",
            advice="Leave train.threads out, so that all cores are used.",
            why_not=f"products run on {device}" if device.type != "cpu" else all_cores,
            apply=lambda: subject.threads(cores()),
            predict=prices and (lambda: prices.threads(cores())),
        ),
        Arm(
            name="fastest_dtype",
            words="products run in the dtype that this machine multiplies fastest",
            advice="Leave train.dtype at auto.",
            why_not=compiled or same_dtype,
            apply=lambda: subject.dtype(fastest),
            predict=prices and (lambda: prices.dtype(fastest)),
        ),
        quiet_arm(lambda: subject.turns[-1].contention, STOP_OTHERS),
    ]
