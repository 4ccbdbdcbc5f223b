"""Page of a plan: all figures with their formulas, reasons in its own numbers, offline, on a phone and on paper."""

import dataclasses
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from dsmini.planner import answers
from dsmini.planner.hardware import load_hardware
from dsmini.planner.pages.page import plan_report
from dsmini.planner.pages.why import why
from dsmini.planner.quantities.explanation import named, shown
from dsmini.planner.request import PlanRequest
from dsmini.planner.setup import Model, Setup, setup
from dsmini.planner.varied_axis import read_axis
from dsmini.planner.vary import vary
from dsmini.planner.whole import Plan, whole_plan
from tests.helpers.chromium import BROWSER, Chromium
from tests.helpers.configs import CONFIGS

in_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here: apt-get install chromium")


def made(name: str = "deepseek-v3", hardware: str = "h800", **chosen: object) -> Setup:
    request = PlanRequest(hardware=hardware, **chosen)  # pyright: ignore[reportArgumentType]
    return setup(request, Model.from_file(CONFIGS / f"{name}.toml"), load_hardware(hardware))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return whole_plan(made())


@pytest.fixture(scope="module")
def page(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.html"
    path.write_text(plan_report(plan, full=True, command="python -m dsmini.plan x").html())
    return path


@pytest.mark.parametrize("name", ["deepseek-v3", "toy", "kimi-k2"])
def test_few_titles_wrap_in_80_columns(name: str) -> None:
    """Of the tables of figures at most one line in ten is the rest of a title."""
    console = Console(width=80, record=True, file=io.StringIO())
    found = whole_plan(made(name))
    answers.PlanAnswer(record={}, report=plan_report(found, full=False)).show(console)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    ends = tuple(f"  {key}" for key in found.all)
    rows = [i for i, line in enumerate(lines) if line.endswith(ends)]
    wrapped = [lines[i + 1] for i in rows if lines[i + 1] and i + 1 not in rows]
    assert len(rows) > 40 and len(wrapped) <= 0.1 * len(rows), wrapped


# --- contents


def test_page_has_every_figure_and_input_once(plan: Plan, page: Path) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page.read_text())
    assert len(ids) == len(set(ids))
    assert set(named(plan.all.values())) <= set(ids)


def test_every_link_leads_to_a_figure_or_a_section(page: Path) -> None:
    text = page.read_text()
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    links = set(re.findall(r'href="#([^"]+)"', text))
    assert len(links) > 150 and links <= ids


def test_figure_shows_its_formula_in_names_and_numbers(page: Path) -> None:
    text = page.read_text()
    block = text[text.index('<div id="kv_cache">') :]
    block = block[: block.index("</details>")]
    for said in ("n_layers × cache_row", "61 × 1.152 kB", "= 70,272 B/token", "V2, table 1", 'href="#n_layers"'):  # noqa: RUF001
        assert said in block, said


