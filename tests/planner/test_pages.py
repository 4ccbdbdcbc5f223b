"""Pages of the planner, each next to its snapshot in pages/: numbers of an invented machine, the same everywhere.

UPDATE_PAGES=1 pytest tests/planner/test_pages.py writes the snapshots again. Read what changed before a commit.
"""

import functools
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from dsmini.atomic import check_folder
from dsmini.planner import pages
from dsmini.planner.hardware import known_hardware
from dsmini.planner.pages import FILES, Answer, ten_lines
from dsmini.planner.plan import read_axis, vary
from dsmini.planner.request import Model, PlanRequest
from tests.helpers.configs import CONFIGS
from tests.helpers.pages import check_page, on_terminal
from tests.helpers.plans import every_of, plan_of, values_of

V3 = "deepseek-v3 @invented"
SMALL = "deepseek-v2-lite @invented gpus=8 batch=96 schedule=1f1b precision=bf16 micro_batch=1 zero=1"
SLOW = f"{V3} gpus=2048 pipeline=1 expert=256 tensor=8 zero=3 recompute=full schedule=1f1b precision=fp8"


@functools.cache
def planned(words: str, whole: bool = False) -> Answer:
    return pages.planned(plan_of(words), f"python -m dsmini.plan {words}", whole=whole)


def varied(*axes: str, of: tuple[str, ...] = (), words: str = V3) -> Answer:
    return pages.varied(plan_of(words), axes, of, "")


PAGES: dict[str, Callable[[], str]] = {
    "plan": lambda: on_terminal(planned(V3), 100),
    "tables": lambda: on_terminal(planned(V3, whole=True), 100),
    "explanation": lambda: "\n\n".join(
        "\n".join(pages.explained(plan_of(V3).figures, name, width).lines)
        for name, width in (("slow_row_bytes", 100), ("effective_share", 70), ("n_layers", 80))
    ),
    "search": lambda: on_terminal(pages.searched(plan_of(SMALL), SMALL), 100),
    "variation": lambda: (
        on_terminal(
            varied("context=4096,1024,65536", of=("decode_gpu_cache", "decode_gpus", "decode_time", "decode_cost"))
        )
        + on_terminal(varied("pipeline=8,7,16"), 100)
        + on_terminal(varied("precision=fp8,bf16", "zero=0,1", of=("memory_needed", "training_time")), 100)
        + on_terminal(varied("slow_link=12.5e9,25e9", of=("dispatch_seconds",)), 100)
    ),
}
"""Snapshots by name."""


@pytest.mark.parametrize("name", PAGES)
def test_page_is_as_it_was(name: str) -> None:
    text = "".join(f"{line.rstrip()}\n" for line in PAGES[name]().strip().splitlines())
    check_page(Path(__file__).parent / "pages" / f"{name}.txt", text)


# --- what snapshots do not show


PLANNED = [("toy", name) for name in known_hardware()]
PLANNED += [
    ("deepseek-v3", "a100-pcie"),
    ("deepseek-v3", "laptop"),
    ("deepseek-v2-lite", "gb200-nvl72"),
    ("toy-mha", "h100"),
]


@pytest.mark.parametrize(("name", "hardware"), PLANNED)
def test_models_are_planned_on_every_machine(name: str, hardware: str) -> None:
    plan = plan_of(f"{name} @{hardware}")
    found = " ".join(ten_lines(plan))
    assert "None" not in found and plan.training.fits == ("a failure every" in found) != ("does not fit: no " in found)


def test_every_figure_is_on_the_page_with_its_formula_and_each_link_leads_to_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.html"
    check_folder(path.parent, FILES)
    assert planned(V3).write(path.parent) == [path, path.parent / "plan.json"]
    text = path.read_text()
    ids, links = re.findall(r'\bid="([^"]+)"', text), set(re.findall(r'href="#([^"]+)"', text))
    assert len(ids) == len(set(ids)) and set(plan_of(V3).figures) <= set(ids)
    assert len(links) > 100 and links <= set(ids)
    block = text[text.index('<div id="kv_cache">') :]
    block = block[: block.index("</details>")]
    for said in ("n_layers × cache_row", "61 × 1.152 kB", "= 70,272 B/token", "V2, table 1", 'href="#n_layers"'):  # noqa: RUF001
        assert said in block, said
    for said in ("deepseek-v3 on An invented GPU", "<dd>selective</dd>", "Front of decode", "DeepSeek&#39;s own"):
        assert said in text, said


