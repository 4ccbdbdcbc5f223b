"""Parameters, bytes that are held and bytes that move, counted from the config: next to what is built, and to print."""

import dataclasses
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsmini import ModelConfig, TrainConfig, Transformer, accounting
from dsmini.accounting import (
    cache_bytes,
    decode_bytes_per_token,
    decode_flops_per_token,
    expected_experts,
    fixed_cache_bytes,
    kv_bytes_per_token,
    mha_kv_bytes_per_token,
    mha_twin,
    parameters,
    prefill_bytes_per_token,
    training_bytes,
    training_bytes_per_token,
    weight_bytes,
)
from dsmini.accounting.memory import rows_read
from dsmini.config.model import SLACK
from dsmini.nn import route
from dsmini.nn.fp8 import hold_all_fp8
from dsmini.training.optim import begin_stage, optimizer_state, optimizers
from tests.conftest import randomise
from tests.helpers.accounting import ATTENTIONS, DTYPES, SHARED, V4, form_of, sized
from tests.helpers.commands import ROOT
from tests.helpers.configs import CONFIGS, DSA, V32, released
from tests.helpers.strategies import model_configs
from tests.helpers.watching import storage_bytes

V3 = released("deepseek-v3")

# --- against models

MODULES = tomllib.loads(Path(__file__).with_name("cases.toml").read_text())["modules"]


def module_of(name: str) -> str:
    inner = re.sub(r"^(layers\.\d+\.|mtp\.\d+\.(block\.)?)", "", name)
    (module,) = [module for pattern, module in MODULES.items() if re.fullmatch(pattern, inner)]
    return f"mtp {module}" if name.startswith("mtp.") else module


def check_parameters(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    counted, built = parameters(config), Counter[str]()
    for name, parameter in model.named_parameters():
        built[module_of(name)] += parameter.numel()
    assert counted.by_module == built and counted.total == built.total()
    assert counted.buffers == sum(b.numel() for b in model.buffers())
    assert counted.mtp == sum(p.numel() for p in model.mtp.parameters()) == counted.total - counted.main


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_parameters_of_the_released_sizes(path: Path) -> None:
    check_parameters(ModelConfig.from_file(path))


V4_PRINTED = {
    # parameters of the released files without MTP, with routing biases; active without the head; FP8 cache of a token
    "deepseek-v4-flash": (284_332_240_471, 12.7387e9, 3514.25, 0.1188e12),
    "deepseek-v4-pro": (1_572_997_201_763, 47.9225e9, 5031.4375, 0.3155e12),
}


@pytest.mark.parametrize("name", V4_PRINTED)
def test_counts_of_v4_are_those_of_its_files_and_report(name: str) -> None:
    """FLOPs at a million tokens are in units of FP8: a product in BF16 counts twice, one in FP4 half."""
    c, (files, active, cache, flops) = released(name), V4_PRINTED[name]
    counted = parameters(c)
    tables = c.n_hash_layers * c.vocab_size * c.n_activated_experts
    of_mtp = c.n_mtp_layers * c.n_routed_experts
    assert counted.main + counted.buffers - tables - of_mtp == files
    assert counted.active - counted.by_module["head"] == pytest.approx(active, rel=1e-5)
    assert kv_bytes_per_token(c, dtype="fp8") == cache
    ratios = c.compress_ratios or ()
    entries = {ratio: ratios.count(ratio) * 2**20 // ratio for ratio in (4, 128)}
    chosen = c.n_layers * 128 * 584 + entries[128] * 584 + entries[4] * 68
    assert rows_read(c, 2**20, "fp8") == chosen + ratios.count(4) * (c.index_topk or 0) * 584
    assert counted.active_by_module["mtp projection"] == (1 + 4) * c.dim**2, "h_proj is multiplied with each stream"
    fp4 = weight_bytes(c, "fp4", mtp=False).by_part
    assert fp4["routed experts"] == counted.by_module["routed experts"] / 2
    of = decode_flops_per_token(c, context=2**20).by_module
    weight = {"attention over the context": 2, "scores of the indexer": 0.5}
    assert sum(n * weight.get(module, 1) for module, n in of.items()) == pytest.approx(flops, rel=1e-3)


def held(model: Transformer) -> int:
    return sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()])


