"""A sample at the end of training: the model writes, on the screen as it comes."""

import torch

from dsmini.checkpoint.run_folder import run_tokenizer
from dsmini.console.messages import say
from dsmini.inference.generation import Generation
from dsmini.inference.sampling import Sampling
from dsmini.training.run import TrainingRun

TEMPERATURE = 0.8


def write_sample(run: TrainingRun) -> str:
    """Let a trained model continue train.sample_prompt; return the whole text, "" if no sample is wanted."""
    train, console = run.config.train, run.console
    if not train.sample_tokens:
        return ""
    tokenizer = run_tokenizer(run.folder, run.config)
    decoder, text = tokenizer.stream(), train.sample_prompt
    console.rule(f"a sample at temperature {TEMPERATURE}")
    console.out(text, end="", highlight=False)
    generation = Generation(
        run.trainer.model.eval(),
        [tokenizer.encode(text).tolist()],
        train.sample_tokens,
        sampling=Sampling(temperature=TEMPERATURE),
        generator=torch.Generator().manual_seed(train.seed),
        slide=True,
    )
    try:
        for (tokens,) in generation:
            piece = decoder.decode(tokens)
            console.out(piece, end="", highlight=False)
            text += piece
    except ValueError as error:  # a model whose training failed has no finite logits
        say(console, f"no sample: {error}")
    text += decoder.decode([], final=True)
    console.print()
    console.rule()
    return text
