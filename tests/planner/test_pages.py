"""Pages of the planner, each next to its snapshot in pages/: numbers of an invented machine, the same everywhere.

UPDATE_PAGES=1 pytest tests/planner/test_pages.py writes the snapshots anew. Read what has changed before a commit.
"""

import functools
import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dsmini.planner import answers
from dsmini.planner.answers import PlanAnswer
from dsmini.planner.pages.comparison import variation_section
from dsmini.planner.pages.sections import sections
from dsmini.planner.pages.why import why
from dsmini.planner.quantities.explanation import named, shown
from dsmini.planner.varied_axis import read_axis
from dsmini.planner.vary import vary
from dsmini.report import Detail, Section
from tests.helpers.chromium import BROWSER, Chromium
from tests.helpers.plans import Formulas, plan_of, read, same_page, setup_of

V3 = "deepseek-v3 @invented"
SMALL = "deepseek-v2-lite @invented gpus=8 batch=96 schedule=1f1b precision=bf16 micro_batch=1 zero=1"
SLOW = f"{V3} gpus=2048 pipeline=1 expert=256 tensor=8 zero=3 recompute=full schedule=1f1b precision=fp8"
FOUND = (
    *("deepseek-v3 @h800", SLOW, f"{V3} utilization=0.5", f"{V3} expert=16", "deepseek-v3.2 @invented"),
    *("deepseek-v2-lite @laptop memory*6", "toy @laptop", "toy-mha @invented", "toy-dense @laptop"),
    *("shakespeare @invented", f"{V3} memory*0.7 tokens=1e12 price=5 failures_per_node_day=0.1"),
)
"""Plans of which headings, findings, warnings and reasons are shown."""


@functools.cache
def planned(words: str) -> PlanAnswer:
    return answers.planned(setup_of(words), f"python -m dsmini.plan {words}")


@functools.cache
def searched(words: str) -> PlanAnswer:
    return answers.searched(setup_of(words), read(words)[2], words, lambda done, what: None)


def varied(*axes: str, of: tuple[str, ...] = (), words: str = V3) -> PlanAnswer:
    return answers.varied(setup_of(words), read(words)[2], axes, of, "", lambda done, what: None)


def compared(*axes: str, of: tuple[str, ...] = ()) -> Section:
    """Return the section of a variation as a page shows it."""
    return variation_section(vary(setup_of(V3), read(V3)[2], [read_axis(axis) for axis in axes], of), full=True)


def on_terminal(answer: PlanAnswer, width: int = 100) -> str:
    out = io.StringIO()
    answer.show(Console(file=out, width=width))
    return out.getvalue()


def on_page(found: Iterable[Section]) -> str:
    """Return all that a page shows of some sections, but the formulas of figures."""
    return "\n".join(line for section in found for line in _lines(section))


def _lines(section: Section) -> Iterator[str]:
    yield from ("", f"## {section.title}", section.finding)
    yield from (f"! {warning}" for warning in section.warnings)
    yield from (f"{heading}: {paragraph}" for heading, paragraph in section.prose)
    for table in section.tables:
        yield from (" | ".join(row) for row in (table.columns, *table.rows))
    for plot in section.plots:
        yield f"plot: {plot.title}, {plot.y} over {plot.x}; logarithmic {plot.log_x} {plot.log_y}; {plot.labels}"
        for series in plot.series:
            yield f"  {series.kind} {_rounded(series.x)} {_rounded(series.y)}"
    for heat in section.heat_maps:
        yield f"heat map: {heat.title}; {heat.y} {list(heat.rows)} by {heat.x} {list(heat.columns)}"
        for values, cells in zip(heat.values, heat.cells, strict=True):
            yield f"  {_rounded(values)} {list(cells)}"
    for heading, details in {**section.details, **section.folded}.items():
        yield f"- {heading}"
        yield from (f"  {detail.name} | {detail.title} | {detail.value} | {_last(detail)}" for detail in details)
    yield section.about


def _rounded(values: Iterable[float | None]) -> list[str]:
    return ["" if value is None else f"{value:.4g}" for value in values]


def _last(detail: Detail) -> str:
    """Return the last line of a figure, which has all its digits, or the choice of a largest or smallest."""
    return detail.lines[-1] if len(detail.lines) > 1 else detail.note


def formulas() -> str:
    """Return the formulas of all figures of some plans, each once."""
    seen: set[str] = set()
    lines: list[str] = []
    for words in (V3, "toy @invented", "toy-dsa @invented", SMALL):
        steps = Formulas(plan_of(words).all.values()).steps
        lines += ["", f"## {words}", *(f"{name} = {steps[name].formula}" for name in sorted(steps.keys() - seen))]
        seen |= steps.keys()
    return "\n".join(lines)


def findings() -> str:
    lines: list[str] = []
    for words in FOUND:
        plan = plan_of(words)
        lines += [
            "",
            f"# {words}",
            *(answers.planned(setup_of(words), words).lines if not setup_of(words).refused else []),
        ]
        for section in sections(plan):
            lines += [f"{section.name}: {section.finding}", *(f"! {warning}" for warning in section.warnings)]
        lines += [f"{heading}: {paragraph}" for heading, paragraph in why(plan)]
    return "\n".join(lines)


