"""Serving: bounds and estimates by hand, what they may depend on, and the search against all deployments there are."""

import dataclasses
import itertools
import random
import re
from typing import Any

import pytest

from dsmini.planner.deployments import CHEAPEST, FASTEST, IN_TIME, OWN, Deployments, search
from dsmini.planner.pages import ten_lines
from dsmini.planner.request import PlanRequest
from dsmini.planner.serving import PARTS, PHASES, Deployment, Served, Service, ServingMemory, serve
from tests.helpers.commands import ROOT
from tests.helpers.configs import refusal
from tests.helpers.plans import plan_of, values_of

BOUNDS = tuple(f"bound_{name}_time" for name in ("memory", "compute", "slow", "fast"))
SERVED = ["deepseek-v3", "deepseek-v3 context=32768 drafts=3", "deepseek-v2-lite decode_gpus=4", "toy-mha @laptop"]


def service_of(words: str) -> Service:
    service = plan_of(words).service
    assert service is not None
    return service


def served(words: str, **d: Any) -> Served:
    service = service_of(words)
    spare = -service.c.n_routed_experts % d["gpus"]
    return serve(service, Deployment(**({"phase": "decode", "redundant": spare} | d)))


def found_of(words: str, phase: Any = "decode") -> Deployments:
    return plan_of(words).found[phase]


@pytest.mark.parametrize("words", SERVED)
def test_bound_is_the_slowest_part_and_estimate_the_sum(words: str) -> None:
    found, plan = values_of(words), plan_of(words)
    for phase in PHASES:
        part = {name: found[f"{phase}_{name}"] for name in (*BOUNDS, *PARTS)}
        assert found[f"{phase}_bound_time"] == max(part[name] for name in BOUNDS)
        links = part.pop("links_time")
        work = sum(part[name] for name in PARTS if name not in ("links_time", "draft_time"))
        main = max(work, links) if plan.served[phase].d.micro_batches == 2 else work + links
        assert found[f"{phase}_estimate_time"] == pytest.approx(main + part["draft_time"])
        assert found[f"{phase}_bound_time"] < found[f"{phase}_estimate_time"]
        assert plan.longest(phase)[0] == max(plan.waits[phase], key=lambda word: plan.waits[phase][word])


def test_v3_decodes_as_worked_out_by_hand() -> None:
    """On 144 H800, two experts and 64 sequences a GPU, without drafts."""
    found = served("deepseek-v3 context=4989", gpus=144, batch=64 * 144)
    step, memory = found, found.memory
    assert memory.gpu_experts == 2 and memory.group_sequences == 64 and memory.draft_weights == 0
    assert memory.gpu_cache == 64 * 4989 * 70_272
    assert step.cache_read == 64 * 4989 * 70_272
    experts = 58 * 2 * 3 * (7168 * 2048 + 4 * 16 * 56)
    assert step.memory.s.m.moe_layers * step.memory.gpu_experts * step.s.weights.expert_bytes == experts
    assert step.bound_memory_time == pytest.approx((step.bound_weights_read + step.cache_read) / 3.35e12)
    # absorbed, 128 heads of 576 and 512 numbers; dense products in FP8, head and gates in BF16
    assert step.attention_products == 61 * 4989 * 128 * (576 + 512)
    matrices = 2 * 64 * (step.s.weights.matrix_products + step.s.weights.expert_products) / 1978.9e12
    plain = 2 * 64 * (step.s.weights.other_products + 129280 * 7168) / 989.4e12
    assert step.bound_compute_time == pytest.approx(matrices + plain + 2 * 64 * step.attention_products / 989.4e12)
    # a row in FP8 both ways to each node that the gate's rule reaches, and 8 rows of the estimate, back in BF16
    assert step.least.slow_row_bytes == step.least.nodes_reached * (1 - 1 / 18) * 2 * 7392
    assert step.exchange.slow_row_bytes == pytest.approx(8 * (1 - 1 / 18) * (7392 + 14_336))
    assert step.bound_slow_time == pytest.approx(64 * 58 * step.least.slow_row_bytes / 50e9)
    assert found.gpu_tokens_per_second == pytest.approx(64 / step.estimate_time)


