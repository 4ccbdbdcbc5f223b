"""Variation: one cause for each difference, and reasons for values without a plan."""

import io
from typing import Any

import pytest
from rich.console import Console

from dsmini import ModelConfig
from dsmini.planner.hardware import load_hardware
from dsmini.planner.pages.comparison import variation_section
from dsmini.planner.request import PlanRequest
from dsmini.planner.setup import Model, Setup, setup
from dsmini.planner.varied_axis import read_axis
from dsmini.planner.vary import Variation, vary
from dsmini.planner.whole import Plan, whole_plan
from dsmini.report import Report
from tests.helpers.configs import CONFIGS, refusal

REQUEST = PlanRequest()


@pytest.fixture(scope="module")
def v3() -> Setup:
    return setup(REQUEST, Model.from_file(CONFIGS / "deepseek-v3.toml"), load_hardware("h800"))


def varied(s: Setup, *axes: str, names: tuple[str, ...] = ()) -> Variation:
    return vary(s, REQUEST, [read_axis(axis) for axis in axes], names)


def only(found: Variation) -> Plan:
    (plan,) = found.plans.values()
    return plan


# --- axes


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("kv_lora_rank=128,256", (128, 256)),
        ("kv-lora-rank = 128 , 128", (128,)),
        ("hardware=h100,my/own.toml", ("h100", "my/own.toml")),
        ("tokens=1e12,2e12", (1e12, 2e12)),
        ("batch=1e3,2048", (1000, 2048)),
        ("zero=0,3", (0, 3)),
        ("precision=bf16,fp8", ("bf16", "fp8")),
        ("attention=mla,mha", ("mla", "mha")),
        ("q_lora_rank=none,512", (None, 512)),
        ("norm_topk_prob=true,false", (True, False)),
    ],
)
def test_axis_is_read(text: str, values: tuple[Any, ...]) -> None:
    axis = read_axis(text)
    assert axis.values == values and [type(v) for v in axis.values] == [type(v) for v in values]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("kv_lora_rank", "--vary 'kv_lora_rank' has no values; write it like"),
        ("kv_lora_rank=", "--vary 'kv_lora_rank=' has no values"),
        ("kv_lora_rnk=1", "unknown --vary name 'kv_lora_rnk'; did you mean kv_lora_rank"),
        ("zzz=1", "unknown --vary name 'zzz'; vary hardware, or"),
        ("kv_lora_rank=big", "--vary kv_lora_rank has the value 'big', which it cannot have; use numbers"),
        ("kv_lora_rank=1.5", "--vary kv_lora_rank has the value '1.5'"),
        ("precision=fp4", "--vary precision has the value 'fp4', which it cannot have; use one of fp32, bf16, fp8"),
    ],
)
def test_wrong_axis_is_one_sentence(text: str, sentence: str) -> None:
    assert refusal(read_axis, text).startswith(sentence)


# --- plans


def test_size_of_the_model_changes_what_depends_on_it_alone(v3: Setup) -> None:
    found = varied(v3, "kv_lora_rank=128,256,512")
    caches = [found.plans[i,].cache.per_token.value for i in range(3)]
    assert caches == [(128 + 64) * 122, (256 + 64) * 122, 70_272]
    assert {plan.training.layout for plan in found.plans.values()} == {v3.layout.layout}
    sequences = {plan.setup.serving.workload.sequences.value for plan in found.plans.values() if plan.setup.serving}
    assert sequences == {30}, "as many as in the plan"
    assert "kv_cache" in found.names and "decode_cost" in found.names


def test_value_of_the_plan_itself_changes_nothing(v3: Setup) -> None:
    """Each axis at the plan's own value gives the plan again, figure by figure."""
    base = whole_plan(v3).all
    own = ("kv_lora_rank=512", "hardware=h800", "gpus=2048", "batch=15360", "context=4096", "sequences=30", "price=2")
    for axis in (*own, "cache_dtype=bfloat16", "weight_dtype=fp8", "precision=fp8", "drafts=1"):
        again = only(varied(v3, axis)).all
        assert again.keys() == base.keys(), axis
        differs = [name for name in base if again[name].value != pytest.approx(base[name].value, rel=1e-12)]
        assert differs == [], axis


