"""Every option of a run as text, read from `config.py` itself: name, type, default, unit, docstring."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_hgpt.config import RunConfig
from megatron_hgpt.errors import ConfigError, did_you_mean

_UNITS_OF_NAMES = {
    "_steps": "optimizer steps",
    "_epochs": "epochs",
    "_length": "tokens",
    "_ratio": "share, 0 to 1",
    "_batch_size": "samples",
    "_parallel_size": "ranks",
    "_s": "seconds",
    "_gib": "GiB",
}
"""End of an option's name -> unit."""
_UNITS_OF_DOCSTRINGS = (
    "Optimizer steps", "Samples", "Tokens", "Layers", "Ranks", "Images", "Threads", "Ids", "Indices", "Probability",
    "Model chunks", "Pipeline stages", "Codebook entries",
)  # fmt: skip
"""First words of a number's docstring that are the unit."""
_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option."""

    name: str
    """Dotted, as overrides and error messages have it."""
    kind: str
    """Type in words, with choices and range."""
    default: str
    unit: str
    """Empty for what has none."""
    text: str
    """The docstring, on one line."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A group of options."""

    name: str
    """Dotted; empty for the run itself."""
    text: str
    options: list[Option]


def sections() -> list[Section]:
    """All of them, in the order of config.py."""
    return list(_walk(RunConfig, "", RunConfig()))


def _walk(cls: type, name: str, instance: Any) -> Iterator[Section]:
    docstrings, hints = _docstrings(cls), typing.get_type_hints(cls, include_extras=True)
    prefix, options, inner = f"{name}." if name else "", [], []
    for field in dataclasses.fields(cls):
        kind, text = hints[field.name], docstrings.get(field.name, "")
        default = getattr(instance, field.name)
        nested = next((part for part in _parts(kind) if dataclasses.is_dataclass(part)), None)
        if nested is not None:
            inner.append((typing.cast(type, nested), f"{prefix}{field.name}", default))
            continue
        options.append(
            Option(
                name=f"{prefix}{field.name}",
                kind=describe_type(kind),
                default=describe_value(default),
                unit=_unit(field.name, text) if {int, float} & set(_plain(kind)) else "",
                text=text,
            )
        )
    yield Section(name=name, text=_flat(inspect.getdoc(cls) or ""), options=options)
    for nested_class, nested_name, value in inner:
        yield from _walk(nested_class, nested_name, nested_class() if value is None else value)


def _docstrings(cls: type) -> dict[str, str]:
    """Field -> the string literal that follows it in the source."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: _flat(after.value.value)
        for field, after in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }


def _flat(text: str) -> str:
    return " ".join(text.split())


def _parts(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, else the type itself."""
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    return typing.get_args(kind) if _is_union(kind) else (kind,)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def describe_type(kind: Any) -> str:
    """A field's type in words: ``int, at least 1``, ``one of rows, full, none``, ``list of text``, ``… or null``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return ", ".join([describe_type(arguments[0]), *(str(limit) for limit in arguments[1:])])
    if _is_union(kind):
        words = " or ".join(describe_type(part) for part in arguments if part is not type(None))
        return words + ((", or null" if ", " in words else " or null") if type(None) in arguments else "")
    if origin is typing.Literal:
        return "one of " + ", ".join(describe_value(value) for value in arguments)
    if origin is list:
        return f"list of {describe_type(arguments[0])}"
    if origin is dict:
        return f"mapping of name to {describe_type(arguments[1])}"
    return {str: "text", bool: "true or false", Any: "any value"}.get(kind, getattr(kind, "__name__", str(kind)))


def describe_value(value: Any) -> str:
    """A default as YAML writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _unit(name: str, text: str) -> str:
    for words in _UNITS_OF_DOCSTRINGS:
        if re.match(rf"{words}\b", text):
            return words.lower()
    return next((unit for ending, unit in _UNITS_OF_NAMES.items() if f"_{name}".endswith(ending)), "")


def _plain(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a field's type without their annotations."""
    parts = _parts(kind)
    return tuple(typing.get_args(part)[0] if typing.get_origin(part) is typing.Annotated else part for part in parts)


def explain(key: str = "") -> str:
    """The options that a key or a section names, in full; of everything a section on top, options beneath.

    Args:
        key: dotted name of an option or section; empty for everything.

    Raises:
        ConfigError: there is none of that name; suggests the nearest.
    """
    everything = sections()
    chosen = [section for section in everything if not key or section.name == key or section.name.startswith(f"{key}.")]
    if chosen:
        return "\n".join(_section_text(section) for section in chosen)
    for section in everything:
        for option in section.options:
            if option.name == key:
                return _option_text(option)
    known = [section.name for section in everything if section.name]
    known += [option.name for section in everything for option in section.options]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    hint = did_you_mean(key, known)
    if not hint and (near := did_you_mean(key, by_leaf)):
        leaf = near.removeprefix("; did you mean ").removesuffix("?")
        hint = f"; did you mean {by_leaf[leaf]}?"
    raise ConfigError(f"no option or section is called {key!r}{hint or '; hgpt config --explain lists them'}")


def _option_text(option: Option) -> str:
    facts = f"{option.name}: {option.kind}; default {option.default}"
    if option.unit:
        facts += f"; {option.unit}"
    text = [textwrap.fill(facts, _WIDTH, subsequent_indent="    ", break_on_hyphens=False)]
    if option.text:
        text.append(textwrap.fill(option.text, _WIDTH, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(text)


def _section_text(section: Section) -> str:
    heading = textwrap.fill(f"# {section.name or 'the run'}: {section.text}", _WIDTH, subsequent_indent="#   ")
    return "\n".join([heading, *(["", *map(_option_text, section.options)] if section.options else []), ""])


def markdown() -> str:
    """docs/options.md."""
    lines = [
        "# Options",
        "",
        "Everything that a configuration file and `key=value` may set. `hgpt config --markdown` writes this page, and",
        "`hgpt config --explain KEY` says the same of one option or section. How files, presets and overrides lie on",
        "each other: [configuration.md](configuration.md).",
        "",
    ]
    for section in sections():
        lines += [f"## {section.name or 'The run'}", "", section.text, ""]
        if section.options:
            lines += ["| option | type | default | unit | meaning |", "|---|---|---|---|---|"]
            lines += [
                f"| `{option.name}` | {_cell(option.kind)} | `{option.default}` | {option.unit} "
                f"| {_cell(option.text)} |"
                for option in section.options
            ]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", r"\<")
