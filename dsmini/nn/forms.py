"""Choose the form in which MLA and DSA attend to a cache: expanded or absorbed, whichever is less work.

This is a policy, not a part of the model: `new_cache(form=...)` takes a form, or another function in the place of
cheapest_form.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsmini import ops
from dsmini.nn.cache import ChosenForm, LayerCacheView
from dsmini.nn.layers import is_plain

if TYPE_CHECKING:
    from dsmini.nn.mla import MLA


@dataclass(frozen=True, kw_only=True)
class AttentionWork:
    """Floating-point operations of MLA's attention to a cache, for one sequence and layer, in both forms.

    A multiply-add counts as two. Masked pairs of query and key count too. Work that both forms do is left out.
    """

    queries: int
    keys: int
    to_expand: int
    """Expanding the latents of all keys."""
    expanded: int
    """The whole expanded form, to_expand included."""
    absorbed: int

    @property
    def cheaper(self) -> ChosenForm:
        """Form with fewer operations."""
        return "absorbed" if self.absorbed < self.expanded else "expanded"

    def __str__(self) -> str:
        return (
            f"{self.cheaper}, for {self.queries:,} queries and {self.keys:,} keys: expanded "
            f"{self.expanded / 1e6:,.1f} MFLOP, {self.to_expand / 1e6:,.1f} of them to expand the latents, absorbed "
            f"{self.absorbed / 1e6:,.1f}"
        )


def attention_work(layer: "MLA", queries: int, keys: int, gathered: int | None = None) -> AttentionWork:
    """Count both forms of attention of this many new tokens to this many cached ones, the new ones included.

    Args:
        gathered: number of keys that the absorbed form reads for each query, where it gathers them; None: all.
    """
    h, c, n, r, v = layer.n_heads, layer.kv_lora_rank, layer.qk_nope_head_dim, layer.rope.dim, layer.v_head_dim
    expand = 2 * keys * c * h * (n + v)
    read = keys if gathered is None else gathered
    return AttentionWork(
        queries=queries,
        keys=keys,
        to_expand=expand,
        expanded=expand + 2 * queries * keys * h * (n + r + v),
        absorbed=2 * queries * h * c * (n + v) + 2 * queries * read * h * (c + r + c),
    )


def form_of(layer: "MLA", queries: int, cache: LayerCacheView) -> ChosenForm:
    """Return the form in which a layer attends to a cache: the one that the cache asks for, or the policy's choice.

    Raises: ValueError for a policy that returns anything else.
    """
    if not callable(cache.form):
        return cheapest_form(layer, queries, cache) if cache.form == "auto" else cache.form
    form = cache.form(layer, queries, cache)
    if form not in ("expanded", "absorbed"):
        raise ValueError(f"form= is a function that returned {form!r}; want expanded or absorbed")
    return form


def cheapest_form(layer: "MLA", queries: int, cache: LayerCacheView) -> ChosenForm:
    """Return the form with less work; absorbed for the keys that an indexer chose, where a kernel gathers them.

    Attention with a mask then takes longer than the gather, also where it needs fewer operations (docs/log.md).
    Normed heads have no absorbed form. A module in the place of wkv_b, such as a LoRA wrapper, is absorbed on
    request alone: its weight is computed again in each call.
    """
    if layer.q_head_norm is not None or not is_plain(layer.wkv_b):
        return "expanded"
    indexer: Any = getattr(layer, "indexer", None)
    topk = None if indexer is None or int(cache.at.lengths.max()) <= indexer.topk else indexer.topk
    if topk is not None and ops.serves("topk_attention", layer.wkv_b.weight):
        return "absorbed"
    keys = cache.at.end
    return attention_work(layer, queries, keys, None if topk is None else min(keys, topk)).cheaper
