"""Tokenizer files that fail in the library, or are not files: each is refused in a sentence that names the file."""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dsmini.text.library import named
from dsmini.text.text_side import read_text_side
from dsmini.text.tokenizer import BPETokenizer
from dsmini.text.tokenizer_file import MOST_VALUES
from tests.helpers.text_folders import save_text_side


def test_panic_of_a_regular_expression_is_a_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    library = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    library.save(str(tmp_path / "t.json"))
    tokenizer = BPETokenizer(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"t\.json fails on a text: .*retry-limit.*; name another tokenizer.json"):
        tokenizer.encode("a" * 50 + "!")
    assert capfd.readouterr().err == "", "Rust's own message"
    assert tokenizer.encode("aa").tolist() == [0, 0]
    print("later", file=sys.stderr)
    assert capfd.readouterr().err == "later\n"


def test_other_output_during_a_panic_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def panic(message: str) -> None:
        with named(tmp_path, "fails", quiet=True):
            os.write(2, b"before" + message.encode())
            raise type("PanicException", (BaseException,), {})

    for message in ("", "\nthread 'x' (3) panicked at a.rs:1\n"):
        with pytest.raises(ValueError, match="fails"):
            panic(message)
        assert capfd.readouterr().err == "before"
    with named(tmp_path, "fails", quiet=True), named(tmp_path, "fails", quiet=True):
        print("thread 'x' panicked at a party", file=sys.stderr)
    assert capfd.readouterr().err == "thread 'x' panicked at a party\n"


def with_steps(path: Path, **parts: Any) -> Path:
    """Write a tokenizer.json of two letters with these parts."""
    library = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    for name, part in parts.items():
        setattr(library, name, part)
    library.save(str(path))
    return path


any_character = Regex(".")
GROWING = {
    "doubling": {"normalizer": normalizers.Sequence([normalizers.Replace("a", "aa")] * 28)},
    "long": {"normalizer": normalizers.Replace(any_character, "a" * 1_000_000)},
    "between": {"normalizer": normalizers.Sequence([normalizers.Replace(Regex("(?=a)"), "a")] * 28)},
    "prepended": {"normalizer": normalizers.Prepend("a" * 1_000_000)},
    "bytes": {"normalizer": normalizers.Sequence([normalizers.ByteLevel()] * 28)},
    "ligatures": {
        "normalizer": normalizers.Sequence([normalizers.Replace(any_character, "\ufdfa"), normalizers.NFKD()] * 9)
    },
    "bytes before splitting": {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 28)},
    "decoder": {"decoder": decoders.Sequence([decoders.Replace("a", "aa")] * 28)},
    "spaces": {"decoder": decoders.Sequence([decoders.BPEDecoder(suffix="")] * 28)},
    "template": {
        "post_processor": processors.Sequence([processors.TemplateProcessing(single="$A $A", pair="$A $B")] * 28)
    },
}


