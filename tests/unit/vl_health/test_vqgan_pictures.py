"""A VQGAN of a user's own pictures: what is found, what is skipped, what is measured, what the tool says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_hgpt.errors import ConfigError, DataError
from megatron_hgpt.vision.vqgan import VQGAN
from megatron_hgpt.vl_health.vqgan_pictures import picture_files, read_pictures, round_trip_psnr, train_on_pictures

TOOL = Path(__file__).parents[3] / "tools" / "train_vqgan.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty small ramps in two folders, a text file, and a picture that is none."""
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    ramp = np.mgrid[0:16, 0:16][0] * 8
    for i in range(20):
        pixels = np.repeat((np.rot90(ramp, i % 4) + 5 * i)[..., None], 3, axis=2).astype(np.uint8)
        Image.fromarray(pixels).save(pictures / ("sub" if i % 2 else ".") / f"{i:02d}.png")
    (pictures / "notes.txt").write_text("no picture")
    (pictures / "broken.JPG").write_bytes(b"not a picture")
    return pictures


def test_folders_and_records_name_their_pictures(folder: Path, tmp_path: Path) -> None:
    assert len(picture_files([folder])[0]) == 21
    records = [
        {"id": "a", "image": "pictures/00.png", "conversations": []},
        {"id": "b", "image": ["pictures/02.png", "pictures/00.png"], "target_image": "pictures/04.png"},
        {"id": "c", "conversations": []},
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    expected = [folder / name for name in ("00.png", "02.png", "04.png")]
    assert picture_files([tmp_path / "train.json"]) == (expected, {})
    assert picture_files([tmp_path / "train.json", folder], tmp_path) == picture_files([folder])


def test_records_name_pictures_by_the_rules_of_preprocessing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes((folder / "00.png").read_bytes())
    lines = [
        {"image": "../secret.png"}, {"image": str(tmp_path / "secret.png")}, {"image": "nowhere.png"},
        {"image": [7, "00.png"]}, {"images": ["02.png"]}, "not an object",
    ]  # fmt: skip
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{broken\n")
    files, skipped = picture_files([folder / "train.jsonl"])
    assert files == [folder / "00.png", folder / "02.png"]
    assert skipped == {"path_escape": 2, "missing_image": 1, "malformed_record": 3}
    result = train_on_pictures([folder / "train.jsonl"], tmp_path / "v", resolution=16, num_codes=4, num_steps=2)
    assert (result["num_pictures"], result["num_skipped"]) == (2, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_codes": 0}, "num_codes=0 must be at least 1"), ({"num_steps": 1}, "num_steps=1"),
     ({"resolution": 20}, "resolution=20")],
)  # fmt: skip
def test_options_are_checked_before_a_picture_is_read(options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train_on_pictures([tmp_path / "nowhere"], tmp_path / "v", **options)


def test_no_pictures_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; name a folder"):
        picture_files([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no picture in .*empty"):
        picture_files([tmp_path / "empty"])
    with pytest.raises(DataError, match="none of 1 pictures can be read.*broken"):
        read_pictures([folder / "broken.JPG"], 16)


def test_every_tenth_picture_is_held_out_and_measured(folder: Path, tmp_path: Path) -> None:
    result = train_on_pictures([folder], tmp_path / "vqgan", resolution=16, num_codes=16, num_steps=4)
    assert (result["num_pictures"], result["num_held_out"], result["num_skipped"]) == (18, 2, 1)
    # the broken file is the 11th of the sorted files and takes no place among the pictures
    files = [file for file in picture_files([folder])[0] if file.name != "broken.JPG"]
    held_out = read_pictures([files[9], files[19]], 16).images
    assert result["held_out_psnr"] == pytest.approx(round_trip_psnr(VQGAN.load(tmp_path / "vqgan"), held_out))


def test_a_handful_is_too_few_to_hold_any_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "few pictures").mkdir()
    for name in ("00.png", "02.png"):
        (tmp_path / "few pictures" / name).write_bytes((folder / name).read_bytes())
    few = train_on_pictures([tmp_path / "few pictures"], tmp_path / "few", resolution=16, num_codes=4, num_steps=2)
    assert few["num_held_out"] == 0 and np.isnan(few["held_out_psnr"])


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_tool_reports_what_it_did(folder: Path, tmp_path: Path) -> None:
    small = ["--resolution", "16", "--num-codes", "16", "--steps", "3"]
    result = _run("--images", folder, "--output", tmp_path / "vqgan", *small)
    assert result.returncode == 0, result.stderr
    assert "18 training pictures" in result.stdout and "2 held-out ones, 1 skipped" in result.stdout
    assert result.stdout.endswith(f"configuration: model.vq.path={tmp_path / 'vqgan'}\n")
    assert "step 3/3: loss" in result.stderr and "broken.JPG" in result.stderr
    assert (VQGAN.load(tmp_path / "vqgan").num_codes, VQGAN.load(tmp_path / "vqgan").num_indices) == (16, 4)
    again = _run("--images", folder, "--output", tmp_path / "vqgan", *small)
    assert again.returncode == 2 and "is not empty" in again.stderr and again.stderr.count("\n") == 1
