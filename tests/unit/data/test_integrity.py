"""One changed byte in any file of a dataset or of its feature cache is found before anything is trained on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hgpt.cli import main
from megatron_hgpt.config import VisionConfig
from megatron_hgpt.data.dataset import VLDataset
from megatron_hgpt.data.feature_cache import FeatureCache, describe_tower
from megatron_hgpt.data.feature_cache_writer import CacheOptions, cache_features
from megatron_hgpt.data.mmap_format import DatasetReader
from megatron_hgpt.errors import DataError, SkipSample
from megatron_hgpt.files import sealed
from megatron_hgpt.samples import TASKS, Task
from megatron_hgpt.text.vocabulary import Vocabulary
from megatron_hgpt.vision.clip import HVPTower

C, G = Task.COMPREHENSION, Task.GENERATION
TOWER = VisionConfig(
    hf_config={
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }
)  # fmt: skip
SAMPLES = ("tokens.bin", "loss_mask.bin", "images.bin", "sample_ids.bin")
INDICES = ("tokens.idx", "loss_mask.idx", "images.idx", "sample_ids.idx", "tasks.npy", "checksums.npy", "manifest.json")
CACHED = ("comprehension.bin", "generation.bin")
CACHE_INDICES = tuple(f"{task.value}_{what}.npy" for task in TASKS for what in ("rows", "sums")) + ("manifest.json",)


@pytest.fixture
def dataset(tmp_path: Path, make_dataset: Callable[..., Path]) -> Path:
    """Seven samples with their feature cache."""
    folder = make_dataset(tmp_path / "data", [C, G, C, C, G, C, C])
    options = CacheOptions(precision="fp32", dtype="fp32")
    cache_features(folder, folder / "features", tower=HVPTower.from_config(TOWER, TASKS), vision=TOWER, options=options)
    return folder


def flip(path: Path, position: float) -> None:
    """Change one byte; `position` is its share of the way through the file."""
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def damage_found(folder: Path, vocabulary: Vocabulary) -> list[str]:
    """Reads everything as training does; how each damaged sample was told."""
    options = {"vocabulary": vocabulary, "tokenizer_hash": "abc", "template": "phi3_instruct"}
    cache = FeatureCache(folder / "features", dataset=folder, tower=describe_tower(TOWER), tasks=TASKS)
    found = []
    for features in (None, cache):
        opened = VLDataset(folder, features=features, **options)
        for index in range(len(opened)):
            try:
                opened[index]
            except SkipSample as error:
                found.append(str(error))
    return found


@pytest.mark.parametrize("position", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_changed_sample_is_skipped_and_said(
    dataset: Path, vocabulary: Vocabulary, name: str, position: float
) -> None:
    assert damage_found(dataset, vocabulary) == []
    flip(dataset / name, position)
    found = damage_found(dataset, vocabulary)
    # With the cache no picture is read.
    assert len(found) == (1 if name == "images.bin" else 2)
    assert all("corrupt_sample: " in line and "changed since it was written: hgpt verify" in line for line in found)


@pytest.mark.parametrize("position", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", INDICES)
def test_a_changed_index_is_refused(dataset: Path, name: str, position: float) -> None:
    flip(dataset / name, position)
    with pytest.raises(DataError, match=name):
        DatasetReader(dataset)


@pytest.mark.parametrize("name", CACHED)
def test_changed_features_are_skipped_and_said(dataset: Path, vocabulary: Vocabulary, name: str) -> None:
    flip(dataset / "features" / name, 0.4)
    (found,) = damage_found(dataset, vocabulary)
    assert "corrupt_features: " in found and "changed since they were written: hgpt verify" in found


@pytest.mark.parametrize("name", CACHE_INDICES)
def test_a_changed_index_of_the_cache_is_refused(dataset: Path, vocabulary: Vocabulary, name: str) -> None:
    flip(dataset / "features" / name, 0.9)
    with pytest.raises(DataError, match=name):
        damage_found(dataset, vocabulary)


@pytest.mark.parametrize("name", [*SAMPLES, *INDICES, *(f"features/{name}" for name in CACHED + CACHE_INDICES)])
def test_verify_finds_every_changed_byte(dataset: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flip(dataset / name, 0.6)
    assert main(["verify", str(dataset)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("DataError: ") and Path(name).name in error[0]


def test_verify_says_what_is_right(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dataset / "skipped.jsonl").unlink()  # a list for people
    assert main(["verify", str(dataset)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": as it was written, ")[0] for line in lines] == [str(dataset), str(dataset / "features")]
    assert main(["verify", str(dataset.parent)]) == 2
    assert "is not a dataset folder" in capsys.readouterr().err


def test_verify_goes_on_behind_a_damaged_folder(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(dataset, dataset.parent / "other")
    flip(dataset / "tokens.bin", 0.5)
    assert main(["verify", str(dataset), str(other)]) == 2
    out, err = capsys.readouterr()
    right = [line.split(": as it was written, ")[0] for line in out.splitlines()]
    assert right == [str(dataset / "features"), str(other), str(other / "features")]
    assert err.count("\n") == 1 and err.startswith("DataError: ") and "tokens.bin" in err


def test_a_cache_of_changed_pictures_is_not_written(dataset: Path) -> None:
    shutil.rmtree(dataset / "features")
    flip(dataset / "images.bin", 0.5)
    options = CacheOptions(precision="fp32", dtype="fp32")
    with pytest.raises(DataError, match="a picture of sample 3 changed since it was written"):
        cache_features(dataset, dataset / "f", tower=HVPTower.from_config(TOWER, TASKS), vision=TOWER, options=options)


def test_folders_of_earlier_versions_are_read(dataset: Path, vocabulary: Vocabulary) -> None:
    (dataset / "checksums.npy").unlink()
    manifest = json.loads((dataset / "manifest.json").read_text())
    del manifest["digest"], manifest["files"]["checksums.npy"]
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    opened = VLDataset(dataset, vocabulary=vocabulary, tokenizer_hash="abc", template="phi3_instruct")
    assert [opened[index].sample_id for index in range(2)] == ["c0", "g1"]
    flip(dataset / "loss_mask.bin", 0.0)
    assert opened[0].sample_id == "c0"  # only its sha256 tells
    with pytest.raises(DataError, match=r"loss_mask.bin: its sha256 differs"):
        DatasetReader(dataset, verify_checksums=True)


def test_an_index_that_points_outside_is_a_skip(dataset: Path, vocabulary: Vocabulary) -> None:
    """Whoever writes the index can write its checksum."""
    content = bytearray((dataset / "tokens.idx").read_bytes())
    position = 9 + 8 + 1 + 8 + 8  # header, version, type, two counts; then int32 lengths
    content[position : position + 4] = (2**30).to_bytes(4, "little")
    (dataset / "tokens.idx").write_bytes(content)
    manifest = json.loads((dataset / "manifest.json").read_text())
    import hashlib

    manifest["files"]["tokens.idx"]["sha256"] = hashlib.sha256(content).hexdigest()
    (dataset / "manifest.json").write_text(json.dumps(sealed(manifest)))
    opened = VLDataset(dataset, vocabulary=vocabulary, tokenizer_hash="abc", template="phi3_instruct")
    with pytest.raises(SkipSample, match="corrupt_sample: .*tokens.idx points outside of its file at sample 0"):
        opened[0]
    assert opened[1].sample_id == "g1"
