"""Which records are asked, and what a user hears about those that cannot be."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image

from megatron_hgpt.config import RunConfig
from megatron_hgpt.errors import ConfigError, DataError
from megatron_hgpt.evaluation.runner import SHOWN_PER_REASON, evaluate, read_samples
from megatron_hgpt.inference.loading import LoadedRun


class Answers:
    """A generator that says yes to everything."""

    def __init__(self) -> None:
        self.asked = 0

    def answer(self, prompts: list[Any], max_new_tokens: int) -> list[str]:
        self.asked += len(prompts)
        return ["yes"] * len(prompts)


def loaded(vqgan: str | None = None) -> LoadedRun:
    """A run that answers, with a VQGAN's folder in its configuration at most."""
    config = RunConfig()
    config.model.vq.path = vqgan
    context = SimpleNamespace(dp_rank=0, dp_size=1, world_size=1, device="cpu")
    return LoadedRun(config=config, context=cast(Any, context), generator=cast(Any, Answers()))


def write_records(folder: Path, *, missing: int = 0, drawn: int = 0) -> Path:
    """Two questions, `missing` with a picture that is not there, and `drawn` pictures to draw."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>\nCT?"}, {"from": "gpt", "value": "yes"}]
    records: list[dict[str, Any]] = [{"image": "a.png", "conversations": turns} for _ in range(2)]
    records += [{"image": f"{i}.png", "conversations": turns} for i in range(missing)]
    records += [{"image": "a.png", "target_image": "a.png", "conversations": turns} for _ in range(drawn)]
    (folder / "records.json").write_text(json.dumps(records))
    return folder / "records.json"


def test_a_run_without_a_vqgan_answers(tmp_path: Path) -> None:
    results = evaluate(loaded("nowhere"), write_records(tmp_path), tmp_path)
    assert results is not None
    assert ([result.given for result in results[0]], results[1]) == (["yes", "yes"], [])


@pytest.mark.parametrize(("vqgan", "state"), [(None, "is not set"), ("nowhere", "=nowhere is not a folder")])
def test_pictures_without_a_vqgan_stop_before_the_first_question(vqgan: str | None, state: str, tmp_path: Path) -> None:
    run, path = loaded(vqgan), write_records(tmp_path, drawn=1)
    with pytest.raises(ConfigError, match=f"model.vq.path {state}.*add model.vq.path=FOLDER, or .*--max-images 0"):
        evaluate(run, path, tmp_path)
    assert cast(Any, run.generator).asked == 0
    assert evaluate(run, path, tmp_path, max_images=0) is not None


def test_skipped_records_are_counted_and_the_first_ones_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "megatron_hgpt"):
        samples, skipped = read_samples(write_records(tmp_path, missing=9), tmp_path)
    assert (len(samples), skipped) == (2, {"missing_image": 9})
    assert len(caplog.messages) == SHOWN_PER_REASON + 1
    assert caplog.messages[-1].endswith("2 records are used; skipped: missing_image 9")


def test_a_wrong_image_root_is_an_error(tmp_path: Path) -> None:
    path = write_records(tmp_path, missing=3)
    with pytest.raises(DataError, match=r"no usable record in .*skipped: missing_image 5; check --image-root"):
        evaluate(loaded(), path, tmp_path / "elsewhere")
    path.write_text("[]")
    with pytest.raises(DataError, match="it is empty"):
        read_samples(path, tmp_path)


def test_a_damaged_picture_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_records(tmp_path)
    records = json.loads(path.read_text())
    path.write_text(json.dumps([{**records[0], "image": "b.png", "id": "damaged"}, *records]))
    (tmp_path / "b.png").write_bytes(b"\x89PNG not really")
    results = evaluate(loaded(), path, tmp_path)
    assert results is not None and len(results[0]) == 2
    assert any("record damaged skipped: unreadable_image" in message for message in caplog.messages)
