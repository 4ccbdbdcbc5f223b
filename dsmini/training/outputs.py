"""The end of a finished run: its figures, a sample, and a prompt to continue with."""

import math
import shlex
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsmini import accounting
from dsmini.checkpoint.run_folder import run_tokenizer
from dsmini.console.messages import printable, say
from dsmini.inference.generation import Generation
from dsmini.inference.sampling import Sampling
from dsmini.machine import DTYPES, peak_memory
from dsmini.sources import own_sources
from dsmini.training.run import TrainingRun

TEMPERATURE = 0.8


def summarise(run: TrainingRun) -> dict[str, Any]:
    """Return the figures of the whole run."""
    config, trainer, model = run.config, run.trainer, run.trainer.model.config
    history, last = run.history, run.history.records[-1]
    train, itemsize = config.train, DTYPES[config.train.dtype].itemsize
    parameters = accounting.parameters(model)
    tokens = sum(row["tokens"] for row in history.records)  # not those of steps that a rewind took back
    rate = tokens / history.seconds
    flops = accounting.flops_per_token(model, config.seq_len, training=True, dsa_stage=train.dsa_stage).total
    dtype_name = "float32" if itemsize == 4 else "bfloat16"
    cache = accounting.kv_bytes_per_token(model, dtype_name)
    mha_cache = accounting.mha_kv_bytes_per_token(model, dtype_name)
    vio = [row["max_vio"] for row in history.recent() if row["max_vio"] is not None]
    validated = [(row["val_loss"], row["step"]) for row in history.records if row["val_loss"] is not None]
    best_val_loss, best_val_step = min(validated, default=(None, None))
    nats = last["val_loss"]
    return {
        "run": str(run.folder),
        "steps": trainer.steps_done,
        "loss": last["loss"],
        "val_loss": nats,
        "val_bits_per_byte": None if nats is None else nats / math.log(2) / trainer.corpus.bytes_per_token,
        "val_loss_ema": last.get("val_loss_ema"),
        "val_loss_at_eval_context": last.get("val_loss_at_eval_context"),
        "eval_context": train.eval_context,
        "best_val_loss": best_val_loss,
        "best_val_step": best_val_step,
        "val_tokens": trainer.final_windows().tokens,
        "held_out_tokens": trainer.corpus.windows(config.seq_len).tokens,
        "seq_len": config.seq_len,
        "tokens": tokens,
        "train_seconds": history.seconds,
        "tokens_per_s": rate,
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        "flops_per_s": flops * rate,
        "dtype": train.dtype,
        "device": train.device,
        "threads": torch.get_num_threads(),
        "peak_memory": peak_memory(trainer.device),
        "cache_bytes_per_token": cache,
        "cache_fixed_bytes": accounting.fixed_cache_bytes(model, dtype_name),
        "mha_cache_bytes_per_token": mha_cache,
        "cache_saved": 1 - cache / mha_cache,
        "max_vio": sum(vio) / len(vio) if vio else None,
        "skipped": sum(row["skipped"] for row in history.records),
        "corpus_sha256": trainer.corpus.sha256,
        "sources": own_sources(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Print the figures of a finished run as a table."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in summary_lines(summary):
        table.add_row(name, Text(value))
    console.print(table)


LINES = (
    ("validation", "val_loss", "{val_loss:.4f} nats, {val_bits_per_byte:.4f} bits a byte ({where} of {seq_len})"),
    ("at context", "val_loss_at_eval_context", "{val_loss_at_eval_context:.4f} nats in windows of {eval_context}"),
    ("average", "val_loss_ema", "{val_loss_ema:.4f} nats with the parameters' average over the steps"),
    ("parameters", "parameters", "{parameters:,}, of which {active_parameters:,} are active for a token"),
    ("training", "tokens", "{tokens:,} tokens in {train_seconds:.0f} s: {tokens_per_s:,.0f} tokens/s"),
    ("speed", "speed", "{speed:.1f} GFLOP/s in {dtype}"),
    ("memory", "memory", "{memory:,.0f} MiB at the peak"),
    (
        "cache",
        "cache_saved",
        "{cache}; {mha_cache_bytes_per_token:,} with the same heads as MHA, {cache_saved:.1%} less",
    ),
    ("balance", "max_vio", "MaxVio {max_vio:.2f}, mean over the layers and the last tenth of the steps"),
    ("skipped", "skipped", "{skipped} steps, for a gradient that was not finite"),
)
"""Names of the lines, the figure without which there is no such line, and the words."""


def summary_lines(s: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a summary's figures in words."""
    where = "{val_tokens:,} held-out tokens: all whole windows"
    if s["val_tokens"] < s["held_out_tokens"]:
        where = "{val_tokens:,} of {held_out_tokens:,} held-out tokens, in windows"
    cache = "{cache_bytes_per_token:,} bytes a token in {dtype}"
    if s["cache_fixed_bytes"]:
        cache = "{cache_bytes_per_token:,} bytes a token, and {cache_fixed_bytes:,} of each sequence, in {dtype}"
    said = s | {"where": where.format_map(s), "cache": cache.format_map(s), "skipped": s["skipped"] or None}
    said |= {"speed": s["flops_per_s"] / 1e9, "memory": s["peak_memory"] / 2**20}
    return [(name, words.format_map(said)) for name, key, words in LINES if said[key] is not None]


def write_sample(run: TrainingRun) -> str:
    """Let a trained model continue train.sample_prompt; return the whole text, "" if none is wanted or possible.

    On the screen control characters are pictures. The text that is returned has them as they are.
    """
    train, console = run.config.train, run.console
    if not train.sample_tokens:
        return ""
    tokenizer = run_tokenizer(run.folder, run.config)
    decoder, text = tokenizer.stream(), train.sample_prompt
    try:
        generation = Generation(
            run.whole_model().eval(),
            [tokenizer.encode(text).tolist()],
            train.sample_tokens,
            sampling=Sampling(temperature=TEMPERATURE),
            generator=torch.Generator().manual_seed(train.seed),
            slide=True,
        )
    except ValueError as error:  # of a model that may not be gathered, or of a prompt
        say(console, f"no sample: {error}")
        return ""
    console.rule(f"a sample at temperature {TEMPERATURE}")
    console.out(printable(text), end="", highlight=False)
    try:
        for (tokens,) in generation:
            piece = decoder.decode(tokens)
            console.out(printable(piece), end="", highlight=False)
            text += piece
    except ValueError as error:  # a model whose training failed has no finite logits
        say(console, f"no sample: {error}")
    finally:
        console.print()
        console.rule()
    return text + decoder.decode([], final=True)


def next_command(run: TrainingRun) -> str:
    """Return the command that fits after a finished run, as a shell takes it.

    A loss that is not finite wants a diagnosis. After the warm-up of indexers comes the sparse stage. Any other run
    writes, that of the default text a function.
    """
    folder = shlex.quote(str(run.folder))
    if run.history.records[-1]["loss"] is None:
        return f"python -m dsmini.diagnose {folder}"
    if run.config.train.dsa_stage == "warmup":
        return f"python -m dsmini.train --init {folder}"
    prompt = " --prompt 'def '" if run.config.data.path is None else ""
    return f"python -m dsmini.generate {folder}{prompt}"
