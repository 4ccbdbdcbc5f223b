"""The sample at the end of training, and the prompt that a run offers."""

import dataclasses
import io
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dsmini import DataConfig
from dsmini.training.outputs import next_command, offered_flags, write_sample
from dsmini.training.run import TrainingRun
from tests.helpers.runs import new_run


@pytest.fixture
def run(tmp_path: Path) -> TrainingRun:
    """Make an untrained run whose tokens are bytes below 61: half of them are control characters."""
    run = new_run(tmp_path, sample_tokens=60)
    run.config = dataclasses.replace(run.config, data=DataConfig(path=tmp_path))
    run.console = Console(file=io.StringIO(), width=80)
    return run


def test_sample_is_shown_without_control_characters(run: TrainingRun) -> None:
    text = write_sample(run)
    shown = run.console.file.getvalue()
    controls = {character for character in text if ord(character) < 32} - set("\n\t")
    assert len(controls) > 5 and not controls & set(shown)
    assert all(chr(0x2400 + ord(character)) in shown for character in controls)


def test_interrupted_sample_ends_its_line(run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = run.console.out, []

    def interrupted(*args: object, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        real(*args, **kwargs)

    monkeypatch.setattr(run.console, "out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_sample(run)
    assert run.console.file.getvalue().endswith(f"\n{'─' * 80}\n")


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (b"It was a bright cold day in April", "--prompt 'was a bright'"),
        (b"x don't stop", "--prompt 'don'\"'\"'t stop'"),
        (b"x --flag then", ""),
        (b"\xff\xfe " + b"x" * 300, ""),
        (b"x \x1b[31mred", ""),
        (b"Rome.\n> What is snow like?\n", "--chat"),
    ],
)
def test_offered_flags_are_a_prompt_of_whole_words_or_chat(run: TrainingRun, text: bytes, flags: str) -> None:
    run.trainer.corpus = dataclasses.replace(run.trainer.corpus, val=np.frombuffer(text, np.uint8))
    assert offered_flags(run) == flags
    run.config = dataclasses.replace(run.config, data=DataConfig())
    assert offered_flags(run) == "--prompt 'def '"


def test_next_command_fits_the_stage_and_the_end_of_the_run(run: TrainingRun) -> None:
    folder = shlex.quote(str(run.folder))
    run.trainer.corpus = dataclasses.replace(run.trainer.corpus, val=np.zeros(200, np.uint8))
    run.history.records.append({"loss": 1.0})
    assert next_command(run) == f"python -m dsmini.generate {folder}"
    sparse = {"attention": "dsa", "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
    run.config = dataclasses.replace(
        run.config,
        model=dataclasses.replace(run.config.model, **sparse),
        train=dataclasses.replace(run.config.train, dsa_stage="warmup"),
    )
    assert next_command(run) == f"python -m dsmini.train --init {folder}"
    run.history.records.append({"loss": None})
    assert next_command(run) == f"python -m dsmini.diagnose {folder}"
