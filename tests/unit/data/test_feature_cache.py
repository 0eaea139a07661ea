"""The cache holds exactly what the tower says, each picture once; another tower, dataset or depth is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hgpt.config import RunConfig, VisionConfig
from megatron_hgpt.data.feature_cache import FeatureCache, describe_tower, open_caches
from megatron_hgpt.data.feature_cache_writer import CacheOptions, cache_features
from megatron_hgpt.data.loader import build_loader
from megatron_hgpt.data.mmap_format import DatasetReader
from megatron_hgpt.errors import CheckpointError, ConfigError, DataError, SkipSample
from megatron_hgpt.files import sealed, sha256_of
from megatron_hgpt.samples import TASKS, Task
from megatron_hgpt.vision.clip import HVPTower, tower_hash
from megatron_hgpt.vision.preprocess import clip_preprocess, load_image

C, G = Task.COMPREHENSION, Task.GENERATION
Make = Callable[..., Path]
SIZES = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def _vision(**changes: Any) -> VisionConfig:
    sizes = {**SIZES, **{key: changes.pop(key) for key in list(changes) if key in SIZES}}
    return VisionConfig(hf_config=sizes, **changes)


def _write(folder: Path, vision: VisionConfig | None = None, *, name: str = "features", **options: Any) -> dict:
    vision = vision or _vision()
    settings: dict[str, Any] = {"precision": "fp32", "dtype": "fp32", "batch_size": 3, **options}
    return cache_features(
        folder,
        folder / name,
        tower=HVPTower.from_config(vision, TASKS),
        vision=vision,
        options=CacheOptions(**settings),
    )


def _open(folder: Path, vision: VisionConfig | None = None, name: str = "features", **options: Any) -> FeatureCache:
    tower = describe_tower(vision or _vision())
    return FeatureCache(folder / name, dataset=folder, tower=tower, **{"tasks": TASKS, **options})


@pytest.fixture
def dataset(tmp_path: Path, make_dataset: Make) -> Path:
    return make_dataset(tmp_path / "data", [C, G, C, C, G, C, C])


def test_features_are_the_tower_s_at_the_depth_of_the_task(dataset: Path) -> None:
    manifest = _write(dataset)
    assert manifest["num_blocks"] == {"comprehension": 2, "generation": 1}
    assert (manifest["pictures"], manifest["images"]) == ({"comprehension": 5, "generation": 2}, 7)
    cache, reader, tower = _open(dataset), DatasetReader(dataset), HVPTower.from_config(_vision(), TASKS)
    for index in range(7):
        task = TASKS[int(reader.tasks[index])]
        (features,) = cache.read(reader.image_numbers(index), task)
        pixels = clip_preprocess(load_image(reader.images(index)[0]), 16)[None]
        torch.testing.assert_close(features, tower(pixels, task)[0], rtol=0, atol=1e-6)
        assert (features - tower(pixels, G if task is C else C)[0]).abs().max() > 1e-3
        with pytest.raises(DataError, match="is not cached at the depth of"):
            cache.read(reader.image_numbers(index), G if task is C else C)


def test_both_depths_and_equal_pictures_once(tmp_path: Path, dataset: Path, make_dataset: Make) -> None:
    _write(dataset, both_depths=True, name="both")
    task, both = _write(dataset), _open(dataset, name="both")
    assert sum(both.manifest["files"].values()) > 1.5 * sum(task["files"].values())
    assert torch.equal(both.read([0], C)[0], _open(dataset).read([0], C)[0])
    assert not torch.equal(both.read([0], C)[0], both.read([0], G)[0])
    from megatron_hgpt.data import mmap_format

    same = tmp_path / "same"
    reader = DatasetReader(dataset)
    with mmap_format.DatasetWriter(same) as writer:
        for index, picture in enumerate([0, 1, 0, 0, 1]):
            writer.add(
                sample_id=str(index), task=C, tokens=[1, -200, 2], loss_mask=[0, 0, 1], images=reader.images(picture)
            )
        writer.finish({"tokenizer": {}, "template": {}, "vocabulary": {}})
    assert _write(same)["pictures"] == {"comprehension": 2, "generation": 0}
    cache = _open(same)
    first, second, third, _, fifth = cache.read(range(5), C)
    assert torch.equal(first, third)
    assert torch.equal(second, fifth)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("dtype", "error", "itemsize"), [("fp32", 0.0, 4), ("bf16", 2**-8, 2), ("fp16", 2**-11, 2)])
def test_rounding_and_bytes_of_each_type(dataset: Path, dtype: str, error: float, itemsize: int) -> None:
    _write(dataset, name="exact")
    manifest = _write(dataset, dtype=dtype)
    (exact,), (stored,) = _open(dataset, name="exact").read([0], C), _open(dataset).read([0], C)
    assert stored.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    torch.testing.assert_close(stored.float(), exact, rtol=error, atol=1e-7 if error else 0)
    assert manifest["files"]["comprehension.bin"] == 5 * 4 * 8 * itemsize


def test_values_that_a_type_cannot_hold_are_refused(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HVPTower, "forward", lambda self, pixels, task: torch.full((len(pixels), 4, 8), 7e4))
    with pytest.raises(DataError, match="not finite as fp16; choose --dtype bf16 or fp32"):
        _write(dataset, dtype="fp16")
    assert [path.name for path in dataset.iterdir() if path.is_dir()] == []


def _forge(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(sealed({**manifest, **changes})))


def test_another_tower_dataset_depth_or_size_is_refused(tmp_path: Path, dataset: Path, make_dataset: Make) -> None:
    _write(dataset)
    for vision, what in (
        (_vision(intermediate_size=24), "tower_sha256 of the feature cache is '.*', the run needs '"),
        (_vision(comprehension_hidden_state=-1), r"depth of comprehension \(blocks of the tower\) .* is 2, .* needs 3"),
        (_vision(generation_hidden_state=2), "depth of generation"),
    ):
        with pytest.raises(DataError, match=what):
            _open(dataset, vision)
    # The same depth by another name, and a depth that the stage does not read.
    _open(dataset, _vision(comprehension_hidden_state=2))
    _open(dataset, _vision(generation_hidden_state=2), tasks=[C])
    other = make_dataset(tmp_path / "other", [C, G, C])
    (dataset / "features").rename(other / "features")
    with pytest.raises(DataError, match="dataset_sha256 of the feature cache"):
        _open(other)
    (other / "features").rename(dataset / "features")
    _forge(dataset / "features", image_size=336)
    with pytest.raises(DataError, match="image_size of the feature cache is 336, the run needs 16; .*--overwrite"):
        _open(dataset)


def test_damage_is_refused(dataset: Path) -> None:
    with pytest.raises(DataError, match="is not a feature cache .*hgpt cache-features writes one"):
        _open(dataset)
    _write(dataset)
    _forge(dataset / "features", schema_version=9)
    with pytest.raises(DataError, match="schema version 9, this package reads 1"):
        _open(dataset)
    _write(dataset, overwrite=True)
    stream = dataset / "features" / "comprehension.bin"
    stream.write_bytes(stream.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"comprehension.bin: 636 bytes, manifest.json says 640"):
        _open(dataset)
    (dataset / "features" / "manifest.json").write_text('["tower_sha256"]')
    with pytest.raises(DataError, match="manifest.json holds a list, not an object; hgpt cache-features --overwrite"):
        _open(dataset)


def test_a_finished_cache_is_kept_and_another_one_needs_overwrite(dataset: Path) -> None:
    _write(dataset)
    before = (dataset / "features" / "comprehension.bin").stat().st_mtime_ns
    _write(dataset)
    assert (dataset / "features" / "comprehension.bin").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="features exists with dtype 'fp32', wanted is 'bf16'; pass --overwrite"):
        _write(dataset, dtype="bf16")
    assert _write(dataset, dtype="bf16", overwrite=True)["dtype"] == "bf16"
    (dataset / "notes").mkdir()
    with pytest.raises(DataError, match="notes exists and is not a feature cache; choose another --name"):
        _write(dataset, name="notes", overwrite=True)
    with pytest.raises(ConfigError, match="dtype='fp8' is unknown; use one of fp32, fp16, bf16"):
        _write(dataset, dtype="fp8")


def _config(folder: Path, cache: str | None) -> RunConfig:
    config = RunConfig()
    config.model.template = "phi3_instruct"
    config.data.train, config.data.feature_cache, config.data.num_workers = [str(folder)], cache, 0
    config.model.vocabulary.text_size, config.model.vq.num_codes, config.model.vq.num_indices = 400, 16, 4
    config.model.vision, config.training.precision = _vision(), "fp32"
    config.training.micro_batch_size = 2
    return config


def _batches(config: RunConfig) -> tuple[list[Any], Any]:
    loader = build_loader(
        config, tokenizer_hash="abc", num_image_tokens=4, image_size=16, dp_rank=0, dp_size=1, tasks=[C, G],
        global_batch_size=8,
    )  # fmt: skip
    return [batch for _ in range(3) for batch in loader.next_step()], loader.counts


def test_the_loader_gives_the_same_samples_without_decoding(
    tmp_path: Path, make_dataset: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_dataset(tmp_path / "data", [C, G, C, C, G, C, C], bad=[2])
    assert _write(folder)["skipped"] == {"unreadable_image": 1}
    pixels, counts = _batches(_config(folder, None))

    def no_decoding(*_: Any) -> None:
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr("megatron_hgpt.data.collate.load_image", no_decoding)
    with pytest.raises(AssertionError, match="was decoded"):
        _batches(_config(folder, None))
    cached, cached_counts = _batches(_config(folder, "features"))
    assert cached_counts == counts
    assert counts["skipped/unreadable_image"] > 0
    tower = HVPTower.from_config(_vision(), TASKS)
    for with_pixels, with_features in zip(pixels, cached, strict=True):
        assert with_features.sample_ids == with_pixels.sample_ids
        assert torch.equal(with_features.tokens, with_pixels.tokens)
        assert with_features.pixel_values.shape == (0, 3, 16, 16)
        expected = tower(with_pixels.pixel_values, with_pixels.task)
        torch.testing.assert_close(with_features.to("cpu").image_features, expected, rtol=0, atol=1e-6)


def test_a_skipped_picture_keeps_its_reason_and_a_missing_one_stops(tmp_path: Path, make_dataset: Make) -> None:
    folder = make_dataset(tmp_path / "data", [C, C, G], bad=[1])
    _write(folder)
    cache = _open(folder)
    with pytest.raises(SkipSample, match="unreadable_image"):
        cache.read([1], C)
    rows = np.load(folder / "features" / "comprehension_rows.npy")
    assert rows.tolist() == [0, -2, -1]
    rows_file = folder / "features" / "comprehension_rows.npy"
    np.save(rows_file, np.full_like(rows, -1))
    digests = json.loads((folder / "features" / "manifest.json").read_text())["sha256"]
    _forge(folder / "features", sha256={**digests, rows_file.name: sha256_of(rows_file)})
    with pytest.raises(DataError, match="image [01] is not cached"):
        _batches(_config(folder, "features"))


def test_rounding_is_announced(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(dataset)
    _write(dataset, name="rounded", dtype="bf16")
    open_caches(_config(dataset, "features"), [str(dataset)], TASKS)
    assert "rounding" not in caplog.text
    open_caches(_config(dataset, "rounded"), [str(dataset)], TASKS)
    assert "stored as bf16, training.precision is fp32" in caplog.text


def test_the_tower_s_identity_follows_its_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def tower(name: str, value: float) -> VisionConfig:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(SIZES))
        save_file({"weight": torch.tensor([value])}, tmp_path / name / "model.safetensors")
        return _vision(tower=str(tmp_path / name))

    first = tower("a", 1.0)
    assert tower_hash(first) == tower_hash(tower("b", 1.0))
    assert tower_hash(first) != tower_hash(tower("c", 2.0))
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks config.json or safetensors"):
        tower_hash(first)
    with pytest.raises(ConfigError, match=r"model\.vision\.hf_config\.hidden_size is not set"):
        describe_tower(VisionConfig(tower=str(tmp_path / "b")))


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_hgpt.data import feature_cache_writer as module
sys.path.insert(0, str(Path(sys.argv[2]).parent))

# Everything is written by now, only the rename is missing.
module.Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
import test_feature_cache
test_feature_cache._write(Path(sys.argv[1]))
"""


def test_a_killed_process_leaves_no_cache(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", KILLED, str(dataset), __file__]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (dataset / "features").exists()
    assert len(list(dataset.glob("features.tmp-*"))) == 1  # it had written
    _write(dataset)
    assert "was left by a process that was killed; removed" in caplog.text
    assert [path.name for path in dataset.glob("features*")] == ["features"]
    assert len(_open(dataset).read([0], C)) == 1
