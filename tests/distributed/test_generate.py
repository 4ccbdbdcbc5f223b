"""Generation by several ranks that divide the experts gives the tokens of one process."""

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini import ModelConfig, Transformer, load_pretrained
from dsmini.checkpoint.load import all_experts
from dsmini.checkpoint.tensor_files import is_stacked
from dsmini.checkpoint.training_state import load_run
from dsmini.distributed.decode import SharedTokens, Sharing, held_by_ranks, read_placement
from dsmini.distributed.world import World
from dsmini.inference.fused import Decoder
from dsmini.inference.generation import Generation
from dsmini.inference.sampling import Sampling
from dsmini.nn.moe import MoE
from tests.conftest import randomise
from tests.distributed.generating import (
    COPIES,
    PROMPTS,
    SIZES,
    generated,
    load_part,
    load_shared,
    logits_of,
    new_folder,
    part,
    placement_of,
)
from tests.distributed.ranks import Speech, run_ranks, spoken, wait_until
from tests.helpers.commands import place_with_run, run
from tests.helpers.folders import read as read_folder
from tests.helpers.tolerances import FP32_MODEL, relative_error


def nbytes_of(model: Transformer, experts: bool) -> int:
    """Return the bytes of all routed experts, or of all else."""
    held = [*model.named_parameters(), *model.named_buffers()]
    return sum(t.nbytes for name, t in held if (".experts." in name) == experts)


