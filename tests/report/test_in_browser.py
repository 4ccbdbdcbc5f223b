"""Reports in a browser: complete, without requests, at every width, light, dark and printed."""

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


def test_print_is_light_and_shows_whole_tables(benchmarks: Path, browser: Chromium) -> None:
    browser.open(benchmarks, prefers_color_scheme="dark")
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    text = "getComputedStyle(document.querySelector('svg.plot text')).fill"
    assert browser.evaluate(text) not in ("", "rgb(228, 230, 233)"), "plots are light"
    hidden = "[...document.querySelectorAll('.scroll')].filter(s => s.scrollHeight > s.clientHeight + 2).length"
    assert browser.evaluate(hidden) == 0
    browser.call("Emulation.setEmulatedMedia", media="")
