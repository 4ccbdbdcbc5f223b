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
from dsmini.atomic import write_text
from dsmini.checkpoint.run_folder import new_run_folder, refuse_taken, run_tokenizer, sole_trainer, tokenizer_file
from dsmini.config import RunConfig
from dsmini.console import Help, run
from dsmini.data.corpus import Corpus, load_corpus
from dsmini.inference.generation import Generation
from dsmini.inference.sampling import Sampling
from dsmini.measure.machine import pick_device, pick_dtype
from dsmini.nn import Transformer
from dsmini.training.report import ReadingProgress, print_summary
from dsmini.training.start import begin, read_start
from dsmini.training.summary import summarise
from dsmini.training.tensorboard import require_tensorboard


@dataclass(frozen=True, kw_only=True)
class TrainCommand(RunConfig):
    """Train a DeepSeek-style transformer on a text, and see what it learned to write.

    Without arguments: a small model, the source code of Python's standard library, about five minutes on two cores.
    A config may come first: python -m dsmini.train configs/toy.toml --train.steps 200. Every field below can be set,
    here or in that file: [train] steps = 200.
    """

    resume: Path | None = None
    """Go on with this run, such as runs/toy-001, from its last checkpoint. Its config holds; flags change it."""
    init: Path | None = None
    """Start a new run from the weights of this run or checkpoint, with its model and data, and the usual recipe."""
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
        "resume",
        "init",
    ),
)


def main(args: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    command, start = read_start(TrainCommand, args, HELP)
    console = Console(stderr=command.json)
    if start.config.train.tensorboard:
        require_tensorboard()
    device = pick_device(start.config.train.device)
    if start.config.train.threads:
        torch.set_num_threads(start.config.train.threads)
    if not start.resume:
        refuse_taken(start.config.out)
    corpus = _corpus(start.config, start.resume, console)
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
        summary = summarise(training)
        sample = _sample(console, training.trainer.model, config, out)
        write_text(out / "sample.txt", sample)
        training.finish(summary)
    print_summary(console, summary)
    _say(console, f"\nGo on with: python -m dsmini.generate {shlex.quote(str(out))} --prompt 'def '")
    if command.json:
        print(json.dumps({**summary, "sample": sample}))
    return 0


def _corpus(config: RunConfig, resume: Path | None, console: Console) -> Corpus:
    """The run's corpus, tokenised into a folder beside the run unless it is there. A resumed run has its tokenizer."""
    data = dataclasses.replace(config.data, tokenizer=tokenizer_file(resume, config)) if resume else config.data
    cache = (config.out or Path("runs/new")).parent / "corpus"
    with ReadingProgress(console) as progress:
        return load_corpus(
            data, config.seq_len, config.model.vocab_size, cache, config.train.seed, progress=progress.show
        )


def _resolved(config: RunConfig, device: torch.device, dtype: torch.dtype) -> RunConfig:
    """The config with what was chosen for it: the device, dtype and threads in use."""
    path, tokenizer = (given and given.resolve() for given in (config.data.path, config.data.tokenizer))
    train = dataclasses.replace(
        config.train, device=str(device), dtype=str(dtype).removeprefix("torch."), threads=torch.get_num_threads()
    )
    data = dataclasses.replace(config.data, path=path, tokenizer=tokenizer)
    return dataclasses.replace(config, train=train, data=data)


def _introduction(config: RunConfig, corpus: Corpus) -> list[str]:
    """What is going to happen, in lines."""
    parameters = accounting.parameters(config.model)
    left_out = f", {corpus.skipped} left out: empty or not text" if corpus.skipped else ""
    return [
        f"corpus  {corpus.source}, {corpus.files} files{left_out}",
        f"        {len(corpus.train):,} training tokens, {len(corpus.val):,} held out ({corpus.split})",
        f"        {_tokens_of(config, corpus)}",
        f"        sha256 {corpus.sha256}",
        f"        {corpus.cache}",
        f"model   {parameters.total:,} parameters, {parameters.active:,} active for a token",
        f"run     {config.out}, {config.train.dtype} on {config.train.device}, threads: {config.train.threads}",
    ]


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _tokens_of(config: RunConfig, corpus: Corpus) -> str:
    """What a token is, in words."""
    kind = "a token is a byte"
    if config.data.tokenizer is not None:
        kind = f"tokens of {config.data.tokenizer}, {corpus.bytes_per_token:.2f} bytes each"
    fim = f"; {corpus.rearranged:,} training documents rearranged for fill-in-the-middle"
    return kind + (fim if config.data.fim_rate else "")


def _sample(console: Console, model: Transformer, config: RunConfig, run: Path) -> str:
    """Let the trained model write, on the screen as it comes."""
    if not config.train.sample_tokens:
        return ""
    tokenizer = run_tokenizer(run, config)
    decoder, text = tokenizer.stream(), config.train.sample_prompt
    generator = torch.Generator().manual_seed(config.train.seed)
    prompt = tokenizer.encode(text).tolist()
    console.rule("a sample at temperature 0.8")
    console.out(text, end="", highlight=False)
    sampling = Sampling(temperature=0.8)
    generation = Generation(
        model.eval(), [prompt], config.train.sample_tokens, sampling=sampling, generator=generator, slide=True
    )
    try:
        for (tokens,) in generation:
            piece = decoder.decode(tokens)
            console.out(piece, end="", highlight=False)
            text += piece
    except ValueError as error:  # a model whose training failed has no finite logits
        _say(console, f"no sample: {error}")
    text += decoder.decode([], final=True)
    console.print()
    console.rule()
    return text


if __name__ == "__main__":
    run(main)