def check_counts(config: ModelConfig, rows: int = 3) -> None:
    """Compare parameters, weights in each dtype, and the storage of caches with what is built."""
    check_parameters(config)
    model, is_latent = Transformer(config).eval(), config.is_mla or config.attention == "compressed"
    assert weight_bytes(config, "float32").total == held(model)
    for name in ("float32", "bfloat16", *(["fp8"] if is_latent else [])):
        for mtp in {False, config.n_mtp_layers > 0}:
            made = model.new_cache(2, rows, DTYPES.get(name, "fp8"), mtp=mtp)  # pyright: ignore[reportArgumentType]
            counted = cache_bytes(config, max_seq_len=rows, batch=2, dtype=name, mtp=mtp)  # pyright: ignore[reportArgumentType]
            assert counted.by_part["cache"] == made.nbytes
            assert counted.by_part.get("mtp cache", 0) == made.mtp_nbytes
            a_token = kv_bytes_per_token(config, dtype=name)  # pyright: ignore[reportArgumentType]
            # V4's is a sum of fractions
            assert made.nbytes_per_token == (pytest.approx(a_token) if config.compress_ratios else a_token)
            assert made.nbytes == sum(storage_bytes([stored.data for stored in made.rows]))
            if rows >= SLACK + max(config.window_size or 0, *(config.compress_ratios or (0, 0))):
                assert made.fixed_nbytes == fixed_cache_bytes(config, name)  # pyright: ignore[reportArgumentType]
    assert weight_bytes(config, "bfloat16").total == held(model.to(torch.bfloat16))
    eight, counted = hold_all_fp8(model), weight_bytes(config, "fp8")
    assert counted.total == held(eight)
    assert counted.by_part["scales"] == sum(b.nbytes for name, b in eight.named_buffers() if name.endswith("scale"))


@settings(max_examples=30)
@given(config=model_configs())
def test_counts_of_any_model_are_those_of_what_is_built(config: ModelConfig) -> None:
    check_counts(config)


V4_KINDS = [{}, {"hc_mult": 1, "topk_method": "greedy", "n_hash_layers": 0}]
OTHERS = {f"v4 {changes}": (sized(**(V4 | changes), max_seq_len=256), 200) for changes in V4_KINDS}
OTHERS |= {"ragged blocks": (ModelConfig(dim=192, kv_lora_rank=130, moe_inter_dim=129), 3), "fp8": (released("fp8"), 3)}


@pytest.mark.parametrize("name", OTHERS)
def test_counts_are_those_of_what_is_built(name: str) -> None:
    """Tensor for tensor: V4 with each kind of layer, and weights whose blocks are not whole."""
    check_counts(*OTHERS[name])


