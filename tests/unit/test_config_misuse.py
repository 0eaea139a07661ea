"""Every option of a configuration with values that make no sense, made from its type: one line that names it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatron_hgpt.bounds import Above, AtMost, Below, Within
from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import load_config
from megatron_hgpt.errors import ConfigError

NO_TEXT = ("5", "1.5", "true", "[a]", "{a: 1}", r'"a\0b"', r'"\ud800"', "2020-01-02", "*a")
NO_LIST = ("x", "5", "{a: 1}", "[1]", "[[a]]", "[{a: 1}]", "[null]", "&a [*a]")
NO_MAPPING = ("x", "5", "[a]", "[a: 1]", "&a {b: *a}", "{a: 1, a: 2}", "{[a]: 1}")
NO_CHOICE = ("nonsense", "5000", "[]", "{}", "1.5", "''")
NO_TRUTH = ("2", "maybe", "'true'", "[]", "{}", "1.0")
NO_NUMBER = ("x", "''", "true", "[1]", "{a: 1}", ".nan", ".inf", "-.inf", "1e400", "1" + "0" * 23, "-1" + "0" * 23,
             "9" * 400, "9" * 5000, "0x" + "f" * 300, "!!int ''", "1:2:3:4:5:6:7:8:9:10:11:12:13:14")  # fmt: skip
NO_INT = ("1.5", "1e23", "1.0")

ABSURD = {
    int: (*NO_NUMBER, *NO_INT),
    float: NO_NUMBER,
    bool: NO_TRUTH,
    str: NO_TEXT,
    list: NO_LIST,
    dict: NO_MAPPING,
}
"""Type -> what no option of it takes; another type is a choice."""


def fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every option, sections opened."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kinds = members(hints[field.name])
        section = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if isinstance(section, type):
            yield from fields(section, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name]


def members(kind: Any) -> tuple[Any, ...]:
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if is_union else (kind,)


def bounds(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return (typing.get_args(kind)[0], typing.get_args(kind)[1:]) if hasattr(kind, "__metadata__") else (kind, ())


def absurd(kind: Any) -> Iterator[str]:
    """Values, as YAML, that an option of this type cannot have."""
    options = members(kind)
    if type(None) not in options:
        yield "null"
    (option,) = (option for option in options if option is not type(None))
    plain, limits = bounds(option)
    container = typing.get_origin(plain) or plain
    yield from ABSURD.get(container, NO_CHOICE)
    for limit in limits:
        yield from map(str, _edges(limit, 1 if plain is int else 1e-6))


def _edges(limit: Any, step: float) -> tuple[float, ...]:
    """The nearest values outside a bound."""
    if isinstance(limit, Within):
        return limit.low - step, limit.high + max(step, limit.high * 1e-6 if step != 1 else 1)
    if isinstance(limit, Below):
        return limit.low - step, limit.high
    return (limit.minimum,) if isinstance(limit, Above) else (limit.maximum + 1,)


OPTIONS = dict(fields(RunConfig))


@pytest.mark.parametrize("name", OPTIONS)
def test_values_that_make_no_sense(name: str, record_property: Callable[[str, object], None]) -> None:
    values = list(dict.fromkeys(absurd(OPTIONS[name])))
    for value in values:
        with pytest.raises(ConfigError) as caught:
            load_config(None, [f"{name}={value}"])
        message = str(caught.value)
        assert name.rpartition(".")[2] in message or "is not valid YAML" in message
        assert message.isprintable() and len(message) < 1500, (value[:50], message[:300])
    record_property("values refused", len(values))


def test_every_number_has_two_ends() -> None:
    """Without an upper one, a slip of the keyboard takes the machine (`global_batch_size=1000000`) or never ends."""
    for name, kind in OPTIONS.items():
        for option in members(kind):
            plain, limits = bounds(option)
            if typing.get_origin(plain) is dict:
                plain, limits = bounds(typing.get_args(plain)[1])
            if plain in (int, float):
                upper = [limit for limit in limits if isinstance(limit, Within | Below | AtMost)]
                lower = [limit for limit in limits if isinstance(limit, Within | Below | Above)]
                assert upper and lower, name


def test_many_problems_are_said_in_part() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"training.seed{i}=1" for i in range(300)])
    lines = str(caught.value).splitlines()
    assert lines[0] == "300 problems" and lines[-1] == "  … and 250 more" and len(lines) == 52
