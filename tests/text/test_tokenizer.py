"""Tokenizers: every text comes back, no text can spell a special token, and the command that trains one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from dsmini.config import DataConfig
from dsmini.data.corpus import Corpus, load_corpus
from dsmini.data.documents import CHUNK, find, measure
from dsmini.data.split import split
from dsmini.data.texts import read_texts
from dsmini.data.tokenising import lines
from dsmini.text.bpe import SPECIAL_TOKENS, train_bpe
from dsmini.text.tokenizer import END_TOKENS, FIM_TOKENS, BPETokenizer, ByteTokenizer, load_tokenizer
from tests.helpers.commands import TINY, run, run_all

TEXT = "def hello(naïve):\n    return '日本語 🙂 12345', naïve.encode()\n\n\n# the end, the end; the end\n" * 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text and a small tokenizer trained on it."""
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
    vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{i:02X}>": 2 + i for i in range(256)}, "▁": 258, "a": 259, "▁a": 260}
    library = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    library.add_special_tokens(["<unk>", "</s>"])
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = decoders.Replace("▁", " ")
    library.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    path = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    library.save(str(path))
    return BPETokenizer(path)


TOKENIZERS = ["bytes", "bpe", "byte_fallback"]


def named(name: str, request: pytest.FixtureRequest) -> Any:
    return ByteTokenizer() if name == "bytes" else request.getfixturevalue(name)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_text_comes_back_whole_and_token_by_token(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = named(name, request)

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


@pytest.mark.parametrize("name", TOKENIZERS[:2])  # byte fallback looks back: one bad byte undoes the good before it
def test_a_stream_of_any_tokens_is_their_text(name: str, request: pytest.FixtureRequest) -> None:
    """A model that has learned little writes bytes that are not UTF-8."""
    tokenizer = named(name, request)

    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    def check(tokens: list[int]) -> None:
        stream = tokenizer.stream()
        said = "".join(stream.decode([token]) for token in tokens) + stream.decode([], final=True)
        assert said == tokenizer.decode(tokens)

    check()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_is_held_back_until_it_is_whole(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = named(name, request)
    stream, (first, *tokens) = tokenizer.stream(), tokenizer.encode("a🜁").tolist()
    assert stream.decode([first]) == "a" and len(tokens) >= 3
    assert [stream.decode([token]) for token in tokens] == [*[""] * (len(tokens) - 1), "🜁"]


def test_ids_of_a_model_that_are_no_bytes_are_shown_as_such() -> None:
    """A model may have more ids than there are bytes, and write any of them."""
    assert ByteTokenizer().decode([97, 256, 98, 99999]) == "a�b�"
    stream = ByteTokenizer().stream()
    assert [stream.decode([id]) for id in (97, 0xC3, 300, 98)] == ["a", "", "��", "b"]


@pytest.mark.parametrize("special", [*END_TOKENS[:1], *FIM_TOKENS, SPECIAL_TOKENS[0], SPECIAL_TOKENS[2]])
def test_a_text_cannot_spell_a_special_token(bpe: BPETokenizer, special: str) -> None:
    tokens = bpe.encode(f"before{special}after")
    assert tokens.min() >= len(SPECIAL_TOKENS)
    assert bpe.decode(tokens.tolist()) == f"before{special}after"


def test_tokens_called_ordinary_cannot_be_spelled(trained: Path, tmp_path: Path) -> None:
    """As in DeepSeek's own file, whose fill-in-the-middle tokens are not marked special."""
    content = json.loads((trained / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = BPETokenizer(tmp_path / "t.json")
    assert tokenizer.encode("".join((*END_TOKENS[:1], *FIM_TOKENS))).min() >= len(SPECIAL_TOKENS)


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


def test_the_corpus_is_the_text(trained: Path, tmp_path: Path, bpe: BPETokenizer) -> None:
    corpus = corpus_with(trained, tmp_path)
    assert corpus.train.dtype == np.uint16
    train, val = bpe.decode(corpus.train.tolist()), bpe.decode(corpus.val.tolist())
    assert train + val == TEXT
    assert 0 <= len(train.encode()) - int(0.9 * len(TEXT.encode())) <= 3
    assert corpus.val_bytes == len(val.encode())
    assert corpus.bytes_per_token == len(val.encode()) / len(corpus.val) > 1.5


@pytest.mark.parametrize("cut", range(8))
def test_no_character_is_cut(trained: Path, tmp_path: Path, bpe: BPETokenizer, cut: int) -> None:
    text = "x" * cut + "🙂" * 200
    (tmp_path / "emoji.txt").write_text(text)
    corpus = corpus_with(trained, tmp_path, path=tmp_path / "emoji.txt")
    assert bpe.decode(corpus.train.tolist()) + bpe.decode(corpus.val.tolist()) == text


def test_documents_of_tokens_are_rearranged_whole(trained: Path, tmp_path: Path, bpe: BPETokenizer) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / f"texts/{i}.txt").write_text(f"números {i}, " * 9)
    corpus = corpus_with(trained, tmp_path, path=tmp_path / "texts", fim_rate=1.0)
    assert bpe.fim is not None
    texts = bpe.decode(corpus.train.tolist()).split(END_TOKENS[0])[:-1]
    assert corpus.rearranged == len(texts) > 30
    for text in texts:
        assert text.startswith(FIM_TOKENS[0])
        prefix, rest = text.removeprefix(FIM_TOKENS[0]).split(FIM_TOKENS[1])
        suffix, middle = rest.split(FIM_TOKENS[2])
        assert (tmp_path / f"texts/{(prefix + middle + suffix).split()[1][:-1]}.txt").read_text() == (
            prefix + middle + suffix
        )
    assert bpe.fim.begin not in corpus.val


def test_pieces_of_a_large_text_have_its_tokens(bpe: BPETokenizer) -> None:
    text = Path(__file__).read_bytes()
    text *= 5 * CHUNK // (4 * len(text))
    pieces = list(lines(text[i : i + CHUNK] for i in range(0, len(text), CHUNK)))
    assert len(pieces) > 1
    assert np.array_equal(np.concatenate(bpe.encode_all(pieces)), bpe.encode(text))


def test_the_vocabulary_must_hold_all_tokens(trained: Path, tmp_path: Path, bpe: BPETokenizer) -> None:
    size = bpe.vocab_size
    said = rf"vocab_size={size - 1} is less than the {size} tokens of .*; use --model.vocab-size {size}"
    with pytest.raises(ValueError, match=said):
        corpus_with(trained, tmp_path, size - 1)
    assert len(corpus_with(trained, tmp_path, size).train) > 100


def test_the_end_token_is_the_first_known_one(tmp_path: Path) -> None:
    library = Tokenizer(models.BPE(vocab={"a": 0, "b": 7}, merges=[]))
    library.add_special_tokens(["<eos>", AddedToken("</s>")])
    library.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.end_of_document == library.token_to_id("</s>") and tokenizer.fim is None
    assert tokenizer.vocab_size == max(library.get_vocab().values()) + 1
    with pytest.raises(ValueError, match=r"fim_rate=0.5 needs the tokens .*fim.* which .*t.json does not have"):
        corpus_with(tmp_path, tmp_path, tokenizer=tmp_path / "t.json", fim_rate=0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no tokenizer file .*t.json; name a tokenizer.json"),
        ("{", "is not a tokenizer.json"),
        ("[]", "is not a tokenizer.json"),
        ('{"model": 3}', "is not a tokenizer.json"),
        (Tokenizer(models.BPE()).to_str(), "has no token that ends a document; want one of <｜end▁of▁sentence｜>"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "t.json")


def test_a_missing_library_is_a_sentence(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'tokenizers>=0\.20'"):
        load_tokenizer(trained / "tokenizer.json")
    with pytest.raises(ValueError, match=r"pip install 'tokenizers>=0\.20'"):
        train_bpe([], 300)
    assert load_tokenizer(None).vocab_size == 256


def test_a_tokenizer_is_trained_and_trained_with(trained: Path, tmp_path: Path) -> None:
    command = f"dsmini.tokenize {trained / 'book.txt'} --vocab-size 300 --json"
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    pieces = split(measure(find(trained / "book.txt"))[0], 0.1, whole_characters=True).train
    assert (tmp_path / "tokenizer.json").read_text() == train_bpe(
        read_texts(pieces), 300
    )  # the same from another process
    figures = json.loads(done.stdout)
    assert figures["left_out"] == figures["not_utf8"] == []
    assert figures["vocab_size"] == 300 and figures["documents"] == 1 and figures["bytes"] == len(TEXT.encode())
    assert figures["bytes_per_token"] == figures["held_out_bytes"] / figures["held_out_tokens"] > 1
    assert BPETokenizer(tmp_path / "tokenizer.json").fim is not None
    advice = next(line for line in done.stderr.splitlines() if "Train with it" in line)
    train = f"{advice.split('python -m ')[1]} --out runs/x --train.steps 2 --data.workers 2 --data.fim-rate 1 --json"
    done = run(f"{train} {TINY}", tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    per_token = json.loads((tmp_path / "runs/x/corpus.json").read_text())
    per_token = per_token["val_bytes"] / per_token["val_tokens"]
    assert summary["val_bits_per_byte"] == pytest.approx(summary["val_loss"] / np.log(2) / per_token)
    assert "tokenised once into runs/corpus" in done.stderr and "1 training documents rearranged" in done.stderr
    assert (tmp_path / "runs/x/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").unlink()  # the run keeps its own
    generate = "--prompt 'def naïve' --max-new-tokens 9"
    commands = [f"runs/x {generate} --json", f"runs/x/checkpoints/step-000002 {generate}"]
    (good, whole), (fine, streamed) = run_all([("dsmini.generate", arguments) for arguments in commands], tmp_path)
    assert good == fine == 0, whole + streamed
    text = json.loads(whole)["text"]
    assert text.startswith("def naïve") and streamed.startswith(text + "\n")
    (tmp_path / "runs/x/tokenizer.json").unlink()
    ((status, said),) = run_all([("dsmini.generate", "runs/x")], tmp_path)
    assert status == 2 and "runs/x has no tokenizer.json, which it was trained with" in said


BAD = {
    "nothing.txt": "does not exist",
    "nothing.txt --out there.json": "does not exist",
    "book.txt --vocab-size 100": "--vocab-size 100 is not from 262",
    "book.txt --out there.json": "--out there.json exists; choose a new name, or remove it",
    "book.txt --out no/there.json": "there is no folder no for --out",
    "book.txt --out /proc/there.json": "--out /proc/there.json cannot be written: ",
    "book.txt --val-fraction 2": "is not between 0 and 1",
    "book.txt --vocab 300": "--vocab",
}


def test_mistakes_are_sentences_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    (tmp_path / "there.json").write_text("mine")
    answers = run_all([("dsmini.tokenize", arguments) for arguments in BAD], tmp_path)
    for (arguments, message), (status, said) in zip(BAD.items(), answers, strict=True):
        assert status == 2 and message in " ".join(said.replace("│", " ").split()), (arguments, said)
        assert "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"book.txt", "there.json"}
    ((status, said),) = run_all([("dsmini.tokenize", "--help")], tmp_path)
    assert status == 0 and "python -m dsmini.tokenize" in said and "default" in said
