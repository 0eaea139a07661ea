"""From JSON and pictures to a dataset folder: content, privacy of the pictures, skips, determinism."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megatron_hgpt.data.dataset import VLDataset
from megatron_hgpt.data.mmap_format import DatasetReader
from megatron_hgpt.data.preprocess import Input, PreprocessOptions, preprocess
from megatron_hgpt.errors import ConfigError, DataError
from megatron_hgpt.samples import Task
from megatron_hgpt.text.tokenizer import TextTokenizer
from megatron_hgpt.text.vocabulary import Vocabulary
from megatron_hgpt.vision.preprocess import load_image


class FakeVQGAN:
    """Four indices out of the mean brightness; remembers its batches."""

    num_codes, num_indices = 16, 4

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.full((3, 2, 2), float(image.getpixel((0, 0))[0]))  # type: ignore[index]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.batch_sizes.append(len(images))
        return images[:, 0].flatten(1).long() % self.num_codes


def _record(number: int, **changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nIs this CT?"}, {"from": "gpt", "value": "yes"}]
    return {"id": f"r{number}", "image": f"images/{number}.png", "conversations": turns, **changes}


def _drawing(number: int, **changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nReconstruct the image."}, {"from": "gpt", "value": ""}]
    return {**_record(number, conversations=turns), "target_image": f"images/{number}.png", **changes}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[Any]], Input]:
    """Nine pictures and a file of records."""
    (tmp_path / "raw" / "images").mkdir(parents=True)
    for grey in range(9):
        Image.new("RGB", (40, 20), (grey,) * 3).save(tmp_path / "raw" / "images" / f"{grey}.png")

    def make(records: list[Any]) -> Input:
        (tmp_path / "raw" / "train.json").write_text(json.dumps(records))
        return Input(path=tmp_path / "raw" / "train.json", source="mini")

    return make


@pytest.fixture
def run(tmp_path: Path, sentencepiece: TextTokenizer, vocabulary: Vocabulary) -> Callable[..., dict[str, Any]]:
    def make(*inputs: Input, name: str = "data", vqgan: FakeVQGAN | None = None, **options: Any) -> dict[str, Any]:
        values: dict[str, Any] = {"template": "phi3_instruct", "num_indices": 4, "num_image_tokens": 3, **options}
        return preprocess(
            inputs,
            tmp_path / name,
            tokenizer=sentencepiece,
            vocabulary=vocabulary,
            options=PreprocessOptions(**values),
            vqgan=vqgan,
        )

    return make


def test_dataset_of_both_tasks(
    write: Any, run: Any, tmp_path: Path, sentencepiece: TextTokenizer, vocabulary: Vocabulary
) -> None:
    vqgan = FakeVQGAN()
    given = _drawing(2, target_indices=[4, 3, 2, 1])
    records = [_record(0), _drawing(7), given, {**_drawing(3), "image": None}, _drawing(8, source="ixi")]
    records[3]["conversations"][0]["value"] = "Draw a chest radiograph."
    manifest = run(write(records), vqgan=vqgan, window=2)
    assert vqgan.batch_sizes == [1, 1, 1]  # one batch per window of two records; nothing for the given indices
    assert manifest["counts"]["per_task"] == {"comprehension": 1, "generation": 4}
    assert manifest["counts"]["per_source"] == {"ixi": 1, "mini": 4}
    assert manifest["tokenizer"]["sha256"] == sentencepiece.hash
    assert manifest["vocabulary"] == {"text_size": 400, "num_codes": 16, "start_id": 400, "end_id": 417, "size": 419}
    assert manifest["template"]["system_prompt"] == "You are a helpful AI assistant."
    dataset = VLDataset(
        tmp_path / "data",
        vocabulary=vocabulary,
        tokenizer_hash=sentencepiece.hash,
        template="phi3_instruct",
        num_indices=4,
        verify_checksums=True,
    )
    samples = [dataset[i] for i in range(5)]
    assert [sample.sample_id for sample in samples] == ["r0", "r7", "r2", "r3", "r8"]
    answers = [vocabulary.decode_ids(sample.tokens[sample.loss_mask].tolist()) for sample in samples]
    assert answers == [[], [7] * 4, [4, 3, 2, 1], [3] * 4, [8] * 4]
    assert sentencepiece.decode(samples[0].tokens[samples[0].loss_mask].tolist()) == "yes"
    assert [len(sample.images) for sample in samples] == [1, 1, 1, 0, 1]
    assert load_image(samples[1].images[0]).getpixel((0, 0)) == (7, 7, 7)
    assert samples[1].task is Task.GENERATION


def test_pictures_carry_pixels_only(write: Any, run: Any, tmp_path: Path) -> None:
    item = write([_record(0), _record(1)])
    exif = Image.Exif()
    exif[0x010E] = "PATIENT-NAME"
    text = PngInfo()
    text.add_text("Comment", "PATIENT-NAME")
    Image.new("RGB", (40, 20), (9, 9, 9)).save(item.path.parent / "images" / "0.png", pnginfo=text, exif=exif)
    Image.new("L", (30, 30), 5).save(item.path.parent / "images" / "1.png", format="JPEG", exif=exif)
    assert b"PATIENT-NAME" in (item.path.parent / "images" / "1.png").read_bytes()
    run(item)
    assert b"PATIENT-NAME" not in (tmp_path / "data" / "images.bin").read_bytes()
    first, second = (Image.open(io.BytesIO(DatasetReader(tmp_path / "data").images(i)[0])) for i in range(2))
    assert (first.format, first.info, first.getpixel((0, 0))) == ("PNG", {}, (9, 9, 9))
    assert (second.format, second.mode, second.size) == ("PNG", "RGB", (30, 30))


def test_large_pictures_are_stored_smaller(write: Any, run: Any, tmp_path: Path) -> None:
    item = write([_record(0)])
    for name, limit, size in (("a", 1024, (40, 20)), ("b", 10, (10, 5)), ("c", 0, (40, 20))):
        run(item, name=name, max_image_side=limit)
        assert Image.open(io.BytesIO(DatasetReader(tmp_path / name).images(0)[0])).size == size


def test_same_bytes_for_any_number_of_workers(write: Any, run: Any, tmp_path: Path) -> None:
    records = [_record(i % 9) if i % 3 else _drawing(i % 9) for i in range(25)]
    records[11]["image"] = "images/absent.png"
    item = write(records)
    manifests = [
        run(item, name=f"w{workers}-{window}", vqgan=FakeVQGAN(), num_workers=workers, window=window)
        for workers, window in ((0, 32), (3, 4))
    ]
    assert manifests[0] == manifests[1]
    assert manifests[0]["counts"]["samples"] == 24


def test_skips_are_counted_without_naming_the_machine(write: Any, run: Any, tmp_path: Path) -> None:
    item = write([_record(0), _record(1), "no record", _record(2, image="../secret.png"), _record(3, image="x.png")])
    picture = item.path.parent / "images" / "1.png"
    picture.write_bytes(picture.read_bytes()[:60])
    manifest = run(item)
    reasons = manifest["skipped"]
    assert sum(reasons.values()) == 4
    assert reasons["malformed_record"] == reasons["path_escape"] == reasons["missing_image"] == 1
    listed = [json.loads(line) for line in (tmp_path / "data" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in listed] == ["r1", "mini-2", "r2", "r3"]
    assert [(entry["file"], entry["record"]) for entry in listed] == [("train.json", i) for i in range(1, 5)]
    for file in (tmp_path / "data").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_what_records_say_is_listed_on_request_only(write: Any, run: Any, tmp_path: Path) -> None:
    secret = "SECRET-4711"
    turns = [{"from": secret, "value": secret}, {"from": "gpt", "value": secret}]
    records: list[Any] = [
        _record(0), secret, _record(1, conversations=turns), _record(2, image=f"{secret}.png"), _record(3, task=secret),
        _record(4, image=f"../{secret}"), _record(5, conversations=[secret]), _record(6, image={secret: secret}),
        _record(7, target_indices=[4711 * 10**9] * 4), _record(8, source={secret: 1}), _record(9, id={"name": secret}),
    ]  # fmt: skip
    item = write(records)
    (item.path.parent / "images" / f"{secret}.png").write_bytes(secret.encode() * 9)
    records.append(_record(10, image=f"images/{secret}.png"))
    item = write(records)
    for list_text in (False, True):
        manifest = run(item, name=f"list-{list_text}", list_text=list_text)
        assert sum(manifest["skipped"].values()) == 11
        lines = (tmp_path / f"list-{list_text}" / "skipped.jsonl").read_text().splitlines()
        assert sum("4711" in line for line in lines) == (11 if list_text else 0)
        assert [json.loads(line)["record"] for line in lines] == list(range(1, 12))


def test_many_unusable_records_in_a_row_stop(write: Any, run: Any, tmp_path: Path) -> None:
    bad = _record(0, image="absent.png")
    alternating = [bad, bad, _record(0)] * 4
    assert run(write(alternating), name="a", max_consecutive_skips=3)["skipped"] == {"missing_image": 8}
    with pytest.raises(DataError, match=r"3 unusable records in a row, .*\{'missing_image': 3\}.*image root"):
        run(write([_record(0), *[bad] * 3, _record(0)]), name="b", max_consecutive_skips=3)
    assert not list(tmp_path.glob("b*"))


def test_truncation_is_announced(write: Any, run: Any, caplog: pytest.LogCaptureFixture) -> None:
    item = write([_record(0), _record(1)])
    manifest = run(item, max_seq_length=30)
    assert manifest["creation"]["num_longer_than_max_seq_length"] == 2
    assert manifest["creation"]["num_without_supervised_token"] == 2
    assert "2 samples are longer than 30 tokens and will be truncated when loaded; 2 of them" in caplog.text
    caplog.clear()
    assert run(item, name="b")["creation"]["num_longer_than_max_seq_length"] == 0
    assert caplog.text == ""


def test_refusals(write: Any, run: Any, tmp_path: Path, sentencepiece: TextTokenizer, vocabulary: Vocabulary) -> None:
    item = write([_record(0), _drawing(1)])
    with pytest.raises(DataError, match="record r1 has a target_image; set model.vq.path"):
        run(item)
    with pytest.raises(ConfigError, match="vq.num_indices is 5, the VQGAN has 4"):
        run(item, vqgan=FakeVQGAN(), num_indices=5)
    with pytest.raises(ConfigError, match="vocabulary.text_size is 100"):
        preprocess(
            [item],
            tmp_path / "data",
            tokenizer=sentencepiece,
            vocabulary=replace(vocabulary, text_size=100),
            options=PreprocessOptions(template="phi3_instruct"),
        )
    with pytest.raises(DataError, match="does not exist"):
        run(Input(path=tmp_path / "absent.json"))
    assert not (tmp_path / "data").exists()
