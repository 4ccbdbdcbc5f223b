"""The text side of a model: the files of a DeepSeek or Hugging Face folder that stand between tokens and text.

tokenizer.json            the vocabulary
tokenizer_config.json     the token that begins a text, and the chat template if there is no chat_template.jinja
generation_config.json    the tokens that end an answer; config.json if there is none
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmini.config.fields import token_ids
from dsmini.reading import brief, is_there, read_table
from dsmini.text.chat import Chat, Dialogue, read_template, spelled
from dsmini.text.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer


@dataclass(frozen=True, kw_only=True)
class TextSide:
    """A model's vocabulary, and the ids that begin and end its texts."""

    tokenizer: Tokenizer
    begin: tuple[int, ...] = ()
    """The ids before every text; a chat template writes its own."""
    ends: tuple[int, ...] = ()
    """The ids that end an answer."""
    chat: Chat | Dialogue | None = None
    stops: tuple[str, ...] = ()
    """The strings that end an answer."""


def read_text_side(folder: Path, *, tokenizer: str | None = None, chat: bool = False) -> TextSide:
    """Read the text side of a folder with a config.json.

    Args:
        tokenizer: "bytes", or the tokenizer.json to use; None: the folder's.
        chat: read the chat template too.

    Raises: ValueError for a file that is missing or not understood.
    """
    config = _optional(folder / "tokenizer_config.json")
    if tokenizer == "bytes":
        if chat:
            raise ValueError(
                "--chat needs the folder's tokenizer.json, for its template writes tokens; bytes have none"
            )
        return TextSide(tokenizer=ByteTokenizer(), ends=_ends(folder, {}, {}))
    path = folder / "tokenizer.json" if tokenizer is None else Path(tokenizer)
    if tokenizer is None and not is_there(path):
        raise ValueError(f"{folder} has no tokenizer.json; copy one there, or name it with --tokenizer FILE or bytes")
    template = read_template(folder, config) if chat else None
    if chat and template is None:
        raise ValueError(
            f"{folder} has no chat template, neither chat_template.jinja nor chat_template in tokenizer_config.json; "
            "leave out --chat, and write the prompt as the model was trained on it"
        )
    bpe = BPETokenizer(path)
    return TextSide(
        tokenizer=bpe,
        begin=_begin(bpe, config),
        ends=_ends(folder, config, bpe.added),
        chat=None if template is None else Chat(template, bpe),
    )


def _begin(tokenizer: BPETokenizer, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids before a text: those that tokenizer_config.json names, or else those of tokenizer.json."""
    wanted = config.get("add_bos_token")
    if wanted is None:
        return tuple(tokenizer.beginning)
    if not isinstance(wanted, bool):
        raise ValueError(f"add_bos_token in tokenizer_config.json is {brief(wanted)}, want true or false")
    if not wanted:
        return ()
    name = spelled(config.get("bos_token"))
    if name is None or name not in tokenizer.added:
        raise ValueError(f"tokenizer_config.json wants texts to begin with {name!r}, which {tokenizer.path} lacks")
    return (tokenizer.added[name],)


def _ends(folder: Path, config: Mapping[str, Any], added: Mapping[str, int]) -> tuple[int, ...]:
    """Return the tokens that end an answer, by the first file that names any."""
    vocab_size = _optional(folder / "config.json").get("vocab_size")
    for name in ("generation_config.json", "config.json"):
        ids = _optional(folder / name).get("eos_token_id")
        if ids is not None:
            return token_ids(ids, vocab_size, f"eos_token_id in {folder / name}")
    name = spelled(config.get("eos_token"))
    return (added[name],) if name is not None and name in added else ()


def _optional(path: Path) -> dict[str, Any]:
    """Return the table of a JSON file, or an empty one if there is no file."""
    return read_table(path) if is_there(path) else {}