STAGES = [({}, "sparse"), ({"attention": "gqa", "n_kv_heads": 1}, "sparse"), (DSA, "sparse"), (DSA, "warmup")]
STAGES += [(V4, "sparse"), ({"hc_mult": 2}, "sparse"), (SHARED, "sparse"), (SHARED, "warmup")]
STAGE_NAMES = ["mla", "gqa", "dsa", "warm-up of dsa", "v4", "streams", "shared", "warm-up of shared"]


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("attention", "stage"), STAGES, ids=STAGE_NAMES)
def test_bytes_of_gradients_and_optimizer_are_those_of_a_step(
    attention: dict[str, Any], stage: Any, optimizer: Any, moments: Any
) -> None:
    config = sized(**attention)
    model, tokens = Transformer(config), torch.randint(0, 51, (2, 20))
    begin_stage(model, stage)
    model.losses(tokens, tokens).total.backward()
    for parameter in model.parameters():  # an expert may have no visitor, and then no gradient
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    used = optimizers(model, TrainConfig(optimizer=optimizer, moments=moments))
    for one in used:
        one.step()
    counted = training_bytes(
        config, batch_size=2, seq_len=20, optimizer=optimizer, moments=moments, dsa_stage=stage
    ).by_part
    assert counted["optimizer"] == sum(t.nbytes for t in optimizer_state(used, model.named_parameters()).values())
    assert counted["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    heads = 1 + config.n_mtp_layers if stage == "sparse" else 0
    assert counted.get("the head's gradient", 0) == heads * 4 * 51 * 40


# --- against print


def test_v3_as_printed() -> None:
    """671B, 37B active; MTP 11.5B of its own, 2.4B active: DeepSeek-V3 report and model card."""
    counted, main = parameters(V3), parameters(dataclasses.replace(V3, n_mtp_layers=0))
    assert counted.main == main.total == 671_026_404_352
    assert (main.buffers, counted.buffers) == (14_848, 14_848 + 256)
    embedding, own = counted.by_module["embedding"], counted.mtp - counted.by_module["mtp projection"]
    met = sum(n for k, n in counted.active_by_module.items() if k.startswith("mtp ") and k != "mtp projection")
    found = [counted.active, counted.active + embedding, counted.mtp, own, met + embedding]
    assert [round(n / 1e9, 2) for n in found] == [36.62, 37.55, 11.61, 11.51, 2.44]


def test_other_models_as_printed() -> None:
    """Billions of parameters, from the models' reports. Moonlight's are without embedding and head."""
    names = ("deepseek-v2", "deepseek-v2-lite", "kimi-k2", "moonlight")
    v2, lite, kimi, moonlight = (parameters(released(name)) for name in names)
    assert (v2.total, v2.active) == pytest.approx((236e9, 21e9), abs=0.5e9)
    assert (lite.total, lite.active) == pytest.approx((15.7e9, 2.4e9), abs=0.06e9)
    assert (kimi.total, kimi.active) == pytest.approx((1026e9, 32e9), abs=0.5e9)
    ends = moonlight.by_module["head"]
    assert (moonlight.total - 2 * ends, moonlight.active - ends) == pytest.approx((15.29e9, 2.24e9), abs=0.005e9)


def test_cache_as_printed() -> None:
    """Bytes a token: V3 (INS, table 1); V2 as 2.25 groups of GQA (V2, table 1). The planner's figures have GQA's."""
    assert kv_bytes_per_token(V3) == 70_272
    assert kv_bytes_per_token(released("deepseek-v2")) / 2 == 4.5 * 128 * 60 == 2.25 * (2 * 128) * 60


def test_cache_against_the_mha_twin() -> None:
    """98.24 % needs heads of 128; against the 192-wide keys that MLA expands to it would be 98.59 %."""
    baseline = mha_twin(V3)
    assert baseline == dataclasses.replace(V3, attention="mha")
    assert kv_bytes_per_token(baseline) == 32768 * 61 * 2
    wider = dataclasses.replace(baseline, qk_nope_head_dim=192)
    shares = [1 - kv_bytes_per_token(V3) / kv_bytes_per_token(other) for other in (baseline, wider)]
    assert [f"{share:.2%}" for share in shares] == ["98.24%", "98.59%"] and shares[0] == 1 - 576 / 32768


@given(model_configs())
def test_cache_of_the_mha_twin_needs_no_twin(config: ModelConfig) -> None:
    if config.qk_nope_head_dim % 2 == 0:
        assert mha_kv_bytes_per_token(config) == kv_bytes_per_token(mha_twin(config))


# --- refusals

NAMED = {"TOY": ModelConfig(), "SMALL": sized(), "MHA": sized(attention="mha"), "V3": released("deepseek-v3")}
REFUSED = tomllib.loads((ROOT / "tests/helpers/refusals.toml").read_text())["accounting"]


@pytest.mark.parametrize("call", REFUSED)
def test_refusals_say_what_to_use(call: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its words are compared)
        eval(call, vars(accounting) | NAMED)
    assert REFUSED[call] in str(error.value)


# --- traffic

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}


def nbytes(t: Tensor) -> int:
    """Return the bytes of the numbers that exist: a dimension of stride 0 repeats them."""
    repeated = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride == 0 and n > 1]
    return t.nbytes // max(1, torch.Size(repeated).numel())


class Moved(TorchDispatchMode):
    """Bytes of operands and results, of operations on rows of the cache and of all other products."""

    def __init__(self, rows: int, batch: int) -> None:
        super().__init__()
        self.rows, self.context, self.products, self.codes = {rows, batch * rows}, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.codes += sum(nbytes(t) for t in operands if t.dtype == torch.float8_e4m3fn and not func.is_view)
        there = {t.untyped_storage().data_ptr() for t in operands}
        if all(t.untyped_storage().data_ptr() in there for t in results):  # a view
            return out
        numbers = [t for t in [*operands, *results] if t.is_floating_point()]
        if any(self.rows & set(t.shape) for t in numbers):
            self.context += sum(map(nbytes, numbers))
        elif func.overloadpacket in PRODUCTS:
            self.products += sum(map(nbytes, numbers))
        return out


