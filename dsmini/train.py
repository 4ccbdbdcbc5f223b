"""python -m dsmini.train: train a model on a text and show what it learned."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from dsmini import accounting
from dsmini.checkpoint.manifest import write_text
from dsmini.checkpoint.run_folder import new_run_folder, sole_trainer
from dsmini.command import run
from dsmini.config import RunConfig
from dsmini.data import Corpus, load_corpus
from dsmini.generation import stream
from dsmini.machine import pick_device, pick_dtype
from dsmini.nn import Transformer
from dsmini.report import print_summary
from dsmini.start import begin, read_start
from dsmini.tokenizer import ByteTokenizer


@dataclass(frozen=True, kw_only=True)
class TrainCommand(RunConfig):
    """Train a DeepSeek-style transformer on a text, watch it, and read a sample of what it learned.

    Without arguments: a small model, the source code of Python's standard library, about five minutes on two cores.
    A config may come first: python -m dsmini.train configs/toy.toml --train.steps 200. Every field below can be set.
    """

    resume: Path | None = None
    """Go on with this run, such as runs/toy-001, from its last checkpoint. Its config holds; flags change it."""
    init: Path | None = None
    """Start a new run from the weights of this run or checkpoint, with its model and data, and the usual recipe."""
    json: bool = False
    """Print the final figures as a line of JSON, and all else to the standard error."""


def main(args: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    command, start = read_start(TrainCommand, args)
    console = Console(stderr=command.json)
    device = pick_device(start.config.train.device)
    if start.config.train.threads:
        torch.set_num_threads(start.config.train.threads)
    corpus = load_corpus(start.config.data, start.config.seq_len, start.config.model.vocab_size)
    config = _resolved(start.config, device, pick_dtype(start.config.train.dtype, device))
    out = start.resume or new_run_folder(config.out, start.name)
    config = dataclasses.replace(config, out=out)
    with sole_trainer(out):
        training = begin(start, config, corpus, device, console, _introduction(config, corpus))
        if not training.train():
            training.plot()
            _say(console, f"stopped after step {training.trainer.steps_done}; saved in {out}")
            _say(console, f"Go on with: python -m dsmini.train --resume {shlex.quote(str(out))}")
            return 130
        training.plot()
        summary = training.summarise()
        sample = _sample(console, training.trainer.model, config)
        write_text(out / "sample.txt", sample)
        training.finish(summary)
    print_summary(console, summary)
    _say(console, f"\nGo on with: python -m dsmini.generate {shlex.quote(str(out))} --prompt 'def '")
    if command.json:
        print(json.dumps({**summary, "sample": sample}))
    return 0


def _resolved(config: RunConfig, device: torch.device, dtype: torch.dtype) -> RunConfig:
    """The config with what was chosen for it: the device, dtype and threads in use."""
    path = config.data.path and config.data.path.resolve()
    train = dataclasses.replace(
        config.train, device=str(device), dtype=str(dtype).removeprefix("torch."), threads=torch.get_num_threads()
    )
    return dataclasses.replace(config, train=train, data=dataclasses.replace(config.data, path=path))


def _introduction(config: RunConfig, corpus: Corpus) -> list[str]:
    """What is going to happen, in lines."""
    parameters = accounting.parameters(config.model)
    left_out = f", {corpus.skipped} left out: empty or not text" if corpus.skipped else ""
    return [
        f"corpus  {corpus.source}, {corpus.files} files{left_out}",
        f"        {len(corpus.train):,} training tokens, {len(corpus.val):,} held out ({corpus.split})",
        f"        sha256 {corpus.sha256}",
        f"model   {parameters.total:,} parameters, {parameters.active:,} active for a token",
        f"run     {config.out}, {config.train.dtype} on {config.train.device}, threads: {config.train.threads}",
    ]


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _sample(console: Console, model: Transformer, config: RunConfig) -> str:
    """Let the trained model write, on the screen as it comes."""
    if not config.train.sample_tokens:
        return ""
    tokenizer = ByteTokenizer()
    decoder, text = tokenizer.stream(), config.train.sample_prompt
    generator = torch.Generator().manual_seed(config.train.seed)
    prompt = tokenizer.encode(text).tolist()
    console.rule("a sample at temperature 0.8")
    console.out(text, end="", highlight=False)
    for (token,) in stream(model.eval(), [prompt], config.train.sample_tokens, temperature=0.8, generator=generator):
        assert token is not None  # without an end token no row ends
        piece = decoder.decode(bytes([token]))
        console.out(piece, end="", highlight=False)
        text += piece
    console.print()
    console.rule()
    return text


if __name__ == "__main__":
    run(main)
