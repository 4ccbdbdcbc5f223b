"""llama.cpp and ik_llama.cpp, if some Python has them: our weights in a GGUF file, run in a process of its own."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from dsmini import ModelConfig, Transformer
from dsmini.nn import MLA, FeedForward, MoE

PACKAGES = {"llama.cpp": "llama_cpp", "ik_llama.cpp": "ik_llama_cpp"}
WORKER = Path(__file__).with_name("worker.py")
BF16_HEAD = "BF16 head"


@functools.cache
def engines(others: Sequence[Path]) -> dict[str, str]:
    """Return the Python that runs each engine, by its name: this one, or the first of the others that has it.

    Raises: ValueError for another Python that has none, and if gguf is missing here, which writes the file.
    """
    if not find_spec("gguf"):
        if others:
            raise ValueError("--peer-python needs gguf in this Python, to write the file: pip install gguf")
        return {}
    found = {name: sys.executable for name, package in PACKAGES.items() if find_spec(package)}
    code = f"from importlib.util import find_spec; print(*filter(find_spec, {[*PACKAGES.values()]}))"
    for python in map(str, others):
        how: dict[str, Any] = {"env": _environment(python), "capture_output": True, "text": True, "timeout": 60}
        try:
            has = subprocess.run([python, "-c", code], check=True, **how).stdout.split()
        except (OSError, subprocess.SubprocessError) as error:
            raise ValueError(f"--peer-python {python} cannot be run: {error}") from None
        if not has:
            wanted = "llama-cpp-python or ik-llama-cpp-python"
            raise ValueError(f"--peer-python {python} has no engine; install {wanted} there, or name another Python")
        found = {name: python for name, package in PACKAGES.items() if package in has} | found
    return found


def _environment(python: str) -> dict[str, str]:
    """Return the environment for a Python: PYTHONPATH is meant for this one."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or python == sys.executable}


class Engine:
    """A model of ours that an engine runs.

    Args:
        kind: type of the matrices: see write_gguf.
        room: tokens that the cache has room for.
        at_once: tokens of a prompt that are read together.
    """

    def __init__(self, name: str, python: str, model: Transformer, kind: str, room: int, at_once: int) -> None:
        self.name = name
        sizes = map(str, (room, at_once, torch.get_num_threads()))
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, kind)
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said, "text": True}
            command = [python, str(WORKER), PACKAGES[name], str(path), *sizes]
            self.process = subprocess.Popen(command, env=_environment(python), **pipes)
            if self._answer() != "ready":
                said.seek(0)
                last = [line for line in said.read().splitlines() if line.strip()][-1:]
                raise RuntimeError(f"{name} does not run: {''.join(last) or 'it ended'}")

    def __del__(self) -> None:
        process = getattr(self, "process", None)
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()

    def fill(self, tokens: Tensor, room: int) -> None:
        self.start(room)
        self.feed(tokens)

    def start(self, room: int) -> None:
        self._ask([])

    def feed(self, tokens: Tensor) -> float:
        return self._ask(tokens[0].tolist())

    def _ask(self, tokens: list[int]) -> float:
        assert self.process.stdin is not None
        try:
            print(json.dumps(tokens), file=self.process.stdin, flush=True)
            return float(self._answer())
        except (OSError, ValueError):
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}") from None

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


# --- the file of weights

ARCHITECTURE = "deepseek2"


