"""The parts of docs/claims: arms of equal size, needles, a table of pairs, and experts in four bits."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini import ModelConfig, Transformer, accounting
from dsmini.comparison.arms import make_model_of, read_claim
from dsmini.nn.moe import Experts
from dsmini.numerics.fp4 import round_fp4
from tests.conftest import SMALL
from tests.helpers.commands import ROOT

CLAIMS = ROOT / "docs" / "claims"


def made_by(function: str, **sizes: Any) -> Any:
    """Return the model that a function of docs/claims makes."""
    torch.manual_seed(0)
    return make_model_of(f"{CLAIMS / function}")(ModelConfig(**SMALL | sizes))


def of_file(name: str) -> dict[str, Any]:
    """Return what a file of docs/claims defines."""
    return runpy.run_path(str(CLAIMS / name))


@pytest.mark.parametrize(
    "name",
    ["streams", "hash_layers", "muon_iterations", "compression", "compression_needles", "indexers", "engram",
     "four_bits", "qk_clip", "rates_s", "rates_l", "attention_s", "balance_s"],
)  # fmt: skip
def test_arms_of_a_claim_have_equal_active_parameters(name: str) -> None:
    arms = read_claim(CLAIMS / f"{name}.toml", [], None).arms
    of_attention = [arm for arm in arms if arm.name != "MQA, 96 numbers"]  # its cache is equal, its parameters fewer
    base, *others = [accounting.parameters(arm.config.model).active for arm in of_attention]
    assert others == [pytest.approx(base, rel=0.002)] * len(others)
    assert len({arm.tokens for arm in arms}) == 1


@pytest.mark.parametrize("path", sorted(CLAIMS.glob("*_[sl].toml")), ids=lambda path: path.stem)
def test_steps_of_a_ladder_ask_one_question_of_arms_of_one_name(path: Path) -> None:
    """Tokens are in proportion to active parameters."""
    middle = "calibration" if path.stem.startswith("rates") else path.stem[:-2]
    step, other = (read_claim(each, [], None) for each in (path, CLAIMS / f"{middle}.toml"))
    sizes = [accounting.parameters(claim.arms[0].config.model).active for claim in (step, other)]
    assert step.arms[0].tokens / other.arms[0].tokens == pytest.approx(sizes[0] / sizes[1], rel=0.005)
    if middle != "calibration":
        assert (step.question, step.margin) == (other.question, other.margin)
        assert [arm.name for arm in step.arms] == [arm.name for arm in other.arms]


def test_needles_come_again_eight_windows_later() -> None:
    """A window has 8 bytes, and a sign is known from the same key's alone."""
    text = of_file("needles.py")["text"]
    tables = text(40)
    assert tables == text(40) and tables != text(40, seed=1) and len(tables) == 40 * 16 * 66
    signs: dict[str, set[str]] = {}
    for i in range(0, len(tables), 16 * 66):
        lines = tables[i : i + 16 * 66].splitlines()
        assert len({*lines}) == 1 and len(lines[0]) + 1 == 66 >= 8 * 8
        for key, sign in zip(lines[0][:62:2], lines[0][1:62:2], strict=True):
            signs.setdefault(key, set()).add(sign)
    assert len(signs) == 31 and all(len(of) == 2 for of in signs.values())
    assert len(set.union(*signs.values()) | {*signs}) == 93


def test_pairs_change_nothing_at_first_and_tell_pairs_apart() -> None:
    """A row is read where its pair ends, and moves the token there and those after it alone."""
    model = made_by("pairs.py:pairs")
    torch.manual_seed(0)
    plain = Transformer(ModelConfig(**SMALL))
    tokens = torch.tensor([[5, 6, 7, 5, 6]])
    same = plain(tokens)
    torch.testing.assert_close(model(tokens), same, rtol=0, atol=0)
    rows = of_file("pairs.py")["rows_of"](tokens)
    assert rows[0, 0] == 6057 and rows[0, 1] == rows[0, 4] and len(set(rows[0, 1:4].tolist())) == 3
    vocabulary = plain.config.vocab_size
    with torch.no_grad():
        model.embed.weight[vocabulary + rows[0, 2]] += 1.0
    moved = (model(tokens) - same).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False, False, True, True, True]
    model.train().losses(tokens, tokens).total.backward()
    touched = model.embed.weight.grad[vocabulary:].abs().sum(1).nonzero().flatten().tolist()
    assert set(touched) <= set(rows.flatten().tolist()) and model.layers[0].of_pairs.grad != 0


def test_tables_pairs_and_experts_of_engrams_claim_are_as_large() -> None:
    arms = {arm.name: arm for arm in read_claim(CLAIMS / "engram.toml", [], None).arms}
    tables, experts = (accounting.parameters(arms[name].config.model).total for name in ("tables", "16 experts"))
    with torch.device("meta"):
        model = make_model_of(arms["pairs"].function)(arms["pairs"].config.model)
    pairs = sum(p.numel() for p in model.parameters())
    assert [experts, pairs] == [pytest.approx(tables, rel=0.002)] * 2


@pytest.mark.parametrize("precision", ["native", "fp8"])
def test_experts_in_four_bits_have_rounded_values_and_whole_gradients(precision: str) -> None:
    sizes = {"precision": precision, "moe_inter_dim": 32, "dim": 64}
    model, plain = made_by("four_bits.py:fp4_experts", **sizes), made_by("four_bits.py:fp4_experts", **sizes)
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, Experts):
                plain_class: Any = type(module).__base__
                module.__class__ = plain_class
                for weight in module.parameters(recurse=False):
                    weight.copy_(round_fp4(weight))
    tokens = torch.randint(plain.config.vocab_size, (1, 12))
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=0, atol=0)
    for each in (model, plain):
        each.train().losses(tokens, tokens).total.backward()
    of_model, of_plain = (dict(each.named_parameters()) for each in (model, plain))
    (name, *_) = (name for name in of_model if name.endswith("experts.w1"))
    assert not torch.equal(of_model[name], of_plain[name]) and of_model[name].grad.any()
    torch.testing.assert_close(of_model[name].grad, of_plain[name].grad)
