"""A folder's chat template: a conversation as the tokens that its model was trained to answer.

The template is a Jinja program in the folder. It is not trusted: it runs in a sandbox, and sees only the messages.
What people write is not trusted either. In the rendered text the template's own <｜User｜> is one token, while a
user who types <｜User｜> gets the tokens of those characters, and so does a model that spells it out.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsmini.reading import is_there, read_text
from dsmini.text.tokenizer import BPETokenizer

# no text holds it: half a character of UTF-16, and none that Python makes of a byte it cannot decode
MARK = "\ud800"


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class ChatTemplate:
    """Renders conversations as transformers' apply_chat_template does.

    Args:
        source: the Jinja program.
        path: of the file it is from, for errors.
        tokens: what the program may name: bos_token, eos_token, ...

    Raises: ValueError for a program that is no Jinja.
    """

    def __init__(self, source: str, path: Path, tokens: Mapping[str, str]) -> None:
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {path} is no Jinja template: {error}") from None
        self._path, self._tokens = path, dict(tokens)
        constants = (node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str))
        self._says = [*(node.data for node in tree.find_all(jinja2.nodes.TemplateData)), *constants, *tokens.values()]

    def writes(self, token: str) -> bool:
        """Return whether the template itself spells this."""
        return any(token in text for text in self._says)

    def render(self, messages: Sequence[Message]) -> str:
        """Return the conversation as text, up to where the assistant's answer begins.

        Raises: ValueError for a conversation that the template refuses.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
            )
        except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, ValueError, AttributeError) as error:
            raise ValueError(f"the chat template of {self._path} refuses the conversation: {error}") from None


class Chat:
    """A conversation's tokens, by a template and a tokenizer.

    Raises: ValueError for a tokenizer.json that BPETokenizer refuses.
    """

    def __init__(self, template: ChatTemplate, tokenizer_file: Path) -> None:
        self._template = template
        markup = [token for token in BPETokenizer(tokenizer_file).added if template.writes(token)]
        self.tokenizer = BPETokenizer(tokenizer_file, markup=[token for token in markup if _is_markup(token)])
        """As the folder's, and what the template writes is markup, which no text can spell."""
        self._tokens = self.tokenizer.markup
        longest_first = sorted(self._tokens, key=len, reverse=True)  # as the library matches
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation up to the assistant's answer. Its contents are what `plain` or
        `answer` gave."""
        ids: list[int] = []
        for i, part in enumerate(self._pattern.split(self._template.render(messages))):
            ids += [self._tokens[part]] if i % 2 else self.tokenizer.encode(part.replace(MARK, "")).tolist()
        return ids

    def plain(self, text: str) -> str:
        """Return a text as the content of a message: marked, so that nothing in it or at its borders reads as markup.

        A mark follows each character that could begin a token of the template, and precedes each that could end one:
        wherever a template cuts the text and whatever it puts beside it, a token that begins or ends in the text is
        broken. So is one around the whole text.
        """
        text = text.replace(MARK, "\ufffd")
        core = text.strip()
        if core and any(core in token for token in self._tokens):
            text = text.replace(core, core + MARK)
        first, last = (_any_of({token[i] for token in self._tokens}) for i in (0, -1))
        text = re.sub(first, lambda found: found[0] + MARK, text)
        return re.sub(last, lambda found: MARK + found[0], text)

    def answer(self, tokens: Sequence[int]) -> str:
        """Return a model's answer as the content of a message. Tokens that it wrote stay tokens, such as the end of its
        thoughts, where a template cuts; what it spelled is plain."""
        names = {id: name for name, id in self._tokens.items()}
        out, run = "", list[int]()
        for token in [*tokens, None]:
            if token is not None and token not in names:
                run.append(token)
                continue
            out += self.plain(self.tokenizer.decode(run))
            run = []
            out += names[token] if token is not None else ""
        return out


def read_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """Read the chat template of a model's folder: chat_template.jinja, else that of tokenizer_config.json, else None.

    Args:
        config: what tokenizer_config.json holds.

    Raises: ValueError for one that is not understood.
    """
    path = folder / "chat_template.jinja"
    if is_there(path):
        source: Any = read_text(path)
    else:
        path = folder / "tokenizer_config.json"
        source = _default(config.get("chat_template"), path)
    tokens = {key: named for key in config if key.endswith("_token") and (named := spelled(config[key])) is not None}
    return None if source is None else ChatTemplate(source, path, tokens)


def spelled(token: Any) -> str | None:
    """Return a special token of tokenizer_config.json, which is a text or a table with one."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _default(templates: Any, path: Path) -> str | None:
    """Return the template; of several that have names the default one."""
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
    """Return whether an added token is markup. Texts need those that are a word, a space or a single character."""
    return len(token) > 2 and re.fullmatch(r"\s*|\w+", token) is None


def _any_of(characters: Collection[str]) -> str:
    return f"[{re.escape(''.join(sorted(characters)))}]" if characters else "(?!)"


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks what a model is trained on; it changes nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: "jinja2.parser.Parser") -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that transformers gives a template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    functions: dict[str, Callable[..., Any]] = {"raise_exception": _refuse, "strftime_now": _now}
    environment.globals.update(functions)
    environment.filters["tojson"] = _tojson
    return environment


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Write JSON without escapes for < and >, which Jinja's own filter has."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