def test_page_asks_for_nothing(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text and not re.search(r"(src|href|url\()\s*=?\s*[\"'(]?\s*(https?:|//|file:)", text)


def test_page_tells_coverage_next_to_error(page: Path) -> None:
    text = page.read_text()
    for said in ("Coverage next to error", "671,026,404,352", "-47.26 %", "not attempted", "7.34", "+265.14 %"):
        assert said in text, said


def test_cards_tell_what_is_planned(page: Path) -> None:
    text = page.read_text()
    for said in ("as DeepSeek-V3 was trained", "<dd>selective</dd>", "320 GPUs, as DeepSeek-V3 is served", "160 GB/s"):
        assert said in text, said


# --- reasons


def test_reasons_go_from_machine_to_algorithm_to_data(plan: Plan) -> None:
    headings = [heading for heading, _ in why(plan)]
    assert [heading.partition(":")[0] for heading in headings] == [
        *["Machine to Algorithm"] * 3,
        *["Machine to Data"] * 2,
        *["Algorithm to Data"] * 2,
    ]


def test_reasons_have_the_numbers_of_the_plan(plan: Plan) -> None:
    """Worked out by hand: 71.4 GB hold 61 sequences of 4 times 288 MB. Those of MHA are as --vary counts them."""
    said = dict(why(plan))
    assert plan.serving is not None
    left = 80e9 - plan.serving.decode.memory.weights.value
    assert "1.15 GB for a sequence of its own" in said["Machine to Algorithm: memory"] and int(left / 1.1514e9) == 61
    assert "sequences 61 fit on a GPU, and with multi-head attention 4." in said["Machine to Algorithm: memory"]
    assert "3.50 rows, where one for each remote expert would be 7" in said["Machine to Algorithm: links"]
    assert "4 times less" in said["Machine to Algorithm: links"]
    assert "which does not fit" in said["Machine to Algorithm: arithmetic"], "V3's layout needs FP8"
    assert "at least 4,096 sequences, 16.8 million tokens" in said["Machine to Data: batch"], "32 * 128 sequences"
    assert shown(plan.training.time.tokens_per_day) in said["Machine to Data: tokens"]
    assert "8 of 256 routed experts" in said["Algorithm to Data: tokens"]
    assert "4,230" in said["Algorithm to Data: context"]
    assert "it would be for 282 tokens, 15 times fewer" in said["Algorithm to Data: context"]


def test_multi_head_attention_of_the_reasons_is_that_of_a_variation(plan: Plan) -> None:
    request = PlanRequest(sequences=30)
    varied = vary(plan.setup, request, [read_axis("attention=mla,mha")])
    mla, mha = (varied.plans[i,].serving for i in (0, 1))
    assert mla is not None and mha is not None
    said = " ".join(dict(why(plan)).values())
    for found in (mla.decode.memory.sequences, mha.decode.memory.sequences, mha.decode.memory.context):
        assert shown(found) in said, found


def test_reasons_are_those_of_the_model_at_hand() -> None:
    dense = dict(why(whole_plan(made("toy-mha"))))
    assert "With this model's MHA" in dense["Machine to Algorithm: memory"]
    assert "Machine to Algorithm: links" not in dense and "Machine to Data: batch" not in dense
    alone = dict(why(whole_plan(made("toy-dense", "laptop"))))
    assert alone["Algorithm to Data: tokens"].startswith("All blocks are dense")
    assert "Machine to Algorithm: arithmetic" not in alone
    unserved = dict(why(whole_plan(made("shakespeare"))))
    assert not [heading for heading in unserved if heading.endswith(("memory", "context"))]


def test_reasons_of_a_search_are_about_its_layout() -> None:
    """Experts on two nodes reach both: no limit acts, and half of the copies are remote."""
    two = dict(why(whole_plan(made(expert=16))))["Machine to Algorithm: links"]
    assert "on 1.99 of 2 nodes" in two and "Routing allows" not in two


# --- terminal


def test_terminal_shows_headlines_alone(plan: Plan) -> None:
    out = io.StringIO()
    plan_report(plan, full=False).show(Console(file=out, width=80))
    text = out.getvalue()
    for said in ("kv_cache", "65.0 GB", "What does training take?", "Decode: memory traffic."):
        assert said in text, said
    assert "gate_parameters" not in text and "Coverage" not in text
    assert "decode_gpu_tokens_per_second" in text, "names are not wrapped in 80 columns"


def test_answer_writes_a_page_and_json(tmp_path: Path) -> None:
    answer = answers.planned(made("toy"), "python -m dsmini.plan toy")
    assert [path.name for path in answer.write(tmp_path / "new")] == ["plan.html", "plan.json"]
    assert "toy on NVIDIA H800" in (tmp_path / "new/plan.html").read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        answer.write(tmp_path / "file")


def test_words_say_what_is_a_guess_and_whose_numbers_they_are() -> None:
    lines = answers.planned(made("deepseek-v2-lite"), "x").lines
    assert "14.8 trillion tokens, 15,360 x 4,096 tokens a step; as DeepSeek-V3" in lines[2]
    assert lines[2].endswith("choose --tokens, --batch and --seq-len")
    assert "choose" not in answers.planned(made(), "x").lines[2], "V3's numbers are V3's own"
    laptop = plan_report(whole_plan(made("toy", "laptop")), full=False)
    said = {section.name: section for section in laptop.sections}
    assert "needs 115 MB of 17.2 GB" in said["training_section"].finding
    assert "GPU" not in said["training_section"].finding
    assert "Meta's nodes of eight GPUs" in said["reliability_section"].warnings[0]
    unserved = plan_report(whole_plan(made("shakespeare")), full=False).sections[2]
    assert unserved.finding.startswith("Serving is not planned: qk_norm=True")


def test_page_of_this_machine_says_that_rates_were_measured() -> None:
    s = made("toy", "laptop")
    here = dataclasses.replace(s, hardware=dataclasses.replace(s.hardware, name="this"))
    page = plan_report(whole_plan(here), full=True)
    assert "measured on this machine" in page.lead and "Nothing was measured" not in page.lead
    assert page.sections[1].finding.startswith("This machine takes 81.9 s")
    assert plan_report(whole_plan(s), full=True).lead.startswith("Predicted from sizes and data sheets. Nothing was")


# --- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@in_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_page_fits_and_asks_for_nothing_in_a_browser(page: Path, browser: Chromium, width: int) -> None:
    browser.open(page, width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    asked = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert browser.said("Log.entryAdded") == []


@in_browser
def test_link_opens_a_figure_inside_a_folded_list(page: Path, browser: Chromium) -> None:
    browser.open(page, 1200)
    is_open = "document.getElementById('memory_first').closest('details').open"
    assert not browser.evaluate(is_open)
    browser.evaluate("document.querySelector('#memory_needed').closest('details').querySelector('summary').click()")
    browser.evaluate("document.querySelector('a[href=\"#memory_first\"]').click()")
    waited = "new Promise(done => setTimeout(() => done(document.getElementById('memory_first').offsetHeight), 100))"
    assert browser.evaluate(waited) > 0 and browser.evaluate(is_open)


@in_browser
def test_print_shows_headlines_and_whole_tables(page: Path, browser: Chromium) -> None:
    browser.open(page, 720, prefers_color_scheme="dark")
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = "[...document.querySelectorAll('.scroll')].filter(s => s.scrollHeight > s.clientHeight + 2).length"
    assert browser.evaluate(hidden) == 0
    browser.call("Emulation.setEmulatedMedia", media="")
