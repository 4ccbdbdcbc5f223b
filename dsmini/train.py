"""python -m dsmini.train: train a model on a text and show what it learned."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dsmini import accounting
from dsmini.checkpoint.training import new_run_folder, refuse_taken, write_json, write_text
from dsmini.command import Help, parse, run, take_file
from dsmini.config import RunConfig
from dsmini.data import Corpus, load_corpus
from dsmini.generation import stream
from dsmini.machine import pick_device, pick_dtype
from dsmini.nn import Transformer
from dsmini.report import ReadingProgress, print_summary
from dsmini.tensorboard import require_tensorboard
from dsmini.tokenizer import load_tokenizer
from dsmini.trainer import Trainer
from dsmini.training_run import TrainingRun


@dataclass(frozen=True, kw_only=True)
class TrainCommand(RunConfig):
    """Train a DeepSeek-style transformer on a text, and see what it learned to write.

    Without arguments: a small model, the source code of Python's standard library, about five minutes on two cores.
    A config may come first: python -m dsmini.train configs/toy.toml --train.steps 200. Every field below can be set,
    here or in that file: [train] steps = 200.
    """

    json: bool = False
    """Print the final figures as a line of JSON, and all else to the standard error."""


HELP = Help(
    usage="[FILE.toml] [FLAGS]",
    examples=(
        "                 # a small model, five minutes",
        "--data.path book.txt --train.steps 400",
        "configs/toy-mha.toml --model.dim 256",
        "--train.optimizer muon --train.seq-len 128",
        "--out runs/mine --train.tensorboard",
    ),
    main=(
        "data.path",
        "out",
        "model.dim",
        "model.n_layers",
        "model.attention",
        "train.steps",
        "train.batch_size",
        "train.optimizer",
        "train.lr",
        "train.compile",
        "train.tensorboard",
        "train.device",
    ),
)


def main(args: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    file, rest = take_file(args)
    default = None if file is None else TrainCommand(**_fields(RunConfig.from_file(file)))
    command = parse(TrainCommand, "train", rest, default, HELP)
    config = RunConfig(**{name: value for name, value in _fields(command).items() if name != "json"})
    console = Console(stderr=command.json)

    if config.train.tensorboard:
        require_tensorboard()
    device = pick_device(config.train.device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    refuse_taken(config.out)
    cache = (config.out or Path("runs/new")).parent / "corpus"
    with ReadingProgress(console) as progress:
        corpus = load_corpus(
            config.data, config.seq_len, config.model.vocab_size, cache, config.train.seed, progress=progress.show
        )
    dtype = pick_dtype(config.train.dtype, device)
    config = _resolved(config, device, dtype, "toy" if file is None else file.stem)
    assert config.out is not None
    _introduce(console, config, corpus)

    torch.manual_seed(config.train.seed)
    model = Transformer(config.model, compute_dtype=dtype).to(device)
    training = TrainingRun(config, Trainer(model, corpus, config, device), console)
    finished = training.train()
    training.plot()
    if not finished:
        console.print(f"stopped after step {training.trainer.steps_done}; saved in {config.out}", highlight=False)
        return 130
    summary = training.summarise()
    summary["sample"] = _sample(console, model, config)
    write_text(config.out / "sample.txt", summary["sample"])
    print_summary(console, summary)
    console.print(
        f"\nGo on with: python -m dsmini.generate {config.out} --prompt 'def '", highlight=False, markup=False
    )
    if command.json:
        print(json.dumps(summary))
    return 0


def _fields(config: RunConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def _resolved(config: RunConfig, device: torch.device, dtype: torch.dtype, name: str) -> RunConfig:
    """The config with what was chosen for it: a new folder, and the device, dtype and threads in use."""
    path, tokenizer = (given and given.resolve() for given in (config.data.path, config.data.tokenizer))
    train = dataclasses.replace(
        config.train, device=str(device), dtype=str(dtype).removeprefix("torch."), threads=torch.get_num_threads()
    )
    data = dataclasses.replace(config.data, path=path, tokenizer=tokenizer)
    return dataclasses.replace(config, train=train, data=data, out=new_run_folder(config.out, name))


def _introduce(console: Console, config: RunConfig, corpus: Corpus) -> None:
    """Say what is going to happen, and keep it in the run's folder."""
    assert config.out is not None
    write_text(config.out / "config.toml", config.to_toml())
    write_json(config.out / "corpus.json", corpus.describe())
    if config.data.tokenizer is not None:
        shutil.copyfile(config.data.tokenizer, config.out / "tokenizer.json")
    parameters = accounting.parameters(config.model)
    left_out = f", {corpus.skipped} left out: empty or not text" if corpus.skipped else ""
    for line in (
        f"corpus  {corpus.source}, {corpus.files} files{left_out}",
        f"        {len(corpus.train):,} training tokens, {len(corpus.val):,} held out ({corpus.split})",
        f"        {_tokens_of(config, corpus)}",
        f"        sha256 {corpus.sha256}",
        f"        {corpus.cache}",
        f"model   {parameters.total:,} parameters, {parameters.active:,} active for a token",
        f"run     {config.out}, {config.train.dtype} on {config.train.device}, threads: {config.train.threads}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _tokens_of(config: RunConfig, corpus: Corpus) -> str:
    """What a token is, in words."""
    kind = "a token is a byte"
    if config.data.tokenizer is not None:
        kind = f"tokens of {config.data.tokenizer}, {corpus.bytes_per_token:.2f} bytes each"
    fim = f"; {corpus.rearranged:,} training documents rearranged for fill-in-the-middle"
    return kind + (fim if config.data.fim_rate else "")


def _sample(console: Console, model: Transformer, config: RunConfig) -> str:
    """Let the trained model write, on the screen as it comes."""
    if not config.train.sample_tokens:
        return ""
    tokenizer = load_tokenizer(config.data.tokenizer)
    decoder, text = tokenizer.stream(), config.train.sample_prompt
    generator = torch.Generator().manual_seed(config.train.seed)
    prompt = tokenizer.encode(text).tolist()
    console.rule("a sample at temperature 0.8")
    console.out(text, end="", highlight=False)
    for (token,) in stream(model.eval(), [prompt], config.train.sample_tokens, temperature=0.8, generator=generator):
        assert token is not None  # without an end token no row ends
        piece = decoder.decode([token])
        console.out(piece, end="", highlight=False)
        text += piece
    text += decoder.decode([], final=True)
    console.print()
    console.rule()
    return text


if __name__ == "__main__":
    run(main)
