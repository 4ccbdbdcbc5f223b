"""One optimizer step, read top to bottom, and the validation."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsmini.checkpoint.training_state import Tensors
from dsmini.config import RunConfig
from dsmini.data.corpus import Corpus, Loader, Windows
from dsmini.distributed.mesh import HeldRows, Mesh, Pieces, local
from dsmini.distributed.pipeline import StepBatch
from dsmini.machine import sent, synchronize
from dsmini.nn import Gate, IndexerLoss, Transformer, max_violation
from dsmini.nn.transformer import IGNORE, Losses
from dsmini.training.optim import ParameterAverage, begin_stage, optimizer_state, optimizers
from dsmini.training.qk_clip import clip_logits, largest_logits

LEAST_AT_THE_END = 131_072
"""Held-out tokens that the default of train.final_eval_tokens takes even after a short training."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The results of one optimizer step as computed: losses may be NaN, loads are a tensor.

    Losses are in nats a token, before the update. metrics.jsonl stores a step as a row of record.py.
    """

    step: int
    """Number of steps done, this one included."""
    loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float
    """Norm of the gradient before clipping: of the main model, or of the indexers where they alone learn."""
    lr: float
    tokens: int
    seconds: float
    data_wait: float
    """Share of the seconds spent on waiting for the batch."""
    counts: Tensor | None
    """[MoE layers, experts]: number of tokens each expert received; None for a dense model."""
    skipped: bool
    """The gradient or a loss was not finite, so nothing was changed."""
    indexers: Mapping[str, list[float]] | None = None
    """Figures of IndexerLoss by name, of each layer whose indexer learns; None without any."""
    work: tuple[float, ...] = ()
    """CPU seconds of each part of the batch in forward and backward, without waiting; empty for a single process, and
    on GPUs, whose work this thread only starts."""
    stopping: bool = False
    """A process of the run was asked to stop, as all agree."""

    @property
    def spread(self) -> float | None:
        """(most work - least work) / mean work of the processes; None for a single one."""
        return (max(self.work) - min(self.work)) * len(self.work) / sum(self.work) if sum(self.work) else None

    @property
    def max_vio(self) -> float | None:
        """Mean over MoE layers of (largest load - mean load) / mean load."""
        return None if self.counts is None else max_violation(self.counts).mean().item()


class Trainer:
    """Trains a model on a corpus as a RunConfig says; the caller decides when to step, validate and stop.

    Args:
        mesh: the processes that train together, each with its part of the model and of the batch; None: this one.
    """

    def __init__(
        self, model: Transformer, corpus: Corpus, config: RunConfig, device: torch.device, mesh: Mesh | None = None
    ) -> None:
        self.mesh: Mesh = mesh or Mesh()
        if not self.mesh.names:
            self.mesh.divide(model)
        self.model: Transformer = model
        self.corpus: Corpus = corpus
        self.config: RunConfig = config
        self.device: torch.device = device
        self.named: dict[str, nn.Parameter] = dict(model.named_parameters())
        groups = begin_stage(model, config.train.dsa_stage, self.mesh.names) or [set(self.mesh.names)]
        self.clipped: list[list[int]] = [
            [place for place, name in enumerate(self.mesh.names) if name in group] for group in groups
        ]
        """Places in mesh.names of the parameters of each group whose gradient is clipped by its own norm."""
        dtype = model.compute_dtype or torch.float32
        self.optimizers: list[torch.optim.Optimizer] = optimizers(model, config.train, dtype, self.mesh.owned)
        decay = config.train.ema_decay
        self.average: ParameterAverage | None = None if decay is None else ParameterAverage(self._here().items(), decay)
        self.losses: Callable[..., Losses] = torch.compile(model.losses) if config.train.compile else model.losses
        self.pipeline: Any = self.mesh.pipeline(model)
        self.loader: Loader = Loader(corpus, config.seq_len, config.train.seed, config.data.workers)
        self.steps_done: int = 0
        self.sequences: int = 0
        """Place in the corpus's stream of sequences where the data continues."""
        self.phase: Callable[[str], None] = lambda name: None
        """Told where a phase of a step begins: forward, backward, optimizer."""
        self.stop: Callable[[], bool] = lambda: False
        """Says whether this process was asked to stop. All hear of it in the message of a step."""

    # --- a step

    def step(self) -> StepResult:
        """Take one optimizer step."""
        start, train, mesh = time.perf_counter(), self.config.train, self.mesh
        rows = train.batch_size_at(self.steps_done, mesh.parts)
        # 1. this rank's gradients, and its share of the losses and the loads
        begin = time.thread_time()
        with largest_logits(self.model, wanted=train.qk_clip is not None) as logits:
            sums, counts, waited = self.forward_backward(rows)
        work = torch.zeros(mesh.parts, dtype=torch.float64)
        work[mesh.part] = time.thread_time() - begin
        # 2. the sums over all ranks: gradients, then all figures in one message
        self.phase("optimizer")
        mesh.sum_gradients(self.model.parameters())
        here = [sums.cpu(), mesh.squared_norms(self.model), work, torch.tensor(float(self.stop()))]
        sums, squares, work, stopping, *loads = mesh.sum_all(*here, *([] if counts is None else [counts]))
        # 3. clip each group of parameters by its norm; nothing changes unless all is finite
        norms = [torch.linalg.vector_norm(squares[places].sqrt().float()) for places in self.clipped]
        finite = all(norm.isfinite() for norm in norms) and bool(sums.isfinite().all())
        share = train.rate_share_at(self.steps_done)
        if finite:
            for places, norm in zip(self.clipped, norms, strict=True):
                self._clip({mesh.names[place] for place in places}, norm)
            # 4. move the parameters, the routing biases and the average
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * share
                optimizer.step()
            clip_logits(self.model, logits, train.qk_clip or 0.0)
            mesh.exchange_moved()
            speed = train.bias_speed_at(self.steps_done)
            if loads:
                own = loads[0] if self.pipeline is None else self.pipeline.own_counts(loads[0])
                of_gate: dict[Gate, Tensor] = {}
                for gate, load in zip(self.model.gates(), own, strict=True):
                    of_gate[gate] = of_gate[gate] + load if gate in of_gate else load  # layers may share one
                for gate, load in of_gate.items():
                    gate.update_bias(load, speed)
            if self.average is not None:
                self.average.update(self._here().items())
        self.model.zero_grad(set_to_none=True)
        self.steps_done += 1
        self.sequences += rows
        main, mtp, balance, *fits = sums.tolist()
        synchronize(self.device)
        seconds = time.perf_counter() - start
        return StepResult(
            step=self.steps_done,
            loss=main,
            mtp_loss=mtp,
            balance_loss=balance,
            grad_norm=norms[0].item(),
            lr=train.table_lr * share,
            tokens=rows * self.config.seq_len,
            seconds=seconds,
            data_wait=waited / seconds,
            counts=loads[0].cpu() if loads else None,
            skipped=not finite,
            indexers={name: fits[i::3] for i, name in enumerate(IndexerLoss._fields)} if fits else None,
            work=tuple(work.tolist()) if mesh.parts > 1 and self.device.type == "cpu" else (),
            stopping=bool(stopping),
        )

    def forward_backward(self, rows: int) -> tuple[Tensor, Tensor | None, float]:
        """Add up the gradients of the mean loss over this rank's part of a step.

        Return this rank's shares of the means [main, mtp, balance, and each indexer's kl, recall, mass], its loads [MoE
        layers, experts], and the seconds of waiting for data.
        """
        train, start = self.config.train, time.perf_counter()
        tokens, targets = self.loader.take(self._requests(rows))
        waited = time.perf_counter() - start
        parts = train.grad_accum * self.mesh.parts
        counted = self.mesh.sum_parts((targets != IGNORE).sum())  # of all ranks: every loss is divided by it once
        batch = StepBatch(
            tokens=sent(tokens, self.device),
            targets=sent(targets, self.device),
            documents=self._documents(tokens),
            accumulate=train.grad_accum,
            parts=parts,
            phase=self.phase,
            n_targets=(counted.clamp(min=1) / parts).to(self.device),
            options={
                "mtp_weight": train.mtp_weight_at(self.steps_done),
                "balance_alpha": train.balance_alpha,
                "balance_counts": train.balance_counts,
                "recompute": train.recompute,
            },
        )
        return *self.train_parts(batch), waited

    def train_parts(self, batch: StepBatch) -> tuple[Tensor, Tensor | None]:
        """Run forward and backward for each part of a batch; return the sums and loads of forward_backward."""
        if self.pipeline is not None:
            return self.pipeline.train(batch)
        sums, counts = torch.zeros((), device=self.device), None
        n = batch.accumulate
        documents = [None] * n if batch.documents is None else batch.documents.chunk(n)
        parts = zip(batch.tokens.chunk(n), batch.targets.chunk(n), documents, strict=True)
        for number, (x, y, of) in enumerate(parts, 1):
            self.mesh.begin_part(self.model, last=number == n)
            self.phase("forward")
            losses = self.losses(x, y, documents=of, n_targets=batch.n_targets, **batch.options)
            self.phase("backward")
            (losses.total / batch.parts).backward()
            fits = [figure for fit in losses.indexers for figure in fit]
            sums = sums + torch.stack([losses.main, losses.mtp, losses.balance, *fits]).detach() / batch.parts
            if losses.routing:
                load = torch.stack([routing.counts for routing in losses.routing])
                counts = load if counts is None else counts + load
        return sums, counts

    def _clip(self, names: set[str], norm: Tensor) -> None:
        """Scale the gradients of some parameters so that their norm is at most train.grad_clip."""
        share = (self.config.train.grad_clip / (norm + 1e-6)).clamp(max=1.0).to(self.device)
        grads = [local(p.grad) for name, p in self.named.items() if name in names and p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, share)  # pyright: ignore[reportPrivateImportUsage]

    def _documents(self, tokens: Tensor) -> Tensor | None:
        """Return the documents to mask from each other, on the device; None without such a mask."""
        return sent(self.corpus.documents(tokens), self.device) if self.config.data.document_mask else None

    def _requests(self, rows: int) -> list[tuple[int, int]]:
        """Return (first, number) of this rank's sequences of this step, and of those that are prepared meanwhile."""
        requests, at, mesh = [], self.sequences, self.mesh
        for step in range(self.steps_done, self.steps_done + 1 + self.config.data.workers):
            rows = rows if step == self.steps_done else self.config.train.batch_size_at(step, mesh.parts)
            requests.append((at + mesh.part * (rows // mesh.parts), rows // mesh.parts))
            at += rows
        return requests

    # --- a validation

    @torch.no_grad()
    def validate(
        self,
        windows: Windows | None = None,
        tokens_at_a_time: int = 8192,
        on_part: Callable[[float], None] = lambda done: None,
    ) -> float:
        """Compute the cross-entropy in nats a token over the held-out split. Changes nothing.

        Args:
            windows: the part of it to score; None: all windows of the training's length.
            on_part: told the share that is done. An exception that it raises ends the validation.
        """
        windows = self.corpus.windows(self.config.seq_len) if windows is None else windows
        mine, real = windows.share(self.mesh.part, self.mesh.parts)
        total, done = torch.zeros((), dtype=torch.float64), 0
        self.model.eval()
        try:
            for tokens, targets in mine.blocks(max(1, tokens_at_a_time // windows.seq_len)):
                counted = max(0, min(len(tokens), real - done))
                scored = targets[:counted].to(self.device)
                loss = self._score(tokens.to(self.device), scored, self._documents(tokens))
                total += loss.cpu().double()  # Apple's GPUs have no FP64
                done += len(tokens)
                on_part(done / len(mine))
        finally:
            self.model.train()
            self.mesh.release(self.model)
        return self.mesh.sum_all(total)[0].item() / windows.tokens

    def final_windows(self, seq_len: int | None = None) -> Windows:
        """Return the held-out windows that the validation at the end scores.

        The default is half the number of trained tokens, LEAST_AT_THE_END or more. A forward without multi-token
        prediction costs about a quarter of a training step, so this takes about a tenth of the training time, and more
        of a short one. A time limit would make the loss depend on the machine.
        """
        at_most = self.config.train.final_eval_tokens
        if at_most is None:
            at_most = max(self.sequences * self.config.seq_len // 2, LEAST_AT_THE_END)
        return self.corpus.windows(seq_len or self.config.seq_len, at_most)

    def _score(self, tokens: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
        """Return the sum of the cross-entropy of the first rows of tokens, which have targets."""
        if self.pipeline is not None:
            return self.pipeline.score(tokens, targets, documents)
        hidden = self.model.states(tokens, documents=documents).normed
        return self.model.cross_entropy(hidden[: len(targets)].flatten(0, 1), targets.flatten())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average in place of the model's parameters, which come back bitwise afterwards."""
        assert self.average is not None, "there is no average: ema_decay is None"
        named = self._here()
        live = {name: p.detach().clone() for name, p in named.items()}
        self._copy(named, self.average.tensors)
        try:
            yield
        finally:
            self._copy(named, live)

    @torch.no_grad()
    def _copy(self, named: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        for name, p in named.items():
            p.copy_(values[name])
        self.mesh.release(self.model)

    # --- the state

    def _here(self) -> dict[str, Tensor]:
        """Return the parts of the parameters that are on this rank."""
        return {name: local(p) for name, p in self.named.items()}

    def tensors(self) -> Tensors:
        """Return all tensors that a step reads, by part: the live ones, not copies, of those divided the rows here."""
        state = optimizer_state(self.optimizers, self.named.items())
        parts = {"model": self.model.state_dict(), "optimizer": state}
        parts |= {} if self.average is None else {"average": self.average.tensors}
        return {part: {name: local(t) for name, t in of.items()} for part, of in parts.items()}

    def _like(self, name: str, tensor: Tensor) -> Tensor:
        """Return the parameter of a tensor NAME or NAME/MOMENT; the tensor itself if it is another's."""
        return self.named.get(name.partition("/")[0], tensor)

    def _piece(self, name: str, tensor: Tensor) -> HeldRows:
        """Return this rank's piece of a tensor. Moments are divided as their parameter is, counts of steps are not."""
        return self.mesh.piece(tensor if name.endswith("/step") else self._like(name, tensor))

    def pieces(self, tensors: Tensors) -> Pieces:
        """Return tensors of this rank with the pieces that they are of the whole run's."""
        return {part: {name: (self._piece(name, t), t) for name, t in of.items()} for part, of in tensors.items()}

    def mine(self, tensors: Tensors) -> Tensors:
        """Return this rank's pieces of the tensors of a whole run."""

        def is_here(part: str, name: str, whole: Tensor) -> bool:
            moved_elsewhere = part == "optimizer" and self.mesh.moved_elsewhere(self._like(name, whole))
            return name.partition("/")[0] not in self.mesh.elsewhere and not moved_elsewhere

        return {
            part: {name: self._piece(name, t).of(t) for name, t in of.items() if is_here(part, name, t)}
            for part, of in tensors.items()
        }

    def held_alike(self) -> dict[tuple[int, ...], dict[str, Tensor]]:
        """Return the tensors that other ranks hold too, by those ranks."""
        held: dict[tuple[int, ...], dict[str, Tensor]] = {}
        for part, of in self.tensors().items():
            for name, tensor in of.items():
                held.setdefault(self.mesh.holders(self._like(name, tensor)), {})[f"{part}/{name}"] = tensor
        return {holders: named for holders, named in held.items() if len(holders) > 1}

    def load(self, tensors: Tensors, *, steps_done: int, sequences: int, average_updates: int) -> None:
        """Load the tensors of a whole run after this many steps, of those divided the pieces of this rank."""
        mine = self.mine(tensors)
        for part, of in self.tensors().items():
            self._copy(of, mine[part])
        if self.average is not None:
            self.average.updates = average_updates
        self.steps_done = steps_done
        self.sequences = sequences
