"""Rows of the published parquet layout become records of the JSON schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_hgpt.errors import DataError
from megatron_hgpt.vl_health.hf_parquet import read_records
from megatron_hgpt.vl_health.llava_json import parse_record

pyarrow = pytest.importorskip("pyarrow")
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "CT"}]


def _write(path: Path, **columns: list[Any]) -> Path:
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), path)
    return path


def test_rows_become_samples(tmp_path: Path) -> None:
    number = 40  # more than one batch
    path = _write(
        tmp_path / "a.parquet",
        images=[[bytes([i + 1])] for i in range(number)],
        image_ids=[["x", str(i)] for i in range(number)],
        conversations=[TURNS] * number,
    )
    records = list(read_records(path))
    assert len(records) == number
    sample = parse_record(records[30], image_root=tmp_path, num_codes=4, num_indices=4, default_id="d")
    assert (sample.sample_id, sample.images) == ("x+30#30", [bytes([31])])
    assert [turn.text for turn in sample.turns] == ["<image>\nWhat?", "CT"]


def test_other_forms(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "a.parquet",
        id=["first", None],
        images=[[{"bytes": b"1", "path": "x.png"}], [{"bytes": b"2", "path": None}]],
        conversations=[json.dumps(TURNS), "broken"],
    )
    first, second = read_records(path)
    assert first == {"id": "first", "image": [b"1"], "conversations": TURNS}
    assert second == {"image": [b"2"], "conversations": "broken"}


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no column 'images'"):
        list(read_records(_write(tmp_path / "a.parquet", conversations=["x"])))
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    for name in ("b.parquet", "absent.parquet"):
        with pytest.raises(DataError, match="cannot be read as parquet"):
            list(read_records(tmp_path / name))
