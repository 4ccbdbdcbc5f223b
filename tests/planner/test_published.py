"""Published figures: each is computed from configs and hardware, and reproduced, or misses as it says."""

import dataclasses

import pytest

from dsmini.planner.published import published_figures, rounding

FIGURES = {figure.name: figure for figure in published_figures()}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_as_the_file_says(name: str) -> None:
    figure = FIGURES[name]
    assert figure.status == figure.expected, figure.residual
    assert figure.note or figure.status in ("reproduced", "follows"), "what misses, or was worked out, says so"
    assert figure.note or figure.within <= 0.05 or figure.within == rounding(f"{figure.printed:g}"), "wide"


OURS = {
    "v3_parameters": (671_026_404_352, 0),
    "v3_active": (36.62e9, 2e-4),
    "v3_active_with_embedding": (37.55e9, 1e-4),
    "v3_mtp": (11.507e9, 1e-4),
    "v3_flops": (250.4e9, 3e-4),
    "v2_flops": (155.3e9, 3e-4),
    "v3_tokens_per_day": (272.80e9, 1e-4),
    "v2_cache_saving": (0.9334, 1e-4),
    "h800_token_exchange": (14.757e-3, 1e-4),
    "v3_bubble": (1.09, 0.005),
    "v3_step": (19.89, 0.001),
    "llama_flops": (2473e9, 3e-4),
    "failure_16k": (1.803 * 3600, 1e-3),
    "failure_1k": (28.8 * 3600, 2e-3),
    "effective_share_12k": (0.92, 2e-3),
    "ff_checkpoint": (1.95, 0.03),
    "v3_extension_hours": (75.7e3, 4e-3),
    "v32_cache": (48_068, 0),
    "v32_crossover": (2176, 1e-12),
    "v32_flops_ratio": (13.43, 1e-3),
}
"""Values that were worked out by hand, and how close."""


@pytest.mark.parametrize("name", OURS)
def test_our_value_is_the_one_worked_out_by_hand(name: str) -> None:
    value, within = OURS[name]
    assert FIGURES[name].ours == pytest.approx(value, rel=within)


def test_statuses_are_as_they_are_said() -> None:
    """Only what comes from sizes counts as reproduced: four rows rest on the printed step, one constant is fitted."""
    by = {s: {name for name, f in FIGURES.items() if f.status == s} for s in ("fitted", "missed", "worked out")}
    assert by["fitted"] == {"v3_step"}
    assert by["missed"] == {"llama_flops", "v3_link_share", "v3_bubble", "failure_1k", "v3_extension_hours"}
    assert by["worked out"] == {
        *("v32_cache", "v32_crossover", "v32_flops_ratio", "bubble_1f1b", "bubble_zb1p", "bubble_dualpipe")
    }
    for name in ("v3_flops_per_gpu", "v3_flops_per_gpu_full", "v3_tokens_per_day"):
        assert FIGURES[name].status == "follows"
    statuses = [figure.status for figure in FIGURES.values()]
    assert (statuses.count("reproduced"), statuses.count("follows"), statuses.count("misprint")) == (16, 10, 2)


def test_status_follows_the_residual() -> None:
    figure = FIGURES["v3_flops"]

    def status(**changes: object) -> str:
        return dataclasses.replace(figure, **changes).status

    assert status(within=0.001) == "missed" == status(expected="fitted", within=0.001)
    assert status(within=0.001, expected="misprint") == "misprint"
    assert status(expected="missed") == "reproduced", "the residual decides, not the file"
    assert status(expected="worked out") == "worked out", "it is no published figure"
    assert status(bound=True) == "missed" and status(bound=True, printed=figure.ours * 2) == "reproduced"
