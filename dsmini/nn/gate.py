"""The gate: which experts a token gets, with which weights, and what keeps the load of the experts even."""

import heapq
import random
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini import ops
from dsmini.config import ModelConfig, layer_config
from dsmini.config.fields import require
from dsmini.nn.attention import Context
from dsmini.nn.first_values import draw_first, draw_normal
from dsmini.nn.layers import FP32Module, at_least_fp32, linear

ScoreFunc = Callable[[Tensor], Tensor]
SCORE_FUNCS: Mapping[str, ScoreFunc] = MappingProxyType(
    {
        "sigmoid": torch.sigmoid,
        "softmax": lambda logits: logits.softmax(-1),
        # far below zero softplus is 0, where the gradient of the root would be infinite
        "sqrtsoftplus": lambda logits: F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt(),
    }
)

OPTIONS = (
    *("n_activated_experts", "n_expert_groups", "n_limited_groups"),
    *("score_func", "norm_topk_prob", "route_scale"),
)
"""Fields of ModelConfig that `route` takes."""


class Routing(NamedTuple):
    """Decision of a gate for n tokens. It travels in the output: gates store no state of a forward."""

    indices: Int[Tensor, "n k"]
    """Chosen experts, best first; of a hash layer in the order of its table."""
    weights: Float[Tensor, "n k"]
    """Weights of the chosen experts, FP32, from the unbiased scores."""
    scores: Float[Tensor, "n e"]
    """All unbiased scores, FP32, for the balance loss."""
    counts: Int[Tensor, " e"]
    """Number of the n tokens that chose each expert."""


def stable_topk(x: Float[Tensor, "n e"], k: int) -> Int[Tensor, "n k"]:
    """Return the indices of the k largest in each row, largest first, the lowest index first among equals.

    torch.topk promises neither order.
    """
    return x.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def route(
    logits: Float[Tensor, "n e"],
    bias: Float[Tensor, " e"] | None,
    *,
    n_activated_experts: int,
    n_expert_groups: int = 1,
    n_limited_groups: int = 1,
    score_func: Literal["sigmoid", "softmax", "sqrtsoftplus"] | ScoreFunc = "sigmoid",
    norm_topk_prob: bool = True,
    route_scale: float = 1.0,
    chosen: Int[Tensor, "n k"] | None = None,
) -> Routing:
    """Choose experts per token by group-limited top-k.

    The bias steers selection only; the weights use the unbiased scores. With a bias a group is scored by its best two
    experts (V3), without one by its best (V2). Excluded groups are -inf, not 0: biased scores may be negative.
    Among equal scores the lower expert wins, on every device.

    Args:
        score_func: sigmoid (V3), softmax (V2), sqrtsoftplus (V4), or a function from logits to scores, both [n, e].
        chosen: the experts, where a table names them; the scores then make the weights alone.

    Source: DeepSeek-V3 report, section 2.1.2, equations 12 to 16; DeepSeek-V4 report, section 2.1.
    """
    each, left = divmod(logits.shape[1], n_expert_groups)
    reachable = each * n_limited_groups
    score = SCORE_FUNCS.get(score_func) if isinstance(score_func, str) else score_func
    if score is None or left or n_activated_experts > reachable:
        raise ValueError(
            f"score_func={score_func!r}, n_activated_experts={n_activated_experts} of {reachable} reachable experts in "
            f"groups of {each}, {left} left over; want {', '.join(SCORE_FUNCS)}, groups of equal size, and no more "
            "active than reachable experts"
        )
    # 1. scores, and what experts are chosen by: [n, e]
    scores = score(logits)
    choice = scores.detach() if bias is None else scores.detach() + bias
    # 2. the best groups of a token; all other groups are out: [n, g] and [n, g, e/g]
    if n_expert_groups > 1:
        grouped = rearrange(choice, "n (g i) -> n g i", g=n_expert_groups)
        group_scores = grouped.amax(-1) if bias is None else grouped.topk(2, -1).values.sum(-1)
        kept = stable_topk(group_scores, n_limited_groups)
        excluded = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
        choice = rearrange(grouped.masked_fill(excluded.unsqueeze(-1), -torch.inf), "n g i -> n (g i)")
    # 3. experts and their weights: [n, k]
    indices = stable_topk(choice, n_activated_experts) if chosen is None else chosen
    weights = scores.gather(1, indices)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    # 4. load: [e]
    ones = torch.ones_like(indices).flatten()
    counts = scores.new_zeros(scores.shape[1], dtype=torch.int64).scatter_add(0, indices.flatten(), ones)
    return Routing(indices, weights * route_scale, scores, counts)


