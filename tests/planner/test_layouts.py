"""Choices that a user leaves open: layouts, deployments, precision; the search for layouts; and advice that fits."""

import dataclasses
import itertools
import json
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsmini.planner import pages
from dsmini.planner.hardware import load_hardware
from dsmini.planner.plan import make_plan
from dsmini.planner.request import Model, PlanRequest
from dsmini.planner.training import PARTS
from tests.helpers.plans import in_layout, plan_of, read
from tests.helpers.released_configs import HF_V3, released_json

CHOSEN = tomllib.loads(Path(__file__).with_name("chosen.toml").read_text())


def chosen(words: str) -> dict[str, Any]:
    plan = plan_of(words)
    found: dict[str, Any] = plan.request.given()
    found |= {"how": plan.inputs.sources["layout"], "fits": plan.training.fits, "weights": plan.request.weight_dtype}
    return found


@pytest.mark.parametrize("words", CHOSEN)
def test_what_is_left_open_is_chosen(words: str) -> None:
    found = chosen(words)
    assert {name: found[name] for name in CHOSEN[words]} == CHOSEN[words]


def test_name_is_of_the_file_or_of_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "My-Model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(HF_V3))
    model = Model.from_file(path)
    assert (read("toy")[0].name, model.name, model.run) == ("toy", "My-Model", None)


def test_own_inference_json_of_v3_is_planned_in_fp8(tmp_path: Path) -> None:
    """It has no blocks of multi-token prediction, and says that its dtype is fp8."""
    path = tmp_path / "config_671B.json"
    path.write_text(json.dumps(released_json("deepseek-v3.inference")))
    model = Model.from_file(path)
    plan = make_plan(PlanRequest(), model, load_hardware("h800"))
    assert (model.fp8, model.config.n_mtp_layers) == (True, 0)
    assert (plan.request.precision, plan.request.weight_dtype) == ("fp8", "fp8")
    assert plan.inputs.sources["layout"] == "as DeepSeek-V3 was trained", "by its sizes, whatever its file"


# --- advice

UNFIT = [
    "deepseek-v3 gpus=8",
    "deepseek-v3 batch=1",
    "deepseek-v2-lite memory*0.325 gpus=12 batch=96 zero=0 recompute=none precision=bf16 micro_batch=1 schedule=1f1b",
    "deepseek-v3 sequences=1000000",
]


@pytest.mark.parametrize("words", UNFIT)
def test_each_advice_fits_when_it_is_taken(words: str) -> None:
    (said,) = plan_of(words).misfit.values()
    changes = said.rpartition("; use ")[2].split(" and ")
    names = tuple(change.partition("=")[0] + "=" for change in changes)
    rest = [word for word in words.split() if not word.startswith(names)]
    assert plan_of(" ".join([*rest, *changes])).misfit == {}


def test_either_of_training_and_serving_may_not_fit() -> None:
    """A plan leaves out what does not fit, and says what would; it is refused if nothing fits."""
    large = plan_of("deepseek-v2-lite @laptop memory*6")
    record = pages.planned(large, "a test").record
    assert record["fits"] is False and record["misfit"]["training"].startswith(
        "no layout on gpus=1 fits 90 % of 103 GB a GPU"
    )
    assert record["figures"]["decode"]["decode_time"]["value"] > 0
    tight = plan_of("toy @laptop memory*0.0001")
    assert tight.refused.startswith("neither training nor serving fits: no layout on gpus=1 fits 90 % of 1.72 MB")
    assert "Serving: decode on 1 GPU takes " in tight.refused


# --- search

SEARCHED = [
    "deepseek-v2-lite memory*0.7 gpus=6 batch=96 precision=fp8 schedule=1f1b micro_batch=1",
    "deepseek-v2-lite gpus=4 batch=96 precision=fp8 schedule=dualpipe",
    "deepseek-v2-lite memory*0.5625 gpus=12 batch=96 precision=bf16 schedule=zb1p zero=1 micro_batch=2",
]


def every_layout(words: str) -> Iterator[dict[str, Any]]:
    """Yield all layouts that the choices of a request allow, and some that no model has."""
    request = read(words)[2]
    gpus = request.gpus or 1
    sizes = [n for n in range(1, gpus + 1) if gpus % n == 0]
    choices = {
        **{name: sizes for name in ("pipeline", "tensor", "expert")},
        **{"zero": [0, 1, 2, 3], "recompute": ["none", "selective", "full"], "micro_batch": [1, 2, 4]},
        **{"precision": ["bf16", "fp8"], "schedule": ["1f1b", "zb1p", "dualpipe"]},
    }
    names = [name for name in choices if getattr(request, name) is None]
    for values in itertools.product(*(choices[name] for name in names)):
        yield dict(zip(names, values, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("words", SEARCHED)
def test_search_finds_the_best_of_all_plans(words: str) -> None:
    """And what binds: the longest part of a step."""
    plan, best, count = plan_of(words), dict[tuple[Any, ...], tuple[float, float, str]](), 0
    for layout in every_layout(words):
        try:
            one = in_layout(plan, **layout)
        except ValueError:
            continue
        count += 1
        r = dataclasses.replace(plan.training.layout, **layout)
        binds = PARTS[max(PARTS, key=lambda part: one[part])]
        if one["memory_needed"] <= 0.9 * plan.hardware.memory:
            sizes = (r.pipeline, r.tensor, r.expert, r.micro_batch)
            best[sizes] = min(best.get(sizes, (math.inf, 0.0, "")), (one["parts_seconds"], one["memory_needed"], binds))
    layouts = pages.searched(plan, words).record["layouts"]
    assert count > 50 and 1 < len(layouts) == min(len(best), 12)
    assert [one["step_seconds"] for one in layouts] == pytest.approx(sorted(step for step, _, _ in best.values())[:12])
    for one in layouts:
        step, memory, binds = best[one["pipeline"], one["tensor"], one["expert"], one["micro_batch"]]
        assert (one["step_seconds"], one["memory"]) == pytest.approx((step, memory), rel=1e-12)
        assert one["binds"] == binds
