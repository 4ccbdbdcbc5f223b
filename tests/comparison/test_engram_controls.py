"""Controls of Engram: arms of a comparison in which tables cannot tell n-grams apart."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini import ModelConfig, Transformer
from dsmini.comparison.arms import make_model_of, read_claim
from dsmini.comparison.trial import prepared
from dsmini.nn import Context
from dsmini.nn.engram import Engram
from tests.conftest import SMALL
from tests.helpers.commands import ROOT
from tests.helpers.configs import refusal

CONTROLS = ROOT / "docs" / "claims" / "engram_controls.py"
CLAIM = f"""\
base = "base.toml"
base_name = "Engram"
set = ["model.engram_layer_ids=[0]", "model.engram_vocab_size=300", "model.n_mtp_layers=0", "train.steps=60",
  "train.lr=0.01", "train.lr_schedule=[\\"constant\\"]"]
[arms]
"one row" = ["{CONTROLS}:one_row"]
"random ids" = ["{CONTROLS}:random_ids", "train.recompute=true"]
"another hash" = ["model.engram_seed=1"]
"none" = ["model.engram_layer_ids=none"]
"""
LETTERS = 24
SIZES: dict[str, Any] = {"engram_layer_ids": (1,), "engram_n_heads": 2, "engram_vocab_size": 1000}


@pytest.fixture
def claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a claim with all arms, on a text whose next letter follows from the pair before it by a table."""
    torch.manual_seed(0)
    after, letters = torch.randint(LETTERS, (LETTERS, LETTERS)).tolist(), [0, 1]
    for fresh in torch.randint(LETTERS * 6, (40_000,)).tolist():  # a sixth is new, so that the text never repeats
        letters.append(fresh if fresh < LETTERS else after[letters[-2]][letters[-1]])
    (tmp_path / "text.txt").write_text("".join(chr(ord("a") + letter) for letter in letters))
    (tmp_path / "base.toml").write_text((Path(__file__).parent / "place" / "base.toml").read_text())
    (tmp_path / "engram.toml").write_text(CLAIM)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "engram.toml"


def test_controls_lose_what_tables_of_pairs_win(claim: Path) -> None:
    """The pair decides, and only who can tell pairs apart learns it in a few steps."""
    losses: dict[str, float] = {}
    for arm in read_claim(claim, [], None).arms:
        trainer = prepared(arm, 0, claim.parent / "corpus")
        last = [trainer.step().loss for _ in range(arm.config.train.steps)][-10:]
        losses[arm.name] = sum(last) / len(last)
    won = losses["none"] - losses["Engram"]
    assert won > 0.5, losses
    assert abs(losses["another hash"] - losses["Engram"]) < won / 4, losses
    for control in ("one row", "random ids"):
        assert losses["none"] - losses[control] < won / 4, losses


def context_of(tokens: list[int]) -> Context:
    return Context(positions=torch.arange(len(tokens))[None], tokens=torch.tensor([tokens]))


def engram_of(name: str) -> Any:
    model = make_model_of(f"{CONTROLS}:{name}")(ModelConfig(**SMALL | SIZES))
    (engram,) = (module for module in model.modules() if isinstance(module, Engram))
    return engram


def test_one_row_has_the_first_row_of_each_head_and_no_other() -> None:
    engram = engram_of("one_row")
    engram.make_hash(torch.arange(engram.config.vocab_size) // 2)  # as a run does with its tokenizer
    rows = engram.hashed(context_of([1, 2, 3, 1, 2, 3]))
    assert engram.embed.weight.shape[0] == 4 and torch.equal(rows, torch.arange(4).view(2, 2).expand(1, 6, 2, 2))


def test_random_ids_read_other_rows_for_the_same_pair() -> None:
    """And others in another batch."""
    engram = engram_of("random_ids")
    rows = engram.hashed(context_of([5] * 40))
    assert len(rows[0, 2:, 0, 0].unique()) > 30
    other = engram.hashed(context_of([5] * 39 + [6]))
    assert (rows[0, :39, 0, 0] != other[0, :39, 0, 0]).sum() > 30
    assert torch.equal(rows, engram.hashed(context_of([5] * 40))), "computed again, it reads the same"


def test_a_control_leaves_first_values_and_torch_generator_as_they_are() -> None:
    """So arms of a seed start alike and read the same batches, wherever these are drawn from."""

    def after_a_step(make: Any) -> tuple[dict[str, Any], Any]:
        torch.manual_seed(0)
        model = make(ModelConfig(**SMALL | SIZES))
        first = {name: p.detach().clone() for name, p in model.named_parameters() if ".embed." not in name}
        tokens = torch.arange(20)[None]
        model.losses(tokens, tokens).total.backward()
        return first, torch.get_rng_state()

    plain, state = after_a_step(Transformer)
    for name in ("one_row", "random_ids"):
        first, moved = after_a_step(make_model_of(f"{CONTROLS}:{name}"))
        assert torch.equal(moved, state), name
        assert first.keys() == plain.keys() and all(torch.equal(first[key], plain[key]) for key in plain), name


def test_controls_without_an_engram_are_refused() -> None:
    for name in ("one_row", "random_ids"):
        assert "use toy-engram" in refusal(make_model_of(f"{CONTROLS}:{name}"), ModelConfig(**SMALL))
