"""The whole model: embedding, blocks, norm, head, and the multi-token prediction blocks after them."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini.config import ModelConfig, layer_config, require_subclass
from dsmini.functional.cross_entropy import IGNORE, chunked_cross_entropy, linear_cross_entropy, rows_at_a_time
from dsmini.functional.embedding import check_ids, embedding
from dsmini.functional.recompute import recomputed
from dsmini.nn.balance import sequence_balance_loss
from dsmini.nn.block import Block
from dsmini.nn.cache import Cache, CacheDtype, Form
from dsmini.nn.dsa import collected_fits
from dsmini.nn.experts import Experts
from dsmini.nn.gate import Gate, Routing
from dsmini.nn.initialization import draw_normal
from dsmini.nn.linear import FP32Linear, Linear, Projection, is_direct
from dsmini.nn.losses import Losses
from dsmini.nn.mtp import MTPChain
from dsmini.nn.norm import LayerNorm, RMSNorm
from dsmini.nn.rope import Rope


class Embedding(nn.Module):
    """One row of the weight for each token id."""

    def __init__(self, vocab_size: int, dim: int, *, init_std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.init_std = init_std
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight from a normal distribution with the standard deviation init_std."""
        draw_normal(self.weight, self.init_std, generator)

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch m"]:
        return embedding(tokens, self.weight)

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)


class Output(NamedTuple):
    """The result of Transformer.run."""

    logits: Float[Tensor, "b s v"]
    """Logits of the next token."""
    hidden: Float[Tensor, "b s m"]
    """Hidden states after the final norm."""
    mtp_logits: list[Tensor]
    """[b, s - k, v] for depths k = 1, 2, ...: at position i, of token i + k + 1. With a cache [b, s, v]: after each
    new token, of the next, as seen k tokens ahead; NaN after the first k of a sequence."""
    routing: list[Routing]
    """One for each MoE layer, those of the MTP blocks last."""


class States(NamedTuple):
    """The hidden states of a forward, from which `head` makes logits, and its routing."""

    normed: Float[Tensor, "b s m"]
    """Hidden states after the final norm."""
    given: Float[Tensor, "b s m"]
    """Hidden states that the first MTP block reads: before or after the final norm, as config.mtp_input says."""
    routing: list[Routing]


