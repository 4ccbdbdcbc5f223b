"""python -m dsmini.generate: continue a text with a trained model."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from dsmini.checkpoint.run_folder import run_tokenizer
from dsmini.checkpoint.training import load_run
from dsmini.command import Help, parse, run
from dsmini.generation import Generation
from dsmini.machine import pick_device, pick_dtype
from dsmini.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Continue a text with a model that dsmini.train trained."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a training run, or of one of its checkpoints."""
    prompt: str = "\n"
    """The text to continue."""
    max_new_tokens: int = 400
    """How many tokens to add."""
    temperature: float = 0.8
    """0 takes the likeliest token; higher is more adventurous."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    seed: int = 0
    """Seed of the draws."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto, float32 or bfloat16."""
    average: bool = False
    """Use the parameters' average over the steps; the run must have kept one, with --train.ema-decay."""
    json: bool = False
    """Print one JSON object instead of streaming the text."""


HELP = Help(
    usage="RUN [FLAGS]",
    examples=(
        "runs/toy-001 --prompt 'def '",
        "runs/toy-001 --temperature 0 --max-new-tokens 80",
        "runs/toy-001/checkpoints/step-001600 --json",
    ),
    main=tuple(field.name for field in dataclasses.fields(GenerateCommand)),
)


def main(args: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    command = parse(GenerateCommand, "generate", args, help=HELP)
    if not -(2**63) <= command.seed < 2**63:
        raise ValueError(f"--seed {command.seed} is too large; use less than 2^63")
    device = pick_device(command.device)
    dtype = pick_dtype(command.dtype, device)
    model, config = load_run(command.run, dtype, average=command.average, say=lambda line: print(line, file=sys.stderr))
    tokenizer = run_tokenizer(command.run, config)
    tokens = tokenizer.encode(command.prompt).tolist()
    generator = torch.Generator().manual_seed(command.seed)
    decoder = tokenizer.stream()

    def show(new: list[int], final: bool = False) -> None:
        if not command.json:
            print(decoder.decode(new, final), end="", flush=True)

    show(tokens)
    generation = Generation(
        model.to(device),
        [tokens],
        command.max_new_tokens,
        sampling=Sampling(temperature=command.temperature, top_k=command.top_k),
        generator=generator,
        slide=True,
    )
    for (new,) in generation:
        show(new)
    show([], final=True)
    stats = generation.stats
    if command.json:
        figures = {"new_tokens": stats.new_tokens, "seconds": stats.seconds, "tokens_per_s": stats.tokens_per_s}
        print(json.dumps({"text": tokenizer.decode(generation.rows[0]), **figures}))
    else:
        print()
        print(f"{stats.new_tokens} tokens, {stats.tokens_per_s:.0f} tokens/s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
