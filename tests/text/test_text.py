"""Tokens as text while they come: stop strings, end tokens, and incomplete characters."""

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsmini.text.prompts import Continuation
from dsmini.text.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer
from tests.helpers.text_folders import save_tokenizer

# few characters, so that stop strings are met; of one, two, three and four bytes
TEXT = st.text(st.sampled_from("abé日🙂"), max_size=24)
STOPS = st.lists(st.text(st.sampled_from("abé日🙂"), min_size=1, max_size=4), max_size=3)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> BPETokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    save_tokenizer(path)
    return BPETokenizer(path)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue("bpe")


def until_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Compute the definition: read character by character, and stop with the first complete stop string."""
    for end in range(len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            return text[: end - max(map(len, whole))], True
    return text, False


def test_text_comes_until_the_first_whole_stop_string(tokenizer: Tokenizer) -> None:
    @given(TEXT, STOPS, st.lists(st.integers(1, 5), max_size=30))
    def check(text: str, stops: list[str], sizes: list[int]) -> None:
        tokens = tokenizer.encode(text).tolist()
        row = Continuation(tokenizer.stream(), stops=stops)
        shown, at = "", 0
        for size in [*sizes, len(tokens)]:  # as speculative decoding gives them: some at once
            shown += row.add(tokens[at : at + size])
            at += size
            assert row.text == shown
        shown += row.close()
        want, stopped = until_stop(text, stops)
        assert shown == row.text == want
        assert row.ended == ("stop" if stopped else None)

    check()


class Words:
    """A stream whose tokens are numbers of characters, so that one token may hold two stop strings."""

    def __init__(self, text: str) -> None:
        self.text = text

    def decode(self, tokens: Sequence[int], final: bool = False) -> str:
        piece, self.text = self.text[: sum(tokens)], self.text[sum(tokens) :]
        return piece


@example("ab日🙂", ["ab日🙂", "b日"], [4])  # the one that begins first is complete last
@given(TEXT, STOPS, st.lists(st.integers(0, 9), max_size=20))
def test_where_a_row_stops_does_not_depend_on_the_tokens_borders(text: str, stops: list[str], sizes: list[int]) -> None:
    row = Continuation(Words(text), stops=stops)
    row.add([*sizes, len(text)])
    row.close()
    assert (row.text, row.ended == "stop") == until_stop(text, stops)


def test_nothing_is_held_back_longer_than_it_must_be() -> None:
    @given(TEXT, STOPS)
    @example("one\n\nUsual\n\n", ["\n\nUser:"])
    def check(text: str, stops: list[str]) -> None:
        row = Continuation(ByteTokenizer().stream(), stops=stops)
        for end in range(1, len(text) + 1):
            row.add(list(text[end - 1].encode()))
            if row.ended:
                return
            held = text[len(row.text) : end]
            assert held == "" or any(stop != held and stop.startswith(held) for stop in stops)

    check()


def test_an_end_token_is_not_shown_and_nothing_is_read_after_it(tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_document
    row = Continuation(tokenizer.stream(), ends={end}, stops=["bab"])
    tokens = tokenizer.encode("ab").tolist()
    assert row.add([*tokens, end, *tokens]) == "ab"
    assert row.ended == "end" and row.n_tokens == len(tokens) + 1
    assert row.add(tokens) == row.close() == ""


def test_unfinished_character_is_given_up_at_the_end() -> None:
    row = Continuation(ByteTokenizer().stream(), ends={0})
    first, *rest = "🙂".encode()
    assert [row.add([first]), row.add(rest[:1])] == ["", ""]
    assert row.add([0]) == "�" and row.ended == "end"
    row = Continuation(ByteTokenizer().stream(), ends={0}, stops=["�"])
    assert row.add([first, 0]) == "" and row.ended == "stop"


def test_a_prompt_that_ends_inside_a_character_is_continued() -> None:
    stream = ByteTokenizer().stream()
    prompt, rest = b"caf\xc3", b"\xa9!"
    assert stream.decode(prompt) == "caf"
    assert Continuation(stream).add(rest) == "é!"
