"""Answers while they come: a generation's rows as text on a page, and what is told of them at the end."""

import sys
from collections.abc import Sequence
from typing import Any, TextIO

from dsmini.inference.generation import Generation, Stats
from dsmini.text.continuation import Continuation

# what moves a terminal's cursor or changes its colours is shown as a picture; of C1 there is none
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Page:
    """Shows texts that grow at the same time one below the other: the first that has not ended streams, and those
    below it wait.

    Args:
        headings: one for each text; a single text is shown without.
    """

    def __init__(self, headings: Sequence[str], out: TextIO | None = None) -> None:
        self._headings, self._out = headings, sys.stdout if out is None else out
        self._waiting = [""] * len(headings)
        self._ended = [False] * len(headings)
        self._at = -1
        self._turn()

    def add(self, i: int, piece: str) -> None:
        if i == self._at:
            self._write(piece)
        else:
            self._waiting[i] += piece

    def end(self, i: int) -> None:
        """Nothing more is added to this text. May be said twice."""
        self._ended[i] = True
        while self._at < len(self._ended) and self._ended[self._at]:
            self._write("\n")
            self._turn()

    def _turn(self) -> None:
        self._at += 1
        if self._at == len(self._headings):
            return
        heading = f"== {self._headings[self._at]} ==\n" if len(self._headings) > 1 else ""
        self._write(("\n" if self._at else "") + heading + self._waiting[self._at])

    def _write(self, text: str) -> None:
        self._out.write(text.translate(CONTROLS) if self._out.isatty() else text)
        self._out.flush()


def follow(
    generation: Generation, rows: Sequence[Continuation], prompts: Sequence[str], max_new_tokens: int, page: Page | None
) -> bool:
    """Run a generation to its end, or until Ctrl-C; what was written by then is in the rows, and on the page.

    Args:
        prompts: what the page shows before each row.

    Returns: whether it was Ctrl-C.
    """
    interrupted = False
    try:
        if page is not None:
            for i, text in enumerate(prompts):
                page.add(i, text)
        for new in generation:
            for i, (row, tokens) in enumerate(zip(rows, new, strict=True)):
                piece = row.add(tokens)
                if row.ended is not None or row.n_tokens == max_new_tokens:
                    generation.end(i)
                    piece += row.close()
                if page is not None:
                    page.add(i, piece)
                    if row.ended is not None or row.n_tokens == max_new_tokens:
                        page.end(i)
    except KeyboardInterrupt:
        interrupted = True
    for i, row in enumerate(rows):
        piece = row.close()
        if page is not None:
            page.add(i, piece)
            page.end(i)
    return interrupted


def finish(row: Continuation, max_new_tokens: int) -> str:
    """Why a row ended: "end" token, "stop" string, "length", or it was "interrupted"."""
    return row.ended or ("length" if row.n_tokens >= max_new_tokens else "interrupted")


def figures(stats: Stats, speculative: bool) -> dict[str, Any]:
    """A generation in numbers: times in seconds, sizes in bytes."""
    names = ["prompt_tokens", "new_tokens", "tokens_per_s", "seconds", "prefill_seconds"]
    names += ["cache_bytes_per_token", "cache_bytes"]
    names += ["steps", "drafted", "accepted", "acceptance_rate", "tokens_per_step"] if speculative else []
    return {name: getattr(stats, name) for name in names}


def say_figures(stats: Stats, speculative: bool) -> str:
    """The same in a line."""
    parts = [
        f"{stats.new_tokens} new tokens, {stats.tokens_per_s:.0f} tokens/s",
        f"prompt {stats.prompt_tokens} tokens, {stats.prefill_seconds:.2f} s",
        f"cache {stats.cache_bytes_per_token:,.0f} bytes a token, {stats.cache_bytes:,} in all",
    ]
    if speculative:
        parts.append(f"{stats.acceptance_rate:.0%} of drafts accepted, {stats.tokens_per_step:.2f} tokens a step")
    return "; ".join(parts)
