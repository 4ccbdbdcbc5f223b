"""The changes that a run may make when it resumes (--resume), or a new run to the weights it starts from (--init)."""

import dataclasses
from typing import Any

from dsmini.config import ModelConfig, RunConfig
from dsmini.config.fields import plain

# --resume refuses a change of these and of every key of the model: it would not be the same run
SAME_RUN = (
    *("data.val_fraction", "data.fim_rate", "data.document_mask"),
    *("train.seed", "train.seq_len", "train.optimizer", "train.moments", "out"),
)
# these change how numbers are rounded or summed
ROUNDING = (
    *("train.threads", "train.device", "train.dtype", "train.recompute", "train.grad_accum", "train.compile"),
    *("parallel.pp", "parallel.dp", "parallel.ep", "parallel.nodes", "parallel.zero", "parallel.schedule"),
)
# these change neither the numbers nor the schedule: what is stored, shown and measured, and where the text and the
# tokenizer are (origin.py and start.py check that they are the same)
BESIDE = (
    *("data.path", "data.tokenizer", "data.workers"),
    *("train.max_skipped", "train.max_rewinds", "train.eval_every", "train.eval_tokens", "train.eval_context"),
    "train.final_eval_tokens",
    *("train.save_every", "train.save_in_background", "train.keep"),
    *("train.tensorboard", "train.diagnose"),
    *("train.sample_tokens", "train.sample_prompt", "parallel.timeout", "parallel.check_replicas"),
)
# --init: these decide which tensors a model has, and their shapes
SHAPES = (
    *("vocab_size", "dim", "inter_dim", "moe_inter_dim", "n_layers", "n_dense_layers", "n_heads", "attention"),
    *("n_kv_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("index_n_heads", "index_head_dim"),
    *("n_routed_experts", "n_shared_experts", "topk_method", "n_mtp_layers", "embed_norm", "qk_norm"),
)


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the keys that differ, such as train.lr, with the old and the new value."""
    before, after = _flat(old), _flat(new)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def check_resume(old: RunConfig, new: RunConfig) -> list[str]:
    """Return in lines what a resumed run does differently from here on; none for an unchanged config.

    Raises: ValueError naming every key that may not change, and why.
    """
    changed = differences(old, new)
    refused = [key for key in changed if key in SAME_RUN or key.startswith("model.")]
    # with and without these are different runs
    refused += [key for key in ("train.ema_decay", "data.tokenizer") if None in changed.get(key, ())]
    if refused:
        raise ValueError(
            f"a run cannot be resumed with another {_listed(refused, changed)}: its weights, data order or optimizer "
            f"state would not fit what it did before; leave that as it was, or start a new run from its weights with "
            f"--init {old.out}"
        )
    lines = [f"{key}: {plain(before)} -> {plain(after)}" for key, (before, after) in changed.items()]
    if rounding := [key for key in changed if key in ROUNDING]:
        lines.append(f"with another {', '.join(rounding)} the result is no longer bit-identical to an unstopped run's")
    if recipe := [key for key in changed if key not in ROUNDING and key not in BESIDE]:
        lines.append(f"with another {', '.join(recipe)} the schedule changes from here on")
    return lines


def check_init(old: ModelConfig, new: ModelConfig, source: str) -> None:
    """Refuse a model that the weights of another do not fit, by its keys."""
    changed = {key: (getattr(old, key), getattr(new, key)) for key in SHAPES if getattr(old, key) != getattr(new, key)}
    if changed:
        got = ", ".join(f"model.{key}={plain(n)} (there {plain(o)})" for key, (o, n) in changed.items())
        raise ValueError(
            f"the weights of {source} do not fit {got}; leave out what changes shapes. The context may change: "
            "max_seq_len, original_seq_len, rope_theta, rope_factor, beta_fast, beta_slow, mscale, mscale_all_dim"
        )


def _flat(config: RunConfig) -> dict[str, Any]:
    sections = dataclasses.asdict(config)
    out = sections.pop("out")
    return {"out": out} | {f"{part}.{key}": value for part, keys in sections.items() for key, value in keys.items()}


def _listed(keys: list[str], changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} ({plain(changed[key][0])} -> {plain(changed[key][1])})" for key in keys)
