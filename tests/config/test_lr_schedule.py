"""Phases of the learning rate as a config writes them."""

import pytest

from dsmini import TrainConfig
from dsmini.config.schedule import Phase, read_phases

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
    for given in (texts, list(texts)):  # a TOML array is a list
        assert TrainConfig(lr_schedule=given).lr_schedule == ("warmup 0.1", "cosine to 0.2")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("text", "kind", "share", "level"),
    [
        ("warmup", "warmup", None, None),
        ("constant", "constant", None, None),
        ("constant 1", "constant", 1.0, None),
        ("constant at 0.03", "constant", None, 0.03),
        ("constant 1 at 0.03", "constant", 1.0, 0.03),
        ("cosine 1 to 0", "cosine", 1.0, 0.0),
        ("linear to 1e-05", "linear", None, 1e-5),
        *((f"linear to {level!r}", "linear", None, level) for level in (0.1 + 0.2, 1 / 3, 5e-324, 1 - 2**-53)),
    ],
)
def test_each_phase_is_read_and_written_the_same(
    text: str, kind: str, share: float | None, level: float | None
) -> None:
    phase = Phase(kind=kind, share=share, level=level)  # pyright: ignore[reportArgumentType]
    assert read_phases((text,)) == (phase,)
    assert str(phase) == text
