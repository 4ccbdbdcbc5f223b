"""Tokenizer files that fail in the library, or are not files: each is refused in a sentence that names the file."""

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsmini.text.library import named
from dsmini.text.text_side import read_text_side
from dsmini.text.tokenizer import BPETokenizer
from dsmini.text.tokenizer_file import MOST_VALUES
from tests.helpers.configs import refusal
from tests.helpers.text_folders import save_text_side, tokenizers

tk = tokenizers()
norm, pre, dec, post = tk.normalizers, tk.pre_tokenizers, tk.decoders, tk.processors


def steps(**parts: Any) -> str:
    """Return a tokenizer.json of two letters with these parts."""
    library = tk.Tokenizer(tk.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    for name, part in parts.items():
        setattr(library, name, part)
    return library.to_str()


def edited(**changes: Any) -> str:
    """Return a tokenizer.json of two letters with these changes of its model, or another normalizer."""
    content = json.loads(steps()) | {"normalizer": changes.pop("normalizer", None)}
    return json.dumps(content | {"model": content["model"] | changes})


LONG = "makes texts more than 1,000 times as long in its {}; name another"
BOTH = dict.fromkeys(("normalizer", "pre_tokenizer"), "normalizer and pre_tokenizer")
ANY = tk.Regex(".")
GROWING = {
    "doubling": ("normalizer", norm.Sequence([norm.Replace("a", "aa")] * 28)),
    "long": ("normalizer", norm.Replace(ANY, "a" * 1_000_000)),
    "between": ("normalizer", norm.Sequence([norm.Replace(tk.Regex("(?=a)"), "a")] * 28)),
    "prepended": ("normalizer", norm.Prepend("a" * 1_000_000)),
    "bytes": ("normalizer", norm.Sequence([norm.ByteLevel()] * 28)),
    "ligatures": ("normalizer", norm.Sequence([norm.Replace(ANY, "\ufdfa"), norm.NFKD()] * 9)),
    "bytes before splitting": ("pre_tokenizer", pre.Sequence([pre.ByteLevel()] * 28)),
    "decoder": ("decoder", dec.Sequence([dec.Replace("a", "aa")] * 28)),
    "spaces": ("decoder", dec.Sequence([dec.BPEDecoder(suffix="")] * 28)),
    "template": ("post_processor", post.Sequence([post.TemplateProcessing(single="$A $A", pair="$A $B")] * 28)),
}
OTHER = "; name another tokenizer.json"
LONG_TOKEN = f"has a token of 20,000 characters, want 10,000 or fewer{OTHER}"
UNTYPED = "has a step without a type in its normalizer"
NOT_ONE = "is not a tokenizer.json"
REFUSALS: dict[str, tuple[str, str]] = {
    **{name: (steps(**{part: step}), LONG.format(BOTH.get(part, part))) for name, (part, step) in GROWING.items()},
    "list": (edited(normalizer=[{"String": "a"}, "b" * 10_000]), UNTYPED),
    "no type": (edited(normalizer={"normalizers": []}), UNTYPED),
    "lists": (edited(normalizer=[[]]), UNTYPED),
    "pattern": (edited(normalizer={"pattern": {"String": "a"}, "content": ""}), UNTYPED),
    "dropout": (edited(dropout=0.5), f"has dropout 0.5, which gives a text other tokens each time; want null{OTHER}"),
    "same id": (edited(vocab={"a": 0, "b": 0}), f"gives 'a' and 'b' the same id 0{OTHER}"),
    "long token": (edited(vocab={"a": 0, "b" * 20_000: 1}), LONG_TOKEN),
    "long suffix": (edited(end_of_word_suffix="b" * 20_000), LONG_TOKEN),
    "deep lists": ("[" * 100_000, NOT_ONE),
    "deep tables": ('{"a":' * 100_000, NOT_ONE),
    "token lists": ('{"added_tokens": 3}', NOT_ONE),
    "tokens": ('{"added_tokens": [3]}', NOT_ONE),
    "half": ("{", NOT_ONE),
    "empty": ("[]", NOT_ONE),
    "model": ('{"model": 3}', NOT_ONE),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_file_that_cannot_be_meant_is_refused(tmp_path: Path, name: str) -> None:
    content, sentence = REFUSALS[name]
    (tmp_path / "t.json").write_text(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert f"t.json {sentence}" in refusal(BPETokenizer, tmp_path / "t.json")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_panic_of_a_regular_expression_is_a_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.json").write_text(steps(pre_tokenizer=pre.Split(tk.Regex("(a+)+$"), "isolated")))
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
        assert "fails" in refusal(panic, message)
        assert capfd.readouterr().err == "before"
    with named(tmp_path, "fails", quiet=True), named(tmp_path, "fails", quiet=True):
        print("thread 'x' panicked at a party", file=sys.stderr)
    assert capfd.readouterr().err == "thread 'x' panicked at a party\n"


PUBLISHED: list[dict[str, Any]] = [
    {
        "normalizer": norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")]),
        "decoder": dec.Sequence([dec.Replace("▁", " "), dec.Fuse(), dec.Strip(" ", 1, 0)]),
    },
    {
        "normalizer": norm.Sequence(
            [norm.NFKC(), *(norm.Replace(a, a.lower()) for a in "ABCDEFGHIJKLM"), norm.Replace(tk.Regex(" {2,}"), " ")]
        ),
        "pre_tokenizer": pre.Sequence(
            [pre.Split(tk.Regex(r"\p{N}{1,3}"), "isolated")] * 3 + [pre.ByteLevel(use_regex=False)]
        ),
        "decoder": dec.ByteLevel(),
        "post_processor": post.TemplateProcessing(single="a $A b", special_tokens=[("a", 0), ("b", 1)]),
    },
]


@pytest.mark.parametrize("parts", PUBLISHED, ids=["sentencepiece", "gpt"])
def test_steps_that_published_files_have_are_taken(tmp_path: Path, parts: dict[str, Any]) -> None:
    (tmp_path / "t.json").write_text(steps(**parts))
    assert BPETokenizer(tmp_path / "t.json").encode("ba").tolist() == [1, 0]


def test_vocabulary_of_any_published_size_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a", "b", *(f"{i:b}".replace("0", "a").replace("1", "b") for i in range(2, 2000))]
    merges = [[name[:-1], name[-1]] for name in names[2:]]
    (tmp_path / "t.json").write_text(edited(vocab={name: id for id, name in enumerate(names)}, merges=merges))
    monkeypatch.setattr("dsmini.text.library.MOST_VALUES", MOST_VALUES // 500)  # of 2,000 tokens
    assert BPETokenizer(tmp_path / "t.json").vocab_size == 2000
    monkeypatch.setattr("dsmini.text.library.MOST_VALUES", 2000)
    with pytest.raises(ValueError, match=r"t\.json holds about .* values, want 2,000 or fewer"):
        BPETokenizer(tmp_path / "t.json")


def test_vocabulary_without_its_unknown_token_is_a_sentence(tmp_path: Path) -> None:
    tk.Tokenizer(tk.models.WordLevel({"x": 0}, unk_token="[UNK]")).save(str(tmp_path / "t.json"))
    tokenizer = BPETokenizer(tmp_path / "t.json")
    for fails in (lambda: tokenizer.encode("y"), lambda: tokenizer.beginning):
        with pytest.raises(ValueError, match=r"t\.json fails on .*Missing \[UNK\] token"):
            fails()
    assert "t.json fails on token ids" in refusal(tokenizer.decode, [2**40])


KINDS: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/null"),
    "broken link": lambda path: path.symlink_to("nothing"),
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_read(tmp_path: Path, name: str, kind: str) -> None:
    folder = save_text_side(tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    KINDS[kind](folder / name)
    with pytest.raises(ValueError, match=rf"{name}: it is .*, want a regular file|there is no file .*{name}"):
        read_text_side(folder)
