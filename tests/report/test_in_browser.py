"""Reports in a browser: complete, without requests, at every width, light, dark and printed."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.chromium import BROWSER, Chromium

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.mark.parametrize("width", [390, 1200])
def test_click_opens_a_computation_and_a_link_opens_the_next(plan: Path, browser: Chromium, width: int) -> None:
    browser.open(plan, width)
    is_open = "[...document.querySelectorAll('.details details')].map(d => d.open)"
    assert browser.evaluate(is_open) == [False, False]
    browser.evaluate("document.querySelector('.details summary').click()")
    assert browser.evaluate(is_open) == [True, False]
    browser.evaluate("document.querySelector('a[href=\"#row\"]').click()")
    seen = "new Promise(done => { const look = () => document.getElementById('row').offsetHeight ? done(true) : "
    assert browser.evaluate(f"{seen} requestAnimationFrame(look); look() }})")
    assert browser.evaluate(is_open) == [True, True]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_text_of_shaded_cells_is_readable(plan: Path, browser: Chromium) -> None:
    """Compare luminances: text and shade differ by 4.5 to 1 as WCAG asks for, in light and dark."""
    script = """[...document.querySelectorAll('.heat td')].map(td => {
        const before = getComputedStyle(td, '::before')
        return [getComputedStyle(td).color, before.backgroundColor, before.opacity,
            getComputedStyle(td.closest('.scroll')).backgroundColor]})"""
    for scheme in ("light", "dark"):
        browser.open(plan, prefers_color_scheme=scheme)
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_browser_draws_every_plot_and_asks_for_nothing(
    benchmarks: Path, browser: Chromium, width: int, scheme: str
) -> None:
    browser.open(benchmarks, width, prefers_color_scheme=scheme)
    sizes = browser.evaluate("""[...document.querySelectorAll("svg.plot")].map(svg => ({
        box: [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height],
        paths: svg.querySelectorAll("path, use").length, texts: svg.querySelectorAll("text").length,
        label: svg.getAttribute("aria-label")}))""")
    assert len(sizes) == 4
    for plot in sizes:
        assert min(plot["box"]) > 100 and plot["paths"] > 8 and plot["texts"] > 5 and plot["label"]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.body.innerText").count("How fast does a model decode") == 2
    asked = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [benchmarks.as_uri()]
    for said in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
        assert browser.said(said) == []


def test_text_of_plots_stays_inside_them_in_the_font_of_the_page(benchmarks: Path, browser: Chromium) -> None:
    browser.open(benchmarks)
    outside = browser.evaluate("""[...document.querySelectorAll("svg.plot")].flatMap(svg => {
        const box = svg.getBoundingClientRect()
        return [...svg.querySelectorAll("text")].filter(text => {
            const t = text.getBoundingClientRect()
            return t.left < box.left - 2 || t.right > box.right + 2 || t.top < box.top - 2 || t.bottom > box.bottom + 2
        }).map(text => text.textContent)})""")
    assert outside == []
    fonts = "['body', 'svg.plot text'].map(what => getComputedStyle(document.querySelector(what)).fontFamily)"
    body, plot = browser.evaluate(fonts)
    assert body == plot


def test_dark_changes_page_and_plots(benchmarks: Path, browser: Chromium) -> None:
    text, bar = "svg.plot text", "svg.plot path[style*='series']"
    look = f"[document.body, ...['{text}', \"{bar}\"].map(what => document.querySelector(what))].map(getComputedStyle)"
    seen = []
    for scheme in ("light", "dark"):
        browser.open(benchmarks, prefers_color_scheme=scheme)
        seen.append(browser.evaluate(f"{look}.map(style => style.backgroundColor + style.fill + style.stroke)"))
    assert all(light != dark for light, dark in zip(*seen, strict=True)), seen


def test_print_is_light_and_shows_whole_tables(benchmarks: Path, browser: Chromium) -> None:
    browser.open(benchmarks, prefers_color_scheme="dark")
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    text = "getComputedStyle(document.querySelector('svg.plot text')).fill"
    assert browser.evaluate(text) not in ("", "rgb(228, 230, 233)"), "plots are light"
    hidden = "[...document.querySelectorAll('.scroll')].filter(s => s.scrollHeight > s.clientHeight + 2).length"
    assert browser.evaluate(hidden) == 0
    browser.call("Emulation.setEmulatedMedia", media="")
