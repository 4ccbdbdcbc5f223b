"""A folder's chat template: a conversation as the tokens that its model was trained to answer.

The template is a Jinja program in the folder. It is not trusted: it runs in a sandbox, in a process with limits, and
sees only the messages. The messages are not trusted either. In the rendered text the template's own <｜User｜> is one
token. A user who types <｜User｜> gets the tokens of those characters, and so does a model that spells it out.

The text side of a model is the files of a DeepSeek or Hugging Face folder that stand between tokens and text.

tokenizer.json            the vocabulary
tokenizer_config.json     the token that begins a text, and the chat template if there is no chat_template.jinja
generation_config.json    the tokens that end an answer; config.json if there is none
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import jinja2
import jinja2.nodes

from dsmini.config.fields import token_ids
from dsmini.reading import brief, is_there, read_table, read_text, readable
from dsmini.text.template_worker import environment
from dsmini.text.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, is_byte_tokenizer

# half a character of UTF-16: no text holds it, and Python makes another one of a byte it cannot decode
MARK = "\ud800"
LARGEST_TEMPLATE = 4 << 20
"""Largest size of a template file in bytes."""
SECONDS = 2
"""Largest CPU time of a conversation; templates that are published take milliseconds."""
MEMORY = 512 << 20
"""Largest memory of the process that renders a conversation."""
LONGEST = 16 << 20
"""Largest number of characters of a rendered conversation."""
PATIENCE = 60.0
"""Largest time in seconds to wait for a conversation: the machine may be busy."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class ChatTemplate:
    """Renders conversations as transformers' apply_chat_template does, each in a process with limits.

    Args:
        source: the Jinja program.
        path: its file, for errors.
        tokens: the special tokens that the program may name: bos_token, eos_token, ...

    Raises: ValueError for a program that is not Jinja.
    """

    def __init__(self, source: str, path: Path, tokens: Mapping[str, str]) -> None:
        self._source, self._path, self._tokens = source, path, dict(tokens)
        try:
            tree = environment().parse(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            said = readable(" ".join(str(error).split()))
            raise ValueError(f"the chat template of {path} is not a Jinja template: {said}") from None
        constants = [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
        plain = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
        self._says = [*plain, *constants, *tokens.values()]

    def writes(self, token: str) -> bool:
        """Return whether the template itself spells this."""
        return any(token in text for text in self._says)

    def render(self, messages: Sequence[Message], *, seconds: int = SECONDS, memory: int = MEMORY) -> str:
        """Return the conversation as text, up to where the assistant's answer begins.

        Args:
            seconds: largest CPU time of the process.
            memory: largest memory of the process in bytes, its interpreter included (Linux).

        Raises: ValueError for a conversation that the template refuses or leaves empty, and for a template that needs
            more time or memory than it may.
        """
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **self._tokens}
        request = {"source": self._source, "given": given, "seconds": seconds, "memory": memory, "longest": LONGEST}
        answer = _answer(request)
        if "refuses" in answer:
            said = readable(" ".join(answer["refuses"].split()))
            raise ValueError(f"the chat template of {self._path} refuses the conversation: {said}")
        if not answer["text"]:
            raise ValueError(f"the chat template of {self._path} renders nothing; mend it, or leave out --chat")
        return answer["text"]


def _answer(request: Mapping[str, Any]) -> dict[str, str]:
    """Return the answer of a process of template_worker.py, or why there is none."""
    try:
        done = subprocess.run(
            # without site-packages' start-up files; sys.path says where Jinja is
            [sys.executable, "-S", "-P", str(Path(__file__).with_name("template_worker.py"))],
            input=json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for us alone
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return {"refuses": f"it takes more than {PATIENCE:g} s"}
    if done.returncode == -signal.SIGXCPU:
        return {"refuses": f"it takes more than {request['seconds']} s of CPU time"}
    if done.returncode:
        return {"refuses": f"it crashes its process, with status {done.returncode}"}
    return json.loads(done.stdout.decode("utf-8", "surrogatepass"))


class Chat:
    """Encodes conversations by a template and a tokenizer."""

    def __init__(self, template: ChatTemplate, tokenizer: BPETokenizer) -> None:
        self._template = template
        markup = [token for token in tokenizer.added if template.writes(token) and _is_markup(token)]
        self.tokenizer: BPETokenizer = BPETokenizer(tokenizer.path, markup=markup)
        """The folder's tokenizer, in which the tokens that the template writes are markup: no text can spell them."""
        self._tokens = self.tokenizer.markup
        longest_first = sorted(self._tokens, key=len, reverse=True)  # as the library matches
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation up to the assistant's answer.

        Args:
            messages: with contents from `plain` or `answer`.
        """
        ids: list[int] = []
        for i, part in enumerate(self._pattern.split(self._template.render(messages))):
            ids += [self._tokens[part]] if i % 2 else self.tokenizer.encode(part.replace(MARK, "")).tolist()
        return ids

    def plain(self, text: str) -> str:
        """Return a text as the content of a message, marked so that nothing in it or at its borders is read as markup.

        A mark follows each character that could begin a token of the template, and precedes each that could end one.
        A token that begins or ends in the text is then broken, wherever a template cuts the text and whatever it puts
        next to it. A token around the whole text is broken too.
        """
        text = text.replace(MARK, "\ufffd")
        core = text.strip()
        if core and any(core in token for token in self._tokens):
            text = text.replace(core, core + MARK)
        first, last = (_any_of({token[i] for token in self._tokens}) for i in (0, -1))
        text = re.sub(first, lambda found: found[0] + MARK, text)
        return re.sub(last, lambda found: MARK + found[0], text)

    def answer(self, tokens: Sequence[int]) -> str:
        """Return a model's answer as the content of a message.

        Tokens of the template that it wrote stay tokens, such as the end of its thoughts, where a template cuts. The
        rest is plain.
        """
        names = {id: name for name, id in self._tokens.items()}
        out = ""
        for written, group in itertools.groupby(tokens, names.__contains__):
            run = list(group)
            out += "".join(names[token] for token in run) if written else self.plain(self.tokenizer.decode(run))
        return out


class Dialogue:
    """The conversations of a training run, as dsmini.data.dialogue writes them: a turn is a line.

    A person's line begins with "> ", the answer is the line after it. A turn has no line break, so none can spell
    another turn.
    """

    stops: tuple[str, ...] = ("\n",)
    """The strings that end an answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation up to the answer. The system's turn is a line before the others."""
        signs = {"user": "> "}
        text = "".join(f"{signs.get(message['role'], '')}{message['content']}\n" for message in messages)
        return self.tokenizer.encode(text).tolist()

    def plain(self, text: str) -> str:
        """Return a text as the content of a message: one line."""
        return " ".join(text.split())

    def answer(self, tokens: Sequence[int]) -> str:
        """Return a model's answer as the content of a message."""
        return self.plain(self.tokenizer.decode(tokens))


def read_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """Read the chat template of a model's folder: chat_template.jinja, else that of tokenizer_config.json, else None.

    Args:
        config: the content of tokenizer_config.json.

    Raises: ValueError for a template that is not understood.
    """
    path = folder / "chat_template.jinja"
    if is_there(path):
        source: Any = read_text(path, LARGEST_TEMPLATE)
    else:
        path = folder / "tokenizer_config.json"
        source = _default(config.get("chat_template"), path)
    tokens = {key: named for key in config if key.endswith("_token") and (named := spelled(config[key])) is not None}
    return None if source is None else ChatTemplate(source, path, tokens)


def spelled(token: Any) -> str | None:
    """Return the text of a special token of tokenizer_config.json, which is a text or a table that holds one."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _default(templates: Any, path: Path) -> str | None:
    """Return the template; of several with names the default one."""
    if templates is None or isinstance(templates, str):
        return templates
    try:
        named = {one["name"]: one["template"] for one in templates}
    except (TypeError, KeyError):
        named = {}
    if not isinstance(named.get("default"), str):
        raise ValueError(f"chat_template in {path} is neither a text nor a list with a template named 'default'")
    return named["default"]


def _is_markup(token: str) -> bool:
    """Return whether an added token is markup; words, spaces and single characters are not, as texts need them."""
    return len(token) > 2 and re.fullmatch(r"\s*|\w+", token) is None


def _any_of(characters: Collection[str]) -> str:
    return f"[{re.escape(''.join(sorted(characters)))}]" if characters else "(?!)"


# --- the text side of a model


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
            "write one as chat_template.jinja, since no prompt can spell its tokens, or leave out --chat"
        )
    if not chat and is_byte_tokenizer(path):
        return TextSide(tokenizer=ByteTokenizer(), ends=_ends(folder, {}, {}))
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
