"""Vectors to test an engine by: tiny models, and all tensors that the plain equations of nn/ make of their inputs.

check_vectors.py compares an engine's tensors with them, and needs nothing of dsmini. docs/vectors.md has the names.
"""

import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from dsmini import ops
from dsmini.atomic import write_json
from dsmini.checkpoint.load import parts_of
from dsmini.checkpoint.save import save_pretrained
from dsmini.config import ModelConfig
from dsmini.machine import on_threads
from dsmini.nn import Transformer
from dsmini.nn.dsa import hadamard
from dsmini.nn.gate import Routing
from dsmini.nn.hyper_connections import Mix

HERE = Path(__file__).parent
DATA: dict[str, Any] = tomllib.loads((HERE / "vectors.toml").read_text(encoding="utf-8"))
GENERATIONS = tuple(DATA["prompts"])
SEED = 2412
VALUES, GRADIENTS = 1e-5, 1e-4
"""Tolerances, as shares of the norm of a row. FP32 in another order of summation stays well within them."""
NEW = 8
"""Number of tokens by which each prompt is continued."""
PARTS = ("attn_norm", "attn.q_norm", "attn", "ffn_norm", "ffn.gate", "ffn", "hc_attn", "hc_ffn")
"""Modules of a block whose results are recorded."""
METHODS = {"hc_attn": "read", "hc_ffn": "read", "hc_head": "collapse"}
"""Methods of modules that are recorded, where that is not forward."""


def write(folder: Path, name: str) -> int:
    """Write the folder of a generation, and return its size in bytes."""
    model, inputs = drawn(config_of(name)), inputs_of(name)
    save_pretrained(model, folder)
    expected = computed(model, **inputs)
    (folder / "inputs.safetensors").write_bytes(save(inputs))
    (folder / "expected.safetensors").write_bytes(save(expected))
    tensors = [
        {"name": key, "shape": list(value.shape), "tolerance": tolerance_of(key, value), "is": meaning_of(key)}
        for key, value in expected.items()
    ]
    write_json(folder / "index.json", {"generation": name, "torch": torch.__version__, "tensors": tensors})
    shutil.copyfile(HERE / "check_vectors.py", folder / "check.py")
    return sum(file.stat().st_size for file in folder.iterdir())


def config_of(name: str) -> ModelConfig:
    """Return the config of a generation's tiny model."""
    read: dict[str, Any] = DATA["config"]["common"] | DATA["config"][name]
    sizes: dict[str, Any] = {key: tuple(size) if isinstance(size, list) else size for key, size in read.items()}
    return ModelConfig(**sizes)


def inputs_of(name: str) -> dict[str, Tensor]:
    """Return tokens [1, s] with targets, and prompts [2, p], padded with 0 on the right, with their lengths."""
    generator, lengths = torch.Generator().manual_seed(SEED), torch.tensor(DATA["prompts"][name])
    ids = torch.randint(config_of(name).vocab_size, (3, int(lengths.max()) + 1), generator=generator)
    prompts = ids[1:, :-1] * (torch.arange(ids.shape[1] - 1) < lengths[:, None])
    return {"tokens": ids[:1, :-1].clone(), "targets": ids[:1, 1:].clone(), "prompts": prompts, "lengths": lengths}


def tolerance_of(name: str, value: Tensor) -> float:
    """Return the largest error that a row of an engine's may have, as a share of its norm; 0 for whole numbers."""
    return (GRADIENTS if name.startswith("grad.") else VALUES) if value.is_floating_point() else 0.0


def meaning_of(name: str) -> str:
    """Return what a tensor is."""
    ends = [end for end in DATA["meaning"] if f".{name}".endswith(f".{end}") or name.startswith(f"{end}.")]
    return DATA["meaning"][max(ends, key=len, default="block")]


