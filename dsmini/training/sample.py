"""The sample at the end of training, printed as the model writes it, and a prompt for more."""

import shlex

import torch

from dsmini.console.messages import say
from dsmini.console.printable import printable
from dsmini.inference.generation import Generation
from dsmini.inference.sampling import Sampling
from dsmini.training.run import TrainingRun

TEMPERATURE = 0.8
PROMPT_WORDS = 3
"""Maximum number of words in the prompt that a run offers."""
PROMPT_CHARACTERS = 40
"""Maximum number of characters in it."""


def write_sample(run: TrainingRun) -> str:
    """Let a trained model continue train.sample_prompt; return the whole text, "" if none is wanted or possible.

    On the screen control characters are pictures. The text that is returned has them as they are.
    """
    train, console = run.config.train, run.console
    if not train.sample_tokens:
        return ""
    try:
        model = run.whole_model().eval()
    except ValueError as error:
        say(console, f"no sample: {error}")
        return ""
    tokenizer = run.tokenizer
    decoder, text = tokenizer.stream(), train.sample_prompt
    console.rule(f"a sample at temperature {TEMPERATURE}")
    console.out(printable(text), end="", highlight=False)
    generation = Generation(
        model,
        [tokenizer.encode(text).tolist()],
        train.sample_tokens,
        sampling=Sampling(temperature=TEMPERATURE),
        generator=torch.Generator().manual_seed(train.seed),
        slide=True,
    )
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


def offered_prompt(run: TrainingRun) -> str:
    """Return a prompt from the text that a run was trained on, as a shell takes it."""
    if run.config.data.path is None:  # the source code of Python's library
        return "'def '"
    corpus = run.trainer.corpus
    text = corpus.val if corpus.rearranged else corpus.train  # held-out text is never rearranged
    tokens = text[:256].tolist()
    first = tokens[: tokens.index(corpus.end_of_document)] if corpus.end_of_document in tokens else tokens
    lines = run.tokenizer.decode(first).splitlines()
    for words in (line.split()[:PROMPT_WORDS] for line in lines):
        prompt = " ".join(words)
        fits = 0 < len(prompt) <= PROMPT_CHARACTERS and prompt.isprintable() and "\ufffd" not in prompt
        if fits and not prompt.startswith("-"):  # else the command line takes it for a flag
            return shlex.quote(prompt)
    return "TEXT"
