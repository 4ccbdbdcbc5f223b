"""The report as a browser shows it: complete, alone, at every width, light and dark."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import runner
from dsmini.report import Plot, Series
from dsmini.report.plots import THEMES, drawable, styles
from tests.helpers import fake_questions as fake
from tests.helpers.chromium import BROWSER, Chromium

in_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the fake questions, with changes since a run half as fast, and a case that fails."""
    folder = tmp_path_factory.mktemp("report")

    def fail(key: str) -> None:
        if key == "dsmini 2048":
            raise RuntimeError("no memory for <this> & that")

    with contextlib.redirect_stdout(io.StringIO()):
        slow = {"fake_decode": fake.decode(speed=0.5)}
        assert runner.main(["--out", str(folder / "old")], slow, fake.roofs) == 0
        known = {**fake.known(), "fake_decode": fake.decode(fail)}
        arguments = ["--out", str(folder / "new"), "--compare", str(folder / "old" / "results.jsonl")]
        assert runner.main(arguments, known, fake.roofs) == 1
    return folder / "new" / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


def test_page_names_no_other_place(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"(src|href|url\()\s*=?\s*[\"'(]?\s*(https?:|//|file:)", text)
    assert "<script" not in text
    # matplotlib's own namespaces and the browser's are the only addresses, and they are none to fetch from
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }


def test_ids_are_unique_and_references_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "fake-cache-0-" in "".join(ids), "those of the plots are among them"
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)) != set()
    for one, other in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text):
        assert (one or other) in ids


def test_each_plot_has_the_colours_of_its_theme(page: Path) -> None:
    plots = re.findall(r'<svg [^>]*class="plot (\w+)".*?</svg>', page.read_text(), re.DOTALL)
    assert plots == ["light", "dark"] * 4
    for theme, plot in re.findall(r'<svg [^>]*class="plot (\w+)"(.*?)</svg>', page.read_text(), re.DOTALL):
        mine = THEMES[theme]
        assert mine.ink in plot and mine.series[0] in plot
        allowed = {mine.ink, mine.muted, mine.rule, mine.card, *mine.series, "#000000"}  # markers' outlines in <defs>
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", plot)) <= allowed


def test_text_is_escaped_and_said(page: Path) -> None:
    text = page.read_text()
    assert "<tags>" not in text and "<this>" not in text and "<test>" not in text
    for said in (
        "MHA, with &lt;tags&gt; &amp; $5",
        "no memory for &lt;this&gt; &amp; that",
        "70,272 bytes",
        "38.0 GB/s",
        "python -m benchmarks fake_decode --device cpu --dtype bfloat16 --threads",
        "1 of 8 cases is still to be measured.",
        "Nothing to draw yet.",
        "Both sides hold the same shape",
    ):
        assert said in text, said
    assert len(re.findall(r'class="pill">better', text)) == 7  # of eight cases one failed
    assert len(re.findall(r'class="pill">gone', text)) == 1


def test_points_stand_over_their_labels() -> None:
    labels = ["training", "decoding", "reading"]
    some = Series(label="another", x=[1, 2], y=[2.0, 3.0], kind="points")
    line = Series(label="equal", x=[0, 2], y=[1.0, 1.0], dashed=True)
    bars = Series(label="bars", x=(), y=[1.0, 2.0, 3.0], kind="bars")
    plot = Plot(title="t", x="", y="y", series=[some, line, bars], labels=labels)
    assert [list(drawable(s, plot).x) for s in plot.series] == [[1, 2], [0, 2], [0, 1, 2]]


def test_prediction_has_the_colour_of_what_it_predicts() -> None:
    of = {"mla": "", "mha": "", "mla, predicted": "mla", "predicted (mha)": "mha"}
    series = [Series(label=label, x=[1, 2], y=[3, 4], of=of[label]) for label in of]
    mla, mha, mla_predicted, mha_predicted = styles(series)
    assert mla == mla_predicted != mha == mha_predicted


