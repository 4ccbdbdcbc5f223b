"""Triton's machine code divides as IEEE 754 says and fuses no operations. No GPU is needed."""

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's"),
]
AMAX_MIN = 1e-4


@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code_divides_as_ieee_and_fuses_nothing(
    capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Check the code compiled from all launches. The GPU need not be present."""
    from dsmini_kernels.triton import tiles

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    codes: dict[str, list[str]] = {"quantize_program": [], "dequantize_program": [], "pack_program": []}
    for name, found in codes.items():
        # a program that is not a JITFunction counts as interpreted, and takes tensors in main memory
        monkeypatch.setattr(tiles, name, Compiler(getattr(tiles, name), capability, found))
    x, ends = torch.ones(256, 256, dtype=torch.bfloat16), torch.tensor([0, 100, 256])
    tiles.quantize(x, (1, 128), "ue8m0", "e4m3", AMAX_MIN)
    tiles.quantize(x.half(), (128, 128), "fp32", "e5m6", AMAX_MIN)
    tiles.quantize_dequantize(x.float(), (128, 1), "fp32", "e5m2", AMAX_MIN, torch.bfloat16, ends)
    f8, one = x.to(torch.float8_e4m3fn), torch.ones(256, 2)
    tiles.dequantize(f8, one, (1, 128), "e4m3", torch.float16)
    tiles.dequantize(torch.zeros(256, 384, dtype=torch.uint8), one, (1, 128), "e5m6", torch.bfloat16, 256)
    assert [len(found) for found in codes.values()] == [3, 2, 1]
    assert all("div.rn.f32" in code for code in codes["quantize_program"])
    for code in (code for found in codes.values() for code in found):
        assert not re.search(r"\bfma\.|\.ftz|div\.full|div\.approx|rcp\.", code)


class Compiler:
    """A stand-in for a kernel: compiles it for one NVIDIA compute capability, runs ptxas, and stores the PTX."""

    def __init__(self, kernel: Any, capability: int, found: list[str]) -> None:
        self.kernel, self.capability, self.found = kernel, capability, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        kinds = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}
        kinds |= {torch.int16: "i16", torch.int64: "i64"}
        fixed = {name: value for name, value in constants.items() if name in names}
        options = {name: value for name, value in constants.items() if name not in names}
        signature = dict.fromkeys(names, "constexpr")
        for name, arg in zip(names, args, strict=False):
            if arg is None:
                fixed[name] = None
            else:
                signature[name] = f"*{kinds[arg.dtype]}" if isinstance(arg, Tensor) else "i32"
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=fixed)
        done = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        assert done.asm["cubin"]
        self.found.append(cast(str, done.asm["ptx"]))