PAGES: dict[str, Callable[[], str]] = {
    "plan": lambda: on_terminal(planned(V3)),
    "page": lambda: on_page(_page(planned(V3)).sections),
    "formulas": formulas,
    "findings": findings,
    "explanation": lambda: "\n".join(
        line
        for name, width in (("decode_gpu_weights", 100), ("effective_share", 70), ("n_layers", 80))
        for line in (*answers.explained(setup_of(V3), name, width).lines, "")
    ),
    "search": lambda: on_terminal(searched(SMALL)) + on_page([_named(searched(SMALL), "search_section")]),
    "variation": lambda: (
        on_terminal(varied("context=4096,1024", "precision=fp8", of=("decode_gpu_cache", "decode_cost")))
        + on_terminal(varied("pipeline=8,7,16"))
        + on_page(
            (
                compared("context=4096,1024,65536", of=("decode_gpu_cache", "decode_cost")),
                compared("precision=fp8,bf16", "zero=0,1", of=("memory_needed", "training_days", "kv_cache")),
                compared("hardware=h100", "max_seq_len=2048,8192"),
                compared("weight_dtype=fp8,bfloat16", of=("roof_step_seconds", "decode_time_per_token")),
            )
        )
    ),
    "heat-map": lambda: on_terminal(
        varied(
            *("kv_lora_rank=64,512", "hardware=h100,h800,h200,b200,gb200-nvl72,a100-pcie"),
            of=("decode_time_per_token", "decode_sequences_that_fit"),
            words="toy @invented",
        ),
        width=50,
    ),
    "published": lambda: on_terminal(answers.published(), width=120),
}
"""Snapshots by name."""


def _page(answer: PlanAnswer) -> Any:
    assert answer.page is not None
    return answer.page()


def _named(answer: PlanAnswer, name: str) -> Section:
    (found,) = [section for section in _page(answer).sections if section.name == name]
    return found


@pytest.mark.parametrize("name", PAGES)
def test_page_is_as_it_was(name: str) -> None:
    same_page(name, PAGES[name]())


# --- what snapshots do not show


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "new" / "plan.html"
    assert planned(V3).write(path.parent) == [path, path.parent / "plan.json"]
    return path


def test_every_figure_is_on_the_page_once_and_each_link_leads_to_one(page: Path) -> None:
    text = page.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and set(named(plan_of(V3).all.values())) <= set(ids)
    links = set(re.findall(r'href="#([^"]+)"', text))
    assert len(links) > 150 and links <= set(ids)


def test_figure_shows_its_formula_behind_a_click(page: Path) -> None:
    text = page.read_text()
    block = text[text.index('<div id="kv_cache">') :]
    block = block[: block.index("</details>")]
    for said in ("n_layers × cache_row", "61 × 1.152 kB", "= 70,272 B/token", "V2, table 1", 'href="#n_layers"'):  # noqa: RUF001
        assert said in block, said


def test_page_asks_for_nothing_and_says_what_is_planned(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text and not re.search(r"(src|href|url\()\s*=?\s*[\"'(]?\s*(https?:|//|file:)", text)
    for said in ("deepseek-v3 on An invented GPU", "<dd>selective</dd>", "320 GPUs, as DeepSeek-V3 is served"):
        assert said in text, said


def test_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out .*file cannot be written: it is a file; choose another folder"):
        planned("toy @invented").write(tmp_path / "file")


@pytest.mark.parametrize("words", [V3, "toy @invented"])
def test_few_titles_wrap_in_80_columns(words: str) -> None:
    """At most one line in ten of the tables of figures is the rest of a title."""
    found = plan_of(words)
    lines = [line.rstrip() for line in on_terminal(planned(words), 80).splitlines()]
    rows = [i for i, line in enumerate(lines) if line.endswith(tuple(f"  {key}" for key in found.all))]
    wrapped = [lines[i + 1] for i in rows if lines[i + 1] and i + 1 not in rows]
    assert len(rows) > 40 and len(wrapped) <= 0.1 * len(rows), wrapped


def test_multi_head_attention_of_the_reasons_is_that_of_a_variation() -> None:
    plan = plan_of("deepseek-v3")
    found = vary(plan.setup, read("deepseek-v3 sequences=30")[2], [read_axis("attention=mla,mha")]).plans
    said = " ".join(dict(why(plan)).values())
    for place, names in ((0, ["sequences_that_fit"]), (1, ["sequences_that_fit", "longest_context"])):
        for name in names:
            assert shown(found[place,].all[f"decode_{name}"]) in said, name


def test_progress_of_a_variation_is_told() -> None:
    seen: list[tuple[float, str]] = []
    vary(setup_of(V3), read(V3)[2], [read_axis("context=100,200")], (), lambda done, what: seen.append((done, what)))
    assert seen == [(0.5, "1 of 2 plans"), (1.0, "2 of 2 plans")]


# --- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if BROWSER is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_page_fits_and_asks_for_nothing_in_a_browser(page: Path, browser: Chromium, width: int) -> None:
    browser.open(page, width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    asked = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert browser.said("Log.entryAdded") == []


@pytest.mark.slow
def test_link_opens_a_figure_inside_a_folded_list(page: Path, browser: Chromium) -> None:
    browser.open(page, 1200)
    is_open = "document.getElementById('memory_first').closest('details').open"
    assert not browser.evaluate(is_open)
    browser.evaluate("document.querySelector('#memory_needed').closest('details').querySelector('summary').click()")
    browser.evaluate("document.querySelector('a[href=\"#memory_first\"]').click()")
    waited = "new Promise(done => setTimeout(() => done(document.getElementById('memory_first').offsetHeight), 100))"
    assert browser.evaluate(waited) > 0 and browser.evaluate(is_open)


@pytest.mark.slow
def test_print_shows_headlines_and_whole_tables(page: Path, browser: Chromium) -> None:
    browser.open(page, 720, prefers_color_scheme="dark")
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = "[...document.querySelectorAll('.scroll')].filter(s => s.scrollHeight > s.clientHeight + 2).length"
    assert browser.evaluate(hidden) == 0
    browser.call("Emulation.setEmulatedMedia", media="")
