"""python -m dsmini.generate: continue texts, or hold a conversation, with a trained or a published model.

Usage, then examples:

    python -m dsmini.generate [RUN_OR_FOLDER] [FLAGS]

    python -m dsmini.generate            # the newest run, or the trained toy
    python -m dsmini.generate runs/toy-001 --prompt 'def ' 'class ' --speculative
    python -m dsmini.generate DeepSeek-V2-Lite-Chat --chat
"""

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from dsmini.checkpoint.run_folder import TOY, find_model, is_model_folder, run_tokenizer
from dsmini.config.fields import require
from dsmini.console.command import complain, run
from dsmini.console.commandline import parse, refuse_twice
from dsmini.console.messages import say
from dsmini.console.progress import Progress, patience
from dsmini.distributed.failure import tell
from dsmini.distributed.meeting import launched
from dsmini.text.prompts import Page, check_stops, read_line, read_prompts, without_surrogates

if TYPE_CHECKING:  # they load torch, so they are imported where they are used: --help is instant
    from dsmini.inference.generation import Stats
    from dsmini.inference.writer import Answers, Writer
    from dsmini.nn import Transformer
    from dsmini.text.chat import TextSide


@dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Continue texts with a model that dsmini.train trained, or with a DeepSeek or Hugging Face folder."""

    model: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FOLDER")] = None
    """A training run, one of its checkpoints, a folder with config.json, or toy, the model that dsmini comes with. Left
    out: the newest run under runs/; toy if there is none."""
    prompt: tuple[str, ...] = ()
    """Texts to continue, all at once; - reads one from standard input. Left out: a new line."""
    prompt_file: tuple[Path, ...] = ()
    """Files with one text each. A last newline is removed, also from standard input."""
    max_new_tokens: int = 400
    """Largest number of tokens to add to each text."""
    temperature: float = 0.8
    """0 takes the likeliest token; higher is more adventurous."""
    top_k: int | None = None
    """Number of likeliest tokens to draw from."""
    top_p: float | None = None
    """Draw from the fewest tokens whose probabilities sum to this, from 0 to 1."""
    min_p: float | None = None
    """Draw from the tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """A number above 1 makes tokens less likely that the text already holds."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and are left out of it."""
    eos: Literal["auto", "stop", "ignore"] = "auto"
    """stop: an answer ends with the model's end token. auto: so for a folder; in a training run the end token only
    begins the next document."""
    seed: int = 0
    """Seed of the random draws."""
    speculative: bool = False
    """Let multi-token prediction guess ahead: the same distribution in fewer steps."""
    chat: bool = False
    """Answer by the folder's chat template, or as a run that was trained on dialogues (configs/chat.toml). Without a
    prompt: a conversation, one line of standard input a turn. An empty line or Ctrl-D ends it."""
    system: str | None = None
    """The system's turn before a conversation of --chat."""
    context: int | None = None
    """Number of tokens of a text that the cache has room for; more are an error. Left out: the model's context, and
    when a text outgrows it, its older half is forgotten."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"
    """Type of the cache; auto: the model's."""
    fp8: Literal["keep", "dequantize"] = "dequantize"
    """Keep the FP8 weights of a folder, or dequantize them."""
    tokenizer: str | None = None
    """The tokenizer.json for a folder that has none, or bytes."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto, float32 or bfloat16. auto: as a folder stores its weights; for a run and toy, what is faster here."""
    average: bool = False
    """Use the moving average of the parameters; the run must have stored one, with --train.ema-decay."""
    json: bool = False
    """Print a JSON object instead of streaming the text; in a conversation, one per turn."""
    stats: bool = False
    """Also after the answers of --chat: print the tokens, the time and the size of the cache in two lines."""


