"""python -m dsmini.generate: continue texts, or hold a conversation, with a trained or a published model."""

import json
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from dsmini.checkpoint.pretrained import load_pretrained
from dsmini.checkpoint.run_folder import run_tokenizer
from dsmini.checkpoint.trained_model import load_run
from dsmini.console import Help, parse, run
from dsmini.inference.generation import Generation
from dsmini.inference.sampling import Sampling
from dsmini.measure.machine import DTYPES, pick_device, pick_dtype
from dsmini.nn import Transformer
from dsmini.text.answers import Page, figures, finish, follow, say_figures
from dsmini.text.chat import Chat, Message
from dsmini.text.continuation import Continuation
from dsmini.text.text_side import TextSide, read_text_side


@dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Continue texts with a model that dsmini.train trained, or with a DeepSeek or Hugging Face folder."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FOLDER")]
    """A training run, one of its checkpoints, or a folder with config.json and safetensors."""
    prompt: tuple[str, ...] = ()
    """The texts to continue, all at once; - reads one from standard input. Left out: a new line."""
    prompt_file: tuple[Path, ...] = ()
    """Files that hold a text each. A last newline, here and on standard input, is no part of it."""
    max_new_tokens: int = 400
    """How many tokens to add to each text, at most."""
    temperature: float = 0.8
    """0 takes the likeliest token; higher is more adventurous."""
    top_k: int | None = None
    """Draw from this many likeliest tokens."""
    top_p: float | None = None
    """Draw from the fewest tokens whose probabilities sum to this."""
    min_p: float | None = None
    """Draw from the tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens less likely that the text already holds."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and are no part of it."""
    eos: Literal["auto", "stop", "ignore"] = "auto"
    """Whether an answer ends with the model's end token. auto: with that of a folder; not in a training run, whose
    end token only begins the next document."""
    seed: int = 0
    """Seed of the draws."""
    speculative: bool = False
    """Let multi-token prediction guess ahead: the same distribution in fewer steps."""
    chat: bool = False
    """Answer by the folder's chat template. Without a prompt: a conversation, a line of standard input a turn, which an
    empty line or Ctrl-D ends."""
    system: str | None = None
    """What --chat is told before the conversation."""
    context: int | None = None
    """Tokens of a text that the cache has room for; more are an error. Left out: the model's context, and where a text
    outgrows it, its older half is forgotten."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"
    """Of the cache; auto: the model's."""
    fp8: Literal["keep", "dequantize"] = "dequantize"
    """What becomes of a folder's FP8 weights."""
    tokenizer: str | None = None
    """A tokenizer.json for a folder that has none, or bytes."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto, float32 or bfloat16. auto: as a folder stores its weights; for a run, what is faster here."""
    average: bool = False
    """Use the parameters' average over the steps; the run must have kept one, with --train.ema-decay."""
    json: bool = False
    """Print a JSON object instead of streaming the text; in a conversation one a turn."""


HELP = Help(
    usage="RUN_OR_FOLDER [FLAGS]",
    examples=(
        "runs/toy-001 --prompt 'def ' 'class '",
        "runs/toy-001 --temperature 0 --speculative",
        "DeepSeek-V2-Lite-Chat --chat",
    ),
    main=(
        "model",
        "prompt",
        "prompt_file",
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "stop",
        "seed",
        "speculative",
        "chat",
        "system",
        "context",
        "json",
    ),
)