class Gate(FP32Module):
    """The gate of a MoE layer. From a config, or from plain arguments.

    The weight and, with topk_method "noaux_tc", the selection bias are FP32 and stay so. The bias is a
    buffer: no optimizer sees it, `update_bias` moves it once an optimizer step.

    Source: DeepSeek-V3 report, section 2.1.2; V2's softmax gate: DeepSeek-V2 report, section 2.2.
    """

    bias: Tensor | None

    def __init__(self, config: ModelConfig | None = None, /, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        self.weight: nn.Parameter = nn.Parameter(torch.empty(c.n_routed_experts, c.dim, dtype=torch.float32))
        bias = torch.zeros(c.n_routed_experts, dtype=torch.float32) if c.topk_method == "noaux_tc" else None
        self.register_buffer("bias", bias)
        self.options: dict[str, Any] = {name: getattr(c, name) for name in OPTIONS}
        self.init_std: float = c.init_std
        draw_first(self)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight from a normal distribution; the bias starts at zero."""
        draw_normal(self.weight, self.init_std, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        groups = "{n_limited_groups} of {n_expert_groups} groups".format_map(self.options)
        (e, m), k = self.weight.shape, self.options["n_activated_experts"]
        return f"{m}, {k} of {e} experts, {groups}, {self.options['score_func']}"

    def asks(self, context: Context | None) -> tuple[Any, ...]:
        """Return what forward takes besides x: of a gate that chooses by scores, the experts that are imposed."""
        experts = None if context is None else context.experts
        return () if experts is None else (experts.flatten(0, -2),)

    def forward(self, x: Float[Tensor, "n m"], chosen: Int[Tensor, "n k"] | None = None) -> Routing:
        """Choose experts for each token.

        Args:
            chosen: experts that were recorded before, and are imposed; -1: the gate chooses. Scores and weights are
                computed in any case, so that the gate learns. Source: rollout routing replay (arXiv 2510.11370).

        Raises: ValueError for an x that is not [n, dim].
        """
        logits = self.logits(x)
        routing = route(logits, self.bias, **self.options)
        if chosen is None:
            return routing
        return route(logits, None, **self.options, chosen=chosen.where(chosen >= 0, routing.indices))

    def logits(self, x: Float[Tensor, "n m"]) -> Float[Tensor, "n e"]:
        """Return a logit for each token and expert, in FP32.

        Raises: ValueError as forward does.
        """
        m = self.weight.shape[1]
        if x.dim() != 2 or x.shape[1] != m:
            fix = "; use x.flatten(0, -2)" if x.shape[-1:] == (m,) else ""
            raise ValueError(f"the gate got {tuple(x.shape)}; want [n, {m}], a row for each token{fix}")
        # fp32: bf16 scores tie, and ties choose different experts on different devices
        with ops.without_autocast(x):
            return linear(at_least_fp32(x), self.weight)

    def update_bias(self, counts: Int[Tensor, " e"], speed: float) -> None:
        """Move the bias by `speed` towards the experts with less than the mean load; nothing to do without a bias.

        Args:
            counts: tokens each expert received over a whole optimizer step, summed over its parts.

        Source: DeepSeek-V3 report, section 2.1.2, auxiliary-loss-free load balancing.
        """
        if counts.shape != self.weight.shape[:1]:
            raise ValueError(
                f"counts has shape {tuple(counts.shape)}; want one count an expert, [{self.weight.shape[0]}]"
            )
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias_after(self.bias, counts, speed))


class HashGate(Gate):
    """A gate that looks the experts of a token up by its id. The weights are made of its scores, as in any gate.

    It has no selection bias, and nothing balances its load but the table: the balance loss moves none of its scores.

    Args:
        layer: number of the block; each has a table of its own.

    Source: DeepSeek-V4 report, section 2.1. It does not print how DeepSeek makes the table.
    """

    tid2eid: Int[Tensor, "v k"]
    """Experts of each token id, int32: a buffer, saved with the model."""

    def __init__(self, config: ModelConfig | None = None, /, layer: int = 0, **arguments: Any) -> None:
        c = layer_config(config, arguments)
        super().__init__(c)
        self.layer: int = layer
        self.bias: Tensor | None = None
        self.register_buffer("tid2eid", torch.empty(c.vocab_size, c.n_activated_experts, dtype=torch.int32))
        self.table_shape: tuple[int, ...] = tuple(self.tid2eid.shape)
        self.make_table()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight, and make the table of a text whose tokens are all equally frequent."""
        super().reset_parameters(generator)
        if "tid2eid" in self._buffers:  # not yet while Gate.__init__ runs
            self.make_table()

    def make_table(self, counts: Int[Tensor, " v"] | None = None) -> None:
        """Replace the table by `hash_table` of these token counts; None: all are equal."""
        if not self.tid2eid.is_meta:
            v, k = self.table_shape
            counts = torch.ones(v, dtype=torch.int64, device="cpu") if counts is None else counts
            self.tid2eid.copy_(hash_table(counts, len(self.weight), k, self.layer))

    def asks(self, context: Context | None) -> tuple[Any, ...]:
        """Return the ids of the tokens."""
        tokens = None if context is None else context.tokens
        return () if tokens is None else (tokens.flatten(),)

    def forward(self, x: Float[Tensor, "n m"], tokens: Int[Tensor, " n"] | None = None) -> Routing:
        """Weigh the experts of each token.

        Args:
            tokens: ids of the rows of x.

        Raises: ValueError without ids, for a table of another vocabulary, for one that `check_table` refuses, and for
            an x that is not [n, dim].
        """
        got, want = tuple(self.tid2eid.shape), self.table_shape
        require(tokens is not None, "a hash layer chooses experts by token ids and got none; give Context(tokens=...)")
        require(got == want, f"tid2eid is {list(got)}; want {list(want)}, a row for each token; load the model's own")
        chosen = self.tid2eid[tokens].long()
        if ops.can_read_values(chosen):
            check_table(chosen, len(self.weight))
        routing = route(self.logits(x), None, **self.options, chosen=chosen)
        return routing._replace(scores=routing.scores.detach())


def make_tables(gates: Iterable[Gate], counts: Int[Tensor, " v"]) -> None:
    """Make the tables of all hash layers of the token counts of a text, as training does."""
    for gate in gates:
        if isinstance(gate, HashGate):
            gate.make_table(counts)


def check_table(experts: Int[Tensor, "n k"], n_experts: int) -> None:
    """Raise ValueError for a row with an expert twice, as in a table of zeros, or with one that does not exist."""
    rows = experts.sort(-1).values
    wrong = (rows[:, 1:] == rows[:, :-1]).any(-1) | (rows[:, 0] < 0) | (rows[:, -1] >= n_experts)
    if bool(wrong.any()):
        raise ValueError(
            f"tid2eid names the experts {experts[wrong][0].tolist()} for a token; want {experts.shape[1]} different "
            f"ones of 0 to {n_experts - 1}: load the model's own table, or make one by HashGate.make_table"
        )


def hash_table(counts: Int[Tensor, " v"], n_experts: int, k: int, layer: int = 0) -> Int[Tensor, "v k"]:
    """Return k different experts for each token id, such that the experts share the tokens of a text evenly.

    Greedy: from the most frequent token on, each gets the k experts with the least load so far, drawn by the number of
    the layer among equals. A token counts once more than it was seen, so that new ones are spread too. The result is
    the same on every machine. It is made in main memory, whatever torch's default device.

    Args:
        counts: number of times that each token id was seen.
    """
    counts = counts.cpu()
    draw, frequent = random.Random(layer).random, counts.argsort(descending=True, stable=True)
    experts = [(0, draw(), expert) for expert in range(n_experts)]
    heapq.heapify(experts)
    table: list[list[int]] = [[]] * len(counts)
    for token, count in zip(frequent.tolist(), counts[frequent].tolist(), strict=True):
        least = [heapq.heappop(experts) for _ in range(k)]
        table[token] = [expert for _, _, expert in least]
        for load, _, expert in least:
            heapq.heappush(experts, (load + count + 1, draw(), expert))
    return torch.tensor(table, dtype=torch.int32, device="cpu")


def bias_after(bias: Float[Tensor, " e"], counts: Int[Tensor, " e"], speed: float) -> Float[Tensor, " e"]:
    """Return the selection bias after a step: raised by `speed` for experts below the mean load, lowered above it."""
    below = torch.sign(counts.sum() - counts.numel() * counts)  # whole numbers: mean - load has this sign, exactly
    return bias + speed * below.to(bias.dtype)


def sequence_balance_loss(
    scores: Float[Tensor, "n e"],
    indices: Int[Tensor, "n k"],
    batch_size: int,
    counts: Literal["published", "routed"] = "published",
) -> Float[Tensor, ""]:
    """Return the sequence-wise balance loss of one MoE layer, mean over the sequences, without its weight alpha.

    For a sequence of T tokens: f_i = N_r / (K_r T) * (tokens that chose expert i), P_i = the mean over the sequence of
    scores normalised over all experts, loss = sum of f_i P_i; 1 when the load is even.

    Args:
        scores, indices: of a Routing over batch_size whole sequences, one after the other.
        counts: published: f counts the top-k of the plain scores, as equation 18 has it; routed: the experts that were
            really chosen, with bias and groups, as most code does.

    Source: DeepSeek-V3 report, section 2.1.2, equations 17 to 20.
    """
    if counts not in ("published", "routed"):
        raise ValueError(f"counts={counts!r} is unknown; use published or routed")
    e, k = scores.shape[1], indices.shape[1]
    chosen = indices if counts == "routed" else stable_topk(scores.detach(), k)
    per_sequence = rearrange(chosen, "(b t) k -> b (t k)", b=batch_size)
    tokens = torch.zeros(batch_size, e, device=scores.device, dtype=scores.dtype)
    tokens = tokens.scatter_add(1, per_sequence, torch.ones_like(per_sequence, dtype=scores.dtype))
    f = tokens * (e / per_sequence.shape[1])
    p = rearrange(scores / scores.sum(-1, keepdim=True), "(b t) e -> b t e", b=batch_size).mean(1)
    return (f * p).sum(-1).mean()


def max_violation(counts: Int[Tensor, "*layers e"]) -> Float[Tensor, "*layers"]:
    """Return MaxVio of each layer: (largest load - mean load) / mean load; 0 is perfect balance.

    Source: Wang et al. 2024, auxiliary-loss-free load balancing (arXiv 2408.15664), section 4.1.
    """
    load = counts.float()
    mean = load.mean(-1)
    return (load.amax(-1) - mean) / mean.clamp(min=1e-20)
