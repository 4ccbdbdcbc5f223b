"""All figures of serving together: names of their own, explanations, and a plan in less than a second."""

import time

from dsmini.planner.model.compressed_attention import SharedSizes, compressed_attention, shared_cache
from dsmini.planner.model.compressed_parameters import CompressedSizes
from dsmini.planner.model.sparse_attention import SparseSizes, sparse_attention
from dsmini.planner.quantities.formula import walk
from dsmini.planner.quantities.quantity import TOKENS, Anything
from dsmini.planner.serving.decoding import decode_plan
from dsmini.planner.serving.deployment import serving_workload, v3_decode, v3_prefill
from dsmini.planner.serving.prefill import prefill_plan
from dsmini.planner.serving.speculation import speculation_plan
from tests.helpers.serving_plans import V3, check_numbers_are_small, check_sources, h800, model_of


def all_figures() -> list[Anything]:
    model, hardware, workload = model_of(V3), h800(), serving_workload()
    sparse = sparse_attention(model, SparseSizes.published(), TOKENS(2**20, "context", "Context", "a test"))
    context = TOKENS(2**20, "context", "Context", "a test")
    plans = [
        decode_plan(model, hardware, workload, v3_decode()),
        prefill_plan(model, hardware, workload, v3_prefill()),
        speculation_plan(model, hardware, workload, v3_decode()),
        sparse,
        *(
            compressed_attention(
                CompressedSizes.published(f"deepseek-v4-{name}"), context, sparse, SparseSizes.published()
            )
            for name in ("flash", "pro")
        ),
    ]
    return [figure for plan in plans for figure in plan.figures().values()] + [shared_cache(SharedSizes.published())]


def test_every_figure_has_a_name_of_its_own() -> None:
    figures = all_figures()
    assert len({figure.name for figure in figures}) == len(figures) > 120


def test_a_name_inside_formulas_means_one_thing() -> None:
    """The sizes of a formula's inputs too: two values under one name could not be varied apart."""
    found: dict[str, set[tuple[str, float]]] = {}
    for figure in all_figures():
        for node in walk(figure):
            if node.op in ("input", "name") and node.name != "context":
                found.setdefault(node.name, set()).add((node.title, node.value))
    assert {name: values for name, values in found.items() if len(values) > 1} == {}


def test_all_figures_have_sources_and_no_odd_numbers() -> None:
    check_sources(all_figures())
    check_numbers_are_small(all_figures())


def test_all_plans_take_less_than_a_second() -> None:
    start = time.process_time()
    all_figures()
    assert time.process_time() - start < 1
