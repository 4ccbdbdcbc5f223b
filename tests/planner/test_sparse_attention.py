"""Counts of V3.2's sparse attention, and of V4's compressed attention, against print and by hand."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from dsmini import ModelConfig
from dsmini.accounting import (
    kv_bytes_per_token,
    parameters,
)
from dsmini.planner.model.attention_savings import attention_savings
from dsmini.planner.model.compressed_attention import (
    CompressedAttention,
    SharedSizes,
    compressed_attention,
    shared_cache,
)
from dsmini.planner.model.compressed_parameters import CompressedSizes, compressed_parameters
from dsmini.planner.model.sizes_files import FOLDER, read_sizes
from dsmini.planner.model.sparse_attention import SparseAttention, SparseSizes, sparse_attention
from dsmini.planner.quantities.formula import evaluate, inputs
from dsmini.planner.quantities.quantity import TOKENS, Quantity, Tokens
from tests.helpers.configs import refusal, released, written
from tests.helpers.serving_plans import (
    CHANGES,
    V3,
    check_gradients,
    check_inputs_act,
    check_numbers_are_small,
    check_sources,
    model_of,
    with_numbers,
)

MILLION = 2**20


def tokens(value: float) -> Tokens:
    return TOKENS(value, "context", "Context", "a test")


def v32(context: float, config: ModelConfig = V3, **change: float) -> SparseAttention:
    return sparse_attention(model_of(config), with_numbers(SparseSizes.published(), change), tokens(context))


def v4(name: str, context: float = MILLION) -> CompressedAttention:
    sizes = CompressedSizes.published(f"deepseek-v4-{name}")
    return compressed_attention(sizes, tokens(context), v32(context), SparseSizes.published())


# --- V3.2


def test_cache_of_v32() -> None:
    plan = v32(MILLION)
    assert plan.row.value == 656
    assert plan.index_row.value == 132
    assert plan.kv_cache.value == 48_068 == kv_bytes_per_token(V3, dtype="fp8") + 61 * 132
    assert plan.cache.value == pytest.approx(50.4e9, rel=1e-3)


def test_sparse_attention_at_128k() -> None:
    """13.4 times fewer operations and 4.6 times fewer bytes than dense attention."""
    plan = v32(128 * 1024)
    assert plan.dense_flops.value == pytest.approx(36.5e9, rel=1e-3)
    assert plan.index_flops.value == pytest.approx(2.15e9, rel=2e-3)
    assert plan.attention_flops.value == pytest.approx(0.57e9, rel=2e-3)
    assert round(plan.flops_ratio.value, 1) == 13.4
    assert round(plan.read_ratio.value, 1) == 4.6


def test_sparse_attention_pays_from_2176_tokens_on() -> None:
    crossover = v32(1000).crossover
    assert crossover is not None
    assert crossover.value == pytest.approx(2176, rel=1e-12)
    assert v32(2176).flops_ratio.value == pytest.approx(1, rel=1e-12)
    assert v32(2175).flops_ratio.value < 1 < v32(2177).flops_ratio.value


def test_short_contexts_are_read_whole() -> None:
    plan = v32(2000)
    assert plan.attention_flops.value == plan.dense_flops.value == 2 * 128 * (2 * 512 + 64) * 2000
    assert plan.read.value == 2000 * (656 + 132)


def test_indexer_has_as_many_parameters_as_the_released_tensors() -> None:
    assert v32(1000).indexer_parameters.value == 8192 * 1536 + 128 * 7168 + 64 * 7168 + 256 == 13_959_424


def test_indexer_of_a_small_model_never_pays() -> None:
    """Its 64 heads of 128 cost more than attention of 4 heads at any length."""
    small = v32(1000, released("toy"))
    assert small.crossover is None and small.flops_ratio.value < 0.1
    assert v32(10**9, released("toy")).flops_ratio.value < 1


def test_indexer_without_a_compressed_query_reads_the_hidden_state() -> None:
    config = released("moonlight")
    assert config.q_lora_rank is None
    m = config.dim
    assert v32(1000, config).indexer_parameters.value == 8192 * m + 128 * m + 64 * m + 256


def test_v4_is_compared_with_v3_alone() -> None:
    def prefixes(name: str) -> set[str]:
        savings = attention_savings(model_of(released(name)), tokens(4096))
        assert savings is not None
        return {key.partition("_")[0] for key in savings.figures()} - {"context"}

    assert prefixes("deepseek-v3") == {"v32", "pro", "flash", "v41"}
    assert prefixes("kimi-k2") == {"v32"}
    assert attention_savings(model_of(released("toy-mha")), tokens(4096)) is None


def test_operations_of_a_token_at_a_million() -> None:
    plan = v32(MILLION)
    active = parameters(V3).active + 61 * 13_959_424
    layers = 61 * (2 * 64 * 128 * MILLION + 2 * 2 * 128 * (2 * 512 + 64) * 2048)
    assert plan.token_flops.value == pytest.approx(2 * active + layers, rel=1e-12)
    assert plan.token_flops.value == pytest.approx(1.192e12, rel=1e-3)


# --- V4


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("flash", 284_332_240_471, 13.27e9), ("pro", 1_572_997_201_763, 48.85e9)],
)
def test_parameters_of_v4(name: str, total: int, active: float) -> None:
    """The tensors of the released files without multi-token prediction and hash tables: 284B and 1.6T."""
    counted = v4(name).parameters
    assert counted.total.value == total
    assert counted.active.value == pytest.approx(active, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "per_token", "ratio", "printed", "share", "cache"),
    [("pro", 5031.4, 9.55, 9.5, 0.0201, 5.28e9), ("flash", 3514.25, 13.68, 13.7, 0.0200, 3.68e9)],
)
def test_cache_of_v4_as_printed(
    name: str, per_token: float, ratio: float, printed: float, share: float, cache: float
) -> None:
    """V4 report: 9.5 and 13.7 times less than V3.2, and about 2 % of GQA with 8 groups in BF16."""
    plan = v4(name)
    assert plan.entry.value == 584 and plan.index_entry.value == 68
    assert plan.kv_cache.value == pytest.approx(per_token, abs=0.05)
    assert plan.cache_ratio.value == pytest.approx(ratio, abs=0.005)
    assert plan.cache_ratio.value == pytest.approx(printed, rel=0.01)
    assert plan.baseline_share.value == pytest.approx(share, abs=5e-5)
    assert plan.cache.value - plan.window.value == pytest.approx(cache, rel=2e-3)


def test_windows_are_held_once() -> None:
    short = v4("pro", 1000)
    assert short.window.value == v4("pro").window.value == 61 * 128 * 584
    assert short.cache.value == pytest.approx(1000 * 5031.4375 + 61 * 128 * 584, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "counted", "rounded", "printed"), [("pro", 3.78, 3.77, 3.7), ("flash", 10.03, 10.07, 9.8)]
)
def test_operations_of_v4_as_printed(name: str, counted: float, rounded: float, printed: float) -> None:
    """V4 report: 3.7 and 9.8 times fewer than V3.2 at a million tokens, in FP8 units."""
    plan = v4(name)
    assert plan.flops_ratio.value == pytest.approx(counted, abs=0.005)
    assert plan.rounded_ratio.value == pytest.approx(rounded, abs=0.005)
    assert plan.rounded_ratio.value == pytest.approx(printed, rel=0.03)


def test_operations_of_pro_by_hand() -> None:
    plan = v4("pro")
    csa = 30 * 128 * 2048 * 2 * (1024 + 128)
    hca = 31 * 128 * 2048 * 2 * (MILLION / 128 + 128)
    assert plan.attention_flops.value == csa + hca
    assert plan.index_flops.value == 30 * MILLION / 4 * 64 * 128 * 2 * 0.5


def test_short_contexts_have_few_entries() -> None:
    plan = v4("flash", 64)
    entries = 43 * 64 + 21 * 64 / 4 + 20 * 64 / 128
    assert plan.attention_flops.value == pytest.approx(64 * 2048 * 2 * entries, rel=1e-12)


def test_cache_of_v41() -> None:
    """V4.1 report: 890 bytes a token."""
    sizes = SharedSizes.published()
    assert shared_cache(sizes).value == 890
    assert evaluate(shared_cache(sizes), {"v41_decoder_ratio": 2}) == 712


# --- inputs


def doubled(made: Any) -> dict[str, float]:
    """Return twice each number of a dataclass of inputs."""
    values = [getattr(made, field.name) for field in dataclasses.fields(made)]
    return {value.name: 2 * value.value for value in values if isinstance(value, Quantity)}


@pytest.mark.parametrize("context", [1000, MILLION])
def test_every_input_of_v32_acts(context: int) -> None:
    def build(**change: Any) -> Any:
        config = dataclasses.replace(V3, **{name: value for name, value in change.items() if name in CHANGES})
        length = change.pop("context", context)
        return v32(length, config, **change)

    changes = {**CHANGES, **doubled(SparseSizes.published()), "context": 3 * context}
    check_inputs_act(build, changes, least=len(changes) - 3)
    figures = list(build().figures().values())
    check_gradients(figures)
    check_numbers_are_small(figures)
    check_sources(figures)


@pytest.mark.parametrize("name", ["flash", "pro"])
@pytest.mark.parametrize("context", [64, MILLION])
def test_every_input_of_v4_acts(name: str, context: int) -> None:
    published = CompressedSizes.published(f"deepseek-v4-{name}")

    def build(**change: Any) -> Any:
        length = change.get("context", context)
        sizes = with_numbers(published, change)
        return compressed_attention(sizes, tokens(length), v32(length), SparseSizes.published())

    changes = {**doubled(published), "context": 3 * context}
    check_inputs_act(build, changes, least=len(changes))
    figures = list(build().figures().values())
    check_gradients(figures)
    check_numbers_are_small(figures)
    check_sources(figures)


def test_headline_figures_depend_on_what_they_must() -> None:
    plan = v4("flash")
    needs = {
        *("flash_csa_layers", "flash_hca_layers", "flash_csa_ratio", "flash_hca_ratio", "flash_head_dim"),
        *("flash_rope_head_dim", "flash_scale_group", "flash_index_head_dim", "flash_index_scale_group"),
        *("flash_entry_pad", "fp8_size", "bf16_size", "fp4_size", "e8m0_size"),
    }
    assert inputs(plan.kv_cache).keys() == needs
    assert {"n_layers", "kv_lora_rank", "v32_index_head_dim", *needs} <= inputs(plan.cache_ratio).keys()
    assert {"flash_index_topk", "flash_activated", "v32_activated", "context"} <= inputs(plan.rounded_ratio).keys()
    assert "flash_activated" not in inputs(plan.flops_ratio)
    assert inputs(compressed_parameters(CompressedSizes.published("deepseek-v4-pro")).total).keys() <= {
        f"pro_{field.name}" for field in dataclasses.fields(CompressedSizes)
    }


def test_v41_depends_on_every_size() -> None:
    sizes = SharedSizes.published()

    for name, value in doubled(sizes).items():
        again = shared_cache(with_numbers(sizes, {name: value}))
        assert evaluate(shared_cache(sizes), {name: value}) == again.value != 890
    check_gradients([shared_cache(sizes)])
    check_numbers_are_small([shared_cache(sizes)])
    check_sources([shared_cache(sizes)])


# --- files of sizes


def test_every_file_of_sizes_is_read() -> None:
    kinds: dict[str, Callable[[], Any]] = {
        "deepseek-v3.2": SparseSizes.published,
        "deepseek-v4-flash": lambda: CompressedSizes.published("deepseek-v4-flash"),
        "deepseek-v4-pro": lambda: CompressedSizes.published("deepseek-v4-pro"),
        "deepseek-v4.1-flash": SharedSizes.published,
    }
    assert {path.stem for path in FOLDER.glob("deepseek-*.toml")} == kinds.keys()
    for read in kinds.values():
        made = read()
        assert made.title.startswith("DeepSeek-V")
        assert all(name.startswith(made.prefix) for name in doubled(made))


def test_refusal_of_an_unknown_model() -> None:
    assert "deepseek-v4-flash or deepseek-v4-pro" in refusal(CompressedSizes.published, "deepseek-v5")


GOOD = (FOLDER / "deepseek-v3.2.toml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("index_topk = {", "index_top = {", "differ in index_top, index_topk; give each size once"),
        ("value = 2048, ", "", "sizes.index_topk of x.toml is"),
        ("value = 2048", "value = true", "write { value = 1, source"),
        ('source = "config.json: index_topk"', 'source = ""', "sizes.index_topk of x.toml is"),
        ('prefix = "v32_"', "", "no title, prefix or [sizes]; write all three"),
        ("[sizes]", "[other]", "no title, prefix or [sizes]; write all three"),
    ],
)
def test_refusal_of_wrong_files(tmp_path: Any, old: str, new: str, sentence: str) -> None:
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new), "x.toml")
    assert sentence in refusal(read_sizes, SparseSizes, path)
