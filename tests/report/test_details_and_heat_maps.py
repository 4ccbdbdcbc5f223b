"""Numbers whose computation opens on a click, and heat maps: on the page, in a browser, and in a terminal."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from dsmini.report import Detail, HeatMap, Report, Section
from dsmini.report.heat_map import DARKEST, LIGHTEST
from tests.helpers.chromium import BROWSER, Chromium

in_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here: apt-get install chromium")


def heat_map(values: list[list[float | None]]) -> HeatMap:
    return HeatMap(
        title="Time of a step",
        x="hardware",
        y="kv_lora_rank",
        columns=[f"<column {i}>" for i in range(len(values[0]))],
        rows=[f"row {i}" for i in range(len(values))],
        values=values,
        cells=[["" if v is None else f"{v:g} ms" for v in row] for row in values],
        caption="A caption.",
    )


def report() -> Report:
    cache = Detail(
        name="kv_cache",
        title="Cache of a token",
        value="70.3 kB",
        lines=["= n_layers * row", "= 61 * 1152 B"],
        note="Source: V2 report",
        needs=["row", "n_layers"],
    )
    row = Detail(name="row", title="Row of a <layer>", value="1152 B")
    section = Section(
        name="memory",
        title="How much?",
        finding="Little.",
        prose=[("Machine to Algorithm", "Links are slow & dear.")],
        details={"Cache": [cache, row]},
        heat_maps=[heat_map([[1.0, 2.0], [None, 3.0]])],
    )
    return Report(title="A plan", sections=[section], highlights=[("70 kB", "a token")], facts_title="Planned")


def test_shades_go_from_lightest_to_darkest() -> None:
    assert heat_map([[1.0, 2.0], [None, 3.0]]).shades == [[LIGHTEST, 0.26], [None, DARKEST]]
    assert heat_map([[5.0, 5.0]]).shades == [[0.26, 0.26]], "equal values are in the middle"
    assert heat_map([[None]]).shades == [[None]]


def test_values_over_more_than_a_factor_of_ten_are_logarithmic() -> None:
    assert heat_map([[1.0, 10.0, 100.0]]).shades == [[LIGHTEST, 0.26, DARKEST]]
    assert heat_map([[0.0, 50.0, 100.0]]).shades == [[LIGHTEST, 0.26, DARKEST]], "zero has no logarithm"


def test_page_has_details_links_prose_and_heat_maps() -> None:
    page = report().html()
    for said in (
        "<summary><span>Cache of a token</span><b>70.3 kB</b></summary>",
        '<div id="kv_cache">',
        "<pre>= n_layers * row\n= 61 * 1152 B</pre>",
        '<a href="#row">row</a>, n_layers',
        "Row of a &lt;layer&gt;",
        "<h3>Machine to Algorithm</h3>",
        "Links are slow &amp; dear.",
        'style="--shade: 0.05">1 ms</td>',
        'style="--shade: 0.47">3 ms</td>',
        "&lt;column 0&gt;",
        "<td>–</td>",  # noqa: RUF001
        "A caption.",
        "<dt>a token</dt><dd>70 kB</dd>",
    ):
        assert said in page, said
    assert "Spread:" not in page, "nothing was measured"
    assert "<script" not in page


def test_terminal_shows_names_to_ask_for_and_heat_maps_as_tables() -> None:
    out = io.StringIO()
    report().show(Console(file=out, width=100))
    for said in ("Cache of a token", "70.3 kB", "kv_cache", "kv_lora_rank \\ hardware", "<column 1>", "3 ms"):
        assert said in out.getvalue(), said


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@in_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_click_opens_a_computation_and_a_link_opens_the_next(tmp_path: Path, browser: Chromium, width: int) -> None:
    (tmp_path / "report.html").write_text(report().html())
    browser.open(tmp_path / "report.html", width)
    is_open = "[...document.querySelectorAll('.details details')].map(d => d.open)"
    assert browser.evaluate(is_open) == [False, False]
    browser.evaluate("document.querySelector('summary').click()")
    assert browser.evaluate(is_open) == [True, False]
    browser.evaluate("document.querySelector('a[href=\"#row\"]').click()")
    assert browser.evaluate(
        "new Promise(done => setTimeout(() => done(document.getElementById('row').offsetHeight), 100))"
    )
    assert browser.evaluate(is_open) == [True, True]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


@in_browser
def test_text_of_shaded_cells_is_readable(tmp_path: Path, browser: Chromium) -> None:
    """Compare luminances: text and shade differ by 4.5 to 1 as WCAG asks for, in light and dark."""
    (tmp_path / "report.html").write_text(report().html())
    script = """[...document.querySelectorAll('.heat td')].map(td => {
        const before = getComputedStyle(td, '::before')
        return [getComputedStyle(td).color, before.backgroundColor, before.opacity,
            getComputedStyle(td.closest('.scroll')).backgroundColor]})"""
    for scheme in ("light", "dark"):
        browser.open(tmp_path / "report.html", prefers_color_scheme=scheme)
        for text, shade, opacity, card in browser.evaluate(script):
            (ink, over, under), a = (channels(colour) for colour in (text, shade, card)), float(opacity)
            mixed = [a * x + (1 - a) * y for x, y in zip(over, under, strict=True)]
            low, high = sorted((luminance(ink), luminance(mixed)))
            assert (high + 0.05) / (low + 0.05) > 4.5, (scheme, text, opacity)


def channels(colour: str) -> list[float]:
    return [float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]


def luminance(colour: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
