"""Small models with fixed weights: logits by every way of computing them, and generated tokens."""

import hashlib
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import dsmini
from tests.golden.runs import HERE, hash_tensors, raw

SIZES: dict[str, dict[str, Any]] = tomllib.loads((HERE / "configs/models.toml").read_text())
MLA = SIZES["mla"]
MODELS = {"mla": MLA, "gqa": MLA | SIZES["gqa"], "v2": MLA | SIZES["v2"] | {"q_lora_rank": None}}


def model_of(name: str) -> dsmini.Transformer:
    """Build a model with the same weights on all machines: integers times a power of two times a square root."""
    model = dsmini.Transformer(dsmini.ModelConfig(**MODELS[name])).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, tensor in sorted(model.state_dict().items()):
            spread = torch.rand(tensor.shape, generator=generator) - 0.5
            if key.endswith("bias"):  # nonzero and mostly negative
                tensor.copy_(0.4 * spread - 0.1)
            elif tensor.dim() == 1:
                tensor.copy_(1 + spread)
            else:  # a variance of 1 / inputs; the logits then have one of about 1
                tensor.copy_(spread * (12 / tensor.shape[-1]) ** 0.5)
    return model


def tokens_of(rows: int, columns: int, vocab_size: int = MLA["vocab_size"]) -> Tensor:
    """Return tokens [rows, columns], the same on all machines."""
    return torch.randint(0, vocab_size, (rows, columns), generator=torch.Generator().manual_seed(11))


def measured(tensor: Tensor) -> dict[str, Any]:
    """Return the hash of a tensor, its largest magnitude, and 8 of its numbers evenly spread."""
    flat = tensor.detach().float().reshape(-1)
    at = torch.linspace(0, len(flat) - 1, 8, dtype=torch.float64).round().long()
    return {
        "sha256": hashlib.sha256(raw(tensor)).hexdigest(),
        "largest": flat.abs().max().item(),
        "floats": flat[at].tolist(),
    }


def uncached(name: str) -> Tensor:
    return model_of(name)(tokens_of(2, 70))


def cached(name: str, **options: Any) -> Tensor:
    """Feed 70 tokens in chunks of 33, 1, 1, 20 and 15 to a cache with these options."""
    model = model_of(name)
    cache = model.new_cache(batch_size=2, max_seq_len=96, **options)
    return torch.cat([model(part, cache=cache) for part in tokens_of(2, 70).split([33, 1, 1, 20, 15], 1)], 1)


def losses(name: str) -> Tensor:
    """Return main, MTP and balance loss, and the norm of every gradient, sorted by the name of its parameter."""
    model = model_of(name).train()
    tokens = tokens_of(2, 65)
    found = model.losses(tokens[:, :-1], tokens[:, 1:])
    found.total.backward()
    norms = [p.grad.norm() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return torch.stack([found.main, found.mtp, found.balance, found.total, *norms])


def product() -> Tensor:
    """Return an FP8 product and the gradients of its factors, one after the other."""
    x = ((tokens_of(40, 200) - 48) / 8).to(torch.bfloat16).requires_grad_()
    w = ((tokens_of(72, 200) - 48) / 7).requires_grad_()
    y = dsmini.fp8_matmul(dsmini.quantize(x), w)
    y.float().square().sum().backward()
    assert x.grad is not None and w.grad is not None
    return torch.cat([part.detach().float().flatten() for part in (y, x.grad, w.grad)])


LOGITS: dict[str, Callable[[], Tensor]] = {
    **{f"{name} uncached": lambda name=name: uncached(name) for name in MODELS},
    **{f"{name} cached in chunks": lambda name=name: cached(name) for name in MODELS},
    **{f"{name} losses": lambda name=name: losses(name) for name in MODELS},
    "mla bf16 cache": lambda: cached("mla", dtype=torch.bfloat16),
    "mla fp8 cache": lambda: cached("mla", dtype="fp8"),
    "fp8 product": product,
}
"""Function of each tensor by name; most tensors are logits."""


def written(name: str, **options: Any) -> list[list[int]]:
    """Continue prompts of 5 and 12 tokens by 64 and return the new tokens."""
    model, prompts = model_of(name), [tokens_of(1, 5)[0], tokens_of(1, 12)[0]]
    generator = torch.Generator().manual_seed(5)
    out = dsmini.generate(model, prompts, max_new_tokens=64, generator=generator, **options)
    rows = zip(out.tokens.tolist(), out.lengths.tolist(), prompts, strict=True)
    return [row[len(prompt) : length] for row, length, prompt in rows]


SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}
TOKENS: dict[str, Callable[[], list[list[int]]]] = {
    **{f"{name} sampled": lambda name=name: written(name, **SAMPLED) for name in MODELS},
    "mla sampled speculative": lambda: written("mla", speculative=True, **SAMPLED),
}
"""Function of each generation by name."""


def saved(fp8: bool) -> str:
    """Return the hash of the tensors of a published folder that save_pretrained writes."""
    with tempfile.TemporaryDirectory() as folder:
        dsmini.save_pretrained(model_of("mla"), Path(folder) / "model", fp8=fp8)
        files = sorted((Path(folder) / "model").glob("*.safetensors"))
        return hash_tensors({name: tensor for path in files for name, tensor in load_file(path).items()})


HASHES: dict[str, Callable[[], str]] = {
    "saved": lambda: saved(fp8=False),
    "saved in fp8": lambda: saved(fp8=True),
}
"""Function of each hash of tensors without rounded sums by name; their bits are the same on all machines."""