@pytest.mark.parametrize(
    ("n", "fp8", "copies"),
    [
        (2, "keep", False),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in ((2, "dequantize", False), (4, "keep", False), (4, "dequantize", True), (2, "keep", True))
        ),
    ],
)
def test_ranks_hold_their_own_experts_and_generate_the_tokens_of_one_process(
    tmp_path: Path, n: int, fp8: Any, copies: bool
) -> None:
    folder = new_folder(tmp_path / "model", fp8=fp8 == "keep")
    whole = load_pretrained(folder, torch.float32, fp8)
    every = run_ranks(n, part, folder, fp8, placement_of(whole.config) if copies else None)
    own = [set(range(rank * 8 // n, (rank + 1) * 8 // n)) for rank in range(n)]
    own = [set(COPIES[0][rank * 12 // n : (rank + 1) * 12 // n]) for rank in range(n)] if copies else own
    for got, experts in zip(every, own, strict=True):
        read = {name.split(".experts.")[1].split(".")[0] for name in got.read if ".layers.1.mlp.experts." in name}
        assert set(map(int, read)) == experts
        if not copies:
            assert got.nbytes == nbytes_of(whole, experts=False) + nbytes_of(whole, experts=True) // n
    assert {name for got in every for name in got.read} == set(read_folder(folder))
    want, tokens = logits_of(whole), generated(whole)
    for got in every:
        assert relative_error(got.logits, want) < FP32_MODEL
        assert got.logits.equal(every[0].logits)
        assert all(got.tokens[way].equal(every[0].tokens[way]) for way in tokens)
        for way, as_in in (("greedy", "greedy"), ("speculative", "greedy"), ("drawn", "drawn")):
            assert got.tokens[way].equal(tokens[as_in]), way


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
        held = torch.arange(8) // 4 == torch.arange(2)[:, None]
        moe.exchange = SharedTokens(held, world.rank, torch.zeros(2, dtype=torch.int64))
        return want, moe(x)[0]


@pytest.mark.slow
def test_rows_in_simulated_fp8_are_divided_too() -> None:
    for want, got in run_ranks(2, layer_of_simulated_fp8):
        assert relative_error(got, want) < FP32_MODEL


def refuse_gradients(world: World, folder: Path) -> None:
    model = load_part(world, folder)
    assert Decoder(model).blocks[-1] is None, "the kernels of a step would take all experts to be here"
    with pytest.raises(ValueError, match=r"use torch.no_grad\(\)"):
        model(torch.tensor([[1, 2, 3]]))


@pytest.mark.slow
def test_gradients_through_divided_experts_are_refused(tmp_path: Path) -> None:
    run_ranks(2, refuse_gradients, new_folder(tmp_path / "model"))


def agreement(world: World, folder: Path, what: str) -> tuple[str, int]:
    """Generate where rank 1 is stopped, draws with another seed or loses a visit; return the error and the tokens."""
    shared, asked = Sharing(world), list[int]()
    shared.stop = lambda: bool(asked)
    seed = world.rank if what == "seed" else 0
    generation = Generation(
        load_shared(shared, folder),
        PROMPTS,
        20,
        generator=torch.Generator().manual_seed(seed),
        agree=shared.agree,
        sampling=Sampling(temperature=1.0 if what == "seed" else 0.0),
    )
    try:
        for step, _ in enumerate(generation):
            if step == 4 and world.rank == 1:
                asked += [1] * (what == "stop")
                shared.pairs[0] -= int(what == "visit")
    except (ValueError, KeyboardInterrupt) as error:
        return f"{type(error).__name__} {error}", generation.stats.new_tokens
    return "", generation.stats.new_tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "words", "steps"),
    [("stop", "KeyboardInterrupt", 5), ("seed", "ValueError the processes", 20), ("visit", "ValueError the pro", 5)],
)
def test_ranks_end_together_after_a_step(tmp_path: Path, what: str, words: str, steps: int) -> None:
    first, second = run_ranks(2, agreement, new_folder(tmp_path / "model"), what)
    assert first == second and first[0].startswith(words)
    assert first[1] == 3 * steps if what != "seed" else first[1] < 3 * steps


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"experts": [[0, 1]', "JSON"), ('{"experts": [0, 1]}', "want a list of layers"), ("[[0, 1.5]]", "want a list")],
)
def test_placement_that_is_no_table_is_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "placed.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_placement(tmp_path / "placed.json")


# --- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished run of a tiny model of bytes."""
    folder = tmp_path_factory.mktemp("place")
    place_with_run(folder)
    return folder


@pytest.mark.slow
def test_command_answers_as_one_process_and_rank_0_speaks(place: Path) -> None:
    options = "--prompt 'The qu' T --max-new-tokens 40 --temperature 0.5 --json --dtype float32"
    line = [str(place / "runs/x"), *shlex.split(options)]
    placed = run("dsmini.distributed.eplb runs/x --gpus 2 --redundant 4 --json", place)
    (place / "placed.json").write_text(placed.stdout)
    want = spoken(place, line, name="generate")
    for more in ([], ["--placement", str(place / "placed.json")]):
        got = spoken(place, *[[*line, *more]] * 2, name="generate")
        assert got.statuses == [0, 0] and got.errors[1] == got.outputs[1] == ""
        answer, wanted = json.loads(got.outputs[0]), json.loads(want.outputs[0])
        for key in ("answers", "new_tokens", "cache_bytes"):
            assert answer[key] == wanted[key], key


def test_experts_of_a_run_are_read_in_the_order_in_which_they_are_held(place: Path) -> None:
    own = [5, 0, 2]
    part = load_run(place / "runs/x", holding=lambda model: [own] * len(all_experts(model)))[0].state_dict()
    whole = load_run(place / "runs/x")[0].state_dict()
    assert any(map(is_stacked, part)) and part.keys() == whole.keys()
    assert all(torch.equal(t, whole[name][own] if is_stacked(name) else whole[name]) for name, t in part.items())


def stop_rank_1(speech: Speech) -> None:
    """Send SIGTERM to rank 1 once rank 0 has written."""
    wait_until(lambda: speech.outputs[0] != "")
    os.kill(int(speech.read("pid")[1]), signal.SIGTERM)


@pytest.mark.slow
def test_signal_to_one_rank_ends_all_with_what_is_written(place: Path) -> None:
    line = [str(place / "runs/x"), "--prompt", "T", "--max-new-tokens", "1000000"]
    got = spoken(place, line, line, name="generate", meanwhile=stop_rank_1)
    assert (
        got.statuses == [130, 130] and got.outputs[0] and "new tokens" in got.errors[0] and "lost" not in got.errors[0]
    )
    assert got.errors[1] == got.outputs[1] == ""


# --- what ranks cannot divide


def test_what_ranks_cannot_divide_is_refused() -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig(**SIZES))
        dense = Transformer(ModelConfig(**SIZES | {"n_dense_layers": 3, "n_mtp_layers": 0}))
    good = placement_of(model.config)
    for of, n, placement, words in (
        (dense, 2, None, "the model has no experts to divide among 2 processes; start one process"),
        (model, 9, None, "8 experts are not divisible by 9 processes; start 8, say"),
        (model, 5, None, "8 experts are not divisible by 5 processes; start 4, say"),
        (model, 2, good[:2], "the placement has 2 layers, and the model has 4"),
        (model, 5, good, "layer 0 of the placement has 12 places, not divisible by 5 processes"),
        (model, 2, [*good[:3], [8] * 12], "layer 3 of the placement names expert 8; the model has experts 0 to 7"),
        (model, 2, [*good[:3], [0, 1, 2, 3, 4, 5, 7, 7]], "no place for expert 6; give each expert one or more"),
        (model, 2, [[], *good[1:]], "layer 0 of the placement has 0 places"),
    ):
        with pytest.raises(ValueError, match=words):
            held_by_ranks(of, n, placement)


def test_copies_of_an_expert_take_turns() -> None:
    held = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    indices = torch.rand(300, 4).argsort(1)[:, :2]
    ranks = SharedTokens(held, 0, torch.zeros(2, dtype=torch.int64)).rank_of_pairs(indices)
    for expert in range(4):
        pairs = ranks[indices == expert].bincount(minlength=4)
        mean = pairs.sum() / held[:, expert].sum()
        assert ((pairs - held[:, expert] * mean).abs() <= 4 * mean.sqrt() * (held[:, expert].sum() > 1)).all()