def measured(
    config: ModelConfig, context: int, batch: int, dtype: str, cache_dtype: str, form: Any, fp8: bool = False
) -> tuple[Moved, float]:
    """One decoding step, the third call with a cache, so that absorbed halves are there; and how many distinct experts
    a layer read."""
    model = randomise(Transformer(config)).to(DTYPES[dtype]).eval()
    model = hold_all_fp8(model.eval()) if fp8 else model
    tokens = torch.randint(0, config.vocab_size, (batch, context))
    cache = model.new_cache(batch, context, dtype=DTYPES[cache_dtype], form=form)
    model(tokens[:, :-2], cache=cache)
    model(tokens[:, -2:-1], cache=cache)
    with Moved(context, batch) as moved, torch.no_grad():
        routing = model.run(tokens[:, -1:], cache=cache).routing
    if batch == 1:  # no count includes the product that weighs and adds one sequence's experts
        k, m = config.n_activated_experts, config.dim
        moved.products -= (config.n_layers - config.n_dense_layers) * (k + k * m + m) * DTYPES[dtype].itemsize
    visited = [int((r.counts > 0).sum()) for r in routing]
    return moved, sum(visited) / max(1, len(visited))


def split(config: ModelConfig, by_part: Any, case: str, batch: int, size: int) -> tuple[float, float]:
    """Return the bytes a step that move with rows of the cache, and those of the other products."""
    context = {"cache read", "expanded keys and values", "attention operands"}
    apart = {"embedding", "norms", "cache write"} | context
    rows = batch * sum(amount for name, amount in by_part.items() if name in context)
    rest = batch * sum(amount for name, amount in by_part.items() if name not in apart)
    rest -= 4 * parameters(config).buffers / (config.n_layers + config.n_mtp_layers - 1) * (config.n_layers - 1)
    if form_of(case) == "expanded":  # wkv_b is multiplied with the rows
        wkv_b = config.n_layers * config.kv_lora_rank * config.n_heads * (config.qk_nope_head_dim + config.v_head_dim)
        rows, rest = rows + wkv_b * size, rest - wkv_b * size
    return rows, rest


# --- decoding


STEPS: list[Any] = [
    (1, "float32", "float32", 100),
    (3, "bfloat16", "bfloat16", 128),
    (1, "float32", "bfloat16", 100),
    (3, "bfloat16", "float32", 128),
]


@pytest.mark.parametrize(("batch", "dtype", "cache_dtype", "context"), STEPS)
@pytest.mark.parametrize("case", ATTENTIONS)
def test_bytes_that_products_move_in_decoding(
    case: str, batch: int, dtype: Any, cache_dtype: Any, context: int
) -> None:
    """Leave out embedding, norms and writes to the cache: the rest is exact, and in attention a lower bound.

    The bound holds no copy of the rows of a cache in another dtype than the compute dtype.
    """
    config, size = sized(**ATTENTIONS[case]), DTYPES[dtype].itemsize
    moved, experts = measured(config, context, batch, dtype, cache_dtype, form_of(case))
    how: dict[str, Any] = {"dtype": dtype, "cache_dtype": cache_dtype, "experts": experts}
    counted = decode_bytes_per_token(config, context=context, batch=batch, **how)
    rows, rest = split(config, counted.by_part, case, batch, size)
    assert rest == pytest.approx(moved.products, rel=1e-12)
    assert rows <= moved.context
    assert counted.by_part["cache read"] == context * kv_bytes_per_token(config, dtype=cache_dtype)


