"""Train nanoGPT's laptop recipe on transformers' GPT-2: python -m benchmarks.claims.nanogpt TEXT SEED STEPS THREADS

4 layers, 4 heads, width 128, context 64, 12 sequences a step, 2000 steps, in FP32. Training uses the characters of the
first nine tenths of a text. The command prints {"loss": ...}, nats a character over the whole last tenth.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS, CONTEXT, ROWS = 2000, 64, 12


def train(text: str, seed: int, steps: int = STEPS) -> float:
    """Train on the first nine tenths of a text and return the loss over the last tenth."""
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(c) for c in text])
    cut = int(0.9 * len(ids))
    train, held_out = ids[:cut], ids[cut:]
    torch.manual_seed(seed)
    model = _gpt2(len(characters))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())

    for step in range(steps):
        cosine = 1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * (step - 100) / (steps - 100)))
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


def _gpt2(vocab_size: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: Any = {"vocab_size": vocab_size, "n_positions": CONTEXT, "n_embd": 128, "n_layer": 4, "n_head": 4}
    return GPT2LMHeadModel(
        GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0)
    )


if __name__ == "__main__":
    path, seed, steps, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps({"loss": train(Path(path).read_text(), int(seed), int(steps))}))
