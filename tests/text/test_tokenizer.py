"""Tokenizers: every text comes back, also while it comes, none spells a special token, and the command that trains."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsmini.config import DataConfig
from dsmini.data.corpus import Corpus, load_corpus
from dsmini.data.documents import find, measure, read_texts, split
from dsmini.text.prompts import Continuation
from dsmini.text.tokenizer import (
    END_TOKENS,
    FIM_TOKENS,
    SPECIAL_TOKENS,
    BPETokenizer,
    ByteTokenizer,
    byte_tokenizer_json,
    load_tokenizer,
    train_bpe,
)
from tests.helpers.commands import TINY, check_refused, finish
from tests.helpers.configs import refusal
from tests.helpers.text_folders import tokenizers

TEXT = "def hello(naïve):\n    return '日本語 🙂 12345', naïve.encode()\n\n\n# the end, the end; the end\n" * 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text and a small tokenizer trained on it."""
    tokenizers()
    folder = tmp_path_factory.mktemp("trained")
    (folder / "book.txt").write_text(TEXT)
    pieces = split(measure(find(folder / "book.txt"))[0], 0.1, whole_characters=True).train
    (folder / "tokenizer.json").write_text(train_bpe(read_texts(pieces), 340))
    return folder


@pytest.fixture(scope="module")
def bpe(trained: Path) -> BPETokenizer:
    return BPETokenizer(trained / "tokenizer.json")


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> BPETokenizer:
    """Return a tokenizer of the Llama family, which spells unknown characters in bytes."""
    tk = tokenizers()
    vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{i:02X}>": 2 + i for i in range(256)}, "▁": 258, "a": 259, "▁a": 260}
    library = tk.Tokenizer(tk.models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    library.add_special_tokens(["<unk>", "</s>"])
    library.normalizer = tk.normalizers.Sequence([tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")])
    dec = tk.decoders
    library.decoder = dec.Sequence([dec.Replace("▁", " "), dec.ByteFallback(), dec.Fuse(), dec.Strip(" ", 1, 0)])
    path = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    library.save(str(path))
    return BPETokenizer(path)


def test_texts_are_whole_whatever_the_file_says_of_lengths(trained: Path, bpe: BPETokenizer, tmp_path: Path) -> None:
    library = tokenizers().Tokenizer.from_file(str(trained / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=900)
    library.save(str(tmp_path / "short.json"))
    assert np.array_equal(BPETokenizer(tmp_path / "short.json").encode(TEXT[:90]), bpe.encode(TEXT[:90]))


@pytest.fixture(params=["bytes", "bpe", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue(request.param)


def test_every_text_comes_back_whole_and_token_by_token(tokenizer: Any) -> None:
    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30))
    def check(text: str) -> None:
        tokens = tokenizer.encode(text).tolist()
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.encode(text.encode()).tolist() == tokens
        stream = tokenizer.stream()
        parts = [stream.decode([token]) for token in tokens]
        assert "".join(parts) + stream.decode([], final=True) == text
        assert "�" in text or not any("�" in part for part in parts)

    check()


# byte fallback looks back: one bad byte undoes the good before it
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"], indirect=True)
def test_a_stream_of_any_tokens_is_their_text(tokenizer: Any) -> None:
    """A model that has learned little writes bytes that are not UTF-8."""

    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    def check(tokens: list[int]) -> None:
        stream = tokenizer.stream()
        said = "".join(stream.decode([token]) for token in tokens) + stream.decode([], final=True)
        assert said == tokenizer.decode(tokens)

    check()


def test_a_character_is_held_back_until_it_is_whole(tokenizer: Any) -> None:
    stream, (first, *tokens) = tokenizer.stream(), tokenizer.encode("a🜁").tolist()
    assert stream.decode([first]) == "a" and len(tokens) >= 3
    assert [stream.decode([token]) for token in tokens] == [*[""] * (len(tokens) - 1), "🜁"]


@pytest.mark.parametrize("tokenizer", ["bpe", "byte_fallback"], indirect=True)
def test_a_run_of_replacement_characters_is_read_in_linear_time(
    tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them may be the beginning of a character."""
    text = "ab" + "�" * 400 + "é日🙂 b"
    tokens, decode, n = tokenizer.encode(text).tolist(), BPETokenizer.decode, 0

    def counted(self: BPETokenizer, tokens: Sequence[int]) -> str:
        nonlocal n
        n += len(tokens)
        return decode(self, tokens)

    monkeypatch.setattr(BPETokenizer, "decode", counted)
    stream = tokenizer.stream()
    pieces = [stream.decode([token]) for token in tokens]
    assert "".join(pieces) == text and pieces[-1]
    assert n < 100 * len(tokens)


def test_ids_of_a_model_that_are_no_bytes_are_shown_as_such() -> None:
    """A model may have more ids than there are bytes, and write any of them."""
    assert ByteTokenizer().decode([97, 256, 98, 99999]) == "a�b�"


@pytest.mark.parametrize("special", [True, False])
def test_a_text_cannot_spell_a_special_token(trained: Path, tmp_path: Path, special: bool) -> None:
    """In DeepSeek's own file the tokens for fill-in-the-middle are not marked special."""
    content = json.loads((trained / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = special
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = BPETokenizer(tmp_path / "t.json")
    for token in SPECIAL_TOKENS:
        tokens = tokenizer.encode(f"before{token}after")
        assert tokens.min() >= len(SPECIAL_TOKENS)
        assert tokenizer.decode(tokens.tolist()) == f"before{token}after"
    assert tokenizer.fim is not None and tokenizer.decode(tokenizer.fim) == "".join(FIM_TOKENS)


def test_a_document_cannot_end_itself(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / f"texts/{i}.txt").write_text(f"number {i} {END_TOKENS[0]} and {FIM_TOKENS[1]} on " * 5)
    corpus = corpus_with(trained, tmp_path, path=tmp_path / "texts")
    assert np.isin(corpus.train, range(len(SPECIAL_TOKENS))).sum() + corpus.val.tolist().count(1) == 40
    assert corpus.train[-1] == corpus.val[-1] == corpus.end_of_document == 1


def corpus_with(trained: Path, place: Path, vocab_size: int = 400, **config: Any) -> Corpus:
    data = DataConfig(**{"path": trained / "book.txt", "tokenizer": trained / "tokenizer.json"} | config)
    return load_corpus(data, 16, vocab_size, place / "corpus")


def test_the_corpus_is_the_text_and_no_character_is_cut(trained: Path, tmp_path: Path, bpe: BPETokenizer) -> None:
    for number, text in enumerate([TEXT, *("x" * cut + "🙂" * 200 for cut in range(8))]):
        (tmp_path / f"{number}.txt").write_text(text)
        corpus = corpus_with(trained, tmp_path, path=tmp_path / f"{number}.txt")
        train, val = bpe.decode(corpus.train.tolist()), bpe.decode(corpus.val.tolist())
        assert train + val == text and corpus.train.dtype == np.uint16
        assert 0 <= len(train.encode()) - int(0.9 * len(text.encode())) <= 3
        assert (
            corpus.val_bytes == len(val.encode()) and corpus.bytes_per_token == corpus.val_bytes / len(corpus.val) > 1.5
        )
    size = bpe.vocab_size
    said = refusal(corpus_with, trained, tmp_path, size - 1)
    assert f"vocab_size={size - 1} is less than the {size} tokens of " in said and f"size {size}" in said


def test_the_end_token_is_the_first_known_one(tmp_path: Path) -> None:
    tk = tokenizers()
    library = tk.Tokenizer(tk.models.BPE(vocab={"a": 0, "b": 7}, merges=[]))
    library.save(str(tmp_path / "none.json"))
    said = refusal(load_tokenizer, tmp_path / "none.json")
    assert "has no token that ends a document; want one of <｜end▁of▁sentence｜>" in said
    library.add_special_tokens(["<eos>", tk.AddedToken("</s>")])
    library.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.end_of_document == library.token_to_id("</s>") and tokenizer.fim is None
    assert tokenizer.vocab_size == max(library.get_vocab().values()) + 1
    with pytest.raises(ValueError, match=r"fim_rate=0.5 needs the tokens .*fim.* which .*t.json does not have"):
        corpus_with(tmp_path, tmp_path, tokenizer=tmp_path / "t.json", fim_rate=0.5)


def test_a_missing_library_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    for call in ((load_tokenizer, tmp_path / "tokenizer.json"), (train_bpe, [], 300)):
        assert refusal(*call).endswith("needs the tokenizers library; install it with: pip install 'tokenizers>=0.20'")
    assert load_tokenizer(None).vocab_size == 256


def test_bytes_as_a_file_of_the_library_have_the_ids_of_bytes() -> None:
    tokenizer = tokenizers().Tokenizer.from_str(byte_tokenizer_json())
    spaces = "\x00\x01 \u0100 Ġ\u00ad\u00a0\r\n  x  "
    for text in ("", "def f(x):\n\treturn 'ü€😀'", spaces, "a" * 5000, "".join(map(chr, range(256)))):
        ids = tokenizer.encode(text).ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() == 256


def test_a_tokenizer_is_trained_and_trained_with(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "book.txt", tmp_path)
    done = finish("dsmini.tokenize book.txt --vocab-size 300 --json --out 'my tokenizer.json'", tmp_path)
    pieces = split(measure(find(trained / "book.txt"))[0], 0.1, whole_characters=True).train
    assert (tmp_path / "my tokenizer.json").read_text() == train_bpe(read_texts(pieces), 300)
    figures = json.loads(done.stdout)
    known = {"left_out": [], "not_utf8": [], "vocab_size": 300, "documents": 1, "bytes": len(TEXT.encode())}
    assert figures | known == figures
    assert figures["bytes_per_token"] == figures["held_out_bytes"] / figures["held_out_tokens"] > 1
    advice = next(line for line in done.stderr.splitlines() if "Train with it" in line).split("dsmini.train ")[1]
    flags = "--out runs/x --train.steps 2 --data.workers 2 --data.fim-rate 1 --json"
    done = finish(f"dsmini.train {advice} {flags} {TINY}", tmp_path)
    summary, corpus = json.loads(done.stdout), json.loads((tmp_path / "runs/x/corpus.json").read_text())
    per_token = corpus["val_bytes"] / corpus["val_tokens"]
    assert summary["val_bits_per_byte"] == pytest.approx(summary["val_loss"] / np.log(2) / per_token)
    assert "tokenized once into runs/corpus-cache" in done.stderr and "1 training documents rearranged" in done.stderr
    (tmp_path / "my tokenizer.json").unlink()  # the run has its own
    asked = "--prompt 'def naïve' --max-new-tokens 9"
    text = json.loads(finish(f"dsmini.generate runs/x {asked} --json", tmp_path).stdout)["text"]
    assert text.startswith("def naïve")
    of_checkpoint = finish(f"dsmini.generate runs/x/checkpoints/step-000002 {asked}", tmp_path)
    assert of_checkpoint.stdout.startswith(text + "\n")
    (tmp_path / "runs/x/tokenizer.json").unlink()
    check_refused("dsmini.generate", tmp_path, {"runs/x": "runs/x has no tokenizer.json, which it was trained with"})


def test_mistakes_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    (tmp_path / "there.json").write_text("mine")
    (tmp_path / "cut.txt").write_text("aé")  # no place to cut in the last tenth
    check_refused("dsmini.tokenize", tmp_path)


# --- tokens as text while they come: stop strings, end tokens, and incomplete characters

# few characters, so that stop strings are met; of one, two, three and four bytes
PIECES = st.text(st.sampled_from("abé日🙂"), max_size=24)
STOPS = st.lists(st.text(st.sampled_from("abé日🙂"), min_size=1, max_size=4), max_size=3)


def until_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Compute the definition: read character by character, and stop with the first complete stop string."""
    for end in range(len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            return text[: end - max(map(len, whole))], True
    return text, False


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"], indirect=True)
def test_text_comes_until_the_first_whole_stop_string(tokenizer: Any) -> None:
    @given(PIECES, STOPS, st.lists(st.integers(1, 5), max_size=30))
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
@given(PIECES, STOPS, st.lists(st.integers(0, 9), max_size=20))
def test_where_a_row_stops_does_not_depend_on_the_tokens_borders(text: str, stops: list[str], sizes: list[int]) -> None:
    row = Continuation(Words(text), stops=stops)
    row.add([*sizes, len(text)])
    row.close()
    assert (row.text, row.ended == "stop") == until_stop(text, stops)


def test_nothing_is_held_back_longer_than_it_must_be() -> None:
    @given(PIECES, STOPS)
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


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"], indirect=True)
def test_an_end_token_is_not_shown_and_nothing_is_read_after_it(tokenizer: Any) -> None:
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
