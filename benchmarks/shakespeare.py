"""What does a minute and a half of training buy, next to nanoGPT's laptop recipe?

    python -m benchmarks.shakespeare tinyshakespeare.txt [--seeds 3] [--sprint-steps 200]

The text is Karpathy's tinyshakespeare (1,115,394 characters). For each seed three commands take turns on this machine:
    peer     nanoGPT's laptop recipe (4 layers, 4 heads, width 128, context 64, 12 sequences a step, 2000 steps) on
             transformers' GPT-2, in FP32, evaluated over the whole held-out tenth
    sprint   python -m dsmini.train configs/shakespeare.toml with so few steps that it ends in a quarter of the time
    run      the same with all its steps
Reported are wall-clock seconds of each whole command, imports, set-up and final validation included, and the loss over
the whole held-out tenth in nats a character, at context 64 as the peer has it and at the training context.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).parent.parent
STEPS, CONTEXT, ROWS = 2000, 64, 12


def peer(text: Path, seed: int) -> float:
    """Train the peer; its loss over the held-out tenth."""
    from transformers import GPT2Config, GPT2LMHeadModel

    characters = sorted(set(text.read_text()))
    ids = torch.tensor([characters.index(c) for c in text.read_text()])
    cut = int(0.9 * len(ids))
    train, held_out = ids[:cut], ids[cut:]
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(characters), "n_positions": CONTEXT, "n_embd": 128, "n_layer": 4, "n_head": 4}
    model = GPT2LMHeadModel(
        GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0)
    )
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())

    for step in range(STEPS):
        cosine = 1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) / 101 if step < 100 else cosine
        windows = torch.stack([train[i : i + CONTEXT + 1] for i in torch.randint(len(train) - CONTEXT, (ROWS,))])
        loss(windows[:, :-1], windows[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    n = (len(held_out) - 1) // CONTEXT
    x, y = held_out[: n * CONTEXT].view(n, -1), held_out[1 : n * CONTEXT + 1].view(n, -1)
    with torch.inference_mode():
        return sum(loss(a, b).item() * len(a) for a, b in zip(x.split(256), y.split(256), strict=True)) / n


def command(arguments: list[str]) -> tuple[float, dict[str, Any]]:
    """Run a command of this checkout; its seconds, and the JSON of its last line."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr)
    return seconds, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="tinyshakespeare.txt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sprint-steps", type=int, default=200)
    parser.add_argument("--peer-seed", type=int, help=argparse.SUPPRESS)  # how this file runs the peer
    options, more = parser.parse_known_args()
    text = options.text.resolve()
    if options.peer_seed is not None:
        print(json.dumps({"loss": peer(text, options.peer_seed)}))
        return
    console = Console(stderr=True)
    results: dict[str, list[tuple[float, float, float | None]]] = {"peer": [], "sprint": [], "run": []}

    def record(name: str, seed: int, seconds: float, loss: float, own: float | None) -> None:
        results[name].append((seconds, loss, own))
        console.print(f"seed {seed}  {name:6}  {seconds:6.1f} s  {loss:.4f}", highlight=False)

    ours = ["dsmini.train", "configs/shakespeare.toml", "--data.path", str(text), "--json", *more]
    with tempfile.TemporaryDirectory() as runs:
        for seed in range(options.seeds):
            seconds, answer = command(["benchmarks.shakespeare", str(text), "--peer-seed", str(seed)])
            record("peer", seed, seconds, answer["loss"], None)
            for name, steps in (("sprint", ["--train.steps", str(options.sprint_steps)]), ("run", [])):
                where = ["--out", f"{runs}/{name}-{seed}", "--train.seed", str(seed), "--train.sample-tokens", "0"]
                seconds, answer = command([*ours, *where, *steps])
                record(name, seed, seconds, answer["val_loss_at_eval_context"], answer["val_loss"])
    rows = []
    table = Table("", "seconds", "loss at context 64", "each seed", "at the training context")
    for name, of_seed in results.items():
        seconds, losses = statistics.median(s for s, _, _ in of_seed), [loss for _, loss, _ in of_seed]
        own = [loss for _, _, loss in of_seed if loss is not None]
        row = {"name": name, "seconds": [s for s, _, _ in of_seed], "loss_64": losses, "loss_own": own}
        rows.append(row)
        each = " ".join(f"{loss:.3f}" for loss in losses)
        table.add_row(
            name, f"{seconds:.1f}", f"{statistics.mean(losses):.4f}", each, f"{statistics.mean(own):.4f}" if own else ""
        )
    console.print(table)
    print(json.dumps({"benchmark": "shakespeare", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