def test_page_of_two_axes_has_a_column_for_each_pair() -> None:
    """A plan that does not fit has its memory alone and says what would fit; a pair without a plan has no column."""
    answer = varied("precision=fp8,bf16", "zero=0,1", of=("memory_needed", "training_time"), words=f"{V3} memory*0.93")
    (table,) = answer.sections[0].tables
    assert list(table.columns[1:]) == [f"precision={p}, zero={z}" for p in ("fp8", "bf16") for z in (0, 1)]
    needed, time = table.rows
    assert all(needed) and [cell != "" for cell in time[1:]] == [False, True, False, False]
    unfit = [said.partition(": training does not fit: use more GPUs")[0] for said in answer.sections[0].warnings]
    assert unfit == [table.columns[i] for i in (1, 3, 4)]
    assert len(varied("pipeline=7,8", "hardware=h100,h800", of=("training_cost",)).sections[0].tables[0].columns) == 3


def test_narrow_terminal_shows_whole_words() -> None:
    assert {"tokens/s", "671,026,404,352", "model"} <= {*on_terminal(planned(V3, whole=True), 44).split()}


# --- variations

VARIED = tomllib.loads(Path(__file__).with_name("plans.toml").read_text())["varied"]
OWN = "kv_lora_rank=512 hardware=h800 gpus=2048 batch=15360 context=4096 price=2"
OWN += " cache_dtype=bfloat16 weight_dtype=fp8 precision=fp8"


@pytest.mark.parametrize(("axis", "figure", "wanted"), VARIED)
def test_variation_moves_a_figure_as_it_must(axis: str, figure: str, wanted: str) -> None:
    made = plan_of("deepseek-v3")
    found, names = vary(made, [read_axis(axis)], (figure,))
    values = [float(every_of(each.plan)[figure]) for each in found if each.plan is not None]
    assert len(values) == len(axis.split(",")) and names == [figure]
    if wanted in ("grows", "falls"):
        assert values == sorted(set(values), reverse=wanted == "falls")
    else:
        assert values == pytest.approx([f * values_of("deepseek-v3")[figure] for f in eval(wanted)], rel=1e-4)
    assert {each.plan.inputs.sources["layout"] for each in found if each.plan} == {made.inputs.sources["layout"]}


def test_variation_tells_where_serving_has_no_plan() -> None:
    """And plans serving where a value lets it."""
    (section,) = varied("prompt=64,512", words="toy").sections
    why = "prompt=512 is longer than the model's max_seq_len=256; shorten it"
    assert section.warnings == [f"prompt=512: serving is not planned: {why}"]
    refused = plan_of("shakespeare")
    ((normed, plain), _) = vary(refused, [read_axis("qk_norm=true,false")])
    assert normed.plan and plain.plan and refused.unserved == normed.plan.unserved != ""
    assert plain.plan.served and not plain.plan.unserved


def test_variation_by_a_link_that_the_hardware_lacks() -> None:
    ((each,), _) = vary(plan_of("toy @laptop"), [read_axis("fast_link=1e9")])
    assert each.plan is not None and each.plan.hardware.linked


@pytest.mark.parametrize("axis", OWN.split())
def test_variation_by_the_plans_own_value_changes_nothing(axis: str) -> None:
    ((each,), _) = vary(plan_of("deepseek-v3"), [read_axis(axis)])
    assert each.plan is not None
    assert {name: float(f) for name, f in every_of(each.plan).items()} == pytest.approx(
        values_of("deepseek-v3"), rel=1e-12
    )


def test_sentences_of_serving_count_and_name_what_is_served() -> None:
    lines = [line for line in ten_lines(plan_of("deepseek-v3 @h200 context=131072")) if "prefill" in line]
    assert lines[0] == "prefill    no deployment reads a prompt in 5 s."
    assert ", 1 prompt in all:" in " ".join(lines)
    for words, said, unsaid in (
        ("", "bound of any deployment on up to 512 GPUs, in 90 % of the memory, with 4,096 tokens, ", "1 tokens"),
        ("", ", at most 3 drafts accepted with 85 %:", "indexer"),
        ("", " deployments on 11 numbers of GPUs up to 256; left out: ", ""),
        ("drafts=0 decode_gpus=8", " on 8 GPUs, ", "accepted"),
        (
            "drafts=2 decode_gpus=8 decode_tensor=4 sequences=9",
            " 8 GPUs, tensor 4, 9 sequences of each, in ",
            "most 2",
        ),
        ("context=1 decode_gpus=8", " with 1 token, ", "1 tokens"),
    ):
        (line,) = [
            line for line in ten_lines(plan_of(f"deepseek-v3 @h200 {words}")) if line.startswith("decode     bound")
        ]
        assert said in line and not (unsaid and unsaid in line), line


