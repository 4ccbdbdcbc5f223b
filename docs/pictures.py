"""Draw the pictures of gallery.md that need no measurement: python docs/pictures.py"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import dsmini
from dsmini import ModelConfig, accounting
from dsmini.nn.attention import Context
from dsmini.planner.hardware import load_hardware
from dsmini.planner.plan import make_plan
from dsmini.planner.request import Model, PlanRequest
from dsmini.reading import find_config

FOLDER = Path(__file__).parent / "gallery"
MILLION = 1_048_576
TOKENS = 64
TINY = {"dim": 64, "n_heads": 2, "n_layers": 1, "n_dense_layers": 1, "max_seq_len": TOKENS, "n_mtp_layers": 0}
INDEXER = {"index_n_heads": 2, "index_head_dim": 32}
V4 = {"attention": "compressed", "window_size": 8, "head_dim": 32, "o_groups": 1, "o_lora_rank": 16, "q_lora_rank": 32}


def draw_caches() -> Figure:
    """Draw the bytes of a million tokens with each kind of attention, as released models store them."""
    config = ModelConfig.from_file(find_config(Path("deepseek-v3")))
    twin = accounting.mha_twin(config)
    gqa = dataclasses.replace(twin, attention="gqa", n_kv_heads=8)
    found = {
        "MHA, 128 heads of V3, BF16": accounting.kv_bytes_per_token(twin),
        "GQA, 8 groups of V3's heads, BF16": accounting.kv_bytes_per_token(gqa),
        "MLA, V3, BF16": accounting.kv_bytes_per_token(config),
    }
    for label, name in (("V3.2", "deepseek-v3.2"), ("V4-Pro", "deepseek-v4-pro"), ("V4-Flash", "deepseek-v4-flash")):
        config = ModelConfig.from_file(find_config(Path(name)))
        found[f"{label}, FP8"] = accounting.kv_bytes_per_token(config, dtype="fp8")
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axis = figure.subplots()
    sizes = [each * MILLION / 1e9 for each in found.values()]
    bars = axis.barh(list(found), sizes, color="#1f6f9f")
    axis.bar_label(bars, [f"{size:,.0f} GB" if size > 100 else f"{size:.3g} GB" for size in sizes], padding=4)
    axis.set(xscale="log", xlim=(1, 30_000), xlabel="cache of one text of a million tokens, GB")
    axis.invert_yaxis()
    return figure


def reach(documents: Tensor | None = None, **changes: Any) -> Tensor:
    """Return [s, s]: True where what attention gives a token (first s) depends on another (second s)."""
    torch.manual_seed(0)
    attention = dsmini.Transformer(ModelConfig(**TINY | changes)).layers[0].get_submodule("attn")
    x = torch.randn(1, TOKENS, TINY["dim"], requires_grad=True)
    y = attention(x, Context(positions=torch.arange(TOKENS)[None], documents=documents))
    rows = [torch.autograd.grad(each, x, retain_graph=True)[0][0].abs().sum(-1) for each in y[0].sum(-1)]
    return torch.stack(rows) > 0


def draw_masks() -> Figure:
    """Draw which tokens a token reads in a layer of each kind."""
    documents = torch.arange(TOKENS)[None] // 24
    found = {
        "MLA (V3)": reach(),
        "MLA, three documents": reach(documents),
        "8 keys chosen (V3.2)": reach(attention="dsa", index_topk=8, **INDEXER),
        "window, 3 entries of 4 (V4)": reach(compress_ratios=(4,), index_topk=3, **INDEXER, **V4),
        "window, entries of 16 (V4)": reach(compress_ratios=(16,), index_topk=3, **INDEXER, **V4),
    }
    figure = Figure(figsize=(13, 3), layout="constrained")
    for axis, (title, mask) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        axis.imshow(mask, cmap="Blues", vmax=1.3, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("token that is read")
    figure.axes[0].set_ylabel("token that reads")
    return figure


def draw_plan() -> Figure:
    """Draw what the plan of V3's published training and serving says of memory and time."""
    model = Model.from_file(find_config(Path("deepseek-v3")))
    f = make_plan(PlanRequest(), model, load_hardware("h800")).figures
    memory = {
        "weights": f["memory_weights"],
        "gradients": f["memory_gradients"],
        "optimizer": f["memory_optimizer"],
        "activations": f["memory_activations"],
        "free": f["memory_free"],
    }
    step = {
        "computing": f["computing_seconds"],
        "waiting in the pipeline": f["bubble_seconds"],
        "rows of experts": f["dispatching_seconds"],
        "gradients": f["exchange_seconds"],
    }
    decode = {
        "links": f["decode_links_time"],
        "attention": f["decode_attention_time"],
        "experts": f["decode_experts_time"],
        "matrices": f["decode_matrices_time"],
        "launches": f["decode_latency_time"],
    }
    panels = (
        (f"memory of the fullest GPU: {f['memory']} of {f['gpu_memory'] / 1e9:.1f} GB", memory, 1e9, "GB"),
        (f"a training step, {f['step_seconds']}: the sum of its parts", step, 1, "s"),
        (f"a decoding step, {f['decode_estimate_time']}: work next to links", decode, 1e-3, "ms"),
    )
    figure = Figure(figsize=(13, 2.6), layout="constrained")
    for axis, (title, parts, scale, unit) in zip(figure.subplots(1, 3), panels, strict=True):
        colours = ["#c9ccd1" if name == "free" else "#1f6f9f" for name in parts]
        bars = axis.barh(list(parts), [float(part) / scale for part in parts.values()], color=colours)
        axis.bar_label(bars, fmt="%.3g", padding=4)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel=unit, xlim=(0, 1.15 * max(map(float, parts.values())) / scale))
        axis.invert_yaxis()
    return figure


if __name__ == "__main__":
    for name, draw in (("caches", draw_caches), ("masks", draw_masks), ("plan", draw_plan)):
        draw().savefig(FOLDER / f"{name}.png", dpi=110)
        print(FOLDER / f"{name}.png")