@pytest.mark.parametrize("name", GROWING)
def test_steps_that_multiply_a_text_are_refused(tmp_path: Path, name: str) -> None:
    path = with_steps(tmp_path / "t.json", **GROWING[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"t\.json makes texts more than 1,000 times as long in its .*; name another"):
        BPETokenizer(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_steps_that_published_files_have_are_taken(tmp_path: Path) -> None:
    sentencepiece = {
        "normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        "decoder": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    }
    many = [normalizers.Replace(letter, letter.lower()) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    gpt = [pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")] * 3 + [pre_tokenizers.ByteLevel(use_regex=False)]
    others = {
        "normalizer": normalizers.Sequence([normalizers.NFKC(), *many, normalizers.Replace(Regex(" {2,}"), " ")]),
        "pre_tokenizer": pre_tokenizers.Sequence(gpt),
        "decoder": decoders.ByteLevel(),
        "post_processor": processors.TemplateProcessing(single="a $A b", special_tokens=[("a", 0), ("b", 1)]),
    }
    for parts in (sentencepiece, others):
        assert BPETokenizer(with_steps(tmp_path / "t.json", **parts)).encode("ba").tolist() == [1, 0]


def test_vocabulary_of_any_published_size_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads(with_steps(tmp_path / "t.json").read_text())
    names = [f"{i:b}".replace("0", "a").replace("1", "b") for i in range(2, 2000)]
    content["model"]["vocab"] |= {name: id for id, name in enumerate(names, 2)}
    content["model"]["merges"] = [[name[:-1], name[-1]] for name in names]
    (tmp_path / "t.json").write_text(json.dumps(content))
    monkeypatch.setattr("dsmini.text.library.MOST_VALUES", MOST_VALUES // 500)  # of 2,000 tokens
    assert BPETokenizer(tmp_path / "t.json").vocab_size == 2000
    monkeypatch.setattr("dsmini.text.library.MOST_VALUES", 2000)
    with pytest.raises(ValueError, match=r"t\.json holds about .* values, want 2,000 or fewer"):
        BPETokenizer(tmp_path / "t.json")


def test_step_that_hides_its_type_is_refused(tmp_path: Path) -> None:
    content = json.loads(with_steps(tmp_path / "t.json").read_text())
    for step in (
        [{"String": "a"}, "b" * 10_000],
        {"normalizers": []},
        [[]],
        {"pattern": {"String": "a"}, "content": ""},
    ):
        (tmp_path / "t.json").write_text(json.dumps(content | {"normalizer": step}))
        with pytest.raises(ValueError, match=r"t\.json has a step without a type in its normalizer"):
            BPETokenizer(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dropout": 0.5}, "has dropout 0.5, which gives a text other tokens each time; want null"),
        ({"vocab": {"a": 0, "b": 0}}, "gives 'a' and 'b' the same id 0"),
        ({"vocab": {"a": 0, "b" * 20_000: 1}}, "has a token of 20,000 characters, want 10,000 or fewer"),
        ({"end_of_word_suffix": "b" * 20_000}, "has a token of 20,000 characters, want 10,000 or fewer"),
    ],
    ids=["dropout", "same id", "long token", "long suffix"],
)
def test_model_that_cannot_be_meant_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    content = json.loads(with_steps(tmp_path / "t.json").read_text())
    content["model"] |= changes
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"t\.json {sentence}; name another tokenizer\.json"):
        BPETokenizer(tmp_path / "t.json")


def test_vocabulary_without_its_unknown_token_is_a_sentence(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"x": 0}, unk_token="[UNK]")).save(str(tmp_path / "t.json"))
    tokenizer = BPETokenizer(tmp_path / "t.json")
    for fails in (lambda: tokenizer.encode("y"), lambda: tokenizer.beginning):
        with pytest.raises(ValueError, match=r"t\.json fails on .*Missing \[UNK\] token"):
            fails()
    with pytest.raises(ValueError, match=r"t\.json fails on token ids"):
        tokenizer.decode([2**40])


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, '{"added_tokens": 3}', '{"added_tokens": [3]}'])
def test_malformed_file_is_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=r"t\.json is not a tokenizer\.json"):
        BPETokenizer(tmp_path / "t.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "broken link"])
def test_only_regular_files_are_read(tmp_path: Path, name: str, kind: str) -> None:
    folder = save_text_side(tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    {"folder": os.mkdir, "pipe": os.mkfifo, "broken link": lambda path: os.symlink("nothing", path)}[kind](
        folder / name
    )
    with pytest.raises(ValueError, match=rf"{name}: it is .*, want a regular file|there is no file .*{name}"):
        read_text_side(folder, chat=True)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_token_outside_the_vocabulary_is_refused(tmp_path: Path, name: str) -> None:
    folder = save_text_side(tmp_path / "m")
    (folder / "config.json").write_text('{"vocab_size": 400}')
    for token in (400, 10**30):
        (folder / name).write_text(json.dumps({"vocab_size": 400, "eos_token_id": [3, token]}))
        with pytest.raises(
            ValueError, match=rf"eos_token_id in .*{name} is \[3, {token}\], but the model has 400 tokens"
        ):
            read_text_side(folder)
    (folder / name).write_text('{"vocab_size": 400, "eos_token_id": [3, 399]}')
    assert read_text_side(folder).ends == (3, 399)
