"""The process that renders conversations with chat templates, exactly as transformers does.

It reproduces the sandboxed environment of `transformers.utils.chat_template_utils`, whose import
would take seconds, with the functions that templates use. `tests/test_chat_templates.py` compares
the two.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from dca_jax.bounded.child import MESSAGE, serve

# A template renders a conversation once or twice, plus its own text. A much longer result means a
# faulty template, and would otherwise be rejected only later, in the tokenizer.
LEAST, TIMES = 2**20, 16  # characters; characters for each byte of the request


class Refused(Exception):
    """The template is invalid or rejects these messages."""


class TooLong(Exception):
    """The template's output is too long."""


class Writer:
    """Renders conversations; the last request's compiled template is cached."""

    def __init__(self) -> None:
        self._environment = make_environment()
        self._source, self._template = "", self._environment.from_string("")

    def __call__(self, line: bytes) -> list[dict[str, Any]]:
        """Answers a request of `dca_jax.inference.chat_templates.ChatTemplates`.

        Returns:
            For each conversation its "texts", or its "error": the name of the class and the
            message. `Refused` comes from the template, and `TooLong` means too much output.

        Raises:
            MemoryError: the process cannot continue.
        """
        request = json.loads(line)
        most = LEAST + TIMES * len(line)
        return [
            self._one(request["template"], request["variables"], conversation, most)
            for conversation in request["conversations"]
        ]

    def _one(
        self, source: str, variables: Mapping[str, Any], conversation: Mapping[str, Any], most: int
    ) -> dict[str, Any]:
        messages = [_as_transformers_has_it(message) for message in conversation["messages"]]
        given = {**variables, "tools": conversation["tools"]}
        try:
            template = self._compiled(source)
            texts = [
                _written(template, messages[:count], prompt, given, most)
                for count, prompt in conversation["cuts"]
            ]
        except MemoryError:
            raise
        except TemplateError as error:
            return {"error": [Refused.__name__, str(error)[:MESSAGE]]}
        except Exception as error:  # a template can raise anything
            return {"error": [type(error).__name__, str(error)[:MESSAGE]]}
        return {"texts": texts}

    def _compiled(self, source: str) -> Template:
        if source != self._source:
            self._template = self._environment.from_string(source)
            self._source = source
        return self._template


def _written(
    template: Template,
    messages: list[dict[str, Any]],
    prompt: bool,
    variables: Mapping[str, Any],
    most: int,
) -> str:
    pieces, length = [], 0
    for piece in template.generate(
        messages=messages, documents=None, add_generation_prompt=prompt, **variables
    ):
        pieces.append(piece)
        length += len(piece)
        if length > most:
            raise TooLong(f"more than {most} characters of so few messages")
    return "".join(pieces)


REASONING = ("reasoning_content", "thinking", "reasoning")


def _as_transformers_has_it(message: Mapping[str, Any]) -> dict[str, Any]:
    """Omits null values, and adds a reply's reasoning under the names that templates use."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in REASONING if key in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}


class _Generation(Extension):
    """{% generation %}, which marks the assistant's text; rendered as its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own annotation

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict` without access to its class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=...)` is a template's right
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no name that begins with an underscore: {name!r}")


def make_environment() -> Environment:
    """Jinja's sandbox with transformers' settings."""

    def raise_exception(message: Any) -> None:
        raise TemplateError(message)

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


if __name__ == "__main__":
    serve(Writer())
