"""Published figures: each is computed from configs and hardware, and reproduced, or misses as it says."""

import dataclasses
import io
import re

import pytest
from rich.console import Console

from dsmini.planner.model.references import MODELS, reference, same_sizes
from dsmini.planner.pages.coverage import coverage
from dsmini.planner.published import values as published_values
from dsmini.planner.published.published import PublishedFigure, published_figures, rounding
from dsmini.planner.quantities.formula import inputs, walk
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT
from dsmini.report import Report
from tests.helpers.configs import CONFIGS, released

FIGURES = {figure.name: figure for figure in published_figures()}
FACTS = range(1, 34)
"""Facts that a plan must cover: the context extension is 28, later attention 29 to 33."""


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_as_the_file_says(name: str) -> None:
    figure = FIGURES[name]
    assert figure.status == figure.expected, figure.residual
    assert figure.note or figure.status in ("reproduced", "follows"), "what misses, or was worked out, says so"
    assert figure.note or figure.within <= 0.05 or figure.within == rounding(f"{figure.printed.value:g}"), "wide"


def test_figure_without_sizes_of_a_model_counts_as_following() -> None:
    """A sum or a ratio of printed figures says nothing about the planner's formulas of a model."""
    sizes = tuple(field.name for field in dataclasses.fields(ModelInputs) if field.name != "config")
    for figure in FIGURES.values():
        used = [] if figure.ours is None else list(inputs(figure.ours))
        if not any(name.endswith(sizes) or name.startswith(("pro_", "flash_", "v41_")) for name in used):
            assert figure.status != "reproduced", figure.name


OURS = {
    "v3_parameters": (671_026_404_352, 0),
    "v3_active": (36.62e9, 2e-4),
    "v3_active_with_embedding": (37.55e9, 1e-4),
    "v3_mtp": (11.507e9, 1e-4),
    "v3_flops": (250.4e9, 3e-4),
    "v2_flops": (155.3e9, 3e-4),
    "v3_tokens_per_day": (272.80e9, 1e-4),
    "llama_cache_ratio": (7.34, 1e-3),
    "v2_cache_saving": (0.9334, 1e-4),
    "h800_token_exchange": (14.757e-3, 1e-4),
    "h800_token_exchange_7168": (15.11e-3, 1e-3),
    "gb200_exchange_rate": (1220, 1e-3),
    "v3_bubble": (1.09, 0.005),
    "v3_link_share": (30.8 * 7 / 8 / 40 * 20.0 / 17.4, 0.01),
    "failure_16k": (1.803 * 3600, 1e-3),
    "failure_1k": (28.8 * 3600, 2e-3),
    "effective_share_12k": (0.92, 2e-3),
    "ff_energy_saving": (0.405, 1e-3),
    "ff_checkpoint": (1.95, 0.03),
    "v3_extension_hours": (75.7e3, 4e-3),
    "v32_cache": (48_068, 0),
    "v32_crossover": (2176, 1e-12),
    "v32_flops_ratio": (13.43, 1e-3),
    "v4_pro_cache_ratio": (9.55, 5e-4),
    "v4_flash_cache_ratio": (13.68, 4e-4),
    "v4_pro_flops_ratio": (3.77, 2e-3),
    "v4_flash_flops_ratio": (10.07, 5e-4),
    "v41_cache": (890, 0),
}
"""Values that were worked out by hand, and how close."""


@pytest.mark.parametrize("name", OURS)
def test_our_value_is_the_one_worked_out_by_hand(name: str) -> None:
    value, within = OURS[name]
    ours = FIGURES[name].ours
    assert ours is not None and ours.value == pytest.approx(value, rel=within)


def test_every_fact_is_there() -> None:
    assert {figure.row for figure in FIGURES.values()} >= set(FACTS)
    statuses = [figure.status for figure in FIGURES.values()]
    assert (statuses.count("reproduced"), statuses.count("follows")) == (40, 33)
    assert {name for name, f in FIGURES.items() if f.status == "worked out"} == {
        *("v32_cache", "v32_crossover", "v32_flops_ratio", "bubble_1f1b", "bubble_zb1p", "bubble_dualpipe")
    }
    missing = {name for name, figure in FIGURES.items() if figure.status == "misses"}
    assert missing == {"v3_bubble", "failure_1k", "v3_extension_hours"}


