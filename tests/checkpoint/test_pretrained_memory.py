"""Memory of a load, measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsmini
from dsmini import ModelConfig, save_pretrained
from tests.helpers.commands import ROOT

MEASURE = """
import sys
from pathlib import Path
import torch
from dsmini import load_pretrained  # by name: the package imports a name when it is first used

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

load, folder = sys.argv[1:]
Path("/proc/self/clear_refs").write_text("5")
base = status("VmRSS")
model = load_pretrained(folder, fp8=load)
peak = status("VmHWM") - base
print(peak, sum(t.nbytes for t in model.state_dict().values()))
"""


def measured(load: str, folder: Path) -> tuple[int, int]:
    """Bytes at the peak above what the imports took, and bytes of the model."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, load, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    return peak, size


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure the peak")
def test_load_takes_at_most_the_model_and_a_file(tmp_path: Path) -> None:
    """At most the model, one file, and a tenth more."""
    sizes = {"vocab_size": 1000, "dim": 512, "inter_dim": 1024, "moe_inter_dim": 512, "n_layers": 6, "n_heads": 4}
    model = dsmini.Transformer(ModelConfig(**sizes, n_mtp_layers=0, max_seq_len=32)).to(torch.bfloat16)
    shard = 30_000_000
    save_pretrained(model, tmp_path / "bf16", shard_size=shard)
    save_pretrained(model, tmp_path / "fp8", fp8=True, shard_size=shard // 2)
    for load, folder, largest in (
        ("keep", "bf16", shard),
        ("keep", "fp8", shard // 2),
        ("dequantize", "fp8", shard // 2),
    ):
        peak, size = measured(load, tmp_path / folder)
        print(f"{folder}, {load}: model {size / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, {peak / size:.2f} of the model")
        assert len(list((tmp_path / folder).glob("model-*.safetensors"))) > 4
        assert peak <= 1.1 * (size + largest)
