"""On a GPU dsmini computes, generates and trains as on the CPU, whose results are these tests' references."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dsmini
from dsmini import ModelConfig, RunConfig, Transformer, load_pretrained, ops
from dsmini.checkpoint.training_state import checkpoint_folders
from dsmini.config.run import ParallelConfig
from dsmini.data.corpus import Corpus
from dsmini.distributed.mesh import Mesh, divided_model, fill
from dsmini.distributed.world import World
from dsmini.nn.cache import CacheDtype
from dsmini.train import main
from dsmini.training.record import Row
from dsmini.training.trainer import Trainer
from tests.conftest import SMALL, randomise
from tests.helpers import folders
from tests.helpers.commands import ROOT, TINY
from tests.helpers.configs import FP8_SIZES
from tests.helpers.runs import read_records
from tests.helpers.tolerances import BF16_UNIT, E4M3_UNIT, FP32_UNIT, relative_error, rounding

pytestmark = pytest.mark.gpu
# sums of at most 512 terms, some 20 of them chained in each of four blocks and one of multi-token prediction
DEFAULT_MODEL = rounding(FP32_UNIT, terms=512, chained=100)


def step(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """Return the losses and all gradients on the CPU."""
    losses = model.losses(tokens[:, :-1], tokens[:, 1:])
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(losses.total, list(named.values()))
    found = {"main": losses.main, "total": losses.total} | dict(zip(named, grads, strict=True))
    assert all(t.device == tokens.device for t in found.values())
    return {name: t.detach().cpu() for name, t in found.items()}


def test_losses_and_gradients_of_the_default_model_equal_fp64s(device: str) -> None:
    model, tokens = randomise(Transformer(ModelConfig())), torch.randint(0, 256, (2, 64))
    got = step(model.to(device), tokens.to(device))
    chosen = [routing.indices.cpu() for routing in model.run(tokens.to(device), mtp=True).routing]
    exact = model.cpu().double()
    want = step(exact, tokens)
    # another expert would be another function: no two scores are so close that rounding decides
    assert all(torch.equal(a, r.indices) for a, r in zip(chosen, exact.run(tokens, mtp=True).routing, strict=True))
    for name, value in want.items():
        assert relative_error(got[name], value) < DEFAULT_MODEL, name


def test_fp8_training_is_close_to_the_reference_on_the_cpu(device: str) -> None:
    """Sums of another order move a code to its neighbour here and there. All experts are chosen, so none is swapped."""
    choices = {"n_expert_groups": 1, "n_limited_groups": 1, "n_activated_experts": 8}
    model, tokens = randomise(Transformer(ModelConfig(**SMALL | FP8_SIZES | choices))), torch.randint(0, 61, (2, 24))
    with ops.use("reference"), torch.no_grad():
        logits = model(tokens)
    with ops.use("reference"):
        want = step(model, tokens)
    model.to(device)
    with torch.no_grad():
        assert relative_error(model(tokens.to(device)).cpu(), logits) < E4M3_UNIT / 10
    got = step(model, tokens.to(device))
    assert relative_error(got["total"], want["total"]) < E4M3_UNIT / 10
    whole = [torch.cat([t.flatten() for t in found.values()]) for found in (got, want)]
    assert relative_error(*whole) < E4M3_UNIT


@pytest.mark.parametrize("fp8", ["keep", "dequantize"])
def test_a_folder_in_fp8_is_loaded_onto_the_device(tmp_path: Path, device: str, fp8: Any) -> None:
    sizes = {"dim": 136, "inter_dim": 200, "moe_inter_dim": 130, "kv_lora_rank": 560, "qk_rope_head_dim": 16}
    model = randomise(Transformer(ModelConfig(**SMALL | sizes | {"n_mtp_layers": 1})))
    tensors, _ = folders.in_fp8(folders.tensors_of(model))
    raw = folders.config_json(model.config, quantization_config=folders.QUANTIZED)
    folder = folders.write(tmp_path / "fp8", tensors, raw)
    want, tokens = load_pretrained(folder, dtype=torch.float32), torch.randint(0, 61, (2, 20))
    got = load_pretrained(folder, None if fp8 == "keep" else torch.float32, fp8, device)
    state = got.state_dict()
    assert {t.device.type for t in state.values()} == {device}
    assert any(t.dtype == folders.FP8 for t in state.values()) == (fp8 == "keep")
    error = relative_error(got(tokens.to(device)).cpu(), want(tokens))
    assert error < rounding(FP32_UNIT, terms=560, chained=40)


@pytest.mark.parametrize(
    ("attention", "cache_dtype"),
    [*(("mla", kind) for kind in (None, torch.bfloat16, "fp8")), ("gqa", None), ("gqa", torch.bfloat16)],
)
def test_cached_tokens_have_the_logits_of_the_cpu(device: str, attention: Any, cache_dtype: CacheDtype | None) -> None:
    heads = {"n_kv_heads": 2} if attention == "gqa" else {}
    model, tokens = randomise(Transformer(ModelConfig(attention=attention, **heads))), torch.randint(0, 256, (2, 30))

    def logits(tokens: Tensor) -> Tensor:
        cache = model.new_cache(2, 32, cache_dtype or torch.float32)
        with torch.no_grad():
            return torch.cat([model(part, cache=cache) for part in tokens.split([20, 1, 9], 1)], 1).cpu()

    want = logits(tokens)
    model.to(device)
    # a number that lies between two codes may be rounded to the other one
    allowed = {None: DEFAULT_MODEL, torch.bfloat16: BF16_UNIT / 10, "fp8": E4M3_UNIT / 10}[cache_dtype]
    assert relative_error(logits(tokens.to(device)), want) < allowed


@pytest.mark.parametrize("speculative", [False, True])
def test_greedy_text_of_the_default_model_is_the_cpus(device: str, speculative: bool) -> None:
    model, prompts = randomise(Transformer(ModelConfig())).eval(), [[1, 2, 3], [200, 7], [9] * 40]
    want = dsmini.generate(model, prompts, 16).tokens
    assert torch.equal(dsmini.generate(model.to(device), prompts, 16, speculative=speculative).tokens, want)


CORPUS = Corpus(
    train=torch.arange(3000).square().remainder(61).byte().numpy(),
    val=torch.arange(300).remainder(61).byte().numpy(),
    **{"source": "", "files": 1, "split": "", "sha256": ""},
)


def recipe(device: str, **changes: Any) -> RunConfig:
    train = dsmini.TrainConfig(device=device, dtype="float32", steps=8, batch_size=4, seq_len=16, **changes)
    return RunConfig(model=ModelConfig(**SMALL), train=train)


def losses_of(trainer: Trainer, steps: int = 3) -> Tensor:
    done = [trainer.step() for _ in range(steps)]
    assert not any(result.skipped for result in done)
    return torch.tensor([[result.loss, result.mtp_loss, result.grad_norm] for result in done], dtype=torch.float64)


def new_trainer(config: RunConfig, device: str, ranks: Mesh | None = None) -> Trainer:
    torch.manual_seed(0)
    if ranks is None:
        return Trainer(Transformer(config.model).to(device), CORPUS, config, torch.device(device))
    model = divided_model(config.model, ranks)
    fill(model, ranks, torch.device(device))
    return Trainer(model, CORPUS, config, torch.device(device), ranks)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_steps_have_the_losses_of_the_cpu(device: str, optimizer: Any) -> None:
    want = losses_of(new_trainer(recipe("cpu", optimizer=optimizer), "cpu"))
    got = losses_of(new_trainer(recipe(device, optimizer=optimizer), device))
    assert relative_error(got, want) < DEFAULT_MODEL


@pytest.fixture
def world(device: str) -> Iterator[World]:
    """Join a group of this process alone, over NCCL on a GPU."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield World()
    dist.destroy_process_group()


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_mesh_of_one_process_trains_as_no_mesh(device: str, world: World, zero: Any) -> None:
    assert world.first(lambda: 7) == 7 and world.gather("a") == ["a"]
    assert world.any(True) and not world.any(False)
    config = recipe(device)
    want = losses_of(new_trainer(config, device))
    got = losses_of(new_trainer(config, device, Mesh(ParallelConfig(zero=zero), torch.device(device))))
    assert relative_error(got, want) < DEFAULT_MODEL


