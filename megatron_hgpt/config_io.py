"""Run configurations in and out of YAML: presets, includes, dotted overrides, strict names and types, early checks.

A configuration file may name what lies beneath it:

    preset: healthgpt_m3          # megatron_hgpt/presets/healthgpt_m3.yaml
    base: m3_common.yaml          # another file, relative to this one
    training: {stage: stage2}

Order, later wins: preset, base, file, ``key.sub=value`` overrides (values are YAML).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_hgpt.bounds import Bound
from megatron_hgpt.config import PLUGIN_SIZES, RunConfig
from megatron_hgpt.errors import MOST_PROBLEMS, ConfigError, did_you_mean, raise_problems, shown
from megatron_hgpt.files import write_atomic
from megatron_hgpt.safe_yaml import MAX_KEY, parse_yaml, read_yaml

_PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names that ``preset:`` accepts."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """What cannot be read."""

    field: str
    """Dotted name of the option that keeps its default therefore; empty where it concerns none (an unknown key)."""
    message: str


def load_config(path: str | Path | None = None, overrides: Sequence[str] = (), preset: str | None = None) -> RunConfig:
    """Build a run from a file, a preset and overrides.

    Args:
        path: YAML file, or None.
        overrides: ``a.b=value``, the value read as YAML.
        preset: lies beneath the file.

    Raises:
        ConfigError: all unknown keys (the nearest name is suggested) and all values of a wrong type, range or choice;
            or a file that cannot be read.
    """
    config, problems = read_config(path, overrides, preset)
    raise_problems([problem.message for problem in problems])
    return config


def read_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    preset: str | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[RunConfig, list[Problem]]:
    """As `load_config`, with what cannot be read left at its default and returned as problems.

    Args:
        path, overrides, preset: as there.
        defaults: values beneath all of these, in place of the fields' own; as a file has them.

    Raises:
        ConfigError: a file or preset as a whole cannot be read.
    """
    problems: list[Problem] = []
    refilled: set[str] = set()
    values = _checked(RunConfig, defaults or {}, "", "", problems)
    if preset:
        values = _merge(values, _read_preset(preset, problems, refilled), refilled)
    if path is not None:
        values = _merge(values, _read_file(Path(path), (), problems, refilled), refilled)
    for override in overrides:
        values = _merge(values, _parse_override(override, problems), refilled)
    _refuse_parts(values, refilled, problems)
    return _construct(RunConfig, values), problems


def _refuse_parts(values: dict[str, Any], refilled: set[str], problems: list[Problem]) -> None:
    """A part of a plugin over one that is null would take its other sizes from another model: it stays null."""
    for name in sorted(refilled):
        *sections, last = name.split(".")
        holder: Any = values
        for section in sections:
            holder = holder.get(section) if isinstance(holder, Mapping) else None
        plugin = holder.get(last) if isinstance(holder, dict) else None
        if isinstance(plugin, Mapping) and (missing := [key for key in PLUGIN_SIZES if key not in plugin]):
            holder[last] = None
            problems.append(
                Problem(
                    name,
                    f"{name} is null in the preset or file beneath, and what stands over it lacks "
                    f"{' and '.join(missing)}; give {', '.join(PLUGIN_SIZES[:-1])} and {PLUGIN_SIZES[-1]} together",
                )
            )


def check_types(config: RunConfig) -> tuple[RunConfig, list[Problem]]:
    """A run that was built in Python, read as `read_config` reads a file: wrong values at their defaults, and named."""
    problems: list[Problem] = []
    values = _checked(RunConfig, to_dict(config), "", "", problems)
    return _construct(RunConfig, values), problems


def _read_preset(name: str, problems: list[Problem], refilled: set[str]) -> dict[str, Any]:
    if name not in preset_names():
        raise ConfigError(f"preset {name!r} is unknown; there are {', '.join(preset_names())}")
    return _read_file(_PRESETS / f"{name}.yaml", (), problems, refilled)


def _read_file(path: Path, seen: tuple[Path, ...], problems: list[Problem], refilled: set[str]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` leads back to itself")
    try:
        values = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not a {type(values).__name__}")
    for key in ("preset", "base"):
        if not isinstance(values.get(key, ""), str):
            raise ConfigError(f"{path}: {key}={shown(values[key])} must be a name")
    beneath: dict[str, Any] = {}
    if preset := values.pop("preset", None):
        beneath = _read_preset(preset, problems, refilled)
    if base := values.pop("base", None):
        under = _read_file(path.parent / base, (*seen, path.resolve()), problems, refilled)
        beneath = _merge(beneath, under, refilled)
    # Every field has a default: each file is checked, and named, by itself.
    return _merge(beneath, _checked(RunConfig, values, "", str(path), problems), refilled)


def _merge(
    below: dict[str, Any],
    above: Mapping[str, Any],
    refilled: set[str],
    cls: type | None = RunConfig,
    prefix: str = "",
) -> dict[str, Any]:
    """`above` over `below`, key by key; an empty mapping clears a field that holds one (not a whole section).

    Names of sections that were null and get values are added to `refilled`.
    """
    merged = dict(below)
    for key, value in above.items():
        section = _section(cls, key)
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and (value or section):
            merged[key] = _merge(dict(merged[key]), value, refilled, section, f"{prefix}{key}.")
        else:
            if section is not None and isinstance(value, Mapping) and key in merged:
                refilled.add(f"{prefix}{key}")
            merged[key] = value
    return merged


def _section(cls: type | None, key: str) -> type | None:
    """The dataclass that field `key` of `cls` holds, if it holds one."""
    kind = dict(_fields(cls)).get(key) if cls is not None else None
    return next((option for option in _options(kind) if _is_section(option)), None)


def _parse_override(override: str, problems: list[Problem]) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip() or len(key) > MAX_KEY or not key.isprintable():
        problems.append(Problem("", f"override {shown(override)} is not of the form section.key=value"))
        return {}
    try:
        value = parse_yaml(text)
    except ValueError as error:
        problems.append(Problem(key.strip(), f"the value of override {shown(override)} is not valid YAML: {error}"))
        return {}
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return _checked(RunConfig, value, "", "the command line", problems)


def _all_names(cls: type, prefix: str = "") -> Iterator[str]:
    for field, kind in _fields(cls):
        yield f"{prefix}{field}"
        for option in filter(_is_section, _options(kind)):
            yield from _all_names(option, f"{prefix}{field}.")


def _fields(cls: type) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return [(field.name, hints[field.name]) for field in dataclasses.fields(cls)]


def _suggest(name: str, prefix: str, siblings: Sequence[str]) -> str:
    if hint := did_you_mean(name, siblings, prefix):
        return hint
    everything = list(_all_names(RunConfig))
    by_leaf = {full.rsplit(".", 1)[-1]: full for full in everything}
    near = difflib.get_close_matches(name, list(by_leaf), n=1)
    if near:
        return f"; did you mean {by_leaf[near[0]]}?"
    return f"; {prefix.rstrip('.') or 'a run'} has {', '.join(siblings)}"


def _checked(cls: type, values: Mapping[str, Any], prefix: str, origin: str, problems: list[Problem]) -> dict[str, Any]:
    """The values that can be read, with their declared types; the others are added to `problems`."""
    kinds = dict(_fields(cls))
    where = f"{origin}: " if origin else ""
    good: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in kinds:
            hint = _suggest(str(key), prefix, list(kinds)) if len(problems) < MOST_PROBLEMS else ""
            problems.append(Problem("", f"{where}unknown key {name}{hint}"))
            continue
        section = _section(cls, key)
        if section is not None and isinstance(value, Mapping):
            good[key] = _checked(section, value, f"{name}.", origin, problems)
            continue
        try:
            good[key] = _convert(kinds[key], value, name)
        except ConfigError as error:
            problems.append(Problem(name, f"{where}{error}"))
    return good


def _construct(cls: type, values: Mapping[str, Any], default: Any = None) -> Any:
    """The dataclass of checked values; what they leave out stays as in `default` (two plugins differ)."""
    base = cls() if default is None else default
    arguments = {}
    for key, value in values.items():
        section = _section(cls, key)
        if section is not None and value is not None:
            value = _construct(section, value, getattr(base, key))
        arguments[key] = value
    return dataclasses.replace(base, **arguments)


def _convert(kind: Any, value: Any, name: str) -> Any:
    """`value` as the declared type; int passes for float, nothing else is bent.

    Raises:
        ConfigError: it has another type, lies outside the range or is none of the choices.
    """
    options = _options(kind)
    if value is None and type(None) in options:
        return None
    for option in options:
        plain, bounds = _without_bounds(option)
        container = typing.get_origin(plain)
        if container is list and isinstance(value, list):
            (item,) = typing.get_args(plain)
            return [_convert(item, v, f"{name}[{i}]") for i, v in enumerate(value)]
        if container is dict and isinstance(value, Mapping):
            _, item = typing.get_args(plain)
            return {str(k): v if item is Any else _convert(item, v, f"{name}.{k}") for k, v in value.items()}
        if container is typing.Literal and any(value == c and type(value) is type(c) for c in typing.get_args(plain)):
            return value
        number = _scalar(plain, value)
        if number is not None and all(bound.holds(number) for bound in bounds):
            return number
    if any(map(_is_section, options)):
        raise ConfigError(f"{name} must be a section (a mapping), got {shown(value)}")
    hints = [_choice_hint(option, value) for option in options if option is not type(None)]
    raise ConfigError(f"{name}={shown(value)} must be {describe_type(kind)}{''.join(hints)}")


def _scalar(kind: Any, value: Any) -> Any:
    """`value` as int, str, bool or float; None where it is something else."""
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # no number, or a whole one beyond every float
            return float(value)  # YAML reads 1e-3 (no dot) as text
    return value if kind in (int, str, bool) and type(value) is kind else None


def _options(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if is_union else (kind,)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _without_bounds(kind: Any) -> tuple[Any, tuple[Bound, ...]]:
    if typing.get_origin(kind) is typing.Annotated:
        plain, *bounds = typing.get_args(kind)
        return plain, tuple(bounds)
    return kind, ()


def _choice_hint(kind: Any, value: Any) -> str:
    if typing.get_origin(kind) is not typing.Literal:
        return ""
    return did_you_mean(str(value), map(str, typing.get_args(kind)))


def describe_type(kind: Any) -> str:
    """A field's type in words: ``"int (at least 1) or null"``, ``"one of bf16, fp32, fp8"``."""
    words = []
    for option in _options(kind):
        plain, bounds = _without_bounds(option)
        if plain is type(None):
            words.append("null")
        elif typing.get_origin(plain) is list:
            words.append("a list, as [data/train]")
        elif typing.get_origin(plain) is dict:
            words.append("a mapping, as {key: value}")
        elif typing.get_origin(plain) is typing.Literal:
            words.append("one of " + ", ".join(map(str, typing.get_args(plain))))
        else:
            ranges = f" ({', '.join(map(str, bounds))})" if bounds else ""
            words.append(f"{getattr(plain, '__name__', str(plain))}{ranges}")
    return " or ".join(words)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and scalars."""
    return dataclasses.asdict(config)


def dump(config: RunConfig) -> str:
    """YAML that `load_config` reads back to an equal configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration atomically."""
    write_atomic(path, dump(config))
