"""The figures of a finished run."""

import time
from typing import Any

import torch

from dsmini import accounting
from dsmini.measure.machine import DTYPES, matmul_rate, peak_memory
from dsmini.training.report import bits
from dsmini.training.run import TrainingRun


def summarise(run: TrainingRun) -> dict[str, Any]:
    """The figures of the whole run. Measures this machine's matrix peak (a second)."""
    config, trainer, model = run.config, run.trainer, run.trainer.model.config
    device, dtype = trainer.device, DTYPES[config.train.dtype]
    parameters = accounting.parameters(model)
    tokens = trainer.sequences * config.seq_len
    rate = tokens / run.seconds
    flops = accounting.flops_per_token(model, config.seq_len, causal=True, training=True).total * rate
    peak = matmul_rate(device, dtype)
    val_loss = run.rows[-1]["val_loss"]
    cache = accounting.kv_bytes_per_token(model, dtype.itemsize)
    mha_cache = accounting.mha_kv_bytes_per_token(model, dtype.itemsize)
    vio = [row["max_vio"] for row in run.recent() if row["max_vio"] is not None]
    best_val_loss, best_val_step = run.best or (None, None)
    return {
        "run": str(run.folder),
        "steps": trainer.steps_done,
        "loss": run.rows[-1]["loss"],
        "val_loss": val_loss,
        "val_bits_per_byte": None if val_loss is None else bits(val_loss) / trainer.corpus.bytes_per_token,
        "val_loss_ema": run.rows[-1].get("val_loss_ema"),
        "val_loss_at_eval_context": run.rows[-1].get("val_loss_at_eval_context"),
        "eval_context": config.train.eval_context,
        "best_val_loss": best_val_loss,
        "best_val_step": best_val_step,
        "val_tokens": (len(trainer.corpus.val) - 1) // config.seq_len * config.seq_len,
        "seq_len": config.seq_len,
        "tokens": tokens,
        "train_seconds": run.seconds,
        "tokens_per_s": rate,
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        "flops_per_s": flops,
        "matrix_peak": peak,
        "peak_share": flops / peak,
        "dtype": config.train.dtype,
        "device": config.train.device,
        "threads": torch.get_num_threads(),
        "peak_memory": peak_memory(device),
        "cache_bytes_per_token": cache,
        "mha_cache_bytes_per_token": mha_cache,
        "cache_saved": 1 - cache / mha_cache,
        "max_vio": sum(vio) / len(vio) if vio else None,
        "skipped": run.skipped,
        "corpus_sha256": trainer.corpus.sha256,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
