"""The model without its fast versions: dsmini without functional/ and kernels/, and as the first call of a process."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers.commands import ROOT
from tests.helpers.tolerances import FP32_MODEL, relative_error

SIZES = (
    "dim=64, n_layers=2, n_heads=2, inter_dim=96, moe_inter_dim=32, n_routed_experts=8, vocab_size=97, max_seq_len=64"
)
WITH_ALL = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
SCRIPT = f"""
import importlib.util, sys, torch, dsmini
assert importlib.util.find_spec("dsmini.functional") is None
results = []
for more in (
    dict(attention="mla"),
    dict(attention="gqa", n_kv_heads=1),
    dict(attention="dsa", index_n_heads=2, index_head_dim=32, index_topk=16),
    dict(precision="fp8"),
):
    torch.manual_seed(0)
    model = dsmini.Transformer({SIZES}, **more)
    tokens = torch.randint(0, 97, (2, 49))
    losses = model.losses(tokens[:, :-1], tokens[:, 1:])
    losses.total.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    results += [losses.total.detach(), grads.norm(), dsmini.generate(model, tokens[:, :20], 8).tokens]
torch.save(results, sys.argv[1])
"""


def test_the_model_trains_and_generates_alone(tmp_path: Path) -> None:
    (tmp_path / "dsmini").mkdir()
    for child in (ROOT / "dsmini").iterdir():
        if child.name not in ("functional", "__pycache__"):
            (tmp_path / "dsmini" / child.name).symlink_to(child)
    (tmp_path / "dsmini_kernels.py").write_text("raise ImportError('there are none')")
    alone = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "alone.pt"], env=alone, cwd=tmp_path, check=True)
    script = SCRIPT.replace("is None", "is not None")
    subprocess.run([sys.executable, "-c", script, tmp_path / "all.pt"], env=WITH_ALL, cwd=ROOT, check=True)
    got, want = torch.load(tmp_path / "alone.pt"), torch.load(tmp_path / "all.pt")
    assert all(relative_error(a, b) <= FP32_MODEL for a, b in zip(got[:9], want[:9], strict=True))
    assert relative_error(got[9], want[9]) <= 1e-3  # in FP8 sums of another order move codes to their neighbours


def test_the_first_call_of_a_process_compiles_in_one_graph() -> None:
    script = (
        f"import torch, dsmini; model = dsmini.Transformer({SIZES}, compute_dtype=torch.bfloat16)\n"
        "torch.compile(model, fullgraph=True, backend='eager')(torch.zeros(1, 32, dtype=torch.int64))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=WITH_ALL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
