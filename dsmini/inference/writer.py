"""A writer: a model with its text side, which continues texts and answers conversations.

The tokens of a generation become texts as they come, shown on a page. Its counts and times follow at the end.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from dsmini.inference.generation import Generation, Stats
from dsmini.inference.sampling import Sampling
from dsmini.nn import Transformer
from dsmini.nn.cache import CacheDtype
from dsmini.report.units import human
from dsmini.text.chat import Chat, Dialogue, Message, TextSide
from dsmini.text.prompts import Continuation, Page

CACHE_DTYPES: dict[str, CacheDtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8": "fp8",
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The text that follows a prompt."""

    shown: str
    """The prompt as shown before the text; empty in a chat."""
    text: str
    """The new text."""
    finish: str
    """The reason of its end: "end" for an end token, "stop" for a stop string, "length" or "interrupted"."""
    n_tokens: int
    """Number of new tokens, the one that ended the text included."""
    tokens: list[int]
    """The new tokens without those that end a text."""

    def described(self, prompt: str) -> dict[str, Any]:
        """Return the answer as --json shows it."""
        return {
            "prompt": prompt,
            "text": self.shown + self.text,
            "answer": self.text,
            "finish": self.finish,
            "new_tokens": self.n_tokens,
        }


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The texts of a generation, and its statistics."""

    rows: list[Answer]
    stats: Stats
    interrupted: bool
    """True if Ctrl-C or SIGTERM ended the generation."""


@dataclass(kw_only=True)
class Writer:
    """Writes with a model."""

    model: Transformer
    side: TextSide
    max_new_tokens: int
    sampling: Sampling
    ends: Collection[int] = ()
    """Tokens that end a text."""
    stops: Sequence[str] = ()
    """Strings that end a text and are left out of it; those of the text side are added."""
    speculative: bool = False
    cache_dtype: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"
    """Dtype of the cache; auto is the model's."""
    context: int | None = None
    """Number of tokens of a text that the cache has room for; more are an error. None: the model's context, and when a
    text outgrows it, its older half is forgotten."""
    seed: int = 0
    """Seed of the random draws."""
    watch: Callable[[str, int, int], None] | None = None
    """Shows the progress of long phases: a label, the number of tokens that are done, and that of all."""

    def __post_init__(self) -> None:
        self.stops = (*self.stops, *self.side.stops)
        self.generator: torch.Generator = torch.Generator().manual_seed(self.seed)

    def encode(self, text: str, system: str | None = None) -> list[int]:
        """Return the tokens of a prompt; with a chat template those of a conversation with one turn."""
        chat = self.side.chat
        if chat is not None:
            return chat.encode([*system_turn(chat, system), Message(role="user", content=chat.plain(text))])
        return [*self.side.begin, *self.side.tokenizer.encode(text).tolist()]

    def write(self, prompts: Sequence[list[int]], page: Page | None) -> Answers:
        """Continue all prompts at once, to their ends or until Ctrl-C or SIGTERM.

        Args:
            page: shows the texts as they come; None: `watch` shows how many tokens there are.

        Raises: ValueError for a prompt that is empty or longer than the context.
        """
        generation = Generation(
            self.model,
            prompts,
            self.max_new_tokens,
            sampling=self.sampling,
            eos_token_id=list(self.ends) or None,
            speculative=self.speculative,
            generator=self.generator,
            cache_dtype=CACHE_DTYPES[self.cache_dtype],
            max_seq_len=self.context,
            slide=self.context is None,
            watch=None if self.watch is None else partial(self.watch, "reading the prompt"),
        )
        rows, shown = zip(*(self._continuation(row) for row in prompts), strict=True)
        interrupted = self._follow(generation, rows, shown, page)
        answers = [
            Answer(
                shown=before,
                text=row.text,
                finish=row.ended or ("length" if row.n_tokens >= self.max_new_tokens else "interrupted"),
                n_tokens=row.n_tokens,
                tokens=[token for token in tokens[len(prompt) :] if token not in self.ends],
            )
            for prompt, before, row, tokens in zip(prompts, shown, rows, generation.rows, strict=True)
        ]
        return Answers(rows=answers, stats=generation.stats, interrupted=interrupted)

    def _follow(
        self, generation: Generation, rows: Sequence[Continuation], shown: Sequence[str], page: Page | None
    ) -> bool:
        """Run a generation to its end, or until Ctrl-C or SIGTERM; return True if a signal ended it.

        The text that was written by then is in the rows and on the page.

        Args:
            shown: the text that the page shows before each row, once the prompts are read.
        """
        interrupted, before = False, list(shown)

        def show(i: int, piece: str, ended: bool) -> None:
            piece, before[i] = before[i] + piece, ""
            if page is not None:
                page.add(i, piece)
                if ended:
                    page.end(i)

        try:
            for new in generation:
                for i, (row, tokens) in enumerate(zip(rows, new, strict=True)):
                    piece = row.add(tokens)
                    ended = row.ended is not None or row.n_tokens == self.max_new_tokens
                    if ended:
                        generation.end(i)
                    show(i, piece + (row.close() if ended else ""), ended)
                if self.watch is not None and page is None:
                    self.watch("writing", sum(row.n_tokens for row in rows), len(rows) * self.max_new_tokens)
        except KeyboardInterrupt:
            interrupted = True
        for i, row in enumerate(rows):
            show(i, row.close(), ended=True)
        return interrupted

    def _continuation(self, tokens: list[int]) -> tuple[Continuation, str]:
        """Return the reader of a prompt's new tokens and the text shown before them: the prompt, but not in a chat.

        If a prompt ends inside a character, that character belongs to the continuation.
        """
        stream, begin = self.side.tokenizer.stream(), len(self.side.begin)
        stream.decode(tokens[:begin])
        text = stream.decode(tokens[begin:])
        shown = text if self.side.chat is None else ""
        return Continuation(stream, ends=self.ends, stops=self.stops), shown