@pytest.mark.parametrize("batch", [1, 3])
def test_fp8_weights_are_read_as_codes_and_scales(batch: int) -> None:
    """The absorbed halves are BF16 already."""
    config = sized()
    moved, experts = measured(config, 100, batch, "bfloat16", "bfloat16", "absorbed", fp8=True)
    how: dict[str, Any] = {"context": 100, "batch": batch, "experts": experts}
    least = decode_bytes_per_token(config, **how, dtype="fp8")
    plain = decode_bytes_per_token(config, **how, dtype="bfloat16")
    _, products = split(config, plain.by_part, "absorbed", batch, 2)
    assert products == pytest.approx(moved.products, rel=1e-12)
    halves = config.n_layers * config.kv_lora_rank * config.n_heads * 24
    stays = batch * sum(plain.by_part[name] for name in ("embedding", "norms", "gates", "head")) + 2 * halves
    scales = batch * least.weights - moved.codes - stays
    # a block each: attention's four other matrices, the dense feed-forward, the shared and the visited experts
    assert scales == pytest.approx(4 * (3 * 4 + 3 + 2 * 3 + 2 * 3 * experts), abs=1e-6)


def test_attention_of_v3_by_hand() -> None:
    """Absorbed, 128 heads read 576 numbers as key and sum 512; expanded, keys are 192 wide and values 128."""
    how: dict[str, Any] = {"context": 4096, "batch": 3}
    configs = (dataclasses.replace(V3, **changes) for changes in ({}, {"qk_norm": True}, {"attention": "mha"}))
    absorbed, expanded, mha = (decode_bytes_per_token(config, **how).by_part for config in configs)
    assert absorbed["attention operands"] == pytest.approx(2 * 61 * 128 * (576 + 512))
    assert expanded["attention operands"] == pytest.approx(2 * 61 * 128 * (192 + 128))
    assert mha["attention operands"] == pytest.approx(2 * 61 * 128 * (128 + 128))
    assert expanded["expanded keys and values"] == pytest.approx(2 * 2 * 61 * 4096 * 128 * (128 + 128))
    assert "expanded keys and values" not in {*absorbed, *mha}


def test_a_decoded_token_reads_all_index_keys_and_k_rows() -> None:
    config = released("deepseek-v3", **V32, max_seq_len=2**20)
    read = decode_bytes_per_token(config, context=128 * 1024, dtype="fp8", cache_dtype="fp8").by_part["cache read"]
    assert read == 61 * (132 * 128 * 1024 + 656 * 2048)


@given(config=model_configs(), data=st.data())
def test_decoding_reads_no_more_than_there_is(config: ModelConfig, data: st.DataObject) -> None:
    how: dict[str, Any] = {
        "context": data.draw(st.integers(1, config.max_seq_len)),
        "batch": data.draw(st.integers(1, 5)),
        "dtype": data.draw(st.sampled_from(["float32", "bfloat16", "fp8"])),
        "cache_dtype": data.draw(st.sampled_from(["float32", "bfloat16"])),
    }
    least = decode_bytes_per_token(config, **how)
    assert sum(least.by_part.values()) == least.total
    weights = weight_bytes(config, how["dtype"], mtp=False)
    width = config.n_heads * (config.qk_nope_head_dim + config.v_head_dim)
    halves = 2 * config.n_layers * config.kv_lora_rank * width
    assert least.weights * how["batch"] <= weights.total + how["batch"] * 4 * config.dim + halves
    assert least.by_part["cache write"] == kv_bytes_per_token(config, dtype=how["cache_dtype"])


# --- distinct experts


