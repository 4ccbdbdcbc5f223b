"""Refusals: every mistake of a user is one sentence, of which refusals.toml has a part."""

import dataclasses
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from dsmini.planner import pages
from dsmini.planner.hardware import load_hardware
from dsmini.planner.plan import make_plan
from dsmini.planner.request import Model, PlanRequest
from tests.helpers.configs import CONFIGS, refusal
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


PRICES = {
    "training_cost",
    "training_cost_most",
    "decode_cost",
    "decode_cost_most",
    "prefill_cost",
    "prefill_cost_most",
    "gpu_price",
}


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


def test_what_does_not_fit_has_figures_of_its_memory_alone_and_no_price() -> None:
    """In the record, on the page and in a comparison; what fits next to it has its figures, without a price."""
    plan = plan_of("deepseek-v2-lite @h100 gpus=1")
    record = pages.plan_record(plan)
    training = record["figures"]["training"]
    assert training["memory_needed"]["value"] > 2.8e11 and {f["unit"] for f in training.values()} == {
        "",
        "B",
        "B/token",
        "token",
    }
    assert not {"mfu", "training_gpu_hours", "imbalance"} & set(training)
    assert "decode_time" in record["figures"]["decode"] and "training" not in record["binds"]
    page = pages.plan_page(plan, "", []).html()
    assert "decode_time" in page and "memory_needed" in page
    assert not [name for name in PRICES for said in (json.dumps(record["figures"]), page) if name in said]
    points = [each for of in record["deployments"].values() for each in (*of["points"].values(), *of["front"])]
    assert points and all(each["cost"] is each["cost_most"] is None for each in points)
    request = PlanRequest(hardware="h100", gpus=1)
    models = [Model.from_file(CONFIGS / f"{name}.toml") for name in ("deepseek-v2-lite", "toy")]
    unfit, fit = pages.compare(request, models[:1], ""), pages.compare(request, models, "")
    assert (unfit.status, fit.status) == (2, 0)
    (lite,) = unfit.record["plans"]
    assert not lite["fits"] and "no layout on gpus=1 fits" in lite["misfit"]["training"]
    assert lite["memory_needed"] > 2.8e11 and "training_time" not in lite and not PRICES & set(lite)
    assert any(
        said.startswith("model=deepseek-v2-lite: training does not fit: no") for said in fit.sections[0].warnings
    )


@pytest.mark.parametrize("name", ["training_cost", "training_time", "decode_cost"])
def test_explained_figure_of_what_does_not_fit_is_refused(name: str) -> None:
    said = refusal(pages.explained, plan_of("deepseek-v2-lite @h100 gpus=1"), name, 100)
    assert said.startswith(f"{name} has no value: no layout on gpus=1 fits 90 % of 85.9 GB a GPU")


def test_decoding_that_does_not_fit_says_so_in_each_answer() -> None:
    plan = plan_of("deepseek-v3 decode_gpus=7")
    said, record = plan.misfit["decode"], pages.plan_record(plan)
    assert refusal(pages.explained, plan, "decode_cost", 100) == f"decode_cost has no value: {said}"
    assert not record["fits"] and record["misfit"] == {"decode": said}
    counts = [n for each in record["deployments"].values() for n in each["left_out"].values()]
    assert counts and all(type(n) is int and n > 0 for n in counts)


def test_warm_up_of_indexers_has_no_plan() -> None:
    model, hardware, request = read("toy-dsa")
    assert model.run is not None
    warm_up = dataclasses.replace(model.run, train=dataclasses.replace(model.run.train, dsa_stage="warmup"))
    said = refusal(make_plan, request, dataclasses.replace(model, run=warm_up), hardware)
    assert said.endswith("toy-dsa.toml has train.dsa_stage='warmup', which has no plan; use dsa_stage='sparse'")
