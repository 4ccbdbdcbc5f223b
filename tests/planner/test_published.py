"""Published figures: each is computed from configs and hardware, and reproduced, or misses as it says."""

import dataclasses
import io
import re

import pytest
from rich.console import Console

from dsmini.planner import published
from dsmini.planner.published import published_figures, published_section, rounding
from dsmini.planner.request import is_v3, presets, reference
from dsmini.report import Report
from tests.helpers.configs import released

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


def test_wrong_formula_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = published.computed() | {"v2_cache_saving": FIGURES["v2_cache_saving"].ours * 1.001}
    monkeypatch.setattr(published, "computed", lambda: wrong)
    found = {figure.name: figure for figure in published_figures()}
    assert found["v2_cache_saving"].status == "missed"


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_table_is_readable(width: int) -> None:
    """Numbers are on one line, titles take two or three, and no line is wider than the terminal."""
    console = Console(width=width, record=True, file=io.StringIO())
    Report(title="", sections=[published_section(list(FIGURES.values()), full=False)]).show(console)
    lines = console.export_text().splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("figure"))) :]
    assert max(map(len, table)) <= width and len(table) <= 3 * len(FIGURES)
    rows = [re.split(r"  +", line.strip())[1:] for line in table]
    for row in (
        "671 billion|671|+0.00|0.075|reproduced",
        "48.068 kB/token|48.07|+0.00|0|worked out",
        "7.9 h|28.85|+265.14|3|missed",
        "at most 10 s|1.987|-80.13|below|reproduced",
    ):
        assert row.split("|") in rows, row


def test_finding_counts_every_figure_once() -> None:
    found = published_section(list(FIGURES.values()), full=True)
    numbers = [int(word) for word in re.findall(r"\d+", found.finding)]
    assert numbers[0] == sum(numbers[1:6]) and numbers[0] + numbers[6] == len(FIGURES) == len(found.tables[0].rows)


@pytest.mark.parametrize(("printed", "error"), [("250e9", 0.5 / 250), ("14.76e-3", 0.005 / 14.76), ("4", 1 / 8)])
def test_rounding_is_half_a_unit_of_the_last_digit(printed: str, error: float) -> None:
    assert rounding(printed) == pytest.approx(error)


def test_published_models_have_sizes_of_their_own() -> None:
    assert [name for name in ["deepseek-v3", "deepseek-v2", *presets()["models"]] if is_v3(reference(name))] == [
        "deepseek-v3"
    ]
    assert reference("deepseek-v2") == released("deepseek-v2")
