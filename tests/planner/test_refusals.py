"""Refusals: every mistake of a user is one sentence, of which refusals.toml has a part."""

import dataclasses
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from dsmini.planner import pages
from dsmini.planner.hardware import load_hardware
from dsmini.planner.plan import make_plan
from tests.helpers.configs import refusal
from tests.helpers.plans import INVENTED, plan_of, read

REFUSED = tomllib.loads(Path(__file__).with_name("refusals.toml").read_text())


def planned(words: str, folder: Path) -> None:
    plan = plan_of(words)
    for sentence in plan.misfit.values():  # told in the plan, and no error
        raise ValueError(sentence)
    pages.planned(plan, words)


def searched(words: str, folder: Path) -> None:
    pages.searched(plan_of(words), words)


def varied(words: str, folder: Path) -> None:
    names = re.findall(r"--of (\S+)", words)
    words = re.sub(r"1\.\.(\d+)", lambda last: ",".join(map(str, range(1, int(last[1]) + 1))), words)
    pages.varied(plan_of("deepseek-v3"), re.sub(r"--of \S+", "", words).split(), names, "")


def hardware(words: str, folder: Path) -> None:
    if "-->" in words:
        old, new = (side.replace("\\n", "\n") for side in re.split(r" -->\s?", words))
        text = INVENTED.read_text()
        assert old in text
        words = str(folder / "mine.toml")
        Path(words).write_text(text.replace(old, new, 1))
    load_hardware(words)


KINDS: dict[str, Callable[[str, Path], None]] = {
    "plan": planned,
    "search": searched,
    "vary": varied,
    "hardware": hardware,
}


@pytest.mark.parametrize(("kind", "words"), [(kind, words) for kind in KINDS for words in REFUSED[kind]])
def test_mistake_is_one_sentence(kind: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its words are compared)
        KINDS[kind](words, tmp_path)
    said = str(error.value).replace(f"{tmp_path}/", "")
    assert REFUSED[kind][words] in said and "\n" not in said


def test_warm_up_of_indexers_has_no_plan() -> None:
    model, hardware, request = read("toy-dsa")
    assert model.run is not None
    warm_up = dataclasses.replace(model.run, train=dataclasses.replace(model.run.train, dsa_stage="warmup"))
    said = refusal(make_plan, request, dataclasses.replace(model, run=warm_up), hardware)
    assert said.endswith("toy-dsa.toml has train.dsa_stage='warmup', which has no plan; use dsa_stage='sparse'")