def write_gguf(model: Transformer, path: Path, kind: str = "BF16") -> None:
    """Write a model with MLA, compressed queries and V3's routing as a GGUF file without a tokenizer.

    Args:
        kind: type of the matrices, BF16, F32 or Q8_0; "Q8_0, BF16 head": of all but the head. Norms and gates are FP32.
            Q8_0 needs rows of whole blocks of 32 numbers; other matrices are BF16.
    """
    import gguf  # pyright: ignore[reportMissingImports]

    c = model.config
    assert c.attention == "mla" and c.q_lora_rank is not None and c.topk_method == "noaux_tc" and not c.extended
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _describe(writer, c)
    types = gguf.GGMLQuantizationType
    matrix, _, but = kind.partition(", ")

    def put(name: str, t: Tensor, exact: bool = False) -> None:
        type_ = types.F32 if exact or t.dim() == 1 else types[matrix]
        if type_ == types.Q8_0 and (t.shape[-1] % 32 or (but == BF16_HEAD and name == "output.weight")):
            type_ = types.BF16
        values = t.detach().float().cpu().contiguous().numpy()
        writer.add_tensor(name, gguf.quants.quantize(values, type_), raw_dtype=type_)

    put("token_embd.weight", model.embed.weight)
    put("output_norm.weight", model.norm.weight)
    put("output.weight", model.head.weight)
    for i, block in enumerate(model.layers):
        for name, t in _block(block):
            put(f"blk.{i}.{name}", t, exact="ffn_gate_inp" in name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(w: Any, c: ModelConfig) -> None:
    import gguf  # pyright: ignore[reportMissingImports]

    values = {
        **{"vocab_size": c.vocab_size, "tokenizer_model": "none", "block_count": c.n_layers},
        **{"context_length": c.max_seq_len, "embedding_length": c.dim, "layer_norm_rms_eps": c.norm_eps},
        **{"rope_freq_base": c.rope_theta, "rope_dimension_count": c.qk_rope_head_dim},
        **{"head_count": c.n_heads, "head_count_kv": 1},  # all heads share the latent
        **{"q_lora_rank": c.q_lora_rank, "kv_lora_rank": c.kv_lora_rank},
        **{"key_length": c.kv_lora_rank + c.qk_rope_head_dim, "value_length": c.kv_lora_rank},
        **{"key_length_mla": c.qk_head_dim, "value_length_mla": c.v_head_dim},
        **{"feed_forward_length": c.inter_dim, "leading_dense_block_count": c.n_dense_layers},
        **{"expert_feed_forward_length": c.moe_inter_dim, "expert_count": c.n_routed_experts},
        **{"expert_used_count": c.n_activated_experts, "expert_shared_count": c.n_shared_experts},
        **{"expert_weights_scale": c.route_scale, "expert_weights_norm": c.norm_topk_prob},
        **{"expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID},
    }
    for name, value in values.items():
        getattr(w, f"add_{name}")(value)
    w.add_uint32(f"{ARCHITECTURE}.expert_group_count", c.n_expert_groups)
    w.add_uint32(f"{ARCHITECTURE}.expert_group_used_count", c.n_limited_groups)


def _block(block: Any) -> list[tuple[str, Tensor]]:
    a, f = block.attn, block.ffn
    assert isinstance(a, MLA) and a.wq_a is not None and a.q_norm is not None and a.wq_b is not None
    w_uk, w_uv = a.absorbed_halves(a.wkv_b.weight.dtype)
    tensors = [
        ("attn_norm.weight", block.attn_norm.weight),
        ("attn_q_a.weight", a.wq_a.weight),
        ("attn_q_a_norm.weight", a.q_norm.weight),
        ("attn_q_b.weight", a.wq_b.weight),
        ("attn_kv_a_mqa.weight", a.wkv_a.weight),
        ("attn_kv_a_norm.weight", a.kv_norm.weight),
        ("attn_k_b.weight", rearrange(w_uk, "h n c -> h c n")),
        ("attn_v_b.weight", rearrange(w_uv, "h c v -> h v c")),
        ("attn_output.weight", a.wo.weight),
        ("ffn_norm.weight", block.ffn_norm.weight),
    ]
    if isinstance(f, FeedForward):
        return tensors + _feed_forward(f, "")
    assert isinstance(f, MoE)
    tensors += [("ffn_gate_inp.weight", f.gate.weight), ("exp_probs_b.bias", f.gate.bias)]
    tensors += _feed_forward(f.experts, "_exps")
    return tensors + (_feed_forward(f.shared_experts, "_shexp") if f.shared_experts is not None else [])


def _feed_forward(f: Any, ending: str) -> list[tuple[str, Tensor]]:
    names = {"gate": f.w1, "down": f.w2, "up": f.w3}
    return [(f"ffn_{name}{ending}.weight", getattr(w, "weight", w)) for name, w in names.items()]