def test_no_figure_is_a_typed_number() -> None:
    """Ours come from inputs with a source; the only plain numbers are those of formulas, such as 6 in 6 N D."""
    for figure in FIGURES.values():
        if figure.ours is None:
            continue
        used = inputs(figure.ours)
        assert used, figure.name
        assert all(node.source for node in used.values()), figure.name
        numbers = {node.value for node in walk(figure.ours) if node.op == "number"}
        assert numbers <= {0, 1, 2, 3, 4, 6, 86400}, (figure.name, numbers)
        assert not any(node.name == f"printed_{figure.name}" for node in walk(figure.ours)), "computed from itself"


def test_status_follows_the_residual() -> None:
    figure = FIGURES["v3_flops"]

    def status(**changes: object) -> str:
        return dataclasses.replace(figure, **changes).status

    assert figure.ours is not None
    assert status(within=0.001) == "misses"
    assert status(within=0.001, expected="misprint") == "misprint"
    assert status(expected="misses") == "reproduced", "the residual decides, not the file"
    assert status(expected="worked out") == "worked out", "it is no published figure"
    assert status(expected="worked out", within=0.001) == "misses"
    assert status(ours=None) == "not attempted"
    assert status(bound=True) == "misses" and status(bound=True, printed=figure.ours * 2) == "reproduced"


def test_wrong_formula_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**published_values.COMPUTED, "v3_cache": lambda s: s.cache("deepseek-v3") * COUNT(1.001)}
    monkeypatch.setattr("dsmini.planner.published.published.COMPUTED", wrong)
    found: dict[str, PublishedFigure] = {figure.name: figure for figure in published_figures()}
    assert found["v3_cache"].status == "misses"


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_table_is_readable(width: int) -> None:
    """Numbers are on one line, titles take two or three, and no line is wider than the terminal."""
    console = Console(width=width, record=True, file=io.StringIO())
    Report(title="", sections=[coverage(full=False)]).show(console)
    lines = console.export_text().splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("figure"))) :]
    assert max(map(len, table)) <= width
    assert len(table) <= (3 if width < 100 else 1.1) * len(FIGURES)
    rows = [re.split(r"  +", line.strip())[1:] for line in table]
    for row in (
        "671 billion|671|+0.00|0.075|reproduced",
        "48.068 kB/token|48.07|+0.00|0|worked out",
        "7.9 h|28.83|+265.14|3|misses",
        "1|0.7806|-21.94|25|reproduced",
        "at most 10 s|1.987|-80.13|below|reproduced",
    ):
        assert row.split("|") in rows, row


def test_coverage_counts_every_figure_once() -> None:
    found = coverage(list(FIGURES.values()))
    numbers = [int(word) for word in re.findall(r"\d+", found.finding)]
    assert numbers[0] == sum(numbers[1:6]) and numbers[0] + numbers[6] == len(FIGURES) == len(found.tables[0].rows)


def test_page_shows_the_error_to_hold_next_to_each_figure() -> None:
    table = coverage(list(FIGURES.values())).tables[0]
    column = dict(zip(FIGURES, (row[list(table.columns).index("within")] for row in table.rows), strict=True))
    assert (column["v3_parameters"], column["v3_link_share"], column["v3_cache"]) == ("0.075 %", "25 %", "0 %")
    assert (column["ff_checkpoint"], column["v3_fp8_loss_error"]) == ("below", "")


@pytest.mark.parametrize(("printed", "error"), [("250e9", 0.5 / 250), ("14.76e-3", 0.005 / 14.76), ("4", 1 / 8)])
def test_rounding_is_half_a_unit_of_the_last_digit(printed: str, error: float) -> None:
    assert rounding(printed) == pytest.approx(error)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2"])
def test_packaged_models_are_those_of_configs(name: str) -> None:
    assert reference(name).config == released(name)
    assert same_sizes(reference(name), reference(name))


def test_known_models_differ() -> None:
    names = [path.stem for path in MODELS.glob("*.toml")]
    assert {path.stem for path in CONFIGS.glob("deepseek-v[23].toml")} < set(names)
    assert [(a, b) for a in names for b in names if a < b and same_sizes(reference(a), reference(b))] == []