class Conversation:
    """A conversation that a Writer with a chat template answers turn by turn.

    Args:
        system: the system's turn, before all others.
    """

    def __init__(self, writer: Writer, system: str | None = None) -> None:
        assert writer.side.chat is not None, "a conversation needs a chat template"
        self.writer: Writer = writer
        self.chat: Chat | Dialogue = writer.side.chat
        self.messages: list[Message] = system_turn(self.chat, system)

    def answer(self, line: str, page: Page | None) -> Answers:
        """Answer a turn. Both turns become part of the conversation, whose oldest ones are forgotten as it outgrows the
        model's context, unless the writer has a context of its own.

        Raises: ValueError for a turn that is too long; the conversation is then as it was before.
        """
        messages = [*self.messages, Message(role="user", content=self.chat.plain(line))]
        tokens, system = self.chat.encode(messages), messages[0]["role"] == "system"
        while self.writer.context is None and len(tokens) > self.writer.model.config.max_seq_len:
            if len(messages) < 3 + system:  # the turn alone is too long
                break
            del messages[system : system + 2]
            tokens = self.chat.encode(messages)
        answers = self.writer.write([tokens], page)
        (row,) = answers.rows
        said = self._said(tokens, row).lstrip(" ")  # V2's answers begin with the space that its template writes
        self.messages = [*messages, Message(role="assistant", content=said)]
        return answers

    def _said(self, prompt: list[int], row: Answer) -> str:
        """Return an answer as the content of a message, without its stop string and what follows that.

        Tokens of the template before the stop string stay tokens.
        """
        if row.finish != "stop":
            return self.chat.answer(row.tokens)
        if isinstance(self.chat, Dialogue):
            return self.chat.plain(row.text)
        stream, written = self.chat.tokenizer.stream(), set(self.chat.tokenizer.markup.values())
        stream.decode(prompt)
        length = n_tokens = n_characters = 0  # in all, and up to the last token of the template
        for i, token in enumerate(row.tokens, 1):
            length += len(stream.decode([token]))
            if token in written and length <= len(row.text):
                n_tokens, n_characters = i, length
        return self.chat.answer(row.tokens[:n_tokens]) + self.chat.plain(row.text[n_characters:])


def system_turn(chat: Chat | Dialogue, system: str | None) -> list[Message]:
    """Return the turn before a conversation, if there is one."""
    return [] if system is None else [Message(role="system", content=chat.plain(system))]


def figures(stats: Stats, speculative: bool) -> dict[str, Any]:
    """Return the counts and times of a generation by name: times in seconds, sizes in bytes."""
    names = ["prompt_tokens", "new_tokens", "tokens_per_s", "seconds", "prefill_seconds"]
    names += ["cache_bytes_per_token", "cache_fixed_bytes", "cache_bytes"]
    if speculative:
        names += ["steps", "drafted", "accepted", "acceptance_rate", "tokens_per_step", "draft_seconds"]
    return {name: getattr(stats, name) for name in names}


def turns_in_words(turns: Sequence[Stats]) -> str:
    """Return the answers of a conversation, their tokens and rate in one line."""
    tokens, seconds = sum(turn.decoded_tokens for turn in turns), sum(turn.seconds for turn in turns)
    answers = "1 answer" if len(turns) == 1 else f"{len(turns)} answers"
    return f"{answers}, {sum(turn.new_tokens for turn in turns)} new tokens{_rate(tokens / seconds if seconds else 0)}"


def figures_in_words(stats: Stats, speculative: bool) -> str:
    """Return the figures of a generation in lines of at most 80 columns. The last has the tokens and their rate."""
    fixed = f" + {human(stats.cache_fixed_bytes, 'B')}" if stats.cache_fixed_bytes else ""
    lines = [
        f"prompt {stats.prompt_tokens} tokens, {stats.prefill_seconds:.2f} s; "
        f"cache {stats.cache_bytes_per_token:,.0f} bytes a token{fixed}, {human(stats.cache_bytes, 'B')} in all"
    ]
    if speculative and stats.drafted:
        lines.append(f"{stats.acceptance_rate:.0%} of drafts accepted, {stats.tokens_per_step:.2f} tokens a step")
        share = stats.draft_seconds / stats.seconds
        lines.append(
            f"guessing took {share:.0%} of the time: at most {stats.most_speedup:.2f} times as fast as without"
        )
    return "\n".join([*lines, f"{stats.new_tokens} new tokens{_rate(stats.tokens_per_s)}"])


def _rate(tokens_per_s: float) -> str:
    return f", {human(tokens_per_s, 'token/s')}" if tokens_per_s else ""