def test_bound_takes_no_choice_of_ours() -> None:
    """Micro-batches, efficiencies, latencies and imbalance change the estimate alone."""
    one, two = (served("deepseek-v3", gpus=64, batch=4096, micro_batches=n) for n in (1, 2))
    assert one.least_time == two.least_time and one.time != two.time
    assert two.latency_time > one.latency_time
    slow = served("deepseek-v3 link_efficiency=0.4", gpus=64, batch=4096)
    assert slow.least_time == one.least_time and slow.rows_time > 1.5 * one.rows_time


def test_drafts_share_a_reading_of_the_weights() -> None:
    """In the bound d + 1 tokens of a sequence choose the same experts; in the estimate their own."""
    none, three = (served("deepseek-v3", gpus=8, tensor=8, batch=1, drafts=d) for d in (0, 3))
    assert three.bound_experts_read == none.bound_experts_read < three.experts_read
    assert three.cache_read == none.cache_read
    assert three.matrix_flops == 4 * none.matrix_flops
    assert three.tokens_per_step == pytest.approx(1 + 0.85 + 0.85**2 + 0.85**3) and none.tokens_per_step == 1
    assert three.draft_time > 0 == none.draft_time
    assert three.memory.gpu_weights > none.memory.gpu_weights


def test_weights_of_drafts_have_a_name_in_the_formula_of_the_bound() -> None:
    figures = plan_of("deepseek-v3 drafts=3").figures
    read = figures["decode_bound_weights_read"].formula
    assert "decode_bound_draft_weights" in read and not re.search(r"(?<![\w.])\d{4,}", read)
    assert figures["decode_bound_draft_weights"].unit == "B"


def test_batch_may_be_smaller_than_the_number_of_gpus() -> None:
    """One sequence on eight GPUs that share it: each reads an eighth of heads and vocabulary, and no row crosses."""
    one = served("deepseek-v3", gpus=8, tensor=8, batch=1)
    apart = served("deepseek-v3", gpus=8, tensor=1, batch=1)
    assert one.gpu_tokens == apart.gpu_tokens == 1 / 8 and apart.memory.group_sequences == 1
    assert one.exchanges == 0 < apart.exchanges
    assert one.least_time < apart.least_time and one.gpu_tokens_per_second == one.tokens_per_second / 8


def test_gpus_without_a_sequence_help_with_experts_alone() -> None:
    """A prompt on eight of 64 GPUs: these eight compute its matrices and attention, and send all of its rows."""
    few, many = (served("deepseek-v3", phase="prefill", gpus=n, tensor=8, batch=1) for n in (8, 64))
    assert many.matrices_time == few.matrices_time and many.attention_time == few.attention_time
    assert many.expert_flops == few.expert_flops / 8 and many.experts_time < few.experts_time
    full = served("deepseek-v3", phase="prefill", gpus=64, tensor=8, batch=8)
    a = full.s.a
    sent = [one.rows_time - 2 * one.exchanges * a["exchange_latency"] for one in (many, full)]
    assert sent[0] == pytest.approx(sent[1] / a["expert_imbalance"])
    assert many.least_time < few.least_time, "the bound lets all compute"


def test_bound_divides_all_that_engines_divide() -> None:
    """The cache (context parallelism), feed-forwards and the vocabulary, also where each GPU has its own sequences."""
    apart = served("deepseek-v3", gpus=8, batch=8)
    w = apart.s.weights
    experts = apart.s.m.moe_layers * apart.bound_experts_read * w.expert_bytes
    shared = w.width_bytes + w.vocabulary_bytes
    assert w.width_bytes == 3 * (3 * 7168 * 18432 + 4 * 3 * 56 * 144) + w.expert_bytes * 58
    read = w.divided_bytes - w.width_bytes + w.whole_bytes + experts + shared / 8
    assert apart.bound_weights_read == pytest.approx(read)
    one = served("deepseek-v3", gpus=8, tensor=8, batch=1)
    assert one.cache_read == 4096 * 70_272
    assert one.bound_memory_time == pytest.approx((one.bound_weights_read + one.cache_read / 8) / 3.35e12)