def drawn(config: ModelConfig) -> Transformer:
    """Return a random model without norms of ones, biases of zeros and tables of zeros: every part matters."""
    generator, model = torch.Generator().manual_seed(SEED), Transformer(config)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("tid2eid"):
                rows = torch.rand(len(value), config.n_routed_experts, generator=generator)
                value.copy_(rows.argsort(-1)[:, : value.shape[1]])
            elif name.endswith("gate.bias"):
                value.uniform_(-0.9, 0.1, generator=generator)
            elif "norm" in name:
                value.uniform_(0.5, 1.5, generator=generator)
            else:
                free = value.dim() == 1 or name.startswith("embed.") or name.endswith(".ape")
                value.normal_(std=1.0 if free else value.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def computed(
    model: Transformer, tokens: Tensor, targets: Tensor, prompts: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    """Return what the plain equations of nn/ make of the inputs, by name, in the order of computation.

    The result of a module has the module's name.
    """
    with ops.use("reference"), on_threads(1):  # the bits do not depend on the number of cores
        with torch.no_grad(), recorded(model, cached_rows(model, tokens)) as out:
            run = model.run(tokens, mtp=bool(len(model.mtp)))
        out["logits"] = run.logits
        out.update({f"mtp.{k}.logits": logits for k, logits in enumerate(run.mtp_logits)})
        out["loss"] = model.losses(tokens, targets).main
        model.zero_grad()
        out["loss"].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for part in [part for part in parts_of(model) if part.ours in gradients][::-1]:
            whole = gradients[part.ours]
            out[f"grad.{part.name}"] = whole if part.expert is None else whole[part.expert]
        out.update(continued(model, prompts, lengths))
    return {name: value.detach().clone().contiguous() for name, value in out.items()}


@contextmanager
def recorded(model: Transformer, cached: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that gets what modules of a model return meanwhile, and before each attention what it caches."""
    blocks = [f"layers.{i}" for i in range(len(model.layers))]
    wanted = {f"{block}.{part}" for block in blocks for part in PARTS} | {"embed", "hc_head", "norm", *blocks}
    wanted |= {f"mtp.{k}.block" for k in range(len(model.mtp))}
    out: dict[str, Tensor] = {}
    topk_keys, chosen = ops.find("topk_keys"), list[Tensor]()
    plain = topk_keys.reference

    def note(name: str, result: Any) -> Any:
        if name.endswith(".attn"):
            out.update({key: rows for key, rows in cached.items() if key.startswith(f"{name}.")})
            if chosen:  # some queries at a time
                most = max(part.shape[-1] for part in chosen)
                parts = [F.pad(part, (0, most - part.shape[-1]), value=-1) for part in chosen]
                out[f"{name}.topk"] = rising(torch.cat(parts, 1))
                chosen.clear()
        if name not in out:  # the embedding is asked again, by multi-token prediction
            out.update(tensors_of(name, result))
        return result

    # a module without parameters is the residual of one stream
    modules = [(name, m) for name, m in model.named_modules() if name in wanted and any(True for _ in m.parameters())]
    calls = [(name, module, METHODS.get(name.rpartition(".")[2], "forward")) for name, module in modules]
    for name, module, method in calls:
        real = getattr(module, method)
        setattr(module, method, lambda *args, name=name, real=real: note(name, real(*args)))
    topk_keys.reference = lambda *args: (chosen.append(plain(*args)), chosen[-1])[1]
    try:
        yield out
    finally:
        topk_keys.reference = plain
        for _, module, method in calls:
            delattr(module, method)


def tensors_of(name: str, result: Any) -> dict[str, Tensor]:
    """Return the tensors in what a module returned for one sequence, with their names."""
    if isinstance(result, Routing):
        weights = torch.zeros_like(result.scores).scatter(1, result.indices, result.weights)
        parts = {"scores": result.scores, "experts": rising(result.indices), "weights": weights}
        return {f"{name}.{part}": value[None] for part, value in parts.items()}
    if isinstance(result, tuple) and isinstance(result[1], Mix):
        parts = {"read": result[0], "post": result[1].post, "comb": result[1].comb}
        return {f"{name}.{part}": value for part, value in parts.items() if value is not None}
    return {name: result[0] if isinstance(result, tuple) else result}


def rising(indices: Tensor) -> Tensor:
    """Return whole numbers in rising order along the last dimension, those below 0 last, as int32."""
    last = 1 << 30
    rows = indices.where(indices >= 0, last).sort(-1).values
    return rows.where(rows < last, -1).int()


def cached_rows(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """Return what each attention caches of one sequence, by name."""
    c, s = model.config, tokens.shape[1]
    cache, out = model.new_cache(max_seq_len=s), dict[str, Tensor]()
    model(tokens, cache)
    for i, store in enumerate(cache.stores):
        rows, index, n = dict[str, Tensor](), store.index, s
        if hasattr(store, "window"):  # of V4
            latest = torch.arange(s - (c.window_size or 0), s)[None] % store.window.data.shape[1]
            rows["window"] = store.window.read_at(latest, torch.float32)
            if hasattr(store, "entries"):
                n = store.entries.data.shape[1]
                rows["entries"] = store.entries.read(n, torch.float32)
            index = index and index.entries
        else:
            rows["latent"], rows["k_rope"] = store.read(s, torch.float32).tensor_split((c.kv_lora_rank,), -1)
        if index is not None:
            rows["index_keys"] = hadamard(index.read(n, torch.float32))
        out.update({f"layers.{i}.attn.{part}": value for part, value in rows.items()})
    return out


def continued(model: Transformer, prompts: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Continue prompts greedily from a cache, and return the new tokens and the logits that chose them."""
    cache = model.new_cache(len(prompts), prompts.shape[1] + NEW)
    logits = [model(prompts, cache, lengths)[torch.arange(len(prompts)), lengths - 1]]
    while len(logits) < NEW:
        logits.append(model(logits[-1].argmax(-1, keepdim=True), cache)[:, 0])
    every = torch.stack(logits, 1)
    return {"decode.logits": every, "decode.tokens": every.argmax(-1).int()}
