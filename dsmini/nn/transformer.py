"""The whole model: embedding, blocks, norm, head, and the multi-token prediction blocks behind them."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsmini.config import ModelConfig, layer_config
from dsmini.functional.cross_entropy import IGNORE, linear_cross_entropy
from dsmini.functional.rope import Table
from dsmini.nn.balance import sequence_balance_loss
from dsmini.nn.block import Block
from dsmini.nn.cache import Cache, CacheDtype, Form, Past, Window
from dsmini.nn.experts import Experts
from dsmini.nn.gate import Gate, Routing
from dsmini.nn.linear import Linear
from dsmini.nn.losses import Losses
from dsmini.nn.mtp import MTP
from dsmini.nn.norm import RMSNorm
from dsmini.nn.rope import Rope


class Embedding(nn.Module):
    """A row of the weight for each token id."""

    def __init__(self, vocab_size: int, dim: int, *, init_std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.init_std = init_std
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight from a normal distribution with the standard deviation init_std."""
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch m"]:
        return F.embedding(tokens, self.weight)


class Output(NamedTuple):
    """What Transformer.run returns."""

    logits: Float[Tensor, "b s v"]
    """Of the next token."""
    hidden: Float[Tensor, "b s m"]
    """After the final norm."""
    mtp_logits: list[Tensor]
    """[b, s - k, v] for depths k = 1, 2, ...: at position i, of token i + k + 1. With a cache [b, s, v]: behind each
    new token, of the next, as seen k tokens ahead; NaN behind the first k of a sequence."""
    routing: list[Routing]
    """One for each MoE layer, those of the MTP blocks last."""


class Advance(NamedTuple):
    """What Transformer.advance returns: states from which `head` makes logits."""

    normed: Float[Tensor, "b s m"]
    given: Float[Tensor, "b s m"]
    """What multi-token prediction is given of them: before or after the final norm, as the config says."""
    further: list[Tensor]
    """[b, s, m] for depths 1, 2, ...: behind each new token, of the next."""
    routing: list[Routing]


class _Trunk(NamedTuple):
    hidden: Tensor  # before the final norm
    normed: Tensor
    routing: list[Routing]