def main(args: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    command = parse(GenerateCommand, "generate", args, help=HELP)
    if not -(2**63) <= command.seed < 2**63:
        raise ValueError(f"--seed {command.seed} is too large; use less than 2^63")
    if command.system is not None and not command.chat:
        raise ValueError("--system is for a conversation; add --chat, or put it into the prompt")
    if command.context is not None and command.context < 1:
        raise ValueError(f"--context {command.context} is less than 1; use the tokens a text may come to")
    speaker = Speaker(command)
    if command.chat and not command.prompt and not command.prompt_file:
        return speaker.converse()
    prompts = list(_prompts(command))
    return speaker.answer(prompts)


class Speaker:
    """A loaded model with its text side, and how it is to be asked."""

    def __init__(self, command: GenerateCommand) -> None:
        self._command = command
        self._sampling = Sampling(
            temperature=command.temperature,
            top_k=command.top_k,
            top_p=command.top_p,
            min_p=command.min_p,
            repetition_penalty=command.repetition_penalty,
        )
        self._generator = torch.Generator().manual_seed(command.seed)
        self._model, self._side, is_run = _load(command)
        heeds = command.eos == "stop" or (command.eos == "auto" and not is_run)
        self._ends = self._side.ends if heeds else ()

    def answer(self, prompts: Sequence[tuple[str, str]]) -> int:
        """Continue texts, or answer them by the chat template; returns the exit status.

        Args:
            prompts: of each its heading and its text.
        """
        command, chat = self._command, self._side.chat
        texts = [text for _, text in prompts]
        if chat is not None:
            tokens = [chat.encode([*self._system(chat), _turn("user", chat.plain(text))]) for text in texts]
        else:
            tokens = [[*self._side.begin, *self._side.tokenizer.encode(text).tolist()] for text in texts]
        generation = self._generation(tokens)
        rows, shown = zip(*(self._continuation(row) for row in tokens), strict=True)
        page = None if command.json else Page([heading for heading, _ in prompts])
        interrupted = follow(generation, rows, shown, command.max_new_tokens, page)
        stats = generation.stats
        if command.json:
            answers = [
                {
                    "prompt": _clean(text),
                    "text": before + row.text,
                    "answer": row.text,
                    "finish": finish(row, command.max_new_tokens),
                    "new_tokens": row.n_tokens,
                }
                for text, before, row in zip(texts, shown, rows, strict=True)
            ]
            only = {"text": answers[0]["text"]} if len(answers) == 1 else {}
            print(json.dumps(only | {"answers": answers} | figures(stats, command.speculative)))
        else:
            print(say_figures(stats, command.speculative), file=sys.stderr)
        return 130 if interrupted else 0

    def converse(self) -> int:
        """A conversation on standard input, a line a turn; returns the exit status."""
        command, chat = self._command, self._side.chat
        assert chat is not None, "--chat read a template"
        messages = self._system(chat)
        while line := _line():
            messages.append(_turn("user", chat.plain(line)))
            tokens = chat.encode(messages)
            generation = self._generation([tokens])
            row, shown = self._continuation(tokens)
            page = None if command.json else Page([""])
            interrupted = follow(generation, [row], [shown], command.max_new_tokens, page)
            if command.json:
                said = {"prompt": _clean(line), "answer": row.text, "finish": finish(row, command.max_new_tokens)}
                print(json.dumps(said | figures(generation.stats, command.speculative)), flush=True)
            else:
                print(say_figures(generation.stats, command.speculative), file=sys.stderr)
            if interrupted:
                return 130
            written = [token for token in generation.rows[0][len(tokens) :] if token not in self._ends]
            said = chat.plain(row.text) if row.ended == "stop" else chat.answer(written)
            messages.append(_turn("assistant", said))
        return 0

    def _generation(self, prompts: list[list[int]]) -> Generation:
        command, context = self._command, self._model.config.max_seq_len
        longest = max(map(len, prompts))
        if command.context is None and longest > context:
            raise ValueError(
                f"a prompt of {longest} tokens is longer than the model's context of {context}; shorten it"
            )
        if command.context is not None and command.context > context:
            raise ValueError(
                f"--context {command.context} is more than the model's context of {context}; use that or less"
            )
        dtype = None if command.cache_dtype == "auto" else DTYPES.get(command.cache_dtype, "fp8")
        return Generation(
            self._model,
            prompts,
            command.max_new_tokens,
            sampling=self._sampling,
            eos_token_id=self._ends or None,
            speculative=command.speculative,
            generator=self._generator,
            cache_dtype=dtype,  # pyright: ignore[reportArgumentType]
            max_seq_len=command.context,
            slide=command.context is None,
        )

    def _continuation(self, tokens: list[int]) -> tuple[Continuation, str]:
        """What a prompt's new tokens are read into, and what is shown before them: the prompt, but for a chat. A
        character that the prompt ends inside of is the continuation's."""
        stream, begin = self._side.tokenizer.stream(), len(self._side.begin)
        stream.decode(tokens[:begin])
        text = stream.decode(tokens[begin:])
        shown = text if self._side.chat is None else ""
        return Continuation(stream, ends=self._ends, stops=self._command.stop), shown

    def _system(self, chat: Chat) -> list[Message]:
        return [] if self._command.system is None else [_turn("system", chat.plain(self._command.system))]


def _load(command: GenerateCommand) -> tuple[Transformer, TextSide, bool]:
    """The model, its text side, and whether it is a training run."""
    path = command.model
    device = pick_device(command.device)
    if path.is_dir() and not (path / "config.toml").is_file():
        if any(path.glob("config*.json")):
            return *_load_folder(command, device), False
        raise ValueError(
            f"{path} has neither the config.toml of a training run nor the config.json of a model's folder; "
            "name one that has"
        )
    for flag, wanted in (
        ("--chat", command.chat),
        ("--tokenizer", command.tokenizer),
        ("--fp8 keep", command.fp8 == "keep"),
    ):
        if wanted:
            raise ValueError(
                f"{flag} is for a DeepSeek or Hugging Face folder, and {path} is a training run; leave it out"
            )
    dtype = pick_dtype(command.dtype, device)
    model, config = load_run(path, dtype, average=command.average, say=_note)
    tokenizer = run_tokenizer(path, config)
    return model.to(device), TextSide(tokenizer=tokenizer, ends=(tokenizer.end_of_document,)), True


def _load_folder(command: GenerateCommand, device: torch.device) -> tuple[Transformer, TextSide]:
    if command.average:
        raise ValueError(f"--average is for a training run, and {command.model} is a model's folder; leave it out")
    side = read_text_side(command.model, tokenizer=command.tokenizer, chat=command.chat)
    dtype = None if command.dtype == "auto" else DTYPES[command.dtype]
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _note(str(message))
        return load_pretrained(command.model, dtype=dtype, fp8=command.fp8, device=device), side


def _prompts(command: GenerateCommand) -> Iterator[tuple[str, str]]:
    """The heading and the text of each prompt."""
    if command.prompt.count("-") > 1:
        raise ValueError("--prompt has - more than once, and standard input can be read only once; leave one out")
    n = len(command.prompt) + len(command.prompt_file)
    for i, text in enumerate(command.prompt or ("\n",) * (n == 0), 1):
        if text == "-":
            yield f"{i} of {n}: standard input", _text(sys.stdin.buffer.read())
        else:
            about = textwrap.shorten(_clean(text), 50, placeholder="...")
            yield f"{i} of {n}: {about}" if command.chat else f"{i} of {n}", text
    for i, path in enumerate(command.prompt_file, len(command.prompt) + 1):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read the prompt file {path}: {error.strerror}; check its name") from None
        yield f"{i} of {n}: {path}", _text(content)


def _text(content: bytes) -> str:
    """A file's text; what is no UTF-8 stays as Python keeps it in arguments."""
    return re.sub(rb"\r?\n\Z", b"", content).decode("utf-8", errors="surrogateescape")


def _line() -> str:
    """The next line of standard input, asked for if it is a terminal; empty at its end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return _text(sys.stdin.buffer.readline())


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _clean(text: str) -> str:
    """A text whose undecodable bytes are shown as U+FFFD."""
    return text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")


def _note(line: Any) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    run(main)
