"""Settings files: plain YAML with limits that are checked before it is parsed."""

from pathlib import Path
from typing import Any

import yaml

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.text_files import check_characters, read_text_file

LONGEST = 2**18  # characters; the parser takes a second for about ten thousand
DEEPEST = 8  # settings have three levels
LARGEST = 2**63  # largest number; Python may refuse to print larger ones


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, with strings, numbers, lists and mappings as values.

    Aliases, which can expand without bounds, and repeated names, of which the parser would take the
    last, are refused.

    Raises:
        InputError: a missing file, not text, or not such a mapping; the message has the line.
    """
    text = read_text_file(path)
    if len(text) > LONGEST:
        raise InputError(f"{path} has {len(text)} characters, too many for a file of settings")
    try:
        _check_shape(text, path)
        values = _Loader(text, path).get_single_data()
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {_said(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings; expected lines like 'length: 16384'")
    for name in values:
        if not isinstance(name, str):
            raise InputError(f"{path}: the name of a setting is a text, got {shown(name)}")
    return values


def _said(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    parts = [part for name in ("context", "problem") if (part := getattr(error, name, None))]
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return where + shown(" ".join(parts) or str(error), quote=False)


def _check_shape(text: str, path: Path) -> None:
    """Refuses aliases and deep nesting from the parser's events, before values are built."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = f"{path}: line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise InputError(
                f"{line} repeats a value by the alias *{shown(event.anchor, quote=False)}; write "
                "the value itself (a text that begins with * needs quotes)"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise InputError(f"{line} is nested too deeply; settings are names and values")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with messages that say which value is invalid, and where."""

    def __init__(self, text: str, path: Path) -> None:
        super().__init__(text)
        self._path = path

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        where = f"{self._path}: line {node.start_mark.line + 1}"
        if isinstance(node, yaml.MappingNode):
            _check_names(node, where)
        try:
            value = super().construct_object(node, deep=deep)
        except (yaml.YAMLError, InputError):
            raise
        except Exception:  # of `!!int abc`, `0x_`, `2024-13-01`: each constructor raises its own
            kind = shown(node.tag.rpartition(":")[2], quote=False)
            raise InputError(
                f"{where}: {shown(node.value)} is read as {kind} and is none; a text needs quotes"
            ) from None
        if isinstance(value, str):
            check_characters(value, where)
            if "\0" in value:
                raise InputError(f"{where} holds a NUL character; leave it out")
        if isinstance(value, int) and abs(value) >= LARGEST:
            raise InputError(f"{where}: {shown(value)} is too large a number")
        return value


def _check_names(node: yaml.MappingNode, where: str) -> None:
    names = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{where}: {shown(twice[1])} appears twice; keep one")