class Transformer(nn.Module):
    """A DeepSeek-V3 style language model. From a config, or from plain arguments.

    Args:
        compute_dtype: dtype of activations and matrix products; None: the dtype of the embedding's weight. Norms,
            softmax, gates and losses are FP32 in any case.

    Source: DeepSeek-V3 report, section 2.
    """

    def __init__(
        self, config: ModelConfig | None = None, /, *, compute_dtype: torch.dtype | None = None, **arguments: Any
    ) -> None:
        super().__init__()
        c = self.config = layer_config(config, arguments)
        self.compute_dtype = compute_dtype
        self.rope = Rope.from_config(c)
        self.embed = Embedding(c.vocab_size, c.dim, init_std=c.init_std)
        self.embed_norm = RMSNorm(c.dim, c.norm_eps) if c.embed_norm else None
        self.layers = nn.ModuleList(Block(c, layer=i) for i in range(c.n_layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.head = Linear(c.dim, c.vocab_size, init_std=c.output_init_std)
        self.mtp = nn.ModuleList(MTP(c, depth=k) for k in range(c.n_mtp_layers))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all matrices anew, in the order of named_modules, and set norms to 1 and biases to 0."""
        for module in self.modules():
            if isinstance(module, Embedding | Linear | Experts | Gate):
                module.reset_parameters(generator)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    def forward(
        self, tokens: Int[Tensor, "b s"], cache: Cache | None = None, lengths: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b s v"]:
        """Logits of the next token at every position, in the compute dtype.

        Args:
            cache: of what came before; the tokens are appended to it. No gradients are made then.
            lengths: new tokens in each row, which is padded on the right; left out: all columns are tokens.

        Raises: ValueError for more than max_seq_len tokens, or (on a CPU) a token id outside the vocabulary.
        """
        with torch.set_grad_enabled(cache is None and torch.is_grad_enabled()):
            return self.head(self.hidden(tokens, cache, lengths))

    def hidden(
        self,
        tokens: Int[Tensor, "b s"],
        cache: Cache | None = None,
        lengths: Int[Tensor, " b"] | None = None,
        documents: Int[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b s m"]:
        """The hidden states after the final norm, from which `head` makes the logits.

        Args:
            documents: as in losses; not with a cache, whose rows are one document each.
        """
        if cache is None:
            return self._trunk(tokens, documents).normed
        if documents is not None:
            raise ValueError("documents do not go with a cache, which holds one document a row; leave out one of them")
        return self.advance(tokens, cache, lengths).normed

    def run(
        self,
        tokens: Int[Tensor, "b s"],
        cache: Cache | None = None,
        mtp: bool = False,
        lengths: Int[Tensor, " b"] | None = None,
    ) -> Output:
        """forward, with all that there is to see. With mtp also the logits of the multi-token prediction blocks."""
        if cache is None:
            trunk = self._trunk(tokens)
            normed, routing = self._predict_further(tokens, trunk) if mtp else ([], [])
            mtp_logits = [self.head(h) for h in normed]
            return Output(self.head(trunk.normed), trunk.normed, mtp_logits, trunk.routing + routing)
        positions = cache.window(tokens.shape[1], lengths).positions
        advance = self.advance(tokens, cache, lengths, mtp)
        with torch.no_grad():
            further = [self.head(h) for h in advance.further]
            mtp_logits = [h.masked_fill((positions < k)[..., None], torch.nan) for k, h in enumerate(further, 1)]
            return Output(self.head(advance.normed), advance.normed, mtp_logits, advance.routing)

    def new_cache(
        self,
        batch_size: int = 1,
        max_seq_len: int | None = None,
        dtype: CacheDtype | None = None,
        mtp: bool = False,
        form: Form = "auto",
    ) -> Cache:
        """An empty cache, all of it allocated.

        Args:
            max_seq_len: tokens of each sequence it has room for; left out: the model's.
            dtype: of what is kept, or "fp8" for V3.2's layout; left out: the compute dtype.
            mtp: also keep what the multi-token prediction blocks need, for `run(..., mtp=True)` and `draft`.
            form: how MLA attends to it; auto counts the work of both ways at each call.
        """
        if mtp and not len(self.mtp):
            raise ValueError("mtp=True, but the model has no multi-token prediction blocks; use n_mtp_layers=1")
        return Cache(
            self.config,
            batch_size,
            self.config.max_seq_len if max_seq_len is None else max_seq_len,
            dtype or self._dtype,
            self.embed.weight.device,
            lanes=len(self.mtp) if mtp else 0,
            form=form,
            hidden_dtype=self._dtype,
        )

    @property
    def _dtype(self) -> torch.dtype:
        return self.compute_dtype or self.embed.weight.dtype

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
    ) -> Losses:
        """The training losses; no [b, s, vocab] tensor is held.

        Args:
            targets: the token after each position; IGNORE (-100) where there is none.
            documents: the number of the document each position belongs to: no position then attends to another
                document. Left out: all that came before in the sequence is seen, as published.
            recompute: keep only each block's input and compute the rest again in backward.
            chunk_rows: rows of logits that exist at a time.

        A depth k of MTP is scored at s - k positions and, as published, divided by the number of targets of the main
        loss. Source: DeepSeek-V3 report, equations 17 to 20 (balance), 24 and 25 (MTP).
        """
        self._check_ids("target", targets.masked_fill(targets == IGNORE, 0))
        counted = (targets != IGNORE).sum().clamp(min=1)

        def cross_entropy(hidden: Tensor, target: Tensor) -> Tensor:
            flat = hidden.flatten(0, 1)
            return linear_cross_entropy(flat, self.head.weight, target.flatten(), chunk_rows) / counted

        trunk = self._trunk(tokens, documents, recompute)
        main = cross_entropy(trunk.normed, targets)
        normed, mtp_routing = self._predict_further(tokens, trunk, documents, recompute)
        mtp = balance = torch.zeros_like(main)
        if normed:
            depths = [cross_entropy(h, targets[:, k:]) for k, h in enumerate(normed, 1)]
            mtp = torch.stack(depths).mean()
        routing = trunk.routing + mtp_routing
        if routing:
            parts = [sequence_balance_loss(r.scores, r.indices, tokens.shape[0], balance_counts) for r in routing]
            balance = torch.stack(parts).sum().to(main.dtype)
        return Losses(main, mtp, balance, main + mtp_weight * mtp + balance_alpha * balance, routing)

    def gates(self) -> list[Gate]:
        """The gates in the order of Output.routing."""
        return [module for module in self.modules() if isinstance(module, Gate)]

    def _trunk(self, tokens: Tensor, documents: Tensor | None = None, recompute: bool = False) -> _Trunk:
        self._check(tokens)
        x = self._embed(tokens)
        table = self._table(tokens.shape[1], tokens.device)
        routing: list[Routing] = []
        for block in self.layers:
            x, decided = _run_block(block, recompute, x, table, documents)
            routing += [] if decided is None else [decided]
        return _Trunk(x, self.norm(x), routing)

    @torch.no_grad()
    def advance(
        self,
        tokens: Int[Tensor, "b s"],
        cache: Cache,
        lengths: Int[Tensor, " b"] | None = None,
        mtp: bool = False,
    ) -> "Advance":
        """Append tokens to a cache, and give the states that logits are made from. With mtp the multi-token prediction
        blocks take them in too."""
        self._check(tokens)
        _check_cache(self.config, tokens, cache, mtp)
        window = cache.window(tokens.shape[1], lengths)
        x = self._embed(tokens)
        table = self.rope.table(window.positions)
        routing: list[Routing] = []
        for block, store in zip(self.layers, cache.stores, strict=True):
            x, decided = block(x, table, None, Past(store=store, window=window, form=cache.form))
            routing += [] if decided is None else [decided]
        cache.lengths = window.lengths
        normed = self.norm(x)
        given = x if self.config.mtp_input == "pre_norm" else normed
        further: list[Tensor] = []
        if mtp:
            before = torch.cat((cache.lanes[0].before[:, None].to(given.dtype), given[:, :-1]), 1)
            further = self.take_in(tokens, before, cache, lengths)
            cache.lanes[0].before = _last_column(given, lengths, cache.lanes[0].before)
        return Advance(normed, given, further, routing)

    @torch.no_grad()
    def take_in(
        self, tokens: Int[Tensor, "b s"], before: Float[Tensor, "b s m"], cache: Cache, lengths: Tensor | None = None
    ) -> list[Float[Tensor, "b s m"]]:
        """Let the multi-token prediction blocks see tokens that the cache's layers have seen or are about to see. Each
        depth's normed states: behind each token, what it makes of the next.

        Args:
            before: the main model's hidden state at the position before each token.
        """
        embedding = self._embed(tokens)
        window = cache.window(tokens.shape[1], lengths, cache.lane_lengths)
        all_normed: list[Tensor] = []
        given: Tensor | None = None  # by the depth before
        for k, lane in enumerate(cache.lanes, 1):
            if given is not None:
                before = torch.cat((lane.before[:, None].to(given.dtype), given[:, :-1]), 1)
                lane.before = _last_column(given, lengths, lane.before)
            normed, given = self._lane(k, embedding, before, cache, window)
            all_normed.append(normed)
        cache.lane_lengths = window.lengths
        return all_normed

    def _lane(self, k: int, embedding: Tensor, before: Tensor, cache: Cache, window: Window) -> tuple[Tensor, Tensor]:
        """One depth's normed states for new tokens, and what it gives to the next depth."""
        block, shifted = cast(MTP, self.mtp[k - 1]), window.shifted(k)
        past = Past(store=cache.lanes[k - 1].store, window=shifted, form=cache.form)
        x, _ = block(before, embedding, self.rope.table(shifted.positions), None, past)
        normed = block.norm(x)
        return normed, x if self.config.mtp_input == "pre_norm" else normed

    @torch.no_grad()
    def draft(
        self,
        tokens: Int[Tensor, "b s"],
        before: Float[Tensor, "b s m"],
        cache: Cache,
        pick: Callable[[Float[Tensor, "b v"], int], Int[Tensor, " b"]],
        lengths: Int[Tensor, " b"] | None = None,
    ) -> Int[Tensor, "b depths"]:
        """Guess the tokens behind each sequence, one with each depth of multi-token prediction.

        Args:
            tokens, before, lengths: as in take_in: what is new and certain.
            pick: chooses a token of each row from the logits of depth 0, 1, ...

        The guesses are fed to the deeper blocks and leave no trace: in the next call their places are taken by what is
        certain then.
        """
        normed = self.take_in(tokens, before, cache, lengths)
        states = [_last_column(h, lengths, h[:, 0]) for h in normed]
        certain = [lane.before for lane in cache.lanes]
        guesses: list[Tensor] = []
        for k in range(len(cache.lanes)):
            guesses.append(pick(self.head(states[k]), k))
            window = cache.window(1, None, cache.lane_lengths + k)
            embedding = self._embed(guesses[-1][:, None])
            given: dict[int, Tensor] = {}
            for deeper in range(k + 1, len(cache.lanes)):
                h, gives = self._lane(deeper + 1, embedding, cache.lanes[deeper].before[:, None], cache, window)
                states[deeper], given[deeper + 1] = h[:, 0], gives[:, 0]
            for lane, hidden in given.items():
                if lane < len(cache.lanes):
                    cache.lanes[lane].before = hidden
        for lane, hidden in zip(cache.lanes, certain, strict=True):
            lane.before = hidden
        return torch.stack(guesses, 1)

    def _predict_further(
        self, tokens: Tensor, trunk: _Trunk, documents: Tensor | None = None, recompute: bool = False
    ) -> tuple[list[Tensor], list[Routing]]:
        """Each depth's normed hidden states, [b, s - k, m], and its routing."""
        all_normed: list[Tensor] = []
        routing: list[Routing] = []
        before_norm = self.config.mtp_input == "pre_norm"
        hidden = trunk.hidden if before_norm else trunk.normed
        for k, block in enumerate(cast(list[MTP], list(self.mtp)), 1):
            if tokens.shape[1] <= k:
                raise ValueError(f"a sequence of {tokens.shape[1]} tokens is too short for MTP depth {k}; want {k + 1}")
            embedding = self._embed(tokens[:, k:])
            hidden = hidden[:, : embedding.shape[1]]
            table = self._table(embedding.shape[1], tokens.device)
            within = None if documents is None else documents[:, : embedding.shape[1]]
            x, decided = _run_block(block, recompute, hidden, embedding, table, within)
            normed = block.norm(x)
            hidden = x if before_norm else normed
            all_normed.append(normed)
            routing += [] if decided is None else [decided]
        return all_normed, routing

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).to(self._dtype)
        return x if self.embed_norm is None else self.embed_norm(x)

    def _table(self, s: int, device: torch.device) -> Table:
        return self.rope.table(torch.arange(s, device=device))

    def _check(self, tokens: Tensor) -> None:
        c = self.config
        if tokens.dim() != 2 or not tokens.shape[1] or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens are {tokens.dtype} {tuple(tokens.shape)}; want int64 [batch, sequence]")
        if tokens.shape[1] > c.max_seq_len:
            raise ValueError(
                f"a sequence of {tokens.shape[1]} tokens is longer than max_seq_len={c.max_seq_len}; "
                "shorten it, or build the model with a longer context"
            )
        self._check_ids("token", tokens)

    def _check_ids(self, what: str, ids: Tensor) -> None:
        # On an accelerator the check would wait for the device in every step; the commands check their data once.
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
            low, high = (int(i) for i in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                wrong, last = low if low < 0 else high, self.config.vocab_size - 1
                raise ValueError(f"{what} id {wrong} is outside the vocabulary; want 0 to {last}")


def _run_block(block: nn.Module, recompute: bool, *args: Any) -> tuple[Tensor, Routing | None]:
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]
    return block(*args)


def _last_column(hidden: Tensor, lengths: Tensor | None, old: Tensor) -> Tensor:
    """[b, m]: of each row's last token; the old where it has no new one."""
    if lengths is None:
        return hidden[:, -1]
    at = lengths.to(hidden.device)
    last = hidden[torch.arange(len(hidden), device=hidden.device), (at - 1).clamp(min=0)]
    return torch.where((at > 0)[:, None], last, old.to(last.dtype))


def _check_cache(config: ModelConfig, tokens: Tensor, cache: Cache, mtp: bool) -> None:
    if cache.config != config:
        raise ValueError("the cache was made by a model of another config; use this model's new_cache")
    if len(tokens) != cache.batch_size:
        raise ValueError(f"{len(tokens)} rows of tokens for a cache of {cache.batch_size} sequences; want as many")
    if mtp and not cache.lanes:
        raise ValueError("mtp=True needs a cache that keeps multi-token prediction; use new_cache(mtp=True)")
    if mtp and not torch.equal(cache.lane_lengths, cache.lengths):
        raise ValueError(
            f"multi-token prediction has taken in {cache.lane_lengths.tolist()} tokens of {cache.lengths.tolist()}; "
            "use mtp=True in every call from the first on"
        )
