"""The Triton kernels are served or refused with a reason, run under Triton's interpreter, and divide as IEEE 754 says.

TRITON_INTERPRET=1 must be set before Triton is imported, and torch.compile needs it unset.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dsmini import ops
from dsmini.numerics import dequantize_tiles, quantize_tiles, round_tiles
from dsmini_kernels import triton as backend
from tests.helpers.commands import ROOT
from tests.helpers.gpu import VARIABLE
from tests.kernels.conftest import AMAX_MIN, Kernels

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
wants_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")


@pytest.mark.slow
@pytest.mark.timeout(900)
@wants_triton
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-n", "0", "-m", "gpu", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", VARIABLE: "cpu"}
    done = subprocess.run(
        [*command, "tests/kernels"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 30, done.stdout


@pytest.mark.parametrize("kernels", [pytest.param("triton", marks=pytest.mark.gpu)], indirect=True)
def test_unsupported_calls_raise_unserved(kernels: Kernels) -> None:
    x, wide = kernels.wild(4, 256), kernels.wild(256, 512)
    codes, scales = quantize_tiles(x, (1, 128), "ue8m0", "e4m3", AMAX_MIN)
    ends = torch.tensor([4], device=kernels.device)
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("x is torch.float64", lambda: quantize_tiles(x.double(), (1, 128), "ue8m0", "e4m3", AMAX_MIN)),
        ("format 'e2m1'", lambda: quantize_tiles(x, (1, 128), "ue8m0", "e2m1", AMAX_MIN)),
        ("tile of 256x512", lambda: quantize_tiles(wide, (256, 512), "ue8m0", "e4m3", AMAX_MIN)),
        ("got dtype=torch.float64", lambda: dequantize_tiles(codes, scales, (1, 128), "e4m3", torch.float64)),
        ("scales of shape", lambda: dequantize_tiles(codes, scales[:3], (1, 128))),
        ("are not 130 columns", lambda: dequantize_tiles(codes, scales, (1, 128), "e4m3", torch.float32, 130)),
        ("x has 3 dimensions", lambda: round_tiles(x[None], (2, 4), "fp32", "e4m3", AMAX_MIN, x.dtype, ends)),
    ]
    if kernels.device == "cuda":  # the interpreter takes tensors in main memory
        refused.append(("the tensor is on cpu", lambda: quantize_tiles(x.cpu(), (1, 2), "ue8m0", "e4m3", AMAX_MIN)))
    for reason, call in refused:
        with ops.use("triton"), pytest.raises(ValueError, match=rf"'triton' is forced and cannot run .*{reason}"):
            call()
    assert "dequantize" in backend.OPERATIONS and "triton: ready: Triton " in ops.explain()


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="Triton's kernels run in this process")
def test_forced_without_a_gpu_raises() -> None:
    reason = "Triton needs a GPU .* TRITON_INTERPRET=1" if INSTALLED else "Triton is not installed"
    with ops.use("triton"), pytest.raises(ValueError, match=rf"cannot run quantize: {reason}"):
        quantize_tiles(torch.ones(2, 2), (1, 2), "ue8m0", "e4m3", AMAX_MIN)


def test_missing_triton_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_FOUND", False)
    assert backend.why_not() == "Triton is not installed; pip install triton"


@wants_triton
@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's")
def test_gpu_without_a_c_compiler_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton finds no compiler in the first launch, in the middle of a training step."""

    def launch() -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "_launch_one", launch)
    for cached in (backend._why_no_launch, ops._load):
        cached.cache_clear()
    reason = "Triton cannot run a kernel on this GPU: RuntimeError: Failed to find C compiler. Please specify via CC"
    try:
        with pytest.warns(UserWarning, match=reason):
            assert ops.serving("cuda") == "eager"
        assert backend.why_not() == reason
    finally:
        for cached in (backend._why_no_launch, ops._load):
            cached.cache_clear()


@pytest.mark.slow
@wants_triton
@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's")
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
