"""Small model folders that look published: tokenizer.json, its config with a chat template, end tokens."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
TEXT = [
    "The quick brown fox says hello to the lazy dog, héllo wörld 日本 🙂. " * 20,
    "User and Assistant say: you are <b>. " * 9,
]
# like DeepSeek-V3's, without tools
TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8").replace("\n", "")


def tokenizers() -> Any:
    """Return the tokenizers library; skip the test where it is not installed."""
    return pytest.importorskip("tokenizers", reason="needs the tokenizers library")


@cache
def _trained(vocab_size: int, bos: bool) -> str:
    tk = tokenizers()
    library = tk.Tokenizer(tk.models.BPE())
    words = tk.pre_tokenizers.Split(tk.Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    as_bytes = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = tk.pre_tokenizers.Sequence([words, as_bytes])
    library.decoder = tk.decoders.ByteLevel()
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(vocab_size=vocab_size - 6, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([TEXT * 9], trainer)
    library.add_special_tokens([BOS, EOS])
    library.add_tokens([tk.AddedToken(text, normalized=False) for text in (USER, ASSISTANT, "<think>", "</think>")])
    if bos:
        first = [(BOS, library.token_to_id(BOS))]
        library.post_processor = tk.processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=first)
    return library.to_str()


def save_tokenizer(path: Path, vocab_size: int = 400, bos: bool = False) -> Any:
    """Write a byte-level tokenizer.json like DeepSeek-V3's, where only the first added tokens are special.

    Args:
        bos: add a post-processor that starts every text with the beginning token.
    """
    path.write_text(_trained(vocab_size, bos), encoding="utf-8")
    return tokenizers().Tokenizer.from_file(str(path))


def save_text_side(folder: Path, template: Any = TEMPLATE, **config: Any) -> Path:
    """Write the text files of a model's folder.

    Args:
        template: chat template of tokenizer_config.json; None for no template.
        config: keys to add to that file or to change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder / "tokenizer.json")
    special = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    raw = {
        **{"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizerFast"},
        **{"bos_token": special | {"content": BOS}, "eos_token": special | {"content": EOS}, "pad_token": EOS},
        **({} if template is None else {"chat_template": template}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(raw | config), encoding="utf-8")
    return folder
