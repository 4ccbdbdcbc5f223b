"""Layers and losses under torch.compile equal themselves without it.

This file is also the program that the tests run: shape checks at run time, which pytest turns on, cannot be compiled.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "dim": 16,
    "inter_dim": 40,
    "moe_inter_dim": 8,
    "n_layers": 2,
    "n_heads": 2,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "n_activated_experts": 3,
    "max_seq_len": 64,
    "original_seq_len": 32,
}
CASES = ("layers in fp32", "losses in bf16", "losses in fp32")


def gradients_and_values(run: Callable[[], dict[str, Tensor]], module: nn.Module) -> dict[str, Tensor]:
    """What run returns, and the gradients of its first value."""
    out = run()
    grads = torch.autograd.grad(next(iter(out.values())), list(module.parameters()), allow_unused=True)
    named = {name: grad for (name, _), grad in zip(module.named_parameters(), grads, strict=True) if grad is not None}
    return out | named


def compare(run: Callable[[], dict[str, Tensor]], module: nn.Module, fullgraph: bool) -> dict[str, float]:
    from tests.tolerances import relative_error

    want = gradients_and_values(run, module)
    got = gradients_and_values(torch.compile(run, fullgraph=fullgraph), module)
    assert got.keys() == want.keys() and len(got) > 9
    return {name: relative_error(got[name], want[name]) for name in want}


def layers_in_fp32() -> dict[str, float]:
    """The layers without routed experts and the gate, in one graph."""
    from dsmini import MLA, Attention, FeedForward, Gate, RMSNorm
    from tests.conftest import randomise

    layers = nn.ModuleDict(
        {
            "norm": RMSNorm(16),
            "mla": MLA(**SIZES),
            "mla_without_q_lora": MLA(**SIZES | {"q_lora_rank": None}),
            "gqa": Attention(**SIZES | {"attention": "gqa", "n_kv_heads": 1}),
            "ffn": FeedForward(**SIZES),
            "gate": Gate(**SIZES),
        }
    )
    randomise(layers)
    x = torch.randn(2, 33, 16)

    def run() -> dict[str, Tensor]:
        out = {name: layer(x) for name, layer in layers.items() if name != "gate"}
        routing = layers["gate"](x.flatten(0, 1))
        out |= {"indices": routing.indices, "weights": routing.weights, "counts": routing.counts}
        loss = torch.stack([y.float().square().mean() for y in out.values()]).sum()
        return {"loss": loss} | out

    return compare(run, layers, fullgraph=True)


def losses(compute_dtype: torch.dtype | None, fullgraph: bool) -> dict[str, float]:
    """The whole model: embedding, blocks, MoE, MTP, chunked cross-entropy, balance."""
    from dsmini import Transformer
    from tests.conftest import randomise

    model = randomise(Transformer(**SIZES, compute_dtype=compute_dtype))
    tokens, targets = torch.randint(0, 61, (2, 2, 33)).unbind()

    def run() -> dict[str, Tensor]:
        losses = model.losses(tokens, targets, balance_alpha=0.1, chunk_rows=40)
        named = {"total": losses.total, "main": losses.main, "mtp": losses.mtp, "balance": losses.balance}
        return named | {f"counts {i}": routing.counts for i, routing in enumerate(losses.routing)}

    return compare(run, model, fullgraph)


PROGRAMS: dict[str, Callable[[], dict[str, float]]] = {
    "layers in fp32": layers_in_fp32,
    "losses in bf16": functools.partial(losses, torch.bfloat16, True),
    "losses in fp32": functools.partial(losses, None, False),
}


@functools.cache
def errors_of_all_cases() -> dict[str, dict[str, float]]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("case", CASES)
def test_compiled_equals_eager(case: str) -> None:
    from tests.tolerances import BF16_UNIT, FP32_UNIT, rounding

    bf16 = rounding(BF16_UNIT, chained=30)
    fp32 = rounding(FP32_UNIT, terms=40, chained=30)
    errors = errors_of_all_cases()[case]
    for name, error in errors.items():
        exact = name.startswith(("counts", "indices"))
        assert error <= (0.0 if exact else bf16 if "bf16" in case else fp32), name


if __name__ == "__main__":
    torch.manual_seed(4)
    print(json.dumps({case: PROGRAMS[case]() for case in CASES}))
