"""DeepSeek Sparse Attention: MLA in which a query attends to the keys that its indexer picks.

    1. queries, latent and rotary key as in MLA
    2. the indexer's scores of all keys that a query sees, and the index_topk largest of them
    3. MLA's attention to these keys alone

With no more than index_topk keys there is nothing to choose, and the layer is MLA. MLA's two forms remain. Expanded
makes keys and values of all tokens and hides those that were not picked: training, and short prompts. Absorbed gathers
the picked rows of the cache, so that a decoded token reads index_topk rows of it, whatever the context.

The picks are constants: no gradient of the output reaches the indexer, which learns from a loss of its own. In training
there are two stages (section 2.1.1). In the dense warm-up attention reads all keys, and the indexer learns to foresee
it; in the sparse stage attention reads the picks, and the indexer learns to foresee it among them.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsmini.config import ModelConfig, layer_config
from dsmini.functional.cached_attention import (
    BLOCK,
    Mask,
    cached_attention,
    hidden_keys,
    keys_and_values,
)
from dsmini.functional.indexer_loss import IndexerFit, MainAttention, indexer_fit
from dsmini.functional.linear import quantize_once
from dsmini.functional.rope import Table
from dsmini.functional.sparse_attention import gathers_fast, pick_keys, picked_attention, unpicked
from dsmini.nn.cache import Past
from dsmini.nn.indexer import Indexer
from dsmini.nn.linear import is_direct
from dsmini.nn.mla import MLA, attend, check_sequences


class DSA(MLA):
    """DeepSeek Sparse Attention. From a config, or from plain arguments with the three index sizes.

    Args:
        mask: as in MLA; the indexer picks among the keys that it leaves.

    Source: DeepSeek-V3.2 report (arXiv 2512.02556), section 2.1.
    """

    stage: Literal["warmup", "sparse"] | None = None
    """Stage in which the indexer learns, in training mode; None: it does not."""
    fits: list[IndexerFit] | None = None
    """Takes the indexer's loss of each forward in a stage; None: it is dropped."""

    def __init__(self, config: ModelConfig | None = None, /, *, mask: Mask | None = None, **arguments: Any) -> None:
        c = layer_config(config, arguments if config else {"attention": "dsa", **arguments})
        super().__init__(c, mask=mask)
        self.indexer = Indexer(c)

    def forward(
        self,
        x: Float[Tensor, "b s m"],
        table: Table | None = None,
        documents: Int[Tensor, "b s"] | None = None,
        past: Past | None = None,
    ) -> Float[Tensor, "b s m"]:
        """Attend to the picks, expanded or absorbed; to all keys where there are no more than index_topk.

        Args:
            table, documents, past: as in MLA. The indexer's keys are cached in any case.
        """
        check_sequences(x)
        table = table or self.rope.table(torch.arange(x.shape[1], device=x.device))
        longest = x.shape[1] if past is None else int(past.window.lengths.max())
        stage = self.stage if self.training and past is None else None
        if longest <= self.indexer.topk and stage is None:
            if past is not None:
                past.index.append((self.indexer.keys(x, table),))
            return super().forward(x, table, documents, past)
        # 1. queries, and what they are made of: [b, s, h, n + r] and [b, s, l]
        given = quantize_once(x, self.wkv_a, self.wq if self.wq_a is None else self.wq_a)
        latent = x if self.wq_a is None or self.q_norm is None else self.q_norm(self.wq_a(given))
        q, new = self.queries(given, table, latent), self.latents(given, table)
        # 2. the keys of each query: [b, s, k]
        picks = self.picks(x, latent, table, documents, past)
        # 3. attention to them: [b, s, h v]
        if past is not None and self.sparse_form(q.shape[1], past) == "absorbed":
            return self.wo(self._to_rows(q, new, picks, past))
        c_kv, k_rope = new if past is None else past.extend(new, q.dtype)
        k, v = keys_and_values(self.wkv_b(c_kv), k_rope, self.n_heads, self.qk_nope_head_dim)
        if stage is not None:  # also where nobody takes it: recomputation in backward must do as the forward did
            fit = self.fit(x, latent, table, documents, q, k, picks, stage)
            if self.fits is not None:
                self.fits.append(fit)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if stage == "warmup":
            y = attend(q, k, v, self.scale, past=None, documents=documents, mask=self.mask)
        else:
            y = self._to_keys(q, k, v, picks, past)
        return self.wo(rearrange(y, "b h s v -> b s (h v)"))

    def _to_rows(
        self,
        q: Float[Tensor, "b s h d"],
        new: tuple[Float[Tensor, "b s c"], Float[Tensor, "b s r"]],
        picks: Int[Tensor, "b s k"],
        past: Past,
    ) -> Float[Tensor, "b s hv"]:
        """Append the new rows to the cache and attend to the picked ones, absorbed."""
        past.append(new)
        rows = past.store.read(past.window.end, q.dtype)
        q_nope, q_rope = q.tensor_split((self.qk_nope_head_dim,), -1)
        w_uk, w_uv = self._absorbed_halves(q.dtype, past)
        return picked_attention(q_nope, q_rope, rows, w_uk, w_uv, self.scale, picks)

    def _to_keys(
        self,
        q: Float[Tensor, "b h s d"],
        k: Float[Tensor, "b h t d"],
        v: Float[Tensor, "b h t v"],
        picks: Int[Tensor, "b s k"],
        past: Past | None,
    ) -> Float[Tensor, "b h s v"]:
        """Attend to the keys that are picked, expanded, a block of queries at a time."""
        y = []
        for i, (part, chosen) in enumerate(zip(q.split(BLOCK, 2), picks.split(BLOCK, 1), strict=True)):
            t = _keys_before((i + 1) * BLOCK, k.shape[2], past)
            y.append(cached_attention(part, k[:, :, :t], v[:, :, :t], self.scale, unpicked(chosen, t)))
        return torch.cat(y, 2)

    @torch.no_grad()
    def picks(
        self,
        x: Float[Tensor, "b s m"],
        latent: Float[Tensor, "b s l"],
        table: Table,
        documents: Int[Tensor, "b s"] | None = None,
        past: Past | None = None,
    ) -> Int[Tensor, "b s k"]:
        """Return the positions of the keys that each new token attends to; -1 where it sees fewer than index_topk.

        With a past the indexer's keys are appended to it.

        Args:
            latent: the normed compressed query, or x where none is compressed.
        """
        q, weights = self.indexer.queries(latent, table), self.indexer.head_weights(x)
        keys = self.indexer.keys(x, table)
        if past is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        else:
            (keys,) = past.index.extend((keys,), keys.dtype)
            positions = past.window.positions.clamp(max=keys.shape[1] - 1)  # those of padding may lie after all keys
        blocks, k = [], min(self.indexer.topk, keys.shape[1])
        for start in range(0, x.shape[1], BLOCK):
            part, t = slice(start, start + BLOCK), _keys_before(start + BLOCK, keys.shape[1], past)
            hidden = hidden_keys(self.mask, positions[:, part], t)
            if documents is not None:
                hidden = hidden | (documents[:, part, None] != documents[:, None, :t])
            chosen = pick_keys(q[:, part], keys[:, :t], weights[:, part], k, hidden)
            blocks.append(F.pad(chosen, (0, k - chosen.shape[2]), value=-1))
        return torch.cat(blocks, 1)

    def fit(
        self,
        x: Float[Tensor, "b s m"],
        latent: Float[Tensor, "b s l"],
        table: Table,
        documents: Int[Tensor, "b s"] | None,
        q: Float[Tensor, "b s h d"],
        k: Float[Tensor, "b s h d"],
        picks: Int[Tensor, "b s k"],
        stage: Literal["warmup", "sparse"],
    ) -> IndexerFit:
        """Compare the indexer with attention. Its inputs are detached: the loss moves the indexer, and nothing else.

        Args:
            latent: as in `picks`.
            q, k: queries and keys of attention.
        """
        x, latent, q, k = (t.detach() for t in (x, latent, q, k))

        def hidden(start: int, end: int) -> Bool[Tensor, "#b n t"]:
            mask = hidden_keys(self.mask, torch.arange(start, end, device=x.device)[None], end)
            return mask if documents is None else mask | (documents[:, start:end, None] != documents[:, None, :end])

        index = self.indexer.queries(latent, table), self.indexer.keys(x, table), self.indexer.head_weights(x)
        return indexer_fit(*index, MainAttention(q, k, self.scale, hidden), picks, stage)

    def sparse_form(self, queries: int, past: Past) -> Literal["expanded", "absorbed"]:
        """Return the form in which `forward` attends to picked keys: absorbed where a kernel gathers them.

        Without one the cheaper form runs, as in MLA; the absorbed one reads index_topk keys at most.
        """
        if past.form != "auto" or self.q_head_norm is not None or not is_direct(self.wkv_b):
            return self.form_for(queries, past)
        if gathers_fast(self.wkv_b.weight):
            return "absorbed"
        keys = past.window.end
        absorbed = self.work(queries, min(keys, self.indexer.topk)).absorbed
        return dataclasses.replace(self.work(queries, keys), absorbed=absorbed).cheaper


def dsa_layers(model: nn.Module) -> list[DSA]:
    """Return the DSA layers in the order of a model, those of MTP blocks last."""
    return [module for module in model.modules() if isinstance(module, DSA)]


@contextmanager
def collected_fits(model: nn.Module) -> Iterator[list[IndexerFit]]:
    """Yield the list that takes the losses of a model's indexers, also in the place of a list outside.

    A forward that backward repeats adds nothing.
    """
    fits: list[IndexerFit] = []
    layers = dsa_layers(model)
    before = [layer.fits for layer in layers]
    for layer in layers:
        layer.fits = fits
    try:
        yield fits
    finally:
        for layer, outer in zip(layers, before, strict=True):
            layer.fits = outer


def _keys_before(stop: int, t: int, past: Past | None) -> int:
    """Return the number of t keys that new tokens before column `stop` may see, as far as shapes alone tell."""
    return min(stop, t) if past is None or past.window.fresh else t