def test_rows_for_gpus_that_have_the_sequences_cross_no_link() -> None:
    """All GPUs of a node that share their sequences have each row; with four of eight half of the others get one."""
    copies = [served("deepseek-v3", gpus=8, tensor=n, batch=8).least.fast_copies for n in (1, 2, 4)]
    assert copies == pytest.approx([copies[0] * part / 7 for part in (7, 6, 4)])
    assert served("deepseek-v3", gpus=16, tensor=8, batch=8).least.fast_row_bytes == 0


@pytest.mark.parametrize(
    ("words", "matrices", "experts", "attention", "index"),
    [
        ("deepseek-v3", "fp8", "fp8", "bfloat16", "bfloat16"),
        ("deepseek-v3.2", "fp8", "fp8", "fp8", "fp8"),
        ("deepseek-v4-flash", "fp8", "fp8", "fp8", "fp8"),
        ("deepseek-v4-flash @gb200-nvl72", "fp8", "fp4", "fp8", "fp4"),
        ("kimi-k2", "fp8", "fp8", "bfloat16", "bfloat16"),
        ("kimi-k2 weight_dtype=int4", "bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("deepseek-v3 @ascend-910c weight_dtype=int8", "int8", "int8", "bfloat16", "bfloat16"),
        ("deepseek-v3 @a100-sxm", "bfloat16", "bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_products_run_at_the_peak_of_what_is_served(
    words: str, matrices: str, experts: str, attention: str, index: str
) -> None:
    s = service_of(words)
    found = s.matrix_peak, s.expert_peak, s.attention_peak, s.index_peak
    assert [peak.name for peak in found] == [f"peak_{name}" for name in (matrices, experts, attention, index)]


def test_dense_model_divides_its_feed_forwards() -> None:
    words = "deepseek-v2-lite n_dense_layers=27"
    eight, one = (served(words, gpus=n, tensor=n, batch=1) for n in (8, 1))
    assert 7 < one.weights_read / eight.weights_read < 8, "all but latents and norms"
    assert "share no experts" in refusal(plan_of, f"{words} decode_gpus=4 decode_tensor=2")
    assert {each.d.gpus for each in found_of(words).every} == {each.d.tensor for each in found_of(words).every}


def test_gpus_that_share_heads_divide_what_grouped_heads_cache() -> None:
    four, one = (served("toy attention=gqa n_kv_heads=2", gpus=n, tensor=n, batch=8) for n in (4, 1))
    assert four.memory.cache_parts == 2 and four.cache_read == one.cache_read / 2
    mla = [served("toy", gpus=n, tensor=n, batch=8).cache_read for n in (4, 1)]
    assert mla[0] == mla[1], "one latent for all heads"


# --- the search

SPACES = ["deepseek-v2-lite", "deepseek-v3 memory_share=0.95", "toy-v4 @h20"]


def every_one(s: Service, phase: Any, gpus: int) -> list[Served]:
    """Return each deployment of these GPUs that fits: all batches that a search may try, without its order."""
    spare, found = -s.c.n_routed_experts % gpus, list[Served]()
    drafts = range(4) if phase == "decode" and s.c.n_mtp_layers else [0]
    for tensor, micro, draft in itertools.product([n for n in range(1, 17) if gpus % n == 0], (1, 2), drafts):
        groups = gpus // tensor
        shape = Deployment(phase=phase, gpus=gpus, tensor=tensor, redundant=spare, drafts=draft)
        fit = int(ServingMemory(s, shape).sequences_that_fit)
        fit = min(fit, 64 * groups) if phase == "prefill" else fit
        sizes = {2**i for i in range(20) if 2**i <= groups} | {groups * 2**i for i in range(40)} | {fit}
        if tensor & (tensor - 1) or s.c.n_heads % tensor or tensor > s.h.node:
            continue
        for batch in (n for n in sizes if n <= max(fit, groups)):
            d = dataclasses.replace(shape, batch=max(batch, 1), micro_batches=micro)
            if micro == 2 and (gpus == 1 or batch < 2 * groups):
                continue
            one = serve(s, d)
            if one.memory.gpu_memory <= s.h.memory * s.a["memory_share"]:
                found.append(one)
    return found


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("words", SPACES)
def test_search_finds_the_front_of_all_deployments(words: str, phase: Any) -> None:
    s = service_of(words)
    gpus = 48 if "v3" in words else 8
    every = every_one(s, phase, gpus)
    found = search(s, PlanRequest(decode_gpus=gpus, prefill_gpus=gpus), phase)
    points = {(one.time, one.gpu_tokens_per_second) for one in every}
    points |= {(found.main.time, found.main.gpu_tokens_per_second)}  # with the largest batch in time
    front = {(t, g) for t, g in points if not any((t2 <= t and g2 > g) or (t2 < t and g2 >= g) for t2, g2 in points)}
    assert len(every) > 20 and {(one.time, one.gpu_tokens_per_second) for one in found.front} == front
    assert found.points[CHEAPEST].gpu_tokens_per_second == max(g for _, g in points)
    assert found.points[FASTEST].time == min(t for t, _ in points)
    assert found.least_time == min(one.least_time for one in every)
    most = max(one.most_gpu_tokens_per_second for one in [*every, found.main])
    same = found.most == pytest.approx(most, rel=1e-12)
    assert same or (phase == "prefill" and found.most > most), "a bound has no largest number of prompts"
    if IN_TIME in found.points:
        main, groups = found.main, found.main.d.gpus // found.main.d.tensor
        assert main.time <= found.limit and main.gpu_tokens_per_second == max(g for t, g in points if t <= found.limit)
        more = ServingMemory(s, dataclasses.replace(main.d, batch=main.d.batch // groups * groups + groups))
        assert phase == "prefill" or more.misfit or Served(more).time > found.limit


BOUNDED = ["deepseek-v3", "kimi-k2 @h200", "deepseek-v4-flash @gb200-nvl72", "deepseek-v3.2 @ascend-910c", "toy @h100"]


@pytest.mark.parametrize("words", BOUNDED)
def test_no_flags_give_more_than_the_bound(words: str) -> None:
    """Numbers of GPUs, groups, batches and drafts at random, up to those that the bound is said to hold for."""
    s, draw, compared = service_of(words), random.Random(words), 0
    bounds = {phase: search(s, PlanRequest(), phase) for phase in PHASES}
    for _ in range(100):
        phase, flags = draw.choice(PHASES), dict[str, Any]()
        most = bounds[phase].most_gpus
        flags[f"{phase}_gpus"] = draw.choice([draw.randint(1, most), 8 * draw.randint(1, most // 8)])
        flags[f"{phase}_tensor"] = draw.choice([None, None, 1, 2, 4, 8, 64])
        if phase == "decode":
            flags |= {"drafts": draw.choice([None, *range(4)]), "sequences": draw.choice([None, None, 1, 7, 250])}
        try:
            found = search(s, PlanRequest(**flags, micro_batches=draw.choice([None, 1, 2])), phase)
        except ValueError:
            continue
        for each in (*found.every, *found.points.values()):
            assert each.least_time >= bounds[phase].least_time, flags
            assert each.most_gpu_tokens_per_second <= bounds[phase].most * (1 + 1e-12), flags
            compared += 1
        assert found.least_time >= bounds[phase].least_time
        assert found.most <= bounds[phase].most * (1 + 1e-12)
    assert compared > 100


@pytest.mark.parametrize("words", ["deepseek-v3", "deepseek-v4-flash @gb200-nvl72", "kimi-k2 @mi300x"])
def test_all_that_is_chosen_fits_nine_tenths_of_the_memory(words: str) -> None:
    for phase in PHASES:
        found = found_of(words, phase)
        assert all(one.memory.gpu_memory <= 0.9 * plan_of(words).hardware.memory for one in found.every)


def test_times_that_no_deployment_keeps_name_the_nearest() -> None:
    for words, said in (
        ("tpot=1", "gives an output token in 1 ms"),
        ("ttft=0.0001", "a prompt of 4,096 tokens in 100"),
    ):
        refused = refusal(plan_of, f"deepseek-v3 {words}")
        assert said in refused and "the nearest, " in refused, refused


def test_deployment_of_its_own_is_one_candidate_with_a_label() -> None:
    found = found_of("deepseek-v3")
    own = found.points[OWN]
    assert (own.d.gpus, own.d.tensor) == (320, 4) and "V3 report, section 3.4" in own.d.label
    assert OWN not in found_of("kimi-k2").points
    assert found_of("deepseek-v3 @a100-pcie", "prefill").rejected[f"{OWN}, which does not fit"] == 1


def test_deployment_of_its_own_is_on_equal_terms() -> None:
    """It is searched as the same sizes by flags are, and only a candidate where no other sizes are asked."""
    flags = "prefill_gpus=32 prefill_tensor=4 decode_gpus=320 decode_tensor=4"
    for phase in PHASES:
        found = found_of(f"deepseek-v3 {flags}", phase)
        assert found.points[OWN].gpu_tokens_per_second == found.main.gpu_tokens_per_second
        again = found_of("deepseek-v3", phase).points[OWN]
        assert again.gpu_tokens_per_second == found.main.gpu_tokens_per_second
    asked = found_of("deepseek-v3 decode_gpus=64")
    assert OWN not in asked.points and f"{OWN}, of other sizes than asked" in asked.rejected
    assert found_of("deepseek-v3 sequences=4 drafts=0").points[OWN].d.batch == 4 * 320
    said = " ".join(ten_lines(plan_of("deepseek-v3 sequences=56 tpot=25")))
    assert f"decode     {OWN} in more than 25 ms: 320 GPUs" in said


def test_each_of_two_micro_batches_has_sequences() -> None:
    for phase in PHASES:
        every = found_of("deepseek-v3 micro_batches=2", phase).every
        assert every and all(each.d.batch >= 2 * each.d.gpus // each.d.tensor for each in every)


def test_flash_is_cheaper_than_v3_whatever_the_deployment() -> None:
    """At each one's cheapest, at 50 ms, and on equal GPUs: a token of Flash takes a third of the operations."""
    v3, flash = (found_of(f"{name} @h200") for name in ("deepseek-v3", "deepseek-v4-flash"))
    for point in (CHEAPEST, IN_TIME):
        assert flash.points[point].gpu_tokens_per_second > 2 * v3.points[point].gpu_tokens_per_second
    for gpus in (16, 64):
        a, b = (found_of(f"{name} @h200 decode_gpus={gpus}") for name in ("deepseek-v3", "deepseek-v4-flash"))
        assert b.main.gpu_tokens_per_second > 2 * a.main.gpu_tokens_per_second


@pytest.mark.slow
def test_table_of_the_tutorial_is_that_of_the_search() -> None:
    """Its five models on three numbers of GPUs, and the figures that explain who changes places."""
    text = (ROOT / "docs" / "tutorials" / "choose_hardware.md").read_text()
    rows = re.findall(r"^\| (\S+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \((\d+) GPUs\) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    mains: dict[tuple[str, str], Served] = {}
    for model, *printed, own in rows:
        asked = ("32", " decode_gpus=32"), ("64", " decode_gpus=64"), (own, "")
        for (gpus, how), tokens in zip(asked, printed, strict=True):
            main = mains[model, gpus] = found_of(f"{model} @h200{how}").main
            assert (f"{main.gpu_tokens_per_second:,.0f}", str(main.d.gpus)) == (tokens, gpus), model
    few, many = (mains["kimi-k2", gpus] for gpus in ("32", "64"))
    assert (few.memory.gpu_experts, many.memory.gpu_experts) == (12, 6)
    sent = [mains[of].exchange.slow_row_bytes for of in (("deepseek-v3.2", "32"), ("deepseek-v3.2", "64"))]
    sent.append(mains["deepseek-v4-pro", "64"].exchange.slow_row_bytes)
    figures = *(f"{1000 * each.experts_time:.1f} ms" for each in (few, many)), *(f"{n / 1000:.0f} kB" for n in sent)
    assert [said for said in figures if said not in text] == []


def test_other_hardware_is_searched_again() -> None:
    """An H200 holds more sequences than an H800, so each is served by its own best."""
    h800, h200 = (found_of(f"deepseek-v3 @{name} decode_gpus=48").points[CHEAPEST].d for name in ("h800", "h200"))
    assert h200.batch > 1.5 * h800.batch


def test_v4_with_the_window_alone_holds_it() -> None:
    found = values_of("toy-v4 compress_ratios=(0,0,0,0)")
    assert found["decode_gpu_cache"] > 0 and found["kv_cache"] == 0
