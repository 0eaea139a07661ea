"""YAML of other people: plain values of a bounded number, size and depth, or one line that says what is wrong.

PyYAML's safe loader makes no objects of other classes, but eighty bytes of aliases stand for a billion values, a list
may hold itself, and its own constructors raise whatever they meet in a malformed file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_CHARACTERS = 2**20
MAX_VALUES = 50_000
"""Of a file, its aliases written out: a configuration has some hundreds, and one value takes about 2 kB while read."""
MAX_SCALAR = 2**16
"""Characters of one text."""
MAX_KEY = 200
"""Characters of a key; messages repeat them."""
_MAX_DIGITS = 40
_SCALARS = ("null", "bool", "int", "float", "str", "merge")
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in (*_SCALARS, "seq", "map")}


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; of an endless one (a device) as much is read as a file may have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML of plain values, holds a key twice, or is too large; the message is one line.
    """
    with path.open(encoding="utf-8") as stream:
        return parse_yaml(stream.read(MAX_CHARACTERS + 1))


def parse_yaml(text: str) -> Any:
    """The content of a YAML text: None, mappings, lists, texts, numbers and truth values.

    Raises:
        ValueError: as `read_yaml`.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"more than {MAX_CHARACTERS} characters")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded(node, {}, set())
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error  # PyYAML's constructors let all of these through


class _Loader(yaml.SafeLoader):
    """PyYAML's, counting as it goes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One value; an alias gives the node that it names, once more.

        Raises:
            ValueError: one too many.
        """
        self._count += 1
        if self._count > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        return super().compose_node(parent, index)


def _expanded(node: yaml.Node, sizes: dict[int, int], inside: set[int]) -> int:
    """Values that `node` stands for with its aliases written out.

    Args:
        node: checked with all that it holds.
        sizes: of the nodes that were counted already, by identity.
        inside: the nodes that `node` lies in.

    Raises:
        ValueError: too many, a list or mapping that holds itself, a key that stands twice, or what is no plain value.
    """
    line = node.start_mark.line + 1
    if id(node) in inside:
        raise ValueError(f"line {line}: a value holds itself")
    if id(node) in sizes:
        return sizes[id(node)]
    if node.tag not in _PLAIN:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        raise ValueError(f"line {line}: a value of type {kind[:40]!r} is not read; put a text in quotes")
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, line)
    children = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    total = 1
    for child in children if isinstance(children, list) else ():
        total += _expanded(child, sizes, inside | {id(node)})
        if total > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values, aliases written out")
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated(node)
    sizes[id(node)] = total
    return total


def _check_scalar(node: yaml.ScalarNode, line: int) -> None:
    if len(node.value) > MAX_SCALAR:
        raise ValueError(f"line {line}: a text of {len(node.value)} characters; at most {MAX_SCALAR} are read")
    if node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_DIGITS:
        raise ValueError(f"line {line}: a number of {len(node.value)} characters; at most {_MAX_DIGITS} are read")
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in node.value):
        raise ValueError(f"line {line}: a text with a character that no file name and no file can have")


def _refuse_repeated(node: yaml.MappingNode) -> None:
    """YAML itself lets the last one win."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or len(key.value) > MAX_KEY or not key.value.isprintable():
            raise ValueError(f"line {line}: a key must be a text of at most {MAX_KEY} printable characters")
        name = str(key.value)
        if name in lines:
            raise ValueError(
                f"key {name!r} stands on lines {lines[name]} and {line}; the later one would silently replace the "
                "earlier"
            )
        lines[name] = line
