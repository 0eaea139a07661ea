from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from megatron_hgpt.errors import DataError
from megatron_hgpt.evaluation.store import ImageResult, VQAResult, load_results, save_results


def _picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((16, 16, 3), value, dtype=np.uint8))


def _save(folder) -> dict:
    return save_results(
        folder,
        split="train",
        vqa=[
            VQAResult(sample_id="../a", question="<image>\nCT?", image=_picture(1), expected="yes", given="ü <i>"),
            VQAResult(sample_id="b", question="?", image=None, expected="no", given="no", question_type="closed"),
        ],
        images=[
            ImageResult(
                sample_id="c",
                instruction="draw",
                input=None,
                target=_picture(1),
                round_trip=_picture(2),
                output=_picture(3),
                kind="reconstruction",
            )
        ],
    )


def test_round_trip(tmp_path) -> None:
    summary = _save(tmp_path)
    loaded = load_results(tmp_path)
    assert loaded.split == "train"
    assert (loaded.vqa[0].sample_id, loaded.vqa[0].given) == ("../a", "ü <i>")
    assert loaded.vqa[0].image is not None and loaded.vqa[0].image.getpixel((0, 0)) == (1, 1, 1)
    assert loaded.vqa[1].image is None and loaded.vqa[1].question_type == "closed"
    (drawn,) = loaded.images
    assert drawn.input is None and drawn.kind == "reconstruction"
    assert [i.getpixel((5, 5))[0] for i in (drawn.target, drawn.round_trip, drawn.output)] == [1, 2, 3]
    assert summary["images"]["output_vs_target"]["mse"] == 4.0
    assert json.loads((tmp_path / "results.json").read_text())["summary"] == summary
    assert len(list((tmp_path / "images").iterdir())) == 3, "the picture used twice is stored once"


def test_a_second_evaluation_replaces_the_first(tmp_path) -> None:
    _save(tmp_path)
    save_results(tmp_path, split="train", vqa=[], images=[])
    assert load_results(tmp_path).vqa == [] and not (tmp_path / "images").exists()


def test_damage_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"results\.json: not a readable evaluation"):
        load_results(tmp_path)
    _save(tmp_path)
    path = tmp_path / "results.json"
    good = json.loads(path.read_text())
    for field, value in (("image", "../../secret.png"), ("image", "missing.png"), ("given", 3), ("unknown", "x")):
        record = good["vqa"][0] | {field: value}
        path.write_text(json.dumps(good | {"vqa": [record]}))
        with pytest.raises(DataError, match="run the evaluation again"):
            load_results(tmp_path)
    path.write_text(json.dumps(good))
    (tmp_path / "images" / good["vqa"][0]["image"]).write_bytes(b"\x89PNG not really")
    with pytest.raises(DataError, match="run the evaluation again"):
        load_results(tmp_path)
