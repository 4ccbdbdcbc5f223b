"""Small model folders that look published: tokenizer.json, its config with a chat template, end tokens."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
TEXT = [
    "The quick brown fox says hello to the lazy dog, héllo wörld 日本 🙂. " * 20,
    "User and Assistant say: you are <b>. " * 9,
]

# like DeepSeek-V3's, without tools
TEMPLATE = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(is_first=false, system_prompt='', is_first_sp=true) %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}\
{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}\
{% set ns.is_first_sp = false %}\
{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}\
{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}\
{%- for message in messages %}\
{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}\
{%- if message['role'] == 'assistant' and message['content'] is not none %}\
{% set content = message['content'] %}\
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}\
{%- endfor -%}\
{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}"""


def save_tokenizer(path: Path, vocab_size: int = 400, bos: bool = False) -> Tokenizer:
    """Write a byte-level tokenizer.json like DeepSeek-V3's, where only the first added tokens are special.

    Args:
        bos: add a post-processor that starts every text with the beginning token.
    """
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 6, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator([TEXT * 9], trainer)
    library.add_special_tokens([BOS, EOS])
    library.add_tokens([AddedToken(text, normalized=False) for text in (USER, ASSISTANT, "<think>", "</think>")])
    if bos:
        library.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, library.token_to_id(BOS))]
        )
    library.save(str(path))
    return library


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
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": special | {"content": BOS},
        "eos_token": special | {"content": EOS},
        "pad_token": EOS,
        "tokenizer_class": "LlamaTokenizerFast",
        **({} if template is None else {"chat_template": template}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(raw | config), encoding="utf-8")
    return folder