@pytest.mark.parametrize(
    ("axis", "name", "factor"),
    [
        ("gpus=4096", "assumed_step_seconds", 0.5),
        ("tokens=7.4e12", "training_days", 0.5),
        ("price=4", "training_cost", 2),
        ("utilization=0.7788", "assumed_step_seconds", 0.5),
        ("context=8192", "decode_gpu_cache", 2),
        ("sequences=15", "decode_gpu_cache", 0.5),
        ("cache_dtype=fp8", "kv_cache", 656 / 1152),
        ("failures_per_node_day=0.013", "mean_time_to_failure", 0.5),
    ],
)
def test_field_of_the_request_acts(v3: Setup, axis: str, name: str, factor: float) -> None:
    before, after = whole_plan(v3).all[name].value, only(varied(v3, axis)).all[name].value
    assert after == pytest.approx(before * factor, rel=1e-4)


def test_hardware_changes_machines_and_keeps_the_layout(v3: Setup) -> None:
    found = varied(v3, "hardware=h100,b200,a100-pcie")
    plans = [found.plans.get((i,)) for i in range(3)]
    assert plans[0] and plans[1] and plans[0].training.layout == plans[1].training.layout == v3.layout.layout
    assert plans[1].training.time.days.value < plans[0].training.time.days.value
    assert plans[2] is None and "no fp8 units" in found.problems[2,]


def test_value_without_a_plan_is_told(v3: Setup) -> None:
    found = varied(v3, "pipeline=8,7,16")
    assert set(found.plans) == {(0,), (2,)} and "do not divide gpus=2048" in found.problems[1,]
    section = variation_section(found, full=False)
    assert section.warnings[0] == f"pipeline=7: {found.problems[1,]}"


def test_lengths_of_the_plan_stay_with_another_model(v3: Setup) -> None:
    found = varied(v3, "max_seq_len=2048,8192")
    assert found.problems[0,].startswith("context=4096 is longer than the model's max_seq_len=2048")
    assert found.plans[1,].training.workload.seq_len.value == 4096


def test_no_plan_at_all_is_an_error(v3: Setup) -> None:
    assert "do not divide gpus=2048" in refusal(varied, v3, "pipeline=7,9")


def test_two_axes_make_a_heat_map(v3: Setup) -> None:
    found = varied(v3, "kv_lora_rank=128,512", "context=1024,4096,16384", names=("decode_gpu_cache",))
    assert len(found.plans) == 6
    (heat_map,) = variation_section(found, full=True).heat_maps
    assert (heat_map.y, heat_map.rows) == ("kv_lora_rank", ["128", "512"])
    assert (heat_map.x, heat_map.columns) == ("context", ["1,024", "4,096", "16,384"])
    assert heat_map.values[1][1] == found.plans[1, 1].all["decode_gpu_cache"].value
    assert heat_map.values[1][2] == pytest.approx(3 * heat_map.values[0][2], rel=1e-12)  # pyright: ignore
    assert heat_map.cells[1][1] == "69.1 GB"


def test_figures_that_differ_along_both_axes_come_first(v3: Setup) -> None:
    names = varied(v3, "kv_lora_rank=128,512", "context=1024,16384").names
    assert names.index("decode_time_per_token") < names.index("kv_cache")