@pytest.mark.parametrize(("groups", "limited"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("tokens", [1, 2, 7, 30])
def test_distinct_experts_of_random_gates(tokens: int, groups: int, limited: int) -> None:
    """The mean over 2000 layers; groups change which experts come together, not how many in the mean."""
    options: dict[str, Any] = {"n_activated_experts": 3, "n_expert_groups": groups, "n_limited_groups": limited}
    indices = route(torch.randn(2000 * tokens, 16), torch.zeros(16), **options).indices.reshape(2000, -1)
    visited = torch.zeros(2000, 16).scatter(1, indices, 1).sum(1)
    error = float(visited.std()) / 2000**0.5
    assert expected_experts(sized(**options), tokens) == pytest.approx(float(visited.mean()), abs=4 * error + 1e-6)


# --- prefill and training


@pytest.mark.parametrize("case", ["absorbed", "query not compressed", "mha", "gqa"])
def test_bytes_that_a_forward_moves(case: str) -> None:
    """Every Linear, gate and expert reads its input and weight and writes its result: seen by hooks."""
    config, b, s = sized(**ATTENTIONS[case]), 2, 40
    model = randomise(Transformer(config))
    moved: list[int] = []

    def hook(module: Any, args: Any, result: Any) -> None:
        made = b * s * 16 * 4 if len(result) == 4 else result.nbytes  # a gate returns its choice
        moved.append(module.weight.nbytes + args[0].nbytes + made)

    for name, module in model.named_modules():
        if not name.startswith(("mtp", "embed")) and getattr(module, "weight", torch.empty(0)).dim() == 2:
            module.register_forward_hook(hook)
    with torch.no_grad():
        routing = model.run(torch.randint(0, 51, (b, s))).routing
    visits = sum(int(r.counts.sum()) for r in routing)
    distinct = sum(int((r.counts > 0).sum()) for r in routing)
    products = sum(moved) + 4 * 3 * (visits * (config.dim + config.moe_inter_dim) + distinct * config.dim * 24)
    counted = prefill_bytes_per_token(
        config, seq_len=s, batch=b, dtype="float32", experts=distinct / len(routing), last_logits=False
    )
    left_out = {"embedding", "norms", "attention operands", "cache write"}
    ours = b * s * sum(amount for name, amount in counted.by_part.items() if name not in left_out)
    biases = 4 * 16 * len(routing)
    assert ours - biases == pytest.approx(products, rel=1e-12)
    assert counted.by_part["cache write"] == kv_bytes_per_token(config, "float32")


def test_groups_of_heads_read_all_heads() -> None:
    """V4's output projection in two groups moves the same bytes as in one."""
    one, two = (
        prefill_bytes_per_token(sized(**(V4 | {"o_groups": g, "o_lora_rank": 24 // g})), seq_len=8) for g in (1, 2)
    )
    assert one.by_part["activations"] == two.by_part["activations"]


def test_training_moves_three_forwards_of_activations() -> None:
    config = sized(n_mtp_layers=0)
    how: dict[str, Any] = {"seq_len": 50, "dtype": "bfloat16"}
    training = training_bytes_per_token(config, batch_size=4, **how)
    forward = prefill_bytes_per_token(config, batch=4, last_logits=False, **how)
    products = forward.by_part["activations"] + forward.by_part["logits"]
    assert training.by_part["activations"] == pytest.approx(3 * products)
    # a layer's q, k, v and sums, of 4 heads 16 and 14 wide
    assert forward.by_part["attention operands"] == 2 * 3 * 4 * 2 * (16 + 14)
    read, written = 2 * (16 + 14) + 14, 2 * 16 + 14  # all four with the result's gradient; three gradients
    assert training.by_part["attention operands"] == forward.by_part["attention operands"] + 24 * (read + written)
    once = {"embedding", "norms"}
    for name in ("attention", "dense feed-forward", "routed experts", "shared experts", "head", *once):
        assert training.by_part[name] == pytest.approx((1 if name in once else 2) * forward.by_part[name])
    biases = 2 * 16 * 4 / 200  # have no gradient
    assert training.by_part["gates"] == pytest.approx(2 * forward.by_part["gates"] - biases)
    n = parameters(config).total
    assert training.by_part["weight gradients"] * 200 == 4 * n
    assert training.by_part["optimizer"] * 200 == pytest.approx(28 * n, rel=1e-2)  # 12 and two moments twice
    half = training_bytes_per_token(config, batch_size=4, moments="bfloat16", **how)
    assert half.by_part["optimizer"] * 200 == pytest.approx(20 * n, rel=1e-2)


def test_fp8_halves_what_training_reads() -> None:
    config = dataclasses.replace(V3, n_mtp_layers=0)
    fp8, bf16 = (
        training_bytes_per_token(dataclasses.replace(config, precision=p), seq_len=4096, batch_size=8)
        for p in ("fp8", "native")
    )
    assert fp8.by_part["routed experts"] == pytest.approx(bf16.by_part["routed experts"] / 2, rel=1e-3)
    assert fp8.by_part["head"] == bf16.by_part["head"]
    written, read = 1 / 3, 2 / 3 * (1 + 4 / 128) / 2
    assert fp8.by_part["activations"] / bf16.by_part["activations"] == pytest.approx(written + read, rel=0.03)
