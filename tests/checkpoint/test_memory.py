"""Memory of a load: what it takes, and models that are refused because it is not there; shares of a container."""

import os
from pathlib import Path

import pytest
import torch

from dsmini import ModelConfig, Transformer, load_pretrained, save_pretrained
from dsmini.machine import cores, free_bytes, refuse_too_large
from tests.helpers import commands
from tests.helpers.configs import refusal

CPU = torch.device("cpu")
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
MEASURE = """
import sys
from pathlib import Path
from dsmini import load_pretrained  # by name: the package imports a name when it is first used

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

load, folder = sys.argv[1:]
load_pretrained("good")  # imports the rest
Path("/proc/self/clear_refs").write_text("5")
base = status("VmRSS")
model = load_pretrained(folder, fp8=load)
peak = status("VmHWM") - base
print(peak, sum(t.nbytes for t in model.state_dict().values()))
"""


@NEEDS_PROC
@pytest.mark.usefixtures("folder")
def test_load_takes_at_most_the_model_and_a_file(tmp_path: Path) -> None:
    """At most the model, a file of 30 MB, and a tenth more, also of one file; measured in processes of their own."""
    sizes = {"vocab_size": 1000, "dim": 512, "inter_dim": 1024, "moe_inter_dim": 512, "n_layers": 6, "n_heads": 4}
    model = Transformer(ModelConfig(**sizes, n_mtp_layers=0, max_seq_len=32)).to(torch.bfloat16)
    shard = 30_000_000
    save_pretrained(model, tmp_path / "bf16", shard_size=shard)
    save_pretrained(model, tmp_path / "fp8", fp8=True, shard_size=shard // 2)
    save_pretrained(model, tmp_path / "whole")
    (tmp_path / "measure.py").write_text(MEASURE)
    for load, folder, largest in (
        ("keep", "bf16", shard),
        ("keep", "fp8", shard // 2),
        ("dequantize", "fp8", shard // 2),
        ("keep", "whole", shard),
    ):
        done = commands.run_apart(f"measure {load} {folder}", tmp_path)
        assert done.returncode == 0, done.stderr
        peak, size = map(int, done.stdout.split())
        print(f"{folder}, {load}: model {size / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, {peak / size:.2f} of the model")
        assert len(list((tmp_path / folder).glob("model-*.safetensors"))) > 4 or folder == "whole"
        assert peak <= 1.1 * (size + largest)


def test_model_larger_than_the_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = sum(tensor.nbytes for tensor in load_pretrained(folder).state_dict().values())
    monkeypatch.setattr("dsmini.machine.free_bytes", lambda device: need)
    load_pretrained(folder)
    monkeypatch.setattr("dsmini.machine.free_bytes", lambda device: need - 1)
    monkeypatch.setattr("dsmini.checkpoint.load._allocate", lambda *_: pytest.fail("memory was taken"))
    said = f"the model of {folder} needs {need:,} bytes of memory, and this machine has {need - 1:,} left on cpu; use "
    assert said in refusal(load_pretrained, folder)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the texts of all files that can be read, by path, for a test to fill."""
    texts: dict[str, str] = {}

    def read_text(path: Path, *_: object) -> str:
        if str(path) in texts:
            return texts[str(path)]
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    return texts


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/user.slice/run.scope", "user.slice", ("memory.max", "memory.current", "")),
        ("4:memory:/docker/0123", "memory/docker/0123", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")),
    ],
)
def test_free_memory_is_that_of_nested_groups(
    line: str, folder: str, names: tuple[str, str, str], there: dict[str, str]
) -> None:
    limit, used, prefix = names
    group = f"/sys/fs/cgroup/{folder}"
    there |= {"/proc/self/cgroup": line, f"{group}/{limit}": "2000000", f"{group}/{used}": "1500000"}
    there[f"{group}/memory.stat"] = f"{prefix}inactive_file 1000\n{prefix}active_file 200"
    assert free_bytes(CPU) == 501_200


@pytest.mark.parametrize(
    ("line", "files", "want"),
    [
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "150000 100000", "a/b/cpu.max": "900000 100000"}, 2),
        ("0::/", {"cpu.max": "20000 100000"}, 1),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 6),
        ("4:cpuset:/a", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 6),
        ("0::/", {"cpu.max": "6400000 100000"}, 6),
    ],
)
def test_cores_are_at_most_the_share_of_a_container(
    monkeypatch: pytest.MonkeyPatch, there: dict[str, str], line: str, files: dict[str, str], want: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    there |= {f"/sys/fs/cgroup/{name}": text for name, text in files.items()} | {"/proc/self/cgroup": line}
    assert cores() == want


@NEEDS_PROC
def test_free_memory_is_at_most_what_there_is() -> None:
    free = free_bytes(CPU)
    assert free is not None
    assert 2**20 < free < 2**50
    refuse_too_large(2**20, "it", CPU)
    assert "it needs 1,125,899,906,842,624 bytes of memory" in refusal(refuse_too_large, 2**50, "it", CPU)
