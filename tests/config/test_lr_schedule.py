"""Phases of the learning rate as a config writes them."""

from pathlib import Path

import pytest

from dsmini import RunConfig, TrainConfig
from dsmini.config.lr_schedule import SPELLINGS, Phase, read_phases
from tests.helpers.configs import refusal, written

WARMUP, REST = Phase(kind="warmup", share=0.1, level=None), Phase(kind="cosine", share=None, level=0.2)


@pytest.mark.parametrize(
    "texts",
    [
        ("warmup 0.1", "cosine to 0.2"),
        ("warmup 0.1, cosine to 0.2",),
        ("warmup", "0.1", "cosine", "to", "0.2"),
        ("  warmup   .1 ,", "cosine to 2e-1"),
    ],
)
def test_phases_are_read_however_split(texts: tuple[str, ...]) -> None:
    assert read_phases(texts) == (WARMUP, REST)
    assert TrainConfig(lr_schedule=texts).lr_schedule == ("warmup 0.1", "cosine to 0.2")


@pytest.mark.parametrize(
    ("text", "phase"),
    {
        "warmup": Phase(kind="warmup", share=None, level=None),
        "constant": Phase(kind="constant", share=None, level=None),
        "constant 1": Phase(kind="constant", share=1.0, level=None),
        "constant at 0.03": Phase(kind="constant", share=None, level=0.03),
        "constant 1 at 0.03": Phase(kind="constant", share=1.0, level=0.03),
        "cosine 1 to 0": Phase(kind="cosine", share=1.0, level=0.0),
        "linear to 1e-05": Phase(kind="linear", share=None, level=1e-5),
    }.items(),
)
def test_each_phase_is_read_and_written_the_same(text: str, phase: Phase) -> None:
    assert read_phases((text,)) == (phase,)
    assert str(phase) == text


@pytest.mark.parametrize("value", [0.1 + 0.2, 1 / 3, 5e-324, 1e-5, 0.9999999999999999])
def test_number_keeps_its_bits_as_text(value: float) -> None:
    (phase,) = read_phases((f"linear to {value}",))
    assert phase.level == value
    assert read_phases((str(phase),)) == (phase,)


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ((), f"train.lr_schedule is empty; write phases such as {SPELLINGS}"),
        (("warm 0.1", "cosine to 0.1"), f"train.lr_schedule has 'warm 0.1', which is not a phase; write {SPELLINGS}"),
        (("warmup 0.1 to 0.5",), f"train.lr_schedule has 'warmup 0.1 to 0.5', which is not a phase; write {SPELLINGS}"),
        (("cosine",), f"train.lr_schedule has 'cosine', which is not a phase; write {SPELLINGS}"),
        (("cosine at 0.1",), f"train.lr_schedule has 'cosine at 0.1', which is not a phase; write {SPELLINGS}"),
        (("constant to 0.1",), f"train.lr_schedule has 'constant to 0.1', which is not a phase; write {SPELLINGS}"),
        (("linear to nan",), f"train.lr_schedule has 'linear to nan', which is not a phase; write {SPELLINGS}"),
        (
            ("cosine to 1.5",),
            "train.lr_schedule has 'cosine to 1.5', whose level is not between 0 and 1; use a share of one",
        ),
        (
            ("constant -0.5", "cosine to 0"),
            "train.lr_schedule has 'constant -0.5', whose share is not between 0 and 1; use a share of one",
        ),
        (
            ("cosine to 0", "warmup 0.5"),
            "train.lr_schedule='cosine to 0, warmup 0.5' has a warm-up that is not the first phase; "
            "move it to the front",
        ),
        (
            ("constant", "cosine to 0"),
            "train.lr_schedule='constant, cosine to 0' leaves out the share of 'constant' and of 'cosine to 0'; "
            "only one phase can take the remaining steps",
        ),
        (
            ("warmup 0.7", "cosine to 0", "constant 0.6"),
            "train.lr_schedule='warmup 0.7, cosine to 0, constant 0.6' takes 1.3 of the steps; want 1 or less, "
            "what is left is the phase without a share",
        ),
        (
            ("warmup 0.5", "constant 0.25"),
            "train.lr_schedule='warmup 0.5, constant 0.25' takes only 0.75 of the steps; leave out the share of one "
            "phase, which then takes the rest",
        ),
    ],
)
def test_wrong_schedule_is_refused(tmp_path: Path, texts: tuple[str, ...], sentence: str) -> None:
    assert refusal(TrainConfig, lr_schedule=texts) == sentence
    path = written(tmp_path, f"[train]\nlr_schedule = {list(texts)}", "x.toml")
    assert refusal(RunConfig.from_file, path) == f"x.toml: {sentence}"


@pytest.mark.parametrize("value", ["'cosine to 0'", "[1]", "3", "'none'"])
def test_schedule_that_is_no_list_of_texts_is_refused(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, f"[train]\nlr_schedule = {value}", "x.toml")
    assert refusal(RunConfig.from_file, path).endswith(" is not a list of texts")


def test_list_becomes_a_tuple() -> None:
    assert TrainConfig(lr_schedule=["linear to 0"]).lr_schedule == ("linear to 0",)  # pyright: ignore[reportArgumentType]