def test_one_axis_makes_a_table_and_plots(v3: Setup) -> None:
    section = variation_section(varied(v3, "context=4096,1024", names=("decode_gpu_cache", "decode_cost")), full=True)
    assert [plot.title for plot in section.plots] == ["Cache that a GPU holds", "Rent of an output token"]
    (series,) = section.plots[0].series
    assert list(series.x) == [1024, 4096] and series.y[1] == pytest.approx(4 * series.y[0])
    assert section.tables[0].columns == ("context", "4,096", "1,024"), "as asked, and the line from left to right"
    bars = variation_section(varied(v3, "hardware=h100,h800", names=("roof_step_seconds",)), full=True).plots[0]
    assert bars.labels == ["h100", "h800"] and bars.series[0].kind == "bars"


def test_plan_that_does_not_fit_is_marked(v3: Setup) -> None:
    """V3's layout needs 65.0 GB in FP8 with ZeRO 1, and more than 80 GB in BF16 or without ZeRO."""
    found = varied(v3, "precision=fp8,bf16", "zero=0,1", names=("memory_needed", "training_days", "kv_cache"))
    memory, days, cache = variation_section(found, full=False).heat_maps
    for heat_map in (memory, days):
        assert [[cell.startswith("! ") for cell in row] for row in heat_map.cells] == [[True, False], [True, True]]
    assert not any("!" in cell for row in cache.cells for cell in row), "the cache is the same in any layout"
    assert variation_section(found, full=False).warnings == ["! does not fit into the memory of a GPU"]
    bars = variation_section(varied(v3, "sequences=8,64", names=("decode_cost", "training_days")), full=False).tables[0]
    assert [row[2].startswith("! ") for row in bars.rows] == [False, True, False, False]


@pytest.mark.parametrize("width", [80, 50])
def test_wide_heat_map_is_split_where_the_terminal_ends(v3: Setup, width: int) -> None:
    found = varied(v3, "kv_lora_rank=64,512", "hardware=h100,h800,h200,b200,gb200-nvl72,a100-pcie")
    out = io.StringIO()
    Report(title="", sections=[variation_section(found, full=False)]).show(Console(file=out, width=width))
    text = out.getvalue()
    assert text.count("ms/token") == 8
    table = text[text.index("Time of an output token") :].splitlines()
    labels = [line.split()[0] for line in table if line[:2] in ("64", "51")]
    assert labels[:4] == ["64", "512", "64", "512"], "each part has the labels of its rows"
    assert not any(cut in text for cut in ("ms/toke ", "tokens/ ", "…"))


def test_terminal_has_a_bar_for_each_value(v3: Setup) -> None:
    section = variation_section(varied(v3, "context=1024,4096", names=("decode_gpu_cache",)), full=False)
    assert [len(row[-1]) for row in section.tables[0].rows] == [3, 12]


def test_mistakes_of_a_variation_are_sentences(v3: Setup) -> None:
    assert "unknown hardware 'h9000'" in refusal(varied, v3, "hardware=h100,h9000")
    assert "unknown figure 'nope'" in refusal(varied, v3, "context=100", names=("nope",))
    assert refusal(varied, v3, "context=1", "context=2").startswith("--vary got context, context; vary one thing")
    assert refusal(varied, v3, "context=1", "prompt=2", "gpus=3").startswith("--vary got context, prompt, gpus")
    many = ",".join(map(str, range(1, 402)))
    assert refusal(varied, v3, f"batch={many}").startswith("--vary asks for 401 plans; use at most 400")
    assert "odd; RoPE" in refusal(varied, v3, "qk_rope_head_dim=33")


def test_every_field_of_a_model_can_be_named() -> None:
    for name in ("n_layers", "n_routed_experts", "dim", "max_seq_len"):
        assert name in {axis for axis in ModelConfig.__dataclass_fields__}
        assert read_axis(f"{name}=8").values == (8,)


def test_progress_is_told(v3: Setup) -> None:
    seen: list[tuple[float, str]] = []
    vary(v3, REQUEST, [read_axis("context=100,200")], (), lambda done, what: seen.append((done, what)))
    assert seen == [(0.5, "1 of 2 plans"), (1.0, "2 of 2 plans")]
