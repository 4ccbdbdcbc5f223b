"""A researcher's change stays local: each is made here in under 25 lines, trained for a step, and decoded."""

import functools
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmini import MLA, Block, Linear, ModelConfig, Transformer
from dsmini.functional.cached_attention import cached_attention
from dsmini.nn.cache import Past
from tests.conftest import SMALL, randomise
from tests.helpers.tolerances import FP32_MODEL, relative_error

WINDOW = 6
ALL_LAYERS = SMALL["n_layers"] + SMALL["n_mtp_layers"]


class ScaledResidual(Block):
    """A block whose additions are weighed by a learned number for each, as in ReZero (Bachlechner et al. 2020)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x: Tensor, table: Any = None, documents: Any = None, past: Past | None = None) -> Any:
        x = x + self.alpha[0] * self.attn(self.attn_norm(x), table, documents, past)
        y = self.ffn(self.ffn_norm(x))
        y, routing = y if isinstance(y, tuple) else (y, None)
        return x + self.alpha[1] * y, routing


class AttentionWithoutPositions(nn.Module):
    """Multi-query attention without rotary embedding (NoPE, Kazemnejad et al. 2023)."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.d, self.v = c.n_heads, c.qk_nope_head_dim, c.v_head_dim
        self.wq, self.wkv = Linear(c.dim, c.n_heads * self.d), Linear(c.dim, self.d + self.v)
        self.wo = Linear(c.n_heads * self.v, c.dim)

    def forward(self, x: Tensor, table: Any = None, documents: Any = None, past: Past | None = None) -> Tensor:
        q = self.wq(x).unflatten(-1, (self.n_heads, self.d)).transpose(1, 2)
        rows, mask = self.wkv(x), torch.ones(x.shape[1], x.shape[1]).tril().bool()
        if past is not None:
            past.store.write(rows, past.window)
            rows = past.store.read(past.window.end, x.dtype)
            mask = past.window.positions[:, None, :, None] >= torch.arange(past.window.end)
        k, v = rows.unsqueeze(1).split((self.d, self.v), -1)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.wo(y.transpose(1, 2).flatten(2))


class SlidingMLA(MLA):
    """MLA whose queries see the last WINDOW tokens only, their own included."""

    def forward(self, x: Tensor, table: Any = None, documents: Any = None, past: Past | None = None) -> Tensor:
        table = table or self.rope.table(torch.arange(x.shape[1]))
        q, (c_kv, k_rope) = self.queries(x, table), self.latents(x, table)
        positions = torch.arange(x.shape[1])[None]
        if past is not None:
            past.append((c_kv, k_rope))
            c_kv, k_rope = past.store.read(past.window.end, q.dtype).tensor_split((self.kv_lora_rank,), -1)
            positions = past.window.positions
        k_nope, v = self.wkv_b(c_kv).unflatten(-1, (self.n_heads, -1)).tensor_split((self.qk_nope_head_dim,), -1)
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, self.n_heads, -1)), -1)
        distance = positions[..., None] - torch.arange(k.shape[1])
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        y = cached_attention(q, k, v, self.scale, (distance < 0) | (distance >= WINDOW))
        return self.wo(y.transpose(1, 2).flatten(2))


def score_by_softplus(model: Transformer) -> Transformer:
    """Let every gate score experts by sqrt(softplus(logit)), as DeepSeek-V4's do."""
    for gate in model.gates():
        gate.options["score_func"] = lambda logits: F.softplus(logits).sqrt()
    return model


def check_training_and_decoding(model: Transformer, changed: str, layers: int = ALL_LAYERS) -> None:
    """One step lowers the loss and moves the parameters of that name; a cache answers as the whole sequence does."""
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if changed in name}
    losses = []
    for _ in range(2):
        losses.append(model.losses(tokens[:, :-1], tokens[:, 1:]).total)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]
    assert len(before) >= layers
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    want, cache = model(tokens), model.new_cache(2)
    got = torch.cat([model(part, cache) for part in tokens.split((7, 1, 12), 1)], 1)
    assert relative_error(got, want) < FP32_MODEL


def test_another_residual_rule_is_a_subclass_of_block() -> None:
    model = randomise(Transformer(**SMALL, make_block=ScaledResidual))
    check_training_and_decoding(model, "alpha")
    plain = Transformer(**SMALL)
    state = {name: t for name, t in model.state_dict().items() if not name.endswith("alpha")}
    plain.load_state_dict(state)
    tokens = torch.randint(0, SMALL["vocab_size"], (1, 9))
    assert not torch.equal(plain(tokens), model(tokens))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("alpha"):
                p.fill_(1.0)
    assert torch.equal(plain(tokens), model(tokens))


def test_another_attention_class_is_handed_to_transformer() -> None:
    make_block = functools.partial(Block, attention_class=AttentionWithoutPositions)
    model = randomise(Transformer(**SMALL, attention="mqa", make_block=make_block))
    assert all(isinstance(block.attn, AttentionWithoutPositions) for block in model.layers)
    assert all(isinstance(mtp.block.attn, AttentionWithoutPositions) for mtp in model.mtp)
    check_training_and_decoding(model, "attn.wkv")


def test_sliding_window_is_a_subclass_of_mla() -> None:
    make_block = functools.partial(Block, attention_class=SlidingMLA)
    model = randomise(Transformer(**SMALL, make_block=make_block))
    check_training_and_decoding(model, "attn.wkv_b")
    tokens = torch.randint(0, SMALL["vocab_size"], (1, 30))
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % SMALL["vocab_size"]
    reach = SMALL["n_layers"] * (WINDOW - 1)  # of the first token, through all layers
    with torch.no_grad():
        moved = (model(tokens) - model(other)).abs().amax(-1)[0]
    assert moved[reach + 1 :].max() == 0 < moved[: reach + 1].min()


def test_another_score_function_is_given_to_the_gates() -> None:
    model = score_by_softplus(randomise(Transformer(**SMALL)))
    check_training_and_decoding(model, "gate.weight", ALL_LAYERS - SMALL["n_dense_layers"])
    routing = model.run(torch.randint(0, SMALL["vocab_size"], (1, 9))).routing
    assert all((r.scores > 0).all() and (r.scores.max() > 1) for r in routing)  # beyond what a sigmoid gives


@pytest.mark.parametrize("change", [ScaledResidual, AttentionWithoutPositions, SlidingMLA, score_by_softplus])
def test_each_change_takes_under_25_lines(change: Any) -> None:
    assert len(inspect.getsource(change).splitlines()) < 25
