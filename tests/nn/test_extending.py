"""A researcher's change stays local: each is made here in under 25 lines, trained for a step, and decoded."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmini import Block, Linear, ModelConfig, Transformer
from dsmini.nn.cache import Past
from tests.conftest import SMALL, randomise
from tests.helpers.tolerances import FP32_MODEL, relative_error


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


def check_training_and_decoding(model: Transformer, changed: str) -> None:
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
    assert len(before) >= SMALL["n_layers"] + SMALL["n_mtp_layers"]
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