class Transformer(nn.Module):
    """A DeepSeek-V3 style language model. From a config, or from plain arguments.

    Args:
        compute_dtype: dtype of activations and matrix products; None: the dtype of the embedding's weight. Norms,
            softmax, gates and losses are FP32 in any case.
        make_block: builds each block, called as Block is: a subclass of it, or a partial of it with another
            attention class.

    Source: DeepSeek-V3 report, section 2.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        /,
        *,
        compute_dtype: torch.dtype | None = None,
        make_block: Callable[..., nn.Module] = Block,
        **arguments: Any,
    ) -> None:
        super().__init__()
        c = self.config = layer_config(config, arguments)
        self.compute_dtype = compute_dtype
        require_subclass("make_block", make_block, Block)
        self.rope = Rope.from_config(c)
        self.embed = Embedding(c.vocab_size, c.dim, init_std=c.init_std)
        self.embed_norm = RMSNorm(c.dim, c.norm_eps) if c.embed_norm else None
        self.layers = nn.ModuleList(make_block(c, layer=i) for i in range(c.n_layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.head = Linear(c.dim, c.vocab_size, init_std=c.output_init_std)
        self.mtp = MTPChain(c, make_block)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all matrices again, in the order of named_modules, and set norms to 1 and biases to 0.

        A module that is not dsmini's, such as nn.Linear, draws from torch's own generator.
        """
        for module in self.modules():
            if isinstance(module, Embedding | Projection | FP32Linear | Experts | Gate | RMSNorm | LayerNorm):
                module.reset_parameters(generator)
            elif module is not self and callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    def forward(
        self,
        tokens: Int[Tensor, "b s"],
        cache: Cache | None = None,
        lengths: Int[Tensor, " b"] | None = None,
        *,
        targets: Int[Tensor, "b s"] | None = None,
        **options: Any,
    ) -> Float[Tensor, "b s v"] | Losses:
        """Return the logits of the next token at every position, in the compute dtype, or the losses.

        Args:
            cache: of what came before; the tokens are appended to it. No gradients are made then.
            lengths: number of new tokens of each row, which is padded on the right; None: all columns are tokens.
            targets, options: as in `losses`, whose result is returned where there are targets. Wrappers such as DDP and
                FSDP know forward alone.

        Raises: ValueError for more than max_seq_len tokens, or (on a CPU) a token id outside the vocabulary.
        """
        if targets is not None:
            if cache is not None or lengths is not None:
                raise ValueError("targets do not go with a cache or lengths; leave them out, or the targets")
            return self.losses(tokens, targets, **options)
        if options:
            raise ValueError(f"{', '.join(options)}: these are options of the losses; give targets too")
        with nullcontext() if cache is None else torch.no_grad():
            return self.head(self.states(tokens, cache, lengths).normed)

    def states(
        self,
        tokens: Int[Tensor, "b s"],
        cache: Cache | None = None,
        lengths: Int[Tensor, " b"] | None = None,
        documents: Int[Tensor, "b s"] | None = None,
        recompute: bool = False,
    ) -> States:
        """Run all that lies between token ids and the head.

        Args:
            cache, lengths: as in forward.
            documents, recompute: as in losses; not with a cache, whose rows are one document each.
        """
        if cache is not None and documents is not None:
            raise ValueError("documents do not go with a cache, which holds one document a row; leave out one of them")
        with nullcontext() if cache is None else torch.no_grad():
            # 1. token ids to hidden states: [b, s, m]
            x = self.embedded(tokens)
            # 2. positions: 0, 1, ... in all rows, or after what is cached in each: [#b, s]
            window = None if cache is None else cache.place(self.config, tokens, lengths)
            positions = torch.arange(tokens.shape[1], device=tokens.device) if window is None else window.positions
            table = self.rope.table(positions)
            # 3. the blocks, each with its layer's part of the cache: [b, s, m]
            pasts = [None] * len(self.layers) if cache is None or window is None else cache.pasts(window)
            routing: list[Routing] = []
            for block, past in zip(self.layers, pasts, strict=True):
                inputs = (x, table, documents, past)
                x, decided = recomputed(block, *inputs) if recompute else block(*inputs)
                routing += [] if decided is None else [decided]
            if cache is not None and window is not None:
                cache.lengths = window.lengths
            # 4. the final norm: [b, s, m]
            normed = self.norm(x)
            return States(normed, x if self.config.mtp_input == "pre_norm" else normed, routing)

    def embedded(self, tokens: Int[Tensor, "b s"]) -> Float[Tensor, "b s m"]:
        """Return the embeddings of token ids, in the compute dtype.

        Raises: ValueError as forward does.
        """
        if tokens.dim() != 2 or not tokens.shape[1] or tokens.dtype not in (torch.int64, torch.int32):
            got = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(f"tokens are {got}; want int64 [batch, sequence], one token or more")
        if tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"a sequence of {tokens.shape[1]} tokens is longer than max_seq_len={self.config.max_seq_len}; "
                "shorten it, or build the model with a longer context"
            )
        x = self.embed(tokens)
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        return x if self.embed_norm is None else self.embed_norm(x)

    def hidden(
        self,
        tokens: Int[Tensor, "b s"],
        cache: Cache | None = None,
        lengths: Int[Tensor, " b"] | None = None,
        documents: Int[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b s m"]:
        """Return the hidden states after the final norm, from which `head` makes the logits."""
        return self.states(tokens, cache, lengths, documents).normed

    def run(
        self,
        tokens: Int[Tensor, "b s"],
        cache: Cache | None = None,
        mtp: bool = False,
        lengths: Int[Tensor, " b"] | None = None,
    ) -> Output:
        """Run forward and return all that there is to see; with mtp also the logits of multi-token prediction."""
        if cache is None:
            states = self.states(tokens)
            normed, routing = self.mtp(tokens, states.given, self.embedded) if mtp else ([], [])
            mtp_logits = [self.head(h) for h in normed]
            return Output(self.head(states.normed), states.normed, mtp_logits, states.routing + routing)
        with torch.no_grad():
            seen = cache.checked_mtp() if mtp else None
            states, mtp_logits = self.states(tokens, cache, lengths), []
            if seen is not None:
                positions = seen.window(tokens.shape[1], lengths).positions
                before = seen.shift(0, states.given, lengths)
                normed = self.mtp.decode(self.embedded(tokens), before, seen, lengths)
                for k, h in enumerate(normed, 1):
                    mtp_logits.append(self.head(h).masked_fill((positions < k)[..., None], torch.nan))
            return Output(self.head(states.normed), states.normed, mtp_logits, states.routing)

    def new_cache(
        self,
        batch_size: int = 1,
        max_seq_len: int | None = None,
        dtype: CacheDtype | None = None,
        mtp: bool = False,
        form: Form = "auto",
    ) -> Cache:
        """Return an empty cache, with all its memory allocated.

        Args:
            max_seq_len: number of tokens of each sequence it has room for; None: the model's.
            dtype: dtype of what is stored, or "fp8" for V3.2's layout; None: the compute dtype.
            mtp: also store what the multi-token prediction blocks need, for `run(..., mtp=True)` and for drafting.
            form: how MLA attends to it; auto counts the work of both ways at each call.
        """
        if mtp and not len(self.mtp):
            raise ValueError("mtp=True, but the model has no multi-token prediction blocks; use n_mtp_layers=1")
        compute_dtype = self.compute_dtype or next(self.embed.parameters()).dtype
        return Cache(
            self.config,
            batch_size,
            self.config.max_seq_len if max_seq_len is None else max_seq_len,
            dtype or compute_dtype,
            self.device,
            mtp=mtp,
            form=form,
            hidden_dtype=compute_dtype,
        )

    def losses(
        self,
        tokens: Int[Tensor, "b s"],
        targets: Int[Tensor, "b s"],
        *,
        mtp_weight: float = 0.3,
        balance_alpha: float = 1e-4,
        balance_counts: Literal["published", "routed"] = "published",
        documents: Int[Tensor, "b s"] | None = None,
        recompute: bool = False,
        chunk_rows: int | None = None,
        n_targets: Float[Tensor, ""] | None = None,
        states: States | None = None,
        balances: Iterable[Tensor] = (),
    ) -> Losses:
        """Compute the training losses without a tensor [b, s, vocab].

        Args:
            targets: the token after each position; IGNORE (-100) where there is none.
            documents: number of the document of each position: no position then attends to another document. None:
                a position sees all that came before in the sequence, as published.
            recompute: save only each block's input, and compute the rest again in backward.
            chunk_rows: number of rows of logits that exist at a time.
            n_targets: number of targets that the cross-entropies are divided by; None: those of this call. The parts
                of a batch whose losses are averaged share the mean of theirs.
            states, balances: of a pipeline: the states of the tokens, otherwise computed here, and the balance
                losses of earlier MoE layers, whose routing is not in them.

        A depth k of MTP is scored at s - k positions and, as published, divided by the number of targets of the main
        loss. Source: DeepSeek-V3 report, equations 17 to 20 (balance), 24 and 25 (MTP); DeepSeek-V3.2
        report, equations 3 and 4 (indexers).
        """
        if targets.shape != tokens.shape:
            got = f"targets are {tuple(targets.shape)}, tokens {tuple(tokens.shape)}"
            raise ValueError(f"{got}; want a target for each token: losses(x[:, :-1], x[:, 1:])")
        check_ids("target", targets.masked_fill(targets == IGNORE, 0), self.config.vocab_size)
        counted = (targets != IGNORE).sum().clamp(min=1) if n_targets is None else n_targets

        def cross_entropy(hidden: Tensor, target: Tensor) -> Tensor:
            return self.cross_entropy(hidden.flatten(0, 1), target.flatten(), chunk_rows) / counted

        # 1. the next token, from hidden states [b, s, m]
        with collected_fits(self) as indexers:
            if states is None:
                states = self.states(tokens, documents=documents, recompute=recompute)
            main = cross_entropy(states.normed, targets)
            # 2. the tokens after it, from those of each depth k, [b, s - k, m]
            normed, mtp_routing = self.mtp(tokens, states.given, self.embedded, documents, recompute)
        mtp = balance = torch.zeros_like(main)
        if normed:
            depths = [cross_entropy(h, targets[:, k:]) for k, h in enumerate(normed, 1)]
            mtp = torch.stack(depths).mean()
        # 3. the balance of each MoE layer, from its scores [b * s, e]
        routing = states.routing + mtp_routing
        own = [sequence_balance_loss(r.scores, r.indices, tokens.shape[0], balance_counts) for r in routing]
        if parts := [*balances, *own]:
            balance = torch.stack(parts).sum().to(main.dtype)
        # 4. what each indexer missed of attention, which moves its own parameters alone
        total = sum((fit.kl for fit in indexers), main + mtp_weight * mtp + balance_alpha * balance)
        return Losses(main, mtp, balance, total, routing, indexers)

    def cross_entropy(
        self, hidden: Float[Tensor, "n m"], targets: Int[Tensor, " n"], chunk_rows: int | None = None
    ) -> Float[Tensor, ""]:
        """Return the sum over rows of the head's cross-entropy, in nats, FP32, without a tensor [n, vocab]."""
        if is_direct(self.head):
            return linear_cross_entropy(hidden, self.head.weight, targets, chunk_rows)
        return chunked_cross_entropy(self.head, hidden, targets, rows_at_a_time(chunk_rows, self.config.vocab_size))

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where token ids belong."""
        return next(self.embed.parameters()).device

    def gates(self) -> list[Gate]:
        """Return the gates in the order of Output.routing."""
        return [module for module in self.modules() if isinstance(module, Gate)]