MAIN = (
    *("model", "prompt", "prompt_file", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop"),
    *("seed", "speculative", "chat", "system", "context", "json"),
)
"""Fields that --help lists."""


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    command = parse(GenerateCommand, "dsmini.generate", args, main=MAIN)
    from dsmini import ops

    ops.check_forced()
    _refuse(command, args)
    require(
        launched()[1] == 1,
        "dsmini.generate is one process, and a launcher started several; start it without torchrun, and serve a model "
        "that does not fit into one with vLLM or SGLang, from its Hugging Face folder",
    )
    talks = command.chat and not command.prompt and not command.prompt_file
    prompts = [] if talks else list(read_prompts(command.prompt, command.prompt_file, about=command.chat))
    bar = Progress(Console(stderr=True), unit="tokens")
    with bar:
        writer = _writer(command, [text for _, text in prompts], bar)
        return _converse(writer, command) if talks else _answer(writer, command, prompts)


def _refuse(command: GenerateCommand, args: Sequence[str]) -> None:
    """Raise ValueError for flags that contradict each other or have no meaning, before a model is read."""
    from dsmini.inference.generation import check_new_tokens

    refuse_twice(args, "--prompt", "--prompt-file", "--stop")
    require(-(2**63) <= command.seed < 2**63, f"--seed {command.seed} is too large; use less than 2^63")
    require(
        command.chat or command.system is None,
        "--system is for a conversation; add --chat, or put it into the prompt",
    )
    check_new_tokens(command.max_new_tokens)
    require(
        command.context is None or command.context > 0,
        f"--context {command.context} has room for no token; use 1 or more, or leave it out",
    )
    check_stops(command.stop)
    if command.model is not None:  # standard input may be typed by hand, which a wrong name would waste
        is_model_folder(find_model(command.model))


def _answer(writer: "Writer", command: GenerateCommand, prompts: Sequence[tuple[str, str]]) -> int:
    """Continue prompts, each with its heading; return the exit status."""
    page = None if command.json else Page([heading for heading, _ in prompts])
    answers = writer.write([writer.encode(text, command.system) for _, text in prompts], page)
    rows = [row.described(without_surrogates(text)) for (_, text), row in zip(prompts, answers.rows, strict=True)]
    only = {"text": rows[0]["text"]} if len(rows) == 1 else {}
    return _end(command, only | {"answers": rows}, answers)


def _writer(command: GenerateCommand, prompts: Sequence[str], bar: Progress) -> "Writer":
    from dsmini.inference.sampling import Sampling
    from dsmini.inference.writer import Writer

    sampling = Sampling(**{field.name: getattr(command, field.name) for field in fields(Sampling)})
    console = Console(stderr=True)
    path = _model_of(command, partial(say, console))
    with patience(console, f"reading {path}"):
        model, side, is_run = _load(path, command, prompts, partial(say, console))
    return Writer(
        model=model,
        side=side,
        max_new_tokens=command.max_new_tokens,
        sampling=sampling,
        ends=() if command.eos == "ignore" or (command.eos == "auto" and is_run) else side.ends,
        stops=command.stop,
        speculative=command.speculative,
        cache_dtype=command.cache_dtype,
        context=command.context,
        seed=command.seed,
        watch=bar.stage,
    )


def _model_of(command: GenerateCommand, note: Callable[[str], None]) -> Path:
    """Return the path of the model: the one that is named, the newest run or the toy. Say which was chosen."""
    if command.model is not None:
        return find_model(command.model)
    from dsmini.checkpoint.training_state import newest_run

    newest = newest_run()
    if newest is None:
        note(
            "no run under runs/ yet, so this is the toy that dsmini comes with; train yours with python -m dsmini.train"
        )
    else:
        note(f"this is {newest}, the newest run")
    return newest or TOY


def _load(
    path: Path, command: GenerateCommand, prompts: Sequence[str], note: Callable[[str], None]
) -> "tuple[Transformer, TextSide, bool]":
    """Load the model of a path; return it, its text side, and whether it is a training run's.

    Args:
        prompts: refused if one is empty and nothing begins it.
        note: told about damaged checkpoints that are passed over, and warned.

    Raises: ValueError for a path that is neither a run nor a folder, and for a flag of the other kind.
    """
    from dsmini import ops
    from dsmini.checkpoint.load import load_pretrained
    from dsmini.checkpoint.training_state import load_run
    from dsmini.machine import keep_freed_memory, pick_device, pick_dtype
    from dsmini.text.chat import Dialogue, TextSide, read_text_side

    place = pick_device(command.device)
    ops.expect(place.type, "blocks_step", *(() if path == TOY else ("dequantize", "experts")))
    keep_freed_memory()
    empty = "" in prompts and not command.chat
    nothing = "a prompt is empty; give it at least one character, or leave it out"
    if is_model_folder(path):
        require(not command.average, f"--average is for a training run, and {path} is a model's folder; leave it out")
        side = read_text_side(path, tokenizer=command.tokenizer, chat=command.chat)
        require(not empty or bool(side.begin), nothing)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: note(str(message))
            stored = command.dtype == "auto" and path != TOY  # the toy is small: it takes what is faster, as a run does
            dtype = None if stored else pick_dtype(command.dtype, place)
            # PyTorch gives the same bits, and kernels are then compiled before the text, not in the middle of a bar
            with ops.use("eager") if path == TOY and ops.chosen() is None else nullcontext():
                model = load_pretrained(path, dtype=dtype, fp8=command.fp8, device=place)
        got, want = side.tokenizer.vocab_size, model.config.vocab_size
        if got > want:
            file = command.tokenizer or path / "tokenizer.json"
            note(f"{file} has token ids up to {got - 1}, the model of {path} only to {want - 1}")
        return model, side, False
    for flag, wanted in (("--tokenizer", command.tokenizer), ("--fp8 keep", command.fp8 == "keep")):
        require(
            not wanted, f"{flag} is for a DeepSeek or Hugging Face folder, and {path} is a training run; leave it out"
        )
    require(not empty, nothing)
    model, config = load_run(path, pick_dtype(command.dtype, place), average=command.average, say=note)
    own = run_tokenizer(path, config)
    talk = {"chat": Dialogue(own), "stops": Dialogue.stops} if command.chat else {}
    # kernels of a CPU read FP32 weights as they lie; elsewhere each step would cast all of them again, to the same bits
    cast = place.type != "cpu" and config.model.precision == "native"
    return (
        model.to(place, model.compute_dtype if cast else None),
        TextSide(tokenizer=own, ends=(own.end_of_document,), **talk),
        True,
    )


def _converse(writer: "Writer", command: GenerateCommand) -> int:
    """Hold a conversation on standard input, one line a turn; return the exit status.

    A line that is too long is refused and changes nothing; the status is then 2 at the end.
    """
    from dsmini.inference.writer import Conversation, figures_in_words, turns_in_words

    conversation, status, turns = Conversation(writer, command.system), 0, list["Stats"]()
    while line := read_line():
        try:
            answers = conversation.answer(line, None if command.json else Page([""]))
        except ValueError as error:
            status = 2
            complain(str(error))
            if command.json:
                print(json.dumps({"prompt": without_surrogates(line), "error": str(error)}), flush=True)
            continue
        turns.append(answers.stats)
        if command.stats and not command.json:
            print(figures_in_words(answers.stats, command.speculative), file=sys.stderr)
        said = answers.rows[0].described(without_surrogates(line))
        if command.json:
            _end(command, {key: said[key] for key in ("prompt", "answer", "finish")}, answers)
        if answers.interrupted:
            status = 130
            break
    if turns and not command.json:
        print(turns_in_words(turns), file=sys.stderr)
    return status


def _end(command: GenerateCommand, said: dict[str, Any], answers: "Answers") -> int:
    """Print the JSON object, or the figures below the page, after a chat if asked; return the exit status."""
    from dsmini.inference.writer import figures, figures_in_words

    if command.json:
        print(json.dumps(said | figures(answers.stats, command.speculative)), flush=True)
    elif command.stats or not command.chat:
        print(figures_in_words(answers.stats, command.speculative), file=sys.stderr)
    return 130 if answers.interrupted else 0


if __name__ == "__main__":
    run(main, tell)
