"""Refusals: every mistake of a user is one sentence, which refusals.txt has below what was asked for.

A line of [plan] and [search] asks as tests.helpers.plans.read does. [vary] has axes and --of of DeepSeek-V3's plan.
[hardware] has an edit of a good file: old --> new, in which \\n is the end of a line.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsmini.planner import pages
from dsmini.planner.hardware import load_hardware
from dsmini.planner.plan import make_plan
from tests.helpers.configs import refusal
from tests.helpers.plans import INVENTED, plan_of, read


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


def edited(text: str, edit: str, path: Path) -> Path:
    old, new = (side.replace("\\n", "\n") for side in re.split(r" -->\s?", edit))
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def hardware(edit: str, folder: Path) -> None:
    load_hardware(edited(INVENTED.read_text(), edit, folder / "mine.toml") if "-->" in edit else edit)


KINDS: dict[str, Callable[[str, Path], None]] = {
    "plan": planned,
    "search": searched,
    "vary": varied,
    "hardware": hardware,
}


def cases() -> Iterator[tuple[str, str, str]]:
    """Yield the kind, the input and the sentence of each refusal."""
    kind = asked = ""
    for line in (Path(__file__).parent / "refusals.txt").read_text().splitlines():
        if line.startswith("    "):
            yield kind, asked, line.strip()
        elif line.startswith("[") and line[1:-1] in KINDS:
            kind = line[1:-1]
        else:
            asked = line


@pytest.mark.parametrize(
    ("kind", "asked", "sentence"), [pytest.param(*case, id=f"{case[0]}: {case[1]}") for case in cases()]
)
def test_mistake_is_one_sentence(kind: str, asked: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the sentence is compared)
        KINDS[kind](asked, tmp_path)
    said = str(error.value).replace(f"{tmp_path}/", "")
    assert said == sentence or (sentence.endswith("...") and said.startswith(sentence[:-3])), said


def test_warm_up_of_indexers_has_no_plan() -> None:
    model, hardware, request = read("toy-dsa")
    assert model.run is not None
    warm_up = dataclasses.replace(model.run, train=dataclasses.replace(model.run.train, dsa_stage="warmup"))
    said = refusal(make_plan, request, dataclasses.replace(model, run=warm_up), hardware)
    assert said.endswith("toy-dsa.toml has train.dsa_stage='warmup', which has no plan; use dsa_stage='sparse'")
