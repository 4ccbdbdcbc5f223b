"""The whole model: embedding, blocks, norm, head, the multi-token prediction blocks after them, and the losses."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini import ops
from dsmini.config import ModelConfig, layer_config, require_subclass
from dsmini.config.model import V4
from dsmini.nn.attention import Context
from dsmini.nn.block import Aux, Block, run_block
from dsmini.nn.cache import Cache, CacheDtype, Form, MTPCache, check_cache
from dsmini.nn.dsa import IndexerLoss
from dsmini.nn.first_values import drawn_by_name, reset_by_name
from dsmini.nn.gate import Gate, Routing, sequence_balance_loss
from dsmini.nn.layers import Embedding, FP32Product, Linear, RMSNorm, at_least_fp32, check_ids, is_plain, normed
from dsmini.nn.mtp import MTPChain
from dsmini.nn.residual import head_of

INTEGERS = (torch.int64, torch.int32)
"""Dtypes of token ids and of the numbers of documents."""
IGNORE = -100
"""Target of a row that the loss leaves out, as in torch's cross_entropy."""
CHUNK = 1 << 22
"""Number of logits that exist at a time where a wrapper is in the place of the head."""


class Losses(NamedTuple):
    """Losses of a training step, FP32 scalars, and the decisions of the gates."""

    main: Float[Tensor, ""]
    """Mean cross-entropy of the next token, in nats."""
    mtp: Float[Tensor, ""]
    """Mean over depths of the multi-token prediction losses, without its weight; 0 without MTP."""
    balance: Float[Tensor, ""]
    """Sum over MoE layers of the sequence-wise balance losses, without their weight; 0 without MoE."""
    total: Float[Tensor, ""]
    """main + mtp_weight * mtp + balance_alpha * balance + the sum of indexers' kl: the loss to minimise."""
    routing: list[Routing]
    """One for each MoE layer, those of the MTP blocks last; with a cache without theirs."""
    indexers: list[IndexerLoss]
    """One for each indexer that learns, the mean of the layers that it learns from; those of the MTP blocks last."""


@ops.operation("linear_cross_entropy")
def linear_cross_entropy(
    hidden: Float[Tensor, "n m"],
    weight: Float[Tensor, "v m"],
    targets: Int[Tensor, " n"],
) -> Float[Tensor, ""]:
    """Return the sum over rows of the cross-entropy of logits hidden @ weight^T, in nats, FP32.

    Rows with the target IGNORE are left out. The eager version has first derivatives only, and does not store all
    logits: with a vocabulary of 129280 those of one 4096-token sequence take 2.1 GB in FP32.
    """
    logits = at_least_fp32(hidden @ weight.to(hidden.dtype).T)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


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
    """The hidden states of a forward, from which `head` makes logits, and what its blocks found."""

    normed: Float[Tensor, "b s m"]
    """Hidden states after the final norm."""
    given: Float[Tensor, "b s *streams m"]
    """Hidden states that the first MTP block reads: the last block's, or after the final norm, as config.mtp_input
    says. Several residual streams are given as the last block left them."""
    routing: list[Routing]
    indexers: list[IndexerLoss]


