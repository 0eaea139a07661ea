"""The dataset folder: what goes in comes out, it is complete or absent, and damage is found."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_hgpt.data.mmap_format import MAX_LISTED_SKIPS, DatasetReader, DatasetWriter, read_manifest
from megatron_hgpt.errors import DataError
from megatron_hgpt.files import sealed, sha256_of
from megatron_hgpt.samples import IMAGE_TOKEN_ID, Task

DESCRIPTION: dict[str, Any] = {"tokenizer": {}, "template": {}, "vocabulary": {}}


def _write(folder: Path, *, images: bool = True, overwrite: bool = False, first: int = 1) -> dict[str, Any]:
    with DatasetWriter(folder, overwrite=overwrite) as writer:
        pictures = [b"one", b"second"] if images else []
        writer.add(sample_id="ä", task=Task.GENERATION, tokens=[first, -200, 2**31 - 1], loss_mask=[False, False, True])
        writer.add(sample_id="b", task=Task.COMPREHENSION, tokens=[5, 6], loss_mask=[True, False], images=pictures)
        writer.add(sample_id="c", task=Task.COMPREHENSION, tokens=[7], loss_mask=[True], source="slake")
        return writer.finish(DESCRIPTION)


@pytest.mark.parametrize("images", [True, False])
def test_round_trip(tmp_path: Path, images: bool) -> None:
    manifest = _write(tmp_path / "data", images=images)
    reader = DatasetReader(tmp_path / "data", verify_checksums=True)
    assert reader.manifest == manifest
    assert len(reader) == 3
    assert reader.tasks.tolist() == [1, 0, 0]
    assert reader.tokens(0).tolist() == [1, IMAGE_TOKEN_ID, 2**31 - 1]
    assert reader.loss_mask(1).tolist() == [1, 0]
    assert [reader.sample_id(i) for i in range(3)] == ["ä", "b", "c"]
    assert [reader.images(i) for i in range(3)] == [[], [b"one", b"second"] if images else [], []]
    assert manifest["counts"] == {
        "samples": 3,
        "images": 2 if images else 0,
        "tokens": 6,
        "supervised_tokens": 3,
        "per_task": {"comprehension": 2, "generation": 1},
        "per_source": {"": 2, "slake": 1},
    }
    with pytest.raises(IndexError):
        reader.tokens(3)


def test_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path / "data") as writer:
        writer.add(sample_id="a", task=Task.COMPREHENSION, tokens=[1], loss_mask=[True])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_arrays_outlive_the_reader(tmp_path: Path) -> None:
    # Ends the interpreter (segmentation fault) when `_document` returns views instead of copies.
    _write(tmp_path / "data")
    tokens, tasks = DatasetReader(tmp_path / "data").tokens(1), DatasetReader(tmp_path / "data").tasks
    gc.collect()
    assert tokens.tolist() == [5, 6]
    assert tasks.tolist() == [1, 0, 0]


def test_an_empty_result_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="no usable sample; skipped: 1 x missing_image; check --image-root"),
        DatasetWriter(tmp_path / "data") as writer,
    ):
        writer.skip("a", "missing_image", "x.png")
        writer.finish(DESCRIPTION)
    assert list(tmp_path.iterdir()) == []


def test_overwrite(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    _write(folder)
    with pytest.raises(DataError, match="exists already; .* --overwrite"):
        DatasetWriter(folder)
    with pytest.raises(RuntimeError), DatasetWriter(folder, overwrite=True):
        raise RuntimeError
    assert DatasetReader(folder).tokens(0)[0] == 1  # the old one stays until the new one is complete
    _write(folder, overwrite=True, first=9)
    assert DatasetReader(folder).tokens(0)[0] == 9
    assert list(tmp_path.iterdir()) == [folder]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("x")
    with pytest.raises(DataError, match="is not a dataset"):
        DatasetWriter(tmp_path / "other", overwrite=True)


def test_skips_are_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data") as writer:
        writer.add(sample_id="a", task=Task.COMPREHENSION, tokens=[1], loss_mask=[True])
        for i in range(MAX_LISTED_SKIPS + 5):
            writer.skip(f"bad-{i}", "missing_image", "x.png")
        writer.skip("worse", "bad_indices", "3 indices")
        manifest = writer.finish(DESCRIPTION)
    assert manifest["skipped"] == {"bad_indices": 1, "missing_image": MAX_LISTED_SKIPS + 5}
    listed = [json.loads(line) for line in (tmp_path / "data" / "skipped.jsonl").read_text().splitlines()]
    assert len(listed) == MAX_LISTED_SKIPS + 1
    assert listed[-1] == {"id": "worse", "reason": "bad_indices", "detail": "3 indices"}


def test_mask_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 tokens but 1 mask"), DatasetWriter(tmp_path / "data") as writer:
        writer.add(sample_id="a", task=Task.COMPREHENSION, tokens=[1, 2], loss_mask=[True])


def test_damage_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    _write(folder)
    path = folder / "tokens.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(DataError, match=r"tokens.bin: 20 bytes, manifest.json says 24"):
        DatasetReader(folder)
    path.write_bytes(b"\1" + content[1:-1] + b"\1")
    assert len(read_manifest(folder)) > 0  # same size: only the checksum tells
    with pytest.raises(DataError, match=r"tokens.bin: its sha256 differs"):
        DatasetReader(folder, verify_checksums=True)
    path.unlink()
    with pytest.raises(DataError, match=r"tokens.bin: no bytes"):
        DatasetReader(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema version 2, this package reads 1"),
        ({"counts": None}, "has no field 'counts'"),
        ({"files": {}}, "does not list images.bin"),
        ({"counts": {"samples": 4}}, "3 documents, manifest.json says 4 samples"),
    ],
)
def test_manifest_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    manifest = {**_write(tmp_path / "data"), **change}
    path = tmp_path / "data" / "manifest.json"
    path.write_text(json.dumps(sealed({key: value for key, value in manifest.items() if value is not None})))
    with pytest.raises(DataError, match=message):
        DatasetReader(tmp_path / "data")


@pytest.mark.parametrize("content", ["", "[1]", "3", "not json"])
def test_unreadable_manifest(tmp_path: Path, content: str) -> None:
    _write(tmp_path / "data")
    (tmp_path / "data" / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="manifest.json"):
        DatasetReader(tmp_path / "data")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Megatron's half-built reader complains
def test_index_of_another_format_is_refused(tmp_path: Path) -> None:
    manifest = _write(tmp_path / "data")
    path = tmp_path / "data" / "tokens.idx"
    path.write_bytes(b"\0" * manifest["files"]["tokens.idx"]["bytes"])
    with pytest.raises(DataError, match="tokens.idx: its sha256 differs"):
        DatasetReader(tmp_path / "data")
    manifest["files"]["tokens.idx"]["sha256"] = sha256_of(path)
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(DataError, match="tokens.idx cannot be read"):
        DatasetReader(tmp_path / "data")
    with pytest.raises(DataError, match="is not a dataset folder"):
        DatasetReader(tmp_path)
