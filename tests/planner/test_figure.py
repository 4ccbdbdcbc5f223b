"""Figures: numbers that are explained. The laws of all real ones are in test_formulas.py, and pages/ shows some."""

import gc
import inspect
import sys
import weakref
from pathlib import Path
from types import FrameType

import pytest

from dsmini.planner.figure import Figure, figure, figures_of
from dsmini.planner.hardware import load_hardware
from dsmini.planner.pages import explained, planned
from dsmini.planner.plan import make_plan, model_alone
from dsmini.planner.request import Model, PlanRequest
from dsmini.reading import find_config


class Cache:
    """Cache of a token."""

    n_layers = 61

    @figure("B/token")
    def kv_cache(self) -> float:
        """Cache of a token, all layers."""
        return self.n_layers * 1152


def test_number_has_the_name_of_an_input_only_where_it_is_that_input() -> None:
    for layers, formula in ((61, "n_layers * 1152"), (60, "61 * 1152")):
        found = figures_of(Cache(), {"n_layers": Figure("n_layers", layers, "", "Layers", "a file")})
        assert found["kv_cache"].formula == formula


def test_formula_without_source_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare:
        @figure()
        def one(self) -> float:
            """One."""
            return 1

    def missing(method: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", missing)
    with pytest.raises(ValueError, match="formulas are read from dsmini's source files, which are not here"):
        figures_of(Bare(), {})


def test_explaining_the_cache_enters_six_files() -> None:
    """A model's cache needs neither hardware nor a layout, nor a count of its tensors."""
    entered, model = set[str](), Model.from_file(find_config(Path("deepseek-v3")))

    def enter(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.parent.name in ("planner", "accounting") and frame.f_code.co_name[0] != "<":
            entered.add(path.stem)

    sys.setprofile(enter)
    try:
        answer = explained(model_alone(PlanRequest(), model, "kv_cache"), "kv_cache", 100)
    finally:
        sys.setprofile(None)
    assert answer.record["steps"][0]["exact"] == "70,272 B/token"
    assert entered == {"request", "plan", "figure", "model", "memory", "pages"}


def test_plan_dies_with_its_owner() -> None:
    """Its results are its own: no cache of a module holds a plan, its model, a service or a pipeline."""
    plan = make_plan(PlanRequest(gpus=4), Model.from_file(find_config(Path("toy"))), load_hardware("h800"))
    assert planned(plan, "a test").record["deployments"]["decode"]["front"]
    parts = plan, plan.m, plan.service, plan.training, plan.training.pipeline.slowest, plan.found["decode"].main
    dead = [weakref.ref(part) for part in parts]
    del plan, parts
    gc.collect()
    assert [ref() for ref in dead] == [None] * len(dead)
