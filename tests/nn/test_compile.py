"""Layers and losses under torch.compile equal themselves without it.

This file is also the program that each test runs: shape checks at run time, which pytest turns on, cannot be compiled.
C++ is made for one block and its losses; the other cases stop at the graphs, which is where compilation fails.
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

from dsmini import Transformer, quantize
from dsmini.nn import FP8Linear
from tests.conftest import SMALL, randomise
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, relative_error, rounding

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = SMALL | {
    **{"dim": 16, "moe_inter_dim": 8, "n_heads": 2, "n_mtp_layers": 1, "max_seq_len": 64, "original_seq_len": 32}
}
REAL: dict[str, dict[str, Any]] = {"README": {"dim": 128, "n_heads": 4}, "default": {}}
"""Sizes at which training without torch.compile runs kernels."""


def gradients_and_values(run: Callable[[], dict[str, Tensor]], module: nn.Module) -> dict[str, Tensor]:
    """Return what `run` returns, and the gradients of its first value."""
    out = run()
    grads = torch.autograd.grad(next(iter(out.values())), list(module.parameters()), allow_unused=True)
    named = {name: grad for (name, _), grad in zip(module.named_parameters(), grads, strict=True) if grad is not None}
    return out | named


def compare(run: Callable[[], dict[str, Tensor]], module: nn.Module, **options: Any) -> dict[str, float]:
    want = gradients_and_values(run, module)
    got = gradients_and_values(torch.compile(run, **options), module)
    assert got.keys() == want.keys() and len(got) > 9
    return {name: relative_error(got[name], want[name]) for name in want}


def losses(sizes: dict[str, Any], compute_dtype: torch.dtype, length: int = 33, **options: Any) -> dict[str, float]:
    """Compile the whole model: embedding, blocks, MoE, MTP, chunked cross-entropy, balance."""
    model = randomise(Transformer(**sizes, compute_dtype=compute_dtype))
    for gate in model.gates():
        # no scores so close that another rounding would pick another expert
        gate.bias.copy_(2.0 * torch.randperm(len(gate.weight)))  # pyright: ignore[reportOptionalMemberAccess]
    tokens, targets = torch.randint(0, 61, (2, 2, length)).unbind()

    def run() -> dict[str, Tensor]:
        losses = model.losses(tokens, targets, balance_alpha=0.1)
        named = {"total": losses.total, "main": losses.main, "mtp": losses.mtp, "balance": losses.balance}
        return named | {f"counts {i}": routing.counts for i, routing in enumerate(losses.routing)}

    return compare(run, model, **options)


def dense_blocks() -> dict[str, float]:
    """Compile a block of each attention, without routed experts, in one graph in FP32."""
    found = {}
    dsa = {"attention": "dsa", "index_n_heads": 3, "index_head_dim": 8, "index_topk": 9}
    for changes in ({}, {"q_lora_rank": None}, dsa, {"attention": "gqa", "n_kv_heads": 1}):
        torch._dynamo.reset()
        errors = losses(DENSE_BLOCK | changes, torch.float32, fullgraph=True, backend="aot_eager")
        found |= {f"{changes} {name}": error for name, error in errors.items()}
    return found


def ragged_fp8() -> dict[str, float]:
    """Tiles whose last is ragged, forward and backward; 288 is a latent of 256 and a rotary key of 32."""
    x = torch.randn(5, 200)
    out: dict[str, Tensor] = {}
    for rows, tile in ((5, (1, 128)), (5, (128, 128)), (1, (128, 50)), (5, (128, 1))):

        def run(x: Tensor, tile: tuple[int, int] = tile) -> Tensor:
            return quantize(x, tile).dequantize()

        torch._dynamo.reset()
        out[f"tile {tile}"] = torch.compile(run, fullgraph=True)(x[:rows]) - run(x[:rows])
    torch._dynamo.reset()
    layer = FP8Linear(256, 288)
    x = torch.randn(16, 256, requires_grad=True)
    dy = torch.randn(16, 288)
    made = [torch.autograd.grad(f(x), [x, layer.weight], dy) for f in (layer, torch.compile(layer))]
    out |= {name: b - a for name, a, b in zip(("dx", "dw"), *made, strict=True)}
    return {f"bits {name}": float((off != 0).sum() + off.isnan().sum()) for name, off in out.items()}


ONE_BLOCK = SIZES | {"n_layers": 1, "n_dense_layers": 0, "n_mtp_layers": 0}
DENSE_BLOCK = ONE_BLOCK | {"n_dense_layers": 1}
PROGRAMS: dict[str, Callable[[], dict[str, float]]] = {
    "one block in bf16": functools.partial(losses, ONE_BLOCK, torch.bfloat16, fullgraph=True, backend="aot_eager"),
    "dense blocks": dense_blocks,
    "losses in bf16": functools.partial(losses, SIZES, torch.bfloat16, fullgraph=True, backend="aot_eager"),
    "losses in fp32": functools.partial(losses, SIZES, torch.float32, backend="aot_eager"),
    "ragged tiles in C++": ragged_fp8,
    **{
        f"{name} sizes in bf16": functools.partial(losses, sizes, torch.bfloat16, 64, fullgraph=True, backend="eager")
        for name, sizes in REAL.items()
    },
    "one block in C++": functools.partial(losses, ONE_BLOCK, torch.bfloat16, fullgraph=True),
}
IN_BF16 = [case for case in PROGRAMS if "bf16" in case or case == "one block in C++"]
CHEAPEST, *OTHERS = PROGRAMS


@pytest.mark.parametrize("case", [CHEAPEST, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)])
def test_compiled_equals_eager(case: str) -> None:
    if "C++" in case and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    # scalar C++ compiles twice as fast
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    command = [sys.executable, __file__, case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    short = rounding(BF16_UNIT, chained=30) if case in IN_BF16 else rounding(FP32_UNIT, terms=40, chained=30)
    for name, error in json.loads(done.stdout.splitlines()[-1]).items():
        assert error <= (0.0 if name.startswith(("counts", "indices", "bits")) else short), name


if __name__ == "__main__":
    torch.manual_seed(4)
    print(json.dumps(PROGRAMS[sys.argv[1]]()))
