"""Reports of any command: from figures and sentences to words, terminal, page and JSON."""

import re
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dsmini.report import Figure, Plot, Report, Series, units
from dsmini.report.plots import THEMES, _ends, colours_of, legend, svg
from dsmini.report.tables import ratio
from tests.helpers.pages import check_page, on_terminal, text_of
from tests.report.conftest import planned

PAGES = Path(__file__).parent / "pages"


# --- pages


def test_terminal_and_page_of_a_plan(plan: Path) -> None:
    """Compare both with those that are stored. Nothing was measured, so neither speaks of spread."""
    check_page(PAGES / "plan.terminal.txt", on_terminal(planned(), 100))
    check_page(PAGES / "plan.page.txt", text_of(plan.read_text()))
    for part in (
        '<a href="#row">row</a>, n_layers',
        '<div id="kv_cache">',
        ".missed { color: var(--bad)",
    ):
        assert part in plan.read_text()


def test_page_of_benchmarks(benchmarks: Path) -> None:
    """Compare the page with the one that is stored, without the facts of the machine, the run and the traceback."""
    text = text_of(benchmarks.read_text())
    for hidden, shown in {
        r"Traceback .*(?=RuntimeError)": "TRACEBACK ",
        r"--threads \d+": "--threads N",
        r"(?s)Where and when\n.*": "",
    }.items():
        text, hits = re.subn(hidden, shown, text)
        assert hits, hidden
    check_page(PAGES / "benchmarks.page.txt", text)


def test_pages_need_no_other_file_and_hold_no_script(plan: Path, benchmarks: Path) -> None:
    for page in (plan.read_text(), benchmarks.read_text()):
        assert not re.search(r"(src|href|url\()\s*=?\s*[\"'(]?\s*(https?:|//|file:)", page)
        # the only addresses are XML namespaces, which nothing fetches
        addresses = {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
        assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= addresses
        for raw in ("<script", "<tags>", "<this>", "<test>", "<laptop>", "<layer>", "<column"):
            assert raw not in page, raw


def test_ids_are_unique_and_references_lead_somewhere(plan: Path, benchmarks: Path) -> None:
    for page in (plan.read_text(), benchmarks.read_text()):
        ids = re.findall(r'\bid="([^"]+)"', page)
        assert len(ids) == len(set(ids))
        references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
        assert references and {one or other for one, other in references} <= set(ids)
    assert "fake-cache-0-" in "".join(ids), "those of the plots are among them"


def test_example_of_the_docstring_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lines = (Report.__doc__ or "").splitlines()
    first = next(i for i, line in enumerate(lines) if "from dsmini.report import" in line)
    last = next(i for i, line in enumerate(lines) if "write_text(report.html())" in line)
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent("\n".join(lines[first : last + 1])), {"Path": Path, "Console": Console})
    page, printed = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    for said in ("70,272 bytes", "98 % less"):
        assert said in page and said in printed


# --- plots


def test_whiskers_reach_from_the_low_end_to_the_high_one() -> None:
    assert _ends(Series(label="a", x=[1, 2], y=[5.0, 9.0], low=[3.0, 9.5], high=[9.0, 10.0])) == [
        [2.0, 0.0],
        [4.0, 1.0],
    ]


def test_plots_have_the_colours_of_the_page(benchmarks: Path) -> None:
    """Check that a drawing names variables alone, which the page has for light and for dark."""
    page = benchmarks.read_text()
    plots = re.findall(r'<svg [^>]*class="plot"(.*?)</svg>', page, re.DOTALL)
    assert len(plots) == 4
    for plot in plots:
        assert "var(--ink)" in plot and "var(--series-0)" in plot
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", plot)) <= {"#000000"}, "outlines of markers, in <defs>"
    for theme in THEMES.values():
        assert all(f"--{name}: {colour};" in page for name, colour in theme.items())


def test_predictions_share_the_colour_of_their_series() -> None:
    def series(label: str, of: str = "") -> Series:
        return Series(label=label, x=[1, 2], y=[3, 4], of=of, dashed=bool(of))

    both = [series(label, of) for kind in ("MLA", "MHA") for label, of in ((kind, ""), (f"{kind}, predicted", kind))]
    plot = Plot(title="Speed", x="context", y="tokens/s", series=both)
    mla, mla_predicted, mha, mha_predicted = colours_of(both)
    assert mla == mla_predicted != mha == mha_predicted
    drawn = re.findall(r">([^<>]*predicted[^<>]*)</text>", svg(plot, "speed"))
    assert legend(both, plot) == ["MLA", "MLA, predicted", "MHA", "MHA, predicted"] and len(drawn) == 2
    assert legend([series("Speed")], plot) == legend([series("measured")], plot) == []
    assert legend([series("batch 1")], plot) == ["batch 1"]


@pytest.mark.parametrize(
    ("top", "ticks"), [(20.0, ["1", "2", "5", "10", "20"]), (1e5, ["1", "10", "100", "1,000", "10k", "100k"])]
)
def test_ticks_of_a_wide_scale_are_powers_of_ten(top: float, ticks: list[str]) -> None:
    one = Series(label="a", x=[7, 8], y=[1.0, top])
    drawn = svg(Plot(title="Speed", x="context", y="bytes", log_y=True, series=[one]), "speed")
    assert re.findall(r">([^<>]+)</text>", drawn) == ["7", "8", "context", *ticks, "bytes", "a"]


# --- figures in words: units, and tones of predictions


def figure(measured: float | None, **given: Any) -> Figure:
    """Return a figure whose interval is its median."""
    usual: dict[str, Any] = {"question": "q", "case": {"n": 1}, "metric": "time", "unit": "s"}
    return Figure(**{**usual, "low": measured, "high": measured, **given}, measured=measured)


TABLES = tomllib.loads(Path(__file__).with_name("words.toml").read_text())


@pytest.mark.parametrize(("value", "unit", "said"), [*TABLES["shown"], (None, "s", units.NOTHING)])
def test_values_are_shown_in_readable_units(value: float | None, unit: str, said: str) -> None:
    assert units.human(value, unit) == said
    assert units.human(671_026_404_352, "", exact=True) == "671,026,404,352"


def test_ticks_are_short() -> None:
    ticks = {512: "512", 2048: "2,048", 1e4: "10k", 1.5e6: "1.5M", 0.02: "0.02", 0.001: "0.001", 0.0002: "2e-4"}
    assert {value: units.short(value) for value in ticks} == ticks


@pytest.mark.parametrize("case", TABLES["tones"])
def test_tone_says_how_far_a_prediction_was_off(case: dict[str, Any]) -> None:
    tone = case["tone"]
    found = ratio(figure(**{name: value for name, value in case.items() if name != "tone"}, unit="bytes"))
    assert found.tone == tone
    assert tone != "bound" or found == f"{case['measured'] / 100:.2f}"


@pytest.mark.parametrize(
    ("measured", "bar"),
    [(100.0, (50, 0)), (200.0, (50, 25)), (50.0, (25, 25)), (900.0, (50, 50)), (9.0, (0, 50))],
)
def test_bar_begins_in_the_middle_and_ends_at_the_ratio(measured: float, bar: tuple[float, float]) -> None:
    assert ratio(figure(measured, unit="bytes", predicted=100.0)).bar == bar
