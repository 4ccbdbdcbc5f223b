"""How fast does a model decode and read a prompt, next to transformers' DeepSeek-V3 of the same shape?

    python -m benchmarks.decode [--contexts 128 2048 8192] [--prompt 512] [--rounds 3]

Both hold the same shape with random weights in BF16 (455M parameters, 103M active for a token) and no kernels of their
own. At each context single tokens are decoded from a filled cache; the two take turns, six tokens each, so that a busy
neighbour slows both. Reported are medians over the tokens of all rounds but each turn's first, and their ratios; the
cache's bytes a token are read off the storage. (transformers 5.24 keeps MLA's latent too, and expands all of it at
every step.)
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.transformers_model import deepseek_v3
from dsmini import ModelConfig, Transformer

SHAPE = ModelConfig(
    vocab_size=32000,
    dim=1024,
    inter_dim=2816,
    moe_inter_dim=256,
    n_layers=8,
    n_dense_layers=1,
    n_heads=16,
    q_lora_rank=384,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=64,
    n_activated_experts=6,
    n_expert_groups=8,
    n_limited_groups=4,
    n_mtp_layers=0,
    max_seq_len=32768,
)
TURN = 6
"""Tokens that one side decodes before it is the other's turn."""
CHUNK = 512


class Ours:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Transformer(SHAPE).to(torch.bfloat16).eval()

    def start(self, room: int) -> None:
        self.cache = self.model.new_cache(1, room)

    def feed(self, tokens: Tensor) -> None:
        self.model(tokens, self.cache)

    def bytes_per_token(self) -> float:
        return self.cache.nbytes_per_token


class Theirs:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = deepseek_v3(SHAPE).to(torch.bfloat16).eval()

    def start(self, room: int) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    def feed(self, tokens: Tensor) -> None:
        self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True)

    def bytes_per_token(self) -> float:
        held = [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in held) / held[0].shape[-2]


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def random_tokens(n: int) -> Tensor:
    return torch.randint(0, SHAPE.vocab_size, (1, n))


def fill(side: Any, context: int, room: int) -> None:
    side.start(context + room)
    for at in range(0, context, CHUNK):
        side.feed(random_tokens(min(CHUNK, context - at)))


def prefill(side: Any, prompt: int) -> float:
    side.start(prompt)
    return seconds(lambda: side.feed(random_tokens(prompt)))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048, 8192], help="tokens in the cache")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that is read at once")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    console = Console(stderr=True)
    sides = {"dsmini": Ours(), "transformers": Theirs()}
    rows: list[dict[str, Any]] = []
    for context in options.contexts:
        times: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            fill(side, context, options.rounds * TURN)
        for _ in track(range(options.rounds), f"decoding at {context}", console=console):
            for name, side in sides.items():
                times[name] += [seconds(lambda side=side: side.feed(random_tokens(1))) for _ in range(TURN)][1:]
        rates = {name: 1 / statistics.median(of) for name, of in times.items()}
        held = {name: side.bytes_per_token() for name, side in sides.items()}
        rows.append({"what": f"decode at {context}", **rates, "cache_bytes_per_token": held})
    times = {name: [] for name in sides}
    for _ in track(range(options.rounds + 1), f"reading {options.prompt} tokens", console=console):
        for name, side in sides.items():
            times[name].append(prefill(side, options.prompt))
    rows.append(
        {
            "what": f"prefill of {options.prompt}",
            **{n: options.prompt / statistics.median(t[1:]) for n, t in times.items()},
        }
    )
    show(console, rows)
    print(
        json.dumps(
            {"benchmark": "decode", "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        )
    )


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table("tokens/s", "dsmini", "transformers", "ratio", "cache bytes a token")
    for row in rows:
        held = row.get("cache_bytes_per_token", {})
        each = " / ".join(f"{held[name]:,.0f}" for name in ("dsmini", "transformers")) if held else ""
        ratio = row["dsmini"] / row["transformers"]
        table.add_row(row["what"], f"{row['dsmini']:,.1f}", f"{row['transformers']:,.1f}", f"{ratio:.2f} x", each)
    console.print(table)


if __name__ == "__main__":
    main()
