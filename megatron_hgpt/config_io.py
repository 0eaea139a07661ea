"""Run configurations in and out of YAML: presets, includes, dotted overrides, strict names and types, early checks.

A configuration file may name what lies beneath it:

    preset: healthgpt_m3          # megatron_hgpt/presets/healthgpt_m3.yaml
    base: m3_common.yaml          # another file, relative to this one
    training: {stage: stage2}

Order, later wins: preset, base, file, ``key.sub=value`` overrides (values are YAML).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_hgpt.config import RunConfig
from megatron_hgpt.errors import ConfigError, did_you_mean
from megatron_hgpt.files import write_atomic

_PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names that ``preset:`` accepts."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def load_config(path: str | Path | None = None, overrides: Sequence[str] = (), preset: str | None = None) -> RunConfig:
    """Build a run from a file, a preset and overrides.

    Args:
        path: YAML file, or None.
        overrides: ``a.b=value``, the value read as YAML.
        preset: lies beneath the file.

    Raises:
        ConfigError: an unknown key (the nearest name is suggested), a value of a wrong type, a missing file.
    """
    values = _read_preset(preset) if preset else {}
    if path is not None:
        values = _merge(values, _read_file(Path(path), ()))
    for override in overrides:
        values = _merge(values, _parse_override(override))
    return _build(RunConfig, values, "", "the configuration")


def _read_preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise ConfigError(f"preset {name!r} is unknown; there are {', '.join(preset_names())}")
    return _read_file(_PRESETS / f"{name}.yaml", ())


def _read_file(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` leads back to itself")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    values = _parse_yaml(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not a {type(values).__name__}")
    for key in ("preset", "base"):
        if not isinstance(values.get(key, ""), str):
            raise ConfigError(f"{path}: {key}={values[key]!r} must be a name")
    beneath: dict[str, Any] = {}
    if preset := values.pop("preset", None):
        beneath = _read_preset(preset)
    if base := values.pop("base", None):
        beneath = _merge(beneath, _read_file(path.parent / base, (*seen, path.resolve())))
    _build(RunConfig, values, "", str(path))  # every field has a default: each file is checked, and named, by itself
    return _merge(beneath, values)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        if repeated := _repeated_key(yaml.compose(text, Loader=yaml.SafeLoader)):
            raise ConfigError(f"{origin}: {repeated}; the later one would silently replace the earlier")
        return yaml.safe_load(text)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # PyYAML lets ValueErrors of malformed dates and numbers through
        raise ConfigError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error


def _repeated_key(node: yaml.Node | None) -> str | None:
    """The first key that a mapping holds twice, with its lines; YAML itself lets the last one win."""
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                return f"key {name!r} stands on lines {lines[name]} and {line}"
            lines[name] = line
            if found := _repeated_key(value):
                return found
    elif isinstance(node, yaml.SequenceNode):
        return next(filter(None, map(_repeated_key, node.value)), None)
    return None


def _merge(below: dict[str, Any], above: Mapping[str, Any], cls: type | None = RunConfig) -> dict[str, Any]:
    """`above` over `below`, key by key; an empty mapping clears a field that holds one (not a whole section)."""
    merged = dict(below)
    for key, value in above.items():
        section = _section(cls, key)
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and (value or section):
            merged[key] = _merge(dict(merged[key]), value, section)
        else:
            merged[key] = value
    return merged


def _section(cls: type | None, key: str) -> type | None:
    """The dataclass that field `key` of `cls` holds, if it holds one."""
    kind = dict(_fields(cls)).get(key) if cls is not None else None
    sections = [option for option in typing.get_args(kind) or (kind,) if dataclasses.is_dataclass(option)]
    return typing.cast(type, sections[0]) if sections else None


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    value = _parse_yaml(text, f"the value of override {override!r}")
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    _build(RunConfig, value, "", "the command line")
    return value


def _all_names(cls: type, prefix: str = "") -> Iterator[str]:
    for field, kind in _fields(cls):
        yield f"{prefix}{field}"
        for option in typing.get_args(kind) or (kind,):
            if dataclasses.is_dataclass(option):
                yield from _all_names(typing.cast(type, option), f"{prefix}{field}.")


def _fields(cls: type) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
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


def _build(cls: type, values: Any, prefix: str, origin: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{origin}: {prefix.rstrip('.')} must be a section (a mapping), got {values!r}")
    kinds = dict(_fields(cls))
    for key in values:
        if key not in kinds:
            raise ConfigError(f"{origin}: unknown key {prefix}{key}{_suggest(str(key), prefix, list(kinds))}")
    return cls(**{key: _convert(kinds[key], value, f"{prefix}{key}", origin) for key, value in values.items()})


def _convert(kind: Any, value: Any, name: str, origin: str) -> Any:
    """`value` as the declared type; int passes for float, nothing else is bent."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is type(None):
            continue
        if dataclasses.is_dataclass(option):
            return _build(typing.cast(type, option), value, f"{name}.", origin)
        container = typing.get_origin(option)
        if container is list and isinstance(value, list):
            (item,) = typing.get_args(option)
            return [_convert(item, v, f"{name}[{i}]", origin) for i, v in enumerate(value)]
        if container is dict and isinstance(value, Mapping):
            _, item = typing.get_args(option)
            return {str(k): v if item is Any else _convert(item, v, f"{name}.{k}", origin) for k, v in value.items()}
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if option is float and isinstance(value, str) and _is_number(value):
            return float(value)  # YAML reads 1e-3 (no dot) as text
        if option in (int, str, bool) and type(value) is option:
            return value
    expected = " or ".join(getattr(o, "__name__", str(o)) for o in options if o is not type(None))
    raise ConfigError(f"{origin}: {name}={value!r} must be {expected}{' or null' if type(None) in options else ''}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and scalars."""
    return dataclasses.asdict(config)


def dump(config: RunConfig) -> str:
    """YAML that `load_config` reads back to an equal configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration atomically."""
    write_atomic(path, dump(config))
