"""Tokenizer files that fail in the library, or are not files: each is refused in a sentence that names the file."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from dsmini.text.text_side import read_text_side
from dsmini.text.tokenizer import BPETokenizer
from tests.helpers.text_folders import save_text_side


def test_panic_of_a_regular_expression_is_a_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    library = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    library.save(str(tmp_path / "t.json"))
    tokenizer = BPETokenizer(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"t\.json fails on a text: .*retry-limit.*; name another tokenizer.json"):
        tokenizer.encode("a" * 50 + "!")


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
