"""Records out of the parquet files of `lintw/VL-Health` (columns `images`, `image_ids`, `conversations`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hgpt.errors import DataError

_BATCH_ROWS = 16
"""Rows read at a time: their pictures are in memory."""


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Rows in the JSON schema of `llava_json`, with the pictures as encoded bytes.

    A picture is raw bytes, or Hugging Face's ``{"bytes", "path"}``; conversations are a list of turns or its JSON text.
    A row without an id column gets its image ids, joined by "+", and its row number.

    Raises:
        DataError: pyarrow is missing, or the file is not such a parquet file.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from error
    try:
        with ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            missing = sorted({"images", "conversations"} - names)
            if missing:
                raise DataError(f"{path} has no column {missing[0]!r}, it has {sorted(names)}")
            row_number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield _record(row, row_number)
                    row_number += 1
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet ({error}); download or copy it again") from error


def _record(row: dict[str, Any], number: int) -> dict[str, Any]:
    """One row; what does not have the expected form is left for `llava_json.parse_record` to refuse."""
    record = {key: value for key, value in row.items() if key not in ("images", "image_ids") and value is not None}
    pictures = row.get("images")
    pictures = pictures if isinstance(pictures, list) else [] if pictures is None else [pictures]
    record["image"] = [item.get("bytes") if isinstance(item, dict) else item for item in pictures]
    target = record.get("target_image")
    if isinstance(target, dict):
        record["target_image"] = target.get("bytes")
    ids = row.get("image_ids")
    if "id" not in record and ids:
        record["id"] = f"{'+'.join(map(str, ids)) if isinstance(ids, list) else ids}#{number}"
    if isinstance(record.get("conversations"), str):
        try:
            record["conversations"] = json.loads(record["conversations"])
        except ValueError:
            record["conversations"] = None
    return record