@pytest.fixture
def arguments(tmp_path: Path, device: str) -> list[str]:
    """Write a text; return the arguments of dsmini.train for four steps on it."""
    (tmp_path / "text.txt").write_bytes(bytes(32 + i * i % 61 for i in range(20_000)))
    how = f"--train.device {device} --train.dtype float32 --train.steps 4 --train.save-every 2"
    return ["--data.path", str(tmp_path / "text.txt"), *TINY.split(), *how.split(), "--train.final-eval-tokens", "64"]


def records(folder: Path) -> list[Row]:
    found = read_records(folder)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    return found


def assert_alike(got: list[Row], want: list[Row]) -> None:
    for name in ("loss", "mtp_loss", "grad_norm"):
        values = [torch.tensor([row[name] for row in found]) for found in (got, want)]
        assert relative_error(*values) < DEFAULT_MODEL, name


def test_a_resumed_run_continues_as_if_it_had_not_stopped(tmp_path: Path, device: str, arguments: list[str]) -> None:
    out = tmp_path / "run"
    assert main([*arguments, "--out", str(out)]) == 0
    want = records(out)
    assert f'device = "{device}' in (out / "config.toml").read_text()
    shutil.rmtree(max(checkpoint_folders(out), key=str))
    assert main(["--resume", str(out)]) == 0
    assert_alike(records(out), want)


LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
OTHERS: dict[str, tuple[int, list[str], str]] = {
    "compiled": (1, [], "--train.compile"),
    "experts on two": (2, LAUNCH, "--parallel.ep 2"),
    "parameters on two": (2, LAUNCH, "--parallel.zero 3"),
}


@pytest.mark.parametrize(("gpus", "launch", "flags"), OTHERS.values(), ids=list(OTHERS))
def test_other_ways_of_training_have_the_same_losses(
    tmp_path: Path, device: str, arguments: list[str], gpus: int, launch: list[str], flags: str
) -> None:
    """In processes of their own: what is compiled may have no shape checks, which pytest turns on."""
    if device == "cuda" and torch.cuda.device_count() < gpus:
        pytest.skip("one CUDA GPU here; two processes want one each")
    assert main([*arguments, "--out", str(tmp_path / "plain")]) == 0
    command = [sys.executable, *launch, "-m", "dsmini.train", *arguments, "--out", str(tmp_path / "other")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    done = subprocess.run([*command, *flags.split()], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert_alike(records(tmp_path / "other"), records(tmp_path / "plain"))
