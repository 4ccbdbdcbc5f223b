"""Generation by several ranks that divide the experts gives the tokens of one process."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini import ModelConfig, Transformer, load_pretrained
from dsmini.checkpoint.trained_model import load_run as load_whole
from dsmini.distributed.expert_shares import ExpertHolders
from dsmini.distributed.pretrained import load_pretrained as load_part
from dsmini.distributed.pretrained import load_run
from dsmini.distributed.shared_tokens import Agreement, ExpertShare, SharedTokens
from dsmini.distributed.world import World
from dsmini.inference.decoding import Decoder
from dsmini.inference.generation import Generation
from dsmini.inference.sampling import Sampling
from dsmini.nn.moe import MoE
from tests.conftest import randomise
from tests.distributed.generating import PROMPTS, SIZES, generated, logits_of, new_folder, part, placement_of
from tests.distributed.ranks import free_port, run_ranks
from tests.helpers.commands import place_with_run, run, start
from tests.helpers.tolerances import FP32_MODEL, relative_error


@pytest.mark.parametrize(
    ("n", "fp8", "copies"),
    [(2, "dequantize", False), (4, "dequantize", True), (2, "keep", True), (4, "keep", False)],
    ids=str,
)
def test_ranks_generate_the_tokens_of_one_process(tmp_path: Path, n: int, fp8: Any, copies: bool) -> None:
    folder = new_folder(tmp_path / "model", fp8=fp8 == "keep")
    whole = load_pretrained(folder, torch.float32, fp8)
    want, tokens = logits_of(whole), generated(whole, 24)
    got = run_ranks(n, part, folder, fp8, placement_of(whole.config) if copies else None)
    for one in got:
        assert relative_error(one.logits, want) < FP32_MODEL
        assert one.logits.equal(got[0].logits)
        for way in tokens:
            assert one.tokens[way].equal(got[0].tokens[way])
        assert one.tokens["greedy"].equal(tokens["greedy"])
        assert one.tokens["speculative"].equal(tokens["greedy"])
        assert one.tokens["drawn"].equal(tokens["drawn"])


def layer_of_simulated_fp8(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's output, of one process and of divided experts, whose rows arrive as codes."""
    torch.manual_seed(4)
    config = ModelConfig(**(SIZES | {"dim": 128, "moe_inter_dim": 128, "precision": "fp8"}))
    moe, x = randomise(MoE(config)), torch.randn(9, 128)
    with torch.no_grad():
        want = moe(x)[0]
        own = slice(4 * world.rank, 4 * world.rank + 4)
        for name in ("w1", "w2", "w3"):
            setattr(moe.experts, name, torch.nn.Parameter(getattr(moe.experts, name)[own]))
        moe.exchange = SharedTokens(ExpertHolders.of_places(range(8), 2, 8), ExpertShare(world))
        return want, moe(x)[0]


def test_rows_in_simulated_fp8_are_divided_too() -> None:
    for want, got in run_ranks(2, layer_of_simulated_fp8):
        assert relative_error(got, want) < FP32_MODEL


def refusal_with_gradients(world: World, folder: Path) -> str:
    model = load_part(world, folder)
    assert Decoder(model).parts[-1] is None, "the kernels of a step would take all experts to be here"
    with pytest.raises(ValueError, match=r"use torch.no_grad\(\)") as refused:
        model(torch.tensor([[1, 2, 3]]))
    return str(refused.value)


def test_gradients_through_divided_experts_are_refused(tmp_path: Path) -> None:
    assert all(run_ranks(2, refusal_with_gradients, new_folder(tmp_path / "model")))


def agreement(world: World, folder: Path, what: str) -> tuple[str, int]:
    """Generate where rank 1 is stopped, draws with another seed or loses a visit; return the error and the tokens."""
    model = load_part(world, folder)
    share = next(m.exchange.share for m in model.modules() if isinstance(m, MoE) and m.exchange)
    asked: list[int] = []
    seed = world.rank if what == "seed" else 0
    generation = Generation(
        model,
        PROMPTS,
        20,
        generator=torch.Generator().manual_seed(seed),
        agree=Agreement(world, share, lambda: bool(asked)),
        sampling=Sampling(temperature=1.0 if what == "seed" else 0.0),
    )
    try:
        for step, _ in enumerate(generation):
            if step == 4 and world.rank == 1:
                asked += [1] * (what == "stop")
                share.computed -= what == "visit"
    except (ValueError, KeyboardInterrupt) as error:
        return f"{type(error).__name__} {error}", generation.stats.new_tokens
    return "", generation.stats.new_tokens


