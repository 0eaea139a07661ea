"""What a resumed run is told: the settings that are others than when its checkpoint was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import to_dict
from megatron_hgpt.safe_yaml import read_yaml

_ABSENT = object()


def changed_settings(folder: Path, config: RunConfig) -> list[str]:
    """One text per setting that differs from ``resolved_config.yaml`` of a checkpoint, in the configuration's order.

    A setting that the checkpoint's version did not have counts as its default. A file that is missing or damaged is
    one text of its own: the weights do not depend on it.
    """
    path = folder / "resolved_config.yaml"
    try:
        stored = read_yaml(path)
        if not isinstance(stored, Mapping):
            raise ValueError("it holds no sections")
    except (OSError, ValueError) as error:
        return [f"{path} cannot be read ({' '.join(str(error).split())}): what changed since is not known"]
    before = {**dict(_flat(to_dict(RunConfig()))), **dict(_flat(stored))}
    now = dict(_flat(to_dict(config)))
    return [
        f"{name}: {_shown(before.get(name, _ABSENT))} -> {_shown(now.get(name, _ABSENT))}"
        for name in {**now, **dict(_flat(stored))}
        if before.get(name, _ABSENT) != now.get(name, _ABSENT)
    ]


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``a.b`` -> value; an empty mapping has nothing to show."""
    if not isinstance(values, Mapping):
        yield prefix, values
        return
    for key, value in values.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "not set"
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).strip().removesuffix("...").strip()