def test_dtype_that_hardware_forces_is_told() -> None:
    """On the screen and in comparisons: weights that are released in FP8 or FP4, where no units multiply them."""
    for words, said in (
        ("deepseek-v3 @a100-sxm", "bfloat16, since NVIDIA A100 SXM 80 GB has no fp8 units; --weight-dtype int8 takes"),
        ("deepseek-v4-flash @a100-sxm", "bfloat16, since NVIDIA A100 SXM 80 GB has no fp4 or fp8 units; --weight-dt"),
        ("deepseek-v3 @h200", ""),
        ("deepseek-v3 @a100-sxm weight_dtype=int8", ""),
    ):
        told = [line for line in ten_lines(plan_of(words)) if "weights are served in" in line]
        assert (said in told[0]) if said else not told
    (section,) = varied("hardware=h200,ascend-910c", words="deepseek-v3 precision=bf16").sections
    assert any(said.startswith("hardware=ascend-910c: weights are served in bf") for said in section.warnings)


def test_models_are_compared_in_one_table_of_80_columns() -> None:
    """It states the limits, lengths and rents that all have, and each row has one unit."""
    names = ("deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash", "deepseek-v4-pro", "kimi-k2")
    models = [Model.from_file(CONFIGS / f"{name}.toml") for name in names]
    answer = pages.compare(PlanRequest(hardware="h200"), models, "")
    lines = on_terminal(answer, 80).splitlines()
    assert sum(line.split() == ["v3", "v3.2", "v4-flash", "v4-pro", "kimi-k2"] for line in lines) == 1
    text = " ".join(" ".join(lines).split())
    for said in (
        "the cheapest in 50 ms an output token and 5 s to the first token, with 4,096 tokens of context",
        "Rent: NVIDIA H200 SXM $2.50 to $7.00 an hour (spread of published rents, 2026-06).",
        "Parameters without MTP (trillion) 0.671 0.672 0.284 1.57 1.03",
    ):
        assert said in text, said
    rows = {row[0]: row[1:] for row in answer.sections[0].tables[0].rows}
    for rent in ("Rent of the whole run", "decode: Rent of a token", "prefill: Rent of a token"):
        low, high = (rows[next(r for r in rows if r.startswith(f"{rent} at the {end}"))] for end in ("low", "high"))
        assert all(float(a[1:]) < float(b[1:]) for a, b in zip(low, high, strict=True))


def test_price_that_one_of_three_has_is_compared_with_its_date() -> None:
    (section,) = varied("hardware=h800,h20", words="deepseek-v3 precision=bf16").sections
    (table,) = section.tables
    rents = {row[0]: row[1:] for row in table.rows if "Rent" in row[0]}
    assert len(rents) == 3 and all(first and not second for first, second in rents.values()), "no range, no high end"
    assert table.common.endswith("of $2 a GPU hour, 2024-12).") and section.warnings[-1].startswith("no price of h20")
    lines = ten_lines(plan_of("deepseek-v3"))
    assert lines[-2].startswith("price      a GPU is rented for $2.00 an hour (V3 report, table 1:")
    assert not [line for line in ten_lines(plan_of("deepseek-v3 @h20")) if line.startswith("price")]


def test_titles_are_of_their_phase() -> None:
    titles = {name: f.title for name, f in plan_of("deepseek-v3").figures.items()}
    assert titles["decode_time"] == "Time of an output token, an estimate"
    assert titles["prefill_time"] == "Time to the first token, an estimate"
    assert (titles["decode_batch"], titles["prefill_batch"]) == ("Sequences of all GPUs", "Prompts of all GPUs")
    assert not [name for name, said in titles.items() if "or prompts" in said or "or to the first" in said]
    prompts = [said for name, said in titles.items() if name.startswith("prefill_") and "output token" in said]
    assert prompts == []


def test_a_run_of_less_than_a_cent_has_no_digits() -> None:
    said = " ".join(ten_lines(plan_of("toy @h100")))
    assert "and less than $0.001 for 1.48 million tokens" in said and "e-0" not in said
