"""Tokenizer files that fail in the library, or are not files: each is refused in a sentence that names the file."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dsmini.text.chat import read_text_side
from dsmini.text.tokenizer import BPETokenizer
from tests.helpers.configs import refusal
from tests.helpers.text_folders import save_text_side, tokenizers

tk = tokenizers()
norm, pre, dec, post = tk.normalizers, tk.pre_tokenizers, tk.decoders, tk.processors


def long_by(n: int, *steps: Any) -> dict[str, Any]:
    """Return steps that are repeated n times."""
    return {"normalizer": norm.Sequence([*steps] * n)}


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


NOT_ONE = "is not a tokenizer.json"
REFUSALS: dict[str, tuple[str, str]] = {
    "dropout": (edited(dropout=0.5), "has dropout 0.5, which gives a text other tokens each time; want null; name"),
    **{
        name: (
            steps(**parts),
            f"has a {next(iter(parts))} that can make a text {factor} times as long; want at most 64; name another",
        )
        for name, factor, parts in (
            ("doubled 40 times", "1,099,511,627,776", long_by(40, norm.Replace("a", "aa"))),
            ("tripled for each letter", "81", long_by(4, norm.Replace(tk.Regex(""), "ab"))),
            ("inserted", "128", long_by(7, norm.Replace("", "a"))),
            ("bytes of bytes", "128", long_by(7, norm.ByteLevel())),
            ("bytes before words", "128", {"pre_tokenizer": pre.Sequence([pre.ByteLevel()] * 7)}),
            ("decoded", "243", {"decoder": dec.Sequence([dec.Replace("é", "aaaaaa")] * 5)}),
        )
    },
    "steps": (edited(normalizer={"type": "Sequence", "normalizers": [3]}), NOT_ONE),
    "deep lists": ("[" * 100_000, NOT_ONE),
    "tokens": ('{"added_tokens": [3]}', NOT_ONE),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_file_that_cannot_be_meant_is_refused(tmp_path: Path, name: str) -> None:
    content, sentence = REFUSALS[name]
    (tmp_path / "t.json").write_text(content)
    assert f"t.json {sentence}" in refusal(BPETokenizer, tmp_path / "t.json")


def test_panic_of_a_regular_expression_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(steps(pre_tokenizer=pre.Split(tk.Regex("(a+)+$"), "isolated")))
    tokenizer = BPETokenizer(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"t\.json fails on a text: .*retry-limit.*; name another tokenizer.json"):
        tokenizer.encode("a" * 50 + "!")
    assert tokenizer.encode("aa").tolist() == [0, 0]


def test_steps_that_published_files_have_are_taken(tmp_path: Path) -> None:
    """Check those of GPT's kind; those of Llama's are in test_tokenizer.py."""
    smaller = [norm.Replace(letter, letter.lower()) for letter in "ABCDEFGHIJKLM"]
    digits = pre.Split(tk.Regex(r"\p{N}{1,3}"), "isolated")
    parts = {
        "normalizer": norm.Sequence([norm.NFKC(), *smaller, norm.Replace(tk.Regex(" {2,}"), " ")]),
        "pre_tokenizer": pre.Sequence([digits] * 3 + [pre.ByteLevel(use_regex=False)]),
        "decoder": dec.ByteLevel(),
        "post_processor": post.TemplateProcessing(single="a $A b", special_tokens=[("a", 0), ("b", 1)]),
    }
    (tmp_path / "t.json").write_text(steps(**parts))
    assert BPETokenizer(tmp_path / "t.json").encode("ba").tolist() == [1, 0]


def test_vocabulary_without_its_unknown_token_is_a_sentence(tmp_path: Path) -> None:
    tk.Tokenizer(tk.models.WordLevel({"x": 0}, unk_token="[UNK]")).save(str(tmp_path / "t.json"))
    tokenizer = BPETokenizer(tmp_path / "t.json")
    for fails in (lambda: tokenizer.encode("y"), lambda: tokenizer.beginning):
        with pytest.raises(ValueError, match=r"t\.json fails on .*Missing \[UNK\] token"):
            fails()
    assert "t.json fails on token ids" in refusal(tokenizer.decode, [2**40])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
def test_only_regular_files_are_read(tmp_path: Path, name: str) -> None:
    folder = save_text_side(tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name}: it is a FIFO, want a regular file" in refusal(read_text_side, folder)
