"""Records out of the parquet files of `lintw/VL-Health` (columns `images`, `image_ids`, `conversations`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hgpt.errors import DataError
from megatron_hgpt.vl_health.llava_json import parse_or_text

if TYPE_CHECKING:
    from pyarrow import RecordBatch

_BATCH_ROWS = 16
"""Rows read at a time: their pictures are in memory."""


def read_records(path: Path) -> Iterator[Any]:
    """Rows in the JSON schema of `llava_json`, with the pictures as encoded bytes.

    A picture is raw bytes, or Hugging Face's ``{"bytes", "path"}``; conversations are a list of turns or its JSON text.
    A row without an id column gets its image ids, joined by "+", and its row number; one that cannot be read comes as
    text, which is no record.

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
                for row in _rows(batch):
                    yield _record(row, row_number) if isinstance(row, dict) else row
                    row_number += 1
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet ({error}); download or copy it again") from error


def _rows(batch: RecordBatch) -> Iterator[dict[str, Any] | str]:
    """Rows of a batch; one that Python cannot hold (text that is not UTF-8, a date out of range) as what is wrong."""
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            yield f"{type(error).__name__}: {error}"


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
        record["conversations"] = parse_or_text(record["conversations"])
    return record