@pytest.mark.parametrize(
    ("what", "words", "steps"),
    [("stop", "KeyboardInterrupt", 5), ("seed", "ValueError the processes", 20), ("visit", "ValueError the pro", 5)],
)
def test_ranks_end_together_after_a_step(tmp_path: Path, what: str, words: str, steps: int) -> None:
    first, second = run_ranks(2, agreement, new_folder(tmp_path / "model"), what)
    assert first == second and first[0].startswith(words)
    assert first[1] == 3 * steps if what != "seed" else first[1] < 3 * steps


# --- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished run of a tiny model of bytes."""
    folder = tmp_path_factory.mktemp("place")
    place_with_run(folder)
    return folder


def launch(n: int, command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, stdin: int | None = None) -> list[Any]:
    """Start a command in n processes, as a launcher does."""
    port, processes = free_port(), []
    for rank in range(n):
        for name, value in {
            **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"},
        }.items():
            monkeypatch.setenv(name, str(value))
        processes.append(start(command, folder, stdin if rank == 0 else subprocess.DEVNULL))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    return processes


def ends(processes: list[Any]) -> list[tuple[int, str, str]]:
    """Return status, output and errors of each process."""
    try:
        said = [process.communicate(timeout=60) for process in processes]
        return [(process.wait(), *texts) for process, texts in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def test_command_answers_as_one_process_and_rank_0_speaks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "dsmini.generate runs/x --prompt 'The qu' T --max-new-tokens 40 --temperature 0.5 --json --dtype float32"
    placed = run("dsmini.distributed.eplb runs/x --gpus 2 --redundant 4 --json", place)
    (place / "placed.json").write_text(placed.stdout)
    want = json.loads(run(line, place).stdout)
    for more in ("", " --placement placed.json"):
        (status, said, _), other = ends(launch(2, line + more, place, monkeypatch))
        got = json.loads(said)
        assert status == 0 and other == (0, "", "")
        for key in ("answers", "new_tokens", "moved_bytes_per_token", "cache_bytes"):
            assert got[key] == want[key], key


@pytest.mark.parametrize(
    ("n", "arguments", "words"),
    [
        (2, "runs/none --prompt T", "there is no folder runs/none"),
        (3, "runs/x --prompt T", "experts are not divisible by 3 processes"),
        (2, f"runs/x --prompt '{'T' * 300}' --context 20", "longer than the model's context of 32"),
        (2, "runs/x --prompt T --placement book.txt", "book.txt"),
        (2, "runs/x --prompt T --temperature -1", "temperature"),
    ],
)
def test_command_says_once_what_is_wrong(
    place: Path, monkeypatch: pytest.MonkeyPatch, n: int, arguments: str, words: str
) -> None:
    said = ends(launch(n, f"dsmini.generate {arguments}", place, monkeypatch))
    assert [status for status, _, _ in said] == [2] * n
    assert said[0][2].startswith("error: ") and words in said[0][2] and len(said[0][2].splitlines()) == 1
    assert [(out, err) for _, out, err in said[1:]] == [("", "")] * (n - 1)


def test_placement_for_one_process_is_refused(place: Path) -> None:
    done = run("dsmini.generate runs/x --prompt T --placement placed.json", place)
    assert done.returncode == 2 and "there is one; start torchrun" in done.stderr


def test_signal_to_one_rank_ends_all_with_what_is_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = launch(2, "dsmini.generate runs/x --prompt T --max-new-tokens 1000000", place, monkeypatch)
    try:
        first = processes[0].stdout.read(3)
        time.sleep(0.2)
        os.kill(processes[1].pid, signal.SIGTERM)
    finally:
        (status, said, err), other = ends(processes)
    assert first + said and status == 130 and "new tokens" in err and "lost" not in err
    assert other == (130, "", "")


def rows_of_run(world: World, run_folder: Path) -> tuple[list[str], torch.Tensor]:
    """Return the shapes of this rank's experts, and logits."""
    model, _ = load_run(world, run_folder, torch.float32)
    with torch.no_grad():
        return [str(list(p.shape)) for n, p in model.named_parameters() if n.endswith("experts.w1")], model(
            torch.tensor([[1, 2, 3]])
        )


def test_run_is_divided_from_its_checkpoint(place: Path) -> None:
    whole: Transformer = load_whole(place / "runs/x", torch.float32)[0]
    with torch.no_grad():
        want = whole(torch.tensor([[1, 2, 3]]))
    e, *rest = next(p.shape for n, p in whole.named_parameters() if n.endswith("experts.w1"))
    for shapes, logits in run_ranks(2, rows_of_run, place / "runs/x"):
        assert set(shapes) == {str([e // 2, *rest])}
        assert relative_error(logits, want) < FP32_MODEL
