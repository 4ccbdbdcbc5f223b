"""Phases of the learning rate as a config writes them, and the old keys of files and flags, which become phases."""

import dataclasses
from pathlib import Path

import pytest

from dsmini import RunConfig, TrainConfig
from dsmini.config.lr_schedule import Phase, read_phases
from dsmini.config.old_schedule import KEYS, OldSchedule, without_old_flags
from dsmini.train import _read, main
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


# The old keys

DEFAULT = TrainConfig().lr_schedule
ALL = "warmup = 0.1\nconstant = 0.2\ndecay = 'linear'\nlr_final = 0.3\nfinal = 0.15\nlr_last = 0.05\nlast = 0.25\n"
PHASES = ("warmup 0.1", "constant 0.2", "linear to 0.3", "constant 0.15", "constant 0.25 at 0.05")
WITHOUT_OLD_SHAPE = ("cosine 0.5 to 0.3", "linear to 0")


def read(folder: Path, train: str, base: tuple[str, ...] = DEFAULT) -> TrainConfig:
    path = written(folder, f"[train]\n{train}", "x.toml")
    return RunConfig.from_file(path, RunConfig(train=TrainConfig(lr_schedule=base))).train


@pytest.mark.parametrize("base", [DEFAULT, PHASES, WITHOUT_OLD_SHAPE])
def test_all_old_keys_become_phases(tmp_path: Path, base: tuple[str, ...]) -> None:
    new = f"lr = 0.5\nlr_schedule = {list(PHASES)}\nsteps = 7"
    assert read(tmp_path, f"steps = 7\n{ALL}lr = 0.5", base) == read(tmp_path, new)
    assert read(tmp_path, ALL, base) == TrainConfig(lr_schedule=PHASES)


@pytest.mark.parametrize(
    ("train", "base", "want"),
    [
        ("warmup = 0.2", DEFAULT, ("warmup 0.2", "cosine to 0.1")),
        ("warmup = 0", DEFAULT, ("cosine to 0.1",)),
        ("constant = 0.2", DEFAULT, ("warmup 0.05", "constant 0.2", "cosine to 0.1")),
        ("decay = 'linear'", DEFAULT, ("warmup 0.05", "linear to 0.1")),
        ("lr_final = 0", DEFAULT, ("warmup 0.05", "cosine to 0")),
        ("final = 0.2", DEFAULT, ("warmup 0.05", "cosine to 0.1", "constant 0.2")),
        ("lr_last = 0.2", DEFAULT, DEFAULT),
        ("last = 0.2", DEFAULT, ("warmup 0.05", "cosine to 0.1", "constant 0.2 at 0.1")),
        ("warmup = 0.2", PHASES, ("warmup 0.2", *PHASES[1:])),
        ("constant = 0", PHASES, (PHASES[0], *PHASES[2:])),
        ("decay = 'cosine'", PHASES, (*PHASES[:2], "cosine to 0.3", *PHASES[3:])),
        ("lr_final = 0.5", PHASES, (*PHASES[:2], "linear to 0.5", *PHASES[3:])),
        ("final = 0", PHASES, (*PHASES[:3], PHASES[4])),
        ("lr_last = 0", PHASES, (*PHASES[:4], "constant 0.25 at 0")),
        ("last = 0.125", PHASES, (*PHASES[:4], "constant 0.125 at 0.05")),
        ("warmup = 0.2", ("linear to 0",), ("warmup 0.2", "linear to 0")),
    ],
)
def test_old_key_changes_its_phase_of_the_base(
    tmp_path: Path, train: str, base: tuple[str, ...], want: tuple[str, ...]
) -> None:
    assert read(tmp_path, train, base) == TrainConfig(lr_schedule=want)
    key, value = train.split(" = ")
    value = value.strip("'")
    for flag in (f"--train.{key}", f"--train.{key.replace('_', '-')}"):
        new = ["--train.steps", "3", "--train.lr-schedule", *want]
        assert without_old_flags([flag, value, "--train.steps", "3"], base) == new
        assert without_old_flags(["--train.steps", "3", f"{flag}={value}"], base) == new


def test_flag_last_takes_the_level_that_a_file_gives(tmp_path: Path) -> None:
    """With last = 0 the level is in no phase of the file."""
    file = written(tmp_path, "[train]\nlr_last = 0.2\nlast = 0\n", "x.toml")
    origin, command, _ = _read([str(file), "--train.last", "0.25"])
    assert origin.config.train.lr_schedule == DEFAULT
    assert command.train.lr_schedule == (*DEFAULT, "constant 0.25 at 0.2")
    _, command, _ = _read([str(file), "--train.last", "0.25", "--train.lr-last=0.05"])
    assert command.train.lr_schedule == (*DEFAULT, "constant 0.25 at 0.05")
    new = ["--train.lr-schedule", *DEFAULT, "constant 0.25 at 0.2"]
    assert without_old_flags(["--train.last", "0.25"], DEFAULT, [file]) == new
    own = written(tmp_path, "[train]\nlr_last = 0.3\nlast = 0\n", "config.toml")
    assert without_old_flags(["--train.last", "0.25"], DEFAULT, [own, file]) == new, "a file goes before the run's own"


@pytest.mark.parametrize("base", [DEFAULT, PHASES, ("linear to 0",), ("constant 0.9", "cosine to 1e-05")])
def test_old_keys_of_phases_give_the_phases(base: tuple[str, ...]) -> None:
    assert OldSchedule.from_phases(base, "").phases() == base


def test_old_key_without_place_in_the_base_is_refused(tmp_path: Path) -> None:
    assert refusal(read, tmp_path, "warmup = 0.1", WITHOUT_OLD_SHAPE) == (
        "train.warmup of x.toml has no place in train.lr_schedule='cosine 0.5 to 0.3, linear to 0'; "
        "write the phases of lr_schedule"
    )


@pytest.mark.parametrize("args", ["", "--train.lr-schedule linear to 0", "--data.path warmup --train.steps 3"])
def test_command_line_without_old_flags_is_unchanged(args: str) -> None:
    assert without_old_flags(args.split(), DEFAULT) == args.split()


def test_train_command_takes_old_flags(tmp_path: Path) -> None:
    assert refusal(main, ["--train.warmup", "2"]).startswith("the command line: train.warmup=2.0 is not")
    (tmp_path / "taken").touch()
    args = ["--train.warmup", "0.2", "--train.decay=linear", "--out", str(tmp_path)]
    assert refusal(main, args).startswith(f"--out {tmp_path} holds other files")


def test_old_keys_are_no_fields_any_more() -> None:
    assert not {f.name for f in dataclasses.fields(TrainConfig)} & set(KEYS)
