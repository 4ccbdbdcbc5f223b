"""Findings in batches: padding of targets, padded rows of experts, guesses that agree."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer, ops
from dsmini.diagnosis.findings import padding as module
from dsmini.diagnosis.findings.batches import batch_findings, look_at
from dsmini.diagnosis.findings.guesses import acceptance
from dsmini.diagnosis.findings.padding import padded_rows, padding
from dsmini.diagnosis.subject import Subject
from dsmini.functional.cross_entropy import IGNORE
from tests.diagnosis.conftest import MODEL

# --- targets


def test_targets_that_count_have_no_padding() -> None:
    found = padding([torch.zeros(2, 8).long()] * 3)
    assert found.value == 0.0 and not found.is_fault and found.sentence.startswith("0.0% of the 48 targets")


def test_targets_after_the_last_that_counts_are_for_nothing() -> None:
    """Check the example: three of six are left out, and two of these stand at the end."""
    row = torch.tensor([[1, 2, IGNORE, 4, IGNORE, IGNORE]])
    found = padding([row])
    assert found.value == 0.5 and found.is_fault and "33.3% stand after" in found.sentence and found.fix


def test_masked_prompt_is_context_and_no_fault() -> None:
    row = torch.tensor([[IGNORE] * 9 + [1]])
    found = padding([row, row])
    assert found.value == 0.9 and not found.is_fault and "0.0% stand after" in found.sentence


def test_row_without_a_target_is_for_nothing() -> None:
    rows = torch.tensor([[1, 2], [IGNORE, IGNORE]])
    assert padding([rows]).is_fault and "50.0% stand after" in padding([rows]).sentence


@pytest.mark.parametrize(("ignored", "is_fault"), [(10, False), (11, True)])
def test_limit_of_padding(ignored: int, is_fault: bool) -> None:
    row = torch.zeros(1, 100).long()
    row[0, 100 - ignored :] = IGNORE
    assert padding([row]).is_fault == is_fault


# --- rows of experts

WIDE = ModelConfig(
    dim=64,
    n_layers=3,
    n_dense_layers=1,
    n_heads=2,
    n_routed_experts=4,
    n_activated_experts=2,
    n_expert_groups=1,
    n_limited_groups=1,
    n_mtp_layers=1,
    max_seq_len=257,
)


def rows_of(config: ModelConfig, dtype: torch.dtype, backend: str = "eager") -> Any:
    torch.manual_seed(0)
    with ops.use(backend):
        return padded_rows(Transformer(config, compute_dtype=dtype), torch.randint(0, 256, (1, 257)))


def test_rows_between_experts_are_counted() -> None:
    """Check two layers of 257 x 2 visits, and 256 x 2 of the MTP block: each has 4 x 63 rows more, rounded up to 64.

    514 + 252 = 766 become 768, and 512 + 252 = 764 become 768.
    """
    found = rows_of(WIDE, torch.bfloat16)
    visits, rows = 2 * 514 + 512, 3 * 768
    assert found.value == pytest.approx(1 - visits / rows) and not found.is_fault
    assert "2,304 rows for 1,540 visits" in found.sentence


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "eager"), (torch.bfloat16, "reference")])
def test_experts_without_alignment_have_no_padding(dtype: torch.dtype, backend: str) -> None:
    found = rows_of(WIDE, dtype, backend)
    assert found.value == 0.0 and "none of them is padding" in found.sentence


def test_kernel_multiplies_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check it by the name of the kernel that ran; a layer where none ran counts the padding again."""
    seen: list[Any] = []
    monkeypatch.setattr(module.ops, "counting", lambda counter: seen.append(counter) or ops.use(None))
    whole = module.row_alignment

    def told(*args: Any) -> int:
        seen.append("asked")
        return whole(*args)

    monkeypatch.setattr(module, "row_alignment", told)
    model = Transformer(WIDE, compute_dtype=torch.bfloat16)
    first: Any = model.layers[1]
    first.ffn.experts.register_forward_hook(lambda *_: seen[0].kernel_ran("trained_experts", None))
    found = padded_rows(model, torch.randint(0, 256, (1, 257)))
    assert found is not None and seen.count("asked") == 2, "that of two layers, and none of the first"


