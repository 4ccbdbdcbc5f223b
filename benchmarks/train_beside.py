"""How fast does a model train, next to transformers' DeepSeek-V3 of the same shape?

    python -m benchmarks.train [--compiled] [--rounds 7]

Both train the same toy (7.6M parameters, 16 sequences of 256 bytes a step, AdamW) on this machine in FP32 and BF16.
dsmini's step is the one that python -m dsmini.train takes: batch from the corpus, losses, clipping, AdamW, routing
bias. transformers' step is forward, backward and fused AdamW, under autocast for BF16. The steps of all variants take
turns, so that a busy neighbour slows all of them; reported are the median and the best, and the median's ratio to
transformers' in the same dtype. A step's FLOPs, the same count for all, over its time and over the rate of a large
matrix product give the share of this machine's peak. The first step of a compiled variant includes the compiling.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import dsmini
from benchmarks.transformers_model import deepseek_v3
from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.data import load_corpus
from dsmini.machine import matmul_rate
from dsmini.trainer import Trainer

SHAPE = ModelConfig(
    dim=256,
    inter_dim=704,
    moe_inter_dim=96,
    n_layers=6,
    n_dense_layers=1,
    n_heads=4,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_mtp_layers=0,
    max_seq_len=256,
)
BATCH = 16
Step = Callable[[], object]


def dsmini_step(dtype: torch.dtype, compiled: bool) -> Step:
    """A training step of ours."""
    torch.manual_seed(0)
    train = TrainConfig(batch_size=BATCH, steps=1000, compile=compiled, dtype=str(dtype).removeprefix("torch."))  # pyright: ignore[reportArgumentType]
    config = RunConfig(model=SHAPE, train=train)
    corpus = load_corpus(config.data, config.seq_len, SHAPE.vocab_size, Path("runs/corpus"))
    model = Transformer(SHAPE, compute_dtype=dtype)
    return Trainer(model, corpus, config, torch.device("cpu")).step


def transformers_step(dtype: torch.dtype) -> Step:
    """A training step of transformers' DeepseekV3ForCausalLM."""
    torch.manual_seed(0)
    model = deepseek_v3(SHAPE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, SHAPE.vocab_size, (BATCH, SHAPE.max_seq_len))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each that are timed (default 7)")
    parser.add_argument("--compiled", action="store_true", help="also dsmini's step under torch.compile")
    options = parser.parse_args()
    f32, b16 = torch.float32, torch.bfloat16
    steps: dict[str, tuple[torch.dtype, Step]] = {
        "transformers float32": (f32, transformers_step(f32)),
        "dsmini float32": (f32, dsmini_step(f32, False)),
        "transformers bfloat16": (b16, transformers_step(b16)),
        "dsmini bfloat16": (b16, dsmini_step(b16, False)),
    }
    if options.compiled:
        steps |= {
            "dsmini float32 compiled": (f32, dsmini_step(f32, True)),
            "dsmini bfloat16 compiled": (b16, dsmini_step(b16, True)),
        }
    console = Console(stderr=True)
    first = {name: seconds(step) for name, (_, step) in track(steps.items(), "first steps", console=console)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(options.rounds), "rounds", console=console):
        for name, (_, step) in steps.items():
            times[name].append(seconds(step))
    peaks = {dtype: matmul_rate(torch.device("cpu"), dtype) for dtype in (f32, b16)}
    flops = dsmini.accounting.flops_per_token(SHAPE, SHAPE.max_seq_len, causal=True, training=True).total
    tokens = BATCH * SHAPE.max_seq_len
    rows = []
    for name, (dtype, _) in steps.items():
        rate = tokens / statistics.median(times[name])
        rows.append(
            {
                "variant": name,
                "tokens_per_s": rate,
                "best": tokens / min(times[name]),
                "first_step_s": first[name],
                "peak_share": flops * rate / peaks[dtype],
            }
        )
    show(console, rows)
    print(
        json.dumps(
            {
                "benchmark": "train",
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "peak_flops": {str(d): p for d, p in peaks.items()},
                "flops_per_token": flops,
                "rows": rows,
            }
        )
    )


def show(console: Console, rows: list[dict]) -> None:
    by_name = {row["variant"]: row for row in rows}
    table = Table("variant", "tokens/s", "best", "of the peak", "first step", "ratio")
    table.columns[0].no_wrap = True
    for row in rows:
        dtype = row["variant"].split()[1]
        base = by_name[f"transformers {dtype}"]["tokens_per_s"]
        table.add_row(
            row["variant"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['best']:,.0f}",
            f"{row['peak_share']:.0%}",
            f"{row['first_step_s']:.1f} s",
            f"{row['tokens_per_s'] / base:.2f} x",
        )
    console.print(table)


if __name__ == "__main__":
    main()