class Transformer(nn.Module):
    """A DeepSeek-V3 style language model. From a config, or from plain arguments.

    Args:
        compute_dtype: dtype of activations and matrix products; None: the dtype of the embedding's weight. Norms,
            softmax, gates and losses are FP32 in any case.
        make_block: builds each block, called as Block is: a subclass of it, or a partial of it with another
            attention class.

    Source: DeepSeek-V3 report, section 2.
    """

    indexer_stage: Literal["warmup", "sparse"] | None = None
    """Stage in which the indexers learn, in training mode; None: they do not."""

    @drawn_by_name
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
        self.config: ModelConfig
        c = self.config = layer_config(config, arguments)
        self.compute_dtype = compute_dtype
        require_subclass("make_block", make_block, Block)
        self.embed: Embedding = Embedding(c.vocab_size, c.dim, init_std=c.init_std)
        self.embed_norm: RMSNorm | None = RMSNorm(c.dim, c.norm_eps) if c.embed_norm else None
        self.layers: nn.ModuleList = nn.ModuleList(make_block(c, layer=i) for i in range(c.n_layers))
        self.hc_head: Any = head_of(c)
        self.norm: RMSNorm = RMSNorm(c.dim, c.norm_eps)
        head = FP32Product if c.attention in V4 else Linear  # as in DeepSeek's code
        self.head: Linear = head(c.dim, c.vocab_size, init_std=c.output_init_std)
        self.mtp: MTPChain = MTPChain(c, make_block)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all matrices again, by one number of the generator and their names, and set norms to 1, biases to 0.

        That is what a new model has: first_values.py.
        """
        reset_by_name(self, generator)

    def forward(
        self,
        tokens: Int[Tensor, "b s"],
        cache: Cache | None = None,
        lengths: Int[Tensor, " b"] | None = None,
        *,
        targets: Int[Tensor, "b s"] | None = None,
        documents: Int[Tensor, "b s"] | None = None,
        **options: Any,
    ) -> Float[Tensor, "b s v"] | Losses:
        """Return the logits of the next token at every position, or the losses.

        Logits have the compute dtype; V4's are FP32, as the product of its head.

        Args:
            cache: of what came before; the tokens are appended to it. No gradients are made then.
            lengths: number of new tokens of each row, which is padded on the right; None: all columns are tokens.
            documents: as in losses.
            targets, options: as in `losses`, whose result is returned where there are targets. Wrappers such as DDP and
                FSDP know forward alone.

        Raises: ValueError for more than max_seq_len tokens, or (on a CPU) a token id outside the vocabulary.
        """
        if targets is not None:
            if cache is not None or lengths is not None:
                raise ValueError("targets do not go with a cache or lengths; leave them out, or the targets")
            return self.losses(tokens, targets, documents=documents, **options)
        if options:
            if unknown := options.keys() - inspect.signature(Transformer.losses).parameters.keys():
                raise ValueError(
                    f"the model takes no {', '.join(sorted(unknown))}; it takes tokens, cache, lengths and documents. "
                    "Pad rows on the right, where no token before sees the padding, and set its targets to -100"
                )
            raise ValueError(f"{', '.join(options)}: these are options of the losses; give targets too")
        with nullcontext() if cache is None else torch.no_grad():
            return self.head(self.states(tokens, cache, lengths, documents).normed)

    def states(
        self,
        tokens: Int[Tensor, "b s"],
        cache: Cache | None = None,
        lengths: Int[Tensor, " b"] | None = None,
        documents: Int[Tensor, "b s"] | None = None,
        recompute: bool = False,
        train_indexers: bool = False,
        routing: Sequence[Tensor] | None = None,
        keys: Sequence[Tensor] | None = None,
        chosen: list[Any] | None = None,
    ) -> States:
        """Return the hidden states from which the head makes logits.

        Args:
            cache, lengths: as in forward.
            documents, recompute, routing, keys: as in losses; documents not with a cache, whose rows are one each.
            train_indexers: compute the loss of indexers that learn.
            chosen: as in Context.
        """
        imposed = self._imposed(routing, keys, tokens)
        if cache is None and lengths is not None:
            raise ValueError("lengths are of rows in a cache; give one, or leave them out")
        if cache is not None and documents is not None:
            raise ValueError("documents do not go with a cache, which holds one document a row; leave out one of them")
        if documents is not None:
            check_documents(documents, tokens)
        with nullcontext() if cache is None else torch.no_grad():
            # 1. token ids to hidden states: [b, s, m], or as many streams of them as `hc_head` makes
            x = self.hc_head.expand(self.embedded(tokens))
            # 2. positions: 0, 1, ... in all rows, or after what is cached in each: [#b, s]
            at = None if cache is None else cache.place_tokens(self.config, tokens, lengths)
            positions = torch.arange(tokens.shape[1], device=x.device)[None] if at is None else at.positions
            stage = self.stage_for(train_indexers) if cache is None else None
            context = Context(positions=positions, tokens=tokens, documents=documents, stage=stage, chosen=chosen)
            # 3. the blocks, each with its layer's part of the cache: [b, s, m]
            views = [None] * len(self.layers) if cache is None or at is None else cache.views(at)
            found: list[Aux] = []
            for block, view, given in zip(self.layers, views, imposed, strict=True):
                own = context if view is None and not given else replace(context, cache=view, **given)
                x, aux = run_block(block, x, own, recompute)
                found.append(aux)
            if cache is not None and at is not None:
                cache.lengths = at.lengths
            # 4. the final norm: [b, s, m]
            return self.states_of(x, found)

    def _imposed(
        self, routing: Sequence[Tensor] | None, keys: Sequence[Tensor] | None, tokens: Int[Tensor, "b s"]
    ) -> list[dict[str, Any]]:
        """Return what each block gets imposed, as fields of Context.

        Raises: ValueError for a replay of another shape, an expert that does not exist, and a key after its query.
        """
        found: list[dict[str, Any]] = [{} for _ in self.layers]
        if routing is None and keys is None:  # as in every step of decoding
            return found
        c, s, m = self.config, tokens.shape[-1], self.config.tokens_per_key
        seen: Any = (torch.arange(s, device=tokens.device)[:, None] + 1) // m
        kinds = (
            ("routing", "experts", routing, "MoE layer", c.is_moe, c.n_activated_experts, c.n_routed_experts),
            ("keys", "keys", keys, "layer with an indexer", c.has_indexer, min(c.index_topk or 0, s // m), seen),
        )
        for name, field, given, kind, has, k, limit in kinds:
            if given is None:
                continue
            layers, shape = [i for i in range(c.n_layers) if has(i)], (*tokens.shape, k)
            got = [tuple(indices.shape) for indices in given]
            if odd := [indices.dtype for indices in given if indices.dtype not in INTEGERS]:
                raise ValueError(f"{name} has {odd[0]}; want int64, numbers of {field}")
            if got != [shape] * len(layers):
                raise ValueError(
                    f"{name} has {len(got)} layers of {got[0] if got else ()}; want {len(layers)} of {shape}, the "
                    f"{field} of each token in each {kind}, as generate(routing=True) records them of the same tokens"
                )
            for layer, indices in zip(layers, given, strict=True):
                if ops.can_read_values(indices) and not _can_be_chosen(indices, limit):
                    raise ValueError(
                        f"{name} names {field} up to {int(indices.max())}, one twice or out of reach; "
                        "it is that of another model or of other tokens: record it again"
                    )
                found[layer][field] = indices
        return found

    def stage_for(self, train_indexers: bool) -> Any:
        """Return Context.stage: the warm-up's attention reads all keys, also where nobody asks for a loss."""
        stage = self.indexer_stage if self.training else None
        return stage if train_indexers or stage != "sparse" else None

    def states_of(self, x: Float[Tensor, "b s *streams m"], found: list[Aux]) -> States:
        """Return the states after the last block, whose output is x, and what all blocks found."""
        normed = self.norm(self.hc_head.collapse(x))
        return States(normed, self.mtp.given(x, normed), *_listed(found, self.config))

    def embedded(self, tokens: Int[Tensor, "b s"]) -> Float[Tensor, "b s m"]:
        """Return the embeddings of token ids, in the compute dtype.

        Raises: ValueError as forward does.
        """
        if tokens.dim() != 2 or not tokens.shape[1] or tokens.dtype not in INTEGERS:
            got = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(f"tokens are {got}; want int64 [batch, sequence], one token or more")
        if tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"a sequence of {tokens.shape[1]} tokens is longer than max_seq_len={self.config.max_seq_len}; "
                "shorten it, or build the model with a longer context"
            )
        x = self.embed(tokens)
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        return normed(self.embed_norm, x)

    def run(
        self,
        tokens: Int[Tensor, "b s"],
        cache: Cache | None = None,
        mtp: bool = False,
        lengths: Int[Tensor, " b"] | None = None,
        documents: Int[Tensor, "b s"] | None = None,
    ) -> Output:
        """Return forward's logits, hidden states and routing; with mtp also multi-token prediction's logits.

        With documents, logits of depth k mean nothing at the last k positions of a document: token i + k is of the
        next.
        """
        if cache is None:
            states = self.states(tokens, None, lengths, documents)
            stage = self.stage_for(train_indexers=False)
            normed, found = [], []
            if mtp:
                normed, found = self.mtp(tokens, states.given, self.embedded, documents, stage=stage)
            mtp_logits = [self.head(h) for h in normed]
            return Output(
                self.head(states.normed),
                states.normed,
                mtp_logits,
                states.routing + _listed(found, self.config, self.config.n_layers)[0],
            )
        with torch.no_grad():
            seen = cache.checked_mtp() if mtp else None
            states, mtp_logits = self.states(tokens, cache, lengths, documents), []
            if seen is not None:
                positions = seen.place(tokens.shape[1], lengths).positions
                before = seen.shift(0, states.given, lengths)
                normed = self.mtp.decode(self.embedded(tokens), before, seen, lengths, tokens=tokens)
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
            dtype: dtype of what is stored, or "fp8" for V3.2's and V4's layouts; None: the compute dtype.
            mtp: also store what the multi-token prediction blocks need, for `run(..., mtp=True)` and for drafting.
            form: how MLA attends to it: expanded, absorbed, or auto, whichever is less work.
        """
        if mtp and not len(self.mtp):
            raise ValueError("mtp=True, but the model has no multi-token prediction blocks; use n_mtp_layers=1")
        compute_dtype = self.compute_dtype or next(self.embed.parameters()).dtype
        max_seq_len = self.config.max_seq_len if max_seq_len is None else max_seq_len
        dtype = dtype or compute_dtype
        check_cache(self.config, batch_size, max_seq_len, dtype, form)
        sizes, blocks, of_mtp = (batch_size, max_seq_len), list[Any](self.layers), None
        if mtp:
            stores = [depth.block.new_cache(*sizes, dtype, self.device) for depth in list[Any](self.mtp)]
            of_mtp = MTPCache(self.config, stores, *sizes, self.device, form=form)
            zeros = torch.zeros(batch_size, 1, self.config.dim, dtype=compute_dtype, device=self.device)
            of_mtp.last = [self.hc_head.expand(zeros)[:, 0].clone() for _ in stores]
        stores = [block.new_cache(*sizes, dtype, self.device) for block in blocks]
        return Cache(self.config, stores, *sizes, self.device, form=form, mtp=of_mtp)

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
        n_targets: Float[Tensor, ""] | None = None,
        states: States | None = None,
        routing: Sequence[Tensor] | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> Losses:
        """Compute the training losses without a tensor [b, s, vocab].

        Args:
            targets: the token after each position; IGNORE (-100) where there is none.
            documents: number of each position's document. A position attends to its own alone: a run of equal numbers,
                which rise along a row. None: it attends to all positions before it, as published.
            recompute: save only each block's input, and compute the rest again in backward.
            n_targets: number of targets that the cross-entropies are divided by; None: those of this call. The parts
                of a batch whose losses are averaged share the mean of theirs.
            states: the states of the tokens, where another stage of a pipeline computed them; None: `states` of them.
            routing: experts [b, s, k] that each MoE layer gets imposed, without those of MTP, -1 where the gate
                chooses. `generate(routing=True)` records them: training then uses the experts of the generation, whose
                numbers differ in their last bits. Scores and weights are computed again, so that gates learn.
            keys: keys [b, s, k] that each indexer gets imposed, without those of MTP, recorded with the experts. In a
                row of -1 the indexer chooses. In V4 they are compressed entries.

        A depth k of MTP is scored at s - k positions and, as published, divided by the number of targets of the main
        loss. Source: DeepSeek-V3 report, equations 17 to 20 (balance), 24 and 25 (MTP); DeepSeek-V3.2
        report, equations 3 and 4 (indexers).
        """
        if targets.shape != tokens.shape or not tokens.numel():
            got = f"targets are {tuple(targets.shape)}, tokens {tuple(tokens.shape)}"
            raise ValueError(f"{got}; want a token or more, and a target for each: losses(x[:, :-1], x[:, 1:])")
        check_ids("target", targets.masked_fill(targets == IGNORE, 0), self.config.vocab_size)
        if states is not None and (routing is not None or keys is not None):
            raise ValueError(
                "routing and keys are imposed where states are computed, and states are given; leave out one of them"
            )
        if states is None:
            states = self.states(tokens, None, None, documents, recompute, True, routing, keys)
        counted = (targets != IGNORE).sum().clamp(min=1) if n_targets is None else n_targets
        # 1. the next token, from hidden states [b, s, m]
        main = self.cross_entropy(states.normed, targets) / counted
        # 2. the tokens after it, from those of each depth k, [b, s - k, m]
        normed, found = self.mtp(tokens, states.given, self.embedded, documents, recompute, self.stage_for(True))
        mtp = balance = torch.zeros_like(main)
        if normed:
            depths = [self.cross_entropy(h, targets[:, k:]) / counted for k, h in enumerate(normed, 1)]
            mtp = torch.stack(depths).mean()
        # 3. the balance of each MoE layer, from its scores [b * s, e]
        of_mtp, indexers_of_mtp = _listed(found, self.config, self.config.n_layers)
        every, indexers = states.routing + of_mtp, states.indexers + indexers_of_mtp
        if every:
            sizes = (tokens.shape[0], balance_counts)
            balances = [sequence_balance_loss(r.scores, r.indices, *sizes) for r in every]
            balance = torch.stack(balances).sum().to(main.dtype)
        # 4. what each indexer missed of attention, which moves its own parameters alone
        total = sum((loss.kl for loss in indexers), main + mtp_weight * mtp + balance_alpha * balance)
        return Losses(main, mtp, balance, total, every, indexers)

    def cross_entropy(self, hidden: Float[Tensor, "*b m"], targets: Int[Tensor, "*b"]) -> Float[Tensor, ""]:
        """Return the sum over rows of the head's cross-entropy, in nats, FP32, without a tensor [*b, vocab]."""
        hidden, targets = hidden.flatten(0, -2), targets.flatten()
        hidden = at_least_fp32(hidden) if isinstance(self.head, FP32Product) else hidden
        if is_plain(self.head):
            return linear_cross_entropy(hidden, self.head.weight, targets)

        def chunk(h: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(at_least_fp32(self.head(h)), target, ignore_index=IGNORE, reduction="sum")

        parts = (x.split(max(1, CHUNK // self.config.vocab_size)) for x in (hidden, targets))
        return torch.stack([ops.recomputed(chunk, h, target) for h, target in zip(*parts, strict=True)]).sum()

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where token ids belong."""
        return next(self.embed.parameters()).device

    def gates(self) -> list[Gate]:
        """Return the gates in the order of Output.routing; one that several layers share is there as often."""
        return [module for _, module in self.named_modules(remove_duplicate=False) if isinstance(module, Gate)]


def _listed(found: list[Aux], c: ModelConfig, first: int = 0) -> tuple[list[Routing], list[IndexerLoss]]:
    """Return the routing of all MoE layers, and the losses of all indexers, of what blocks from `first` on found.

    The loss of an indexer is the mean over the layers that it learns from.
    """
    by_source: dict[int, list[IndexerLoss]] = {}
    for layer, aux in enumerate(found, first):
        if aux.indexer_loss is not None:
            by_source.setdefault(c.index_source(layer), []).append(aux.indexer_loss)
    means = [
        IndexerLoss(*(torch.stack(figures).mean() for figures in zip(*of, strict=True))) for of in by_source.values()
    ]
    return [aux.routing for aux in found if aux.routing is not None], means


def _can_be_chosen(indices: Int[Tensor, "b s k"], limit: Any) -> bool:
    """Return True for experts or keys of which none is `limit` or more, and none but -1 is twice in a row."""
    rising = indices.sort(-1).values
    twice = (rising[..., 1:] == rising[..., :-1]) & (rising[..., 1:] >= 0)
    return not bool((indices >= limit).any() or twice.any())


def check_documents(documents: Any, tokens: Int[Tensor, "b s"]) -> None:
    """Raise ValueError unless there is a number for each token, and in eager mode on a CPU for numbers that fall.

    A number that came back would be the same document in a mask of keys, and another one in blocks of tokens.
    """
    if not isinstance(documents, Tensor) or documents.shape != tokens.shape or documents.dtype not in INTEGERS:
        got = type(documents).__name__
        if isinstance(documents, Tensor):
            got = f"{documents.dtype} {list(documents.shape)}"
        raise ValueError(f"documents are {got}; want int64 {list(tokens.shape)}, the number of each token's document")
    if ops.can_read_values(documents) and bool((falls := documents.diff() < 0).any()):
        row, before = (int(i) for i in falls.nonzero()[0])
        last, number = (int(i) for i in documents[row, before : before + 2])
        raise ValueError(
            f"documents go back from {last} to {number} at position {before + 1} of row {row}; a document is a run of "
            "equal numbers, and the next has a larger one: number them 0, 1, 2, ..."
        )