def test_dense_model_has_no_rows_of_experts() -> None:
    dense = dataclasses.replace(WIDE, n_dense_layers=4)
    assert padded_rows(Transformer(dense), torch.zeros(1, 8).long()) is None


def test_looking_leaves_no_hooks_and_no_gradients(subject: Subject) -> None:
    model, looked = subject.trainer.model, look_at(subject, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = batch_findings(subject, looked.batches)
    assert [each.name for each in found] == ["padding", "padded_rows", "acceptance"]
    assert found[0].value == 0.0 and not any(each.is_fault for each in found)
    assert all(not m._forward_hooks and m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- guesses


class Saying(Transformer):
    """A model whose head says the tokens that it is told, position by position."""

    def told(self, main: list[int], *guesses: list[int]) -> "Saying":
        self.said = [main, *guesses]
        return self

    def states(self, tokens: Tensor, **_: Any) -> Any:
        hidden = one_hot(self.said[0], len(tokens))
        return type("States", (), {"normed": hidden, "given": hidden})()


def one_hot(ids: list[int], rows: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(ids), 256).float().expand(rows, -1, -1)


def saying(main: list[int], *guesses: list[int]) -> Any:
    model: Any = Saying(dataclasses.replace(MODEL, n_mtp_layers=len(guesses))).told(main, *guesses)
    model.head = torch.nn.Identity()
    chain = model.mtp

    def chain_forward(tokens: Tensor, *_: Any) -> Any:
        return [one_hot(ids, len(tokens)) for ids in guesses], []

    chain.forward = chain_forward
    return model


def test_guesses_are_compared_with_the_prediction_of_the_same_token() -> None:
    """Check one depth: its guess at i is of the token that the model predicts at i + 1."""
    found = acceptance(saying([9, 1, 2, 3, 4], [1, 2, 0, 4]), torch.zeros(2, 5).long())
    assert found is not None and found.value == 0.75 and found.low == found.high == 0.75, "both rows alike"
    assert "75%" in found.sentence and "1.75 tokens" in found.sentence and not found.is_fault


def test_deeper_guess_counts_only_after_the_first() -> None:
    """Check two depths at three positions: the first agrees at 1 and 2, the second at 0 and 2, both at 2 alone."""
    found = acceptance(saying([9, 1, 2, 3, 4], [0, 2, 3, 0], [2, 0, 4]), torch.zeros(1, 5).long())
    assert found is not None and found.value == pytest.approx(2 / 3)
    assert "33% with all 2" in found.sentence and "2.00 tokens" in found.sentence
    assert (found.low, found.high) == (0.0, 1.0), "one row has no spread"


def test_random_weights_say_so(subject: Subject) -> None:
    tokens = subject.one_batch[0]
    fresh, trained = (acceptance(subject.trainer.model, tokens, steps=steps) for steps in (0, 5))
    assert fresh is not None and trained is not None
    assert "random still" in fresh.sentence and "random still" not in trained.sentence
    assert subject.trainer.model.training


def test_model_without_guesses_has_none() -> None:
    model = Transformer(dataclasses.replace(MODEL, n_mtp_layers=0))
    assert acceptance(model, torch.zeros(1, 8).long()) is None


def test_copying_model_accepts_every_guess() -> None:
    """Check a real forward: with a head that always says token 0, both agree everywhere."""
    model = Transformer(MODEL)
    with torch.no_grad():
        model.head.weight.zero_()
    found = acceptance(model, torch.randint(0, 256, (2, 8)))
    assert found is not None and found.value == 1.0 and "2.00 tokens" in found.sentence
