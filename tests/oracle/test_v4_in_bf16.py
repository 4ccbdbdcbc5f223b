"""V4 in BF16 next to a definition with the roundings of DeepSeek's released code, with and without its FP8."""

from typing import Any

import pytest
import torch

from dsmini import Transformer, ops
from dsmini.nn import Context
from tests import reference_v4
from tests.conftest import SMALL, randomise
from tests.helpers.configs import V4_MODEL
from tests.helpers.tolerances import FP32_MODEL, relative_error

SIZES: dict[str, Any] = SMALL | V4_MODEL | {"dim": 64, "head_dim": 96, "moe_inter_dim": 48, "n_activated_experts": 6}
SIZES |= {"n_routed_experts": 16, "swiglu_limit": 1.5, "index_topk": 99, "n_mtp_layers": 0, "max_seq_len": 64}


def model_of(qat: bool) -> Any:
    """Return a model whose weights are BF16 numbers, and whose experts are chosen alike by every precision."""
    model: Any = randomise(Transformer(**SIZES, qat=qat)).bfloat16().eval()
    for gate in model.gates():
        if gate.bias is not None:
            gate.bias.copy_(10.0 * torch.randperm(len(gate.bias)))
    return model


@pytest.mark.parametrize("qat", [False, True])
@torch.no_grad()
def test_bf16_is_as_near_to_the_exact_model_as_deepseeks_order(qat: bool) -> None:
    errors = []
    for _ in range(4):
        model, tokens = model_of(qat), torch.randint(0, SMALL["vocab_size"], (64,))
        exact, theirs = (reference_v4.logits(model, tokens, dtype) for dtype in (torch.float64, torch.bfloat16))
        mine = []
        for backend in ("reference", None):
            with ops.use(backend):
                mine.append(model(tokens[None])[0])
        dtypes = {one.dtype for one in (theirs, *mine)}
        errors.append([relative_error(one, exact) for one in (theirs, *mine)])
    assert dtypes == {torch.float32}
    of_theirs, *of_mine = torch.tensor(errors).mean(0)
    assert all(error <= 1.05 * of_theirs for error in of_mine)


@pytest.mark.parametrize("s", [1, 64])
@pytest.mark.parametrize("layer", [0, 1], ids=["hash", "scores"])
@torch.no_grad()
def test_experts_and_streams_round_where_deepseek_does(layer: int, s: int) -> None:
    """Sums of FP32 have orders, so that a number in a hundred may be rounded to the neighbour."""
    model, tokens = model_of(qat=False), torch.randint(0, SMALL["vocab_size"], (s,))
    block, c = model.layers[layer], model.config
    x, streams = torch.randn(s, c.dim).bfloat16(), torch.randn(s, c.hc_mult, c.dim).bfloat16()
    context = Context(positions=torch.arange(s)[None], tokens=tokens[None])
    written = block.hc_attn.write(streams[None], x[None], block.hc_attn.read(streams[None])[1])[0]
    expected = reference_v4.sublayer(streams, block.hc_attn, block.attn_norm, lambda _: x, c)
    experts = block.ffn(x, context)[0], reference_v4.moe(block.ffn, x, tokens, c)
    for got, want in (experts, (written, expected)):
        assert got.dtype == want.dtype == torch.bfloat16
        assert (got != want).float().mean() < 0.01


@torch.no_grad()
def test_the_definition_is_the_model_in_fp32() -> None:
    model, tokens = model_of(qat=False).float(), torch.randint(0, SMALL["vocab_size"], (64,))
    assert relative_error(model(tokens[None])[0], reference_v4.logits(model, tokens, torch.float64)) <= FP32_MODEL