def test_more_series_than_colours_are_squares() -> None:
    of = {"mla": "", "mha": "", "mla, predicted": "mla", "predicted (mha)": "mha"}
    of |= dict.fromkeys((f"kind {n}" for n in range(9)), "")
    found = dict(zip(of, styles([Series(label=label, x=[1, 2], y=[3, 4], of=of[label]) for label in of]), strict=True))
    assert found["mla"][0] == found["kind 8"][0]
    assert [label for label, (_, marker) in found.items() if marker == "s"] == ["kind 8"]


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_browser_draws_every_plot_and_asks_for_nothing(page: Path, browser: Chromium, width: int, scheme: str) -> None:
    browser.open(page, width, prefers_color_scheme=scheme)
    sizes = browser.evaluate(f"""[...document.querySelectorAll("svg.plot.{scheme}")].map(svg => ({{
        box: [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height],
        paths: svg.querySelectorAll("path, use").length, texts: svg.querySelectorAll("text").length,
        label: svg.getAttribute("aria-label")}}))""")
    other = "dark" if scheme == "light" else "light"
    assert browser.evaluate(f'document.querySelector("svg.plot.{other}").getBoundingClientRect().width') == 0
    assert len(sizes) == 4
    for plot in sizes:
        assert min(plot["box"]) > 100 and plot["paths"] > 8 and plot["texts"] > 5 and plot["label"]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.body.innerText").count("How fast does a model decode") == 2
    asked = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert browser.said("Log.entryAdded") + browser.said("Runtime.consoleAPICalled") == []
    assert browser.said("Runtime.exceptionThrown") == []


@in_browser
def test_text_of_plots_stays_inside_them(page: Path, browser: Chromium) -> None:
    browser.open(page)
    outside = browser.evaluate("""[...document.querySelectorAll("svg.plot.light")].flatMap(svg => {
        const box = svg.getBoundingClientRect()
        return [...svg.querySelectorAll("text")].filter(text => {
            const t = text.getBoundingClientRect()
            return t.left < box.left - 2 || t.right > box.right + 2 || t.top < box.top - 2 || t.bottom > box.bottom + 2
        }).map(text => text.textContent)})""")
    assert outside == []


@in_browser
def test_text_of_plots_has_the_font_of_the_page(page: Path, browser: Chromium) -> None:
    browser.open(page)
    fonts = "['body', 'svg.plot text'].map(what => getComputedStyle(document.querySelector(what)).fontFamily)"
    body, plot = browser.evaluate(fonts)
    assert body == plot


@in_browser
def test_dark_changes_page_and_plots(page: Path, browser: Chromium) -> None:
    look = """(() => {
        const plot = [...document.querySelectorAll("svg.plot")].find(svg => svg.getBoundingClientRect().width > 0)
        const bar = [...plot.querySelectorAll("path")].find(path => path.style.fill.startsWith("rgb"))
        return [getComputedStyle(document.body).backgroundColor, getComputedStyle(bar).fill,
            getComputedStyle(plot.querySelector("text")).fill]})()"""
    seen = []
    for scheme in ("light", "dark"):
        browser.open(page, prefers_color_scheme=scheme)
        seen.append(browser.evaluate(look))
    assert all(light != dark for light, dark in zip(*seen, strict=True)), seen


@in_browser
def test_print_is_light_and_shows_whole_tables(page: Path, browser: Chromium) -> None:
    browser.open(page, prefers_color_scheme="dark")
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    widths = "[...document.querySelectorAll('svg.plot')].map(svg => svg.getBoundingClientRect().width > 0)"
    assert browser.evaluate(widths) == [True, False] * 4, "plots are the light ones"
    hidden = "[...document.querySelectorAll('.scroll')].filter(s => s.scrollHeight > s.clientHeight + 2).length"
    assert browser.evaluate(hidden) == 0
    browser.call("Emulation.setEmulatedMedia", media="")
