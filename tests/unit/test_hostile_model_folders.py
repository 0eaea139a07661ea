"""Folders of models whose descriptions lie: refused in one message before anything of that size is allocated."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_hgpt.cli import main
from megatron_hgpt.config_io import load_config
from megatron_hgpt.convert.safetensors_files import read_header
from megatron_hgpt.demo.tokenizers import make_tiny_tokenizer
from megatron_hgpt.errors import CheckpointError

DEEP = "[" * 100_000 + "]" * 100_000
HUGE = 10**12


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run's three folders, descriptions alone: what resolving and validating read."""
    model = load_config(preset="tiny").model
    make_tiny_tokenizer(tmp_path / "lm")
    (tmp_path / "lm" / "config.json").write_text(json.dumps(model.hf_config))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    (tmp_path / "vq").mkdir()
    autoencoder = {"double_z": False, "z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32}
    autoencoder |= {"ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0}
    params = {"embed_dim": 8, "n_embed": 12, "ddconfig": autoencoder}
    content = {"model": {"target": "taming.models.vqgan.GumbelVQ", "params": params}}
    (tmp_path / "vq" / "model.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def dry_run(root: Path) -> int:
    folders = [f"model.backbone={root / 'lm'}", f"model.vision.tower={root / 'clip'}", f"model.vq.path={root / 'vq'}"]
    return main(["train", "--dry-run", "--preset", "tiny", "model.vocabulary.text_size=null", "model.hf_config={}",
                 "model.vision.hf_config={}", "model.vq.num_codes=null", "model.vq.num_indices=null",
                 "training.num_steps=1", "training.stage=stage3_joint", *folders])  # fmt: skip


def with_json(file: str, **values: Any) -> Callable[[Path], None]:
    """Changes values of a JSON file."""

    def change(root: Path) -> None:
        content = json.loads((root / file).read_text())
        (root / file).write_text(json.dumps(content | values))

    return change


def with_text(file: str, text: str) -> Callable[[Path], None]:
    """Replaces a file."""
    return lambda root: (root / file).write_text(text) and None


def with_vq(**values: Any) -> Callable[[Path], None]:
    """Changes values of the VQGAN's ddconfig, or of what stands around it."""

    def change(root: Path) -> None:
        content = yaml.safe_load((root / "vq" / "model.yaml").read_text())
        params = content["model"]["params"]
        for key, value in values.items():
            (params if key in params else params["ddconfig"])[key] = value
        (root / "vq" / "model.yaml").write_text(yaml.safe_dump(content))

    return change


def with_piece(index: int) -> Callable[[Path], None]:
    """Adds an entry of that id to tokenizer.json."""

    def change(root: Path) -> None:
        content = json.loads((root / "lm" / "tokenizer.json").read_text())
        content["model"]["vocab"]["zzz"] = index
        (root / "lm" / "tokenizer.json").write_text(json.dumps(content))

    return change


LM_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "max_position_embeddings")
VISION_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
VQ_SIZES = ("z_channels", "resolution", "ch", "num_res_blocks", "n_embed", "embed_dim")
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    **{f"lm {key}": (with_json("lm/config.json", **{key: HUGE}), key) for key in LM_SIZES},
    **{f"clip {key}": (with_json("clip/config.json", **{key: HUGE}), key) for key in VISION_SIZES},
    **{f"vq {key}": (with_vq(**{key: HUGE}), key) for key in VQ_SIZES},
    "lm weights": (with_json("lm/config.json", num_hidden_layers=4096, hidden_size=2**18, intermediate_size=2**20),
                   "at most"),
    "lm layer_types": (with_json("lm/config.json", layer_types=5), "layer_types"),
    "lm theta": (with_json("lm/config.json", rope_theta=1e300), "rope_theta"),
    "lm code of its own": (with_json("lm/config.json", architectures=["X"], auto_map={"AutoModel": "x.X"}),
                           "architectures"),
    "lm deep": (with_text("lm/config.json", DEEP), "config.json"),
    "lm list": (with_text("lm/config.json", "[1]"), "config.json"),
    "clip deep": (with_text("clip/config.json", DEEP), "config.json"),
    "vq levels": (with_vq(ch_mult=[1] * 10_000), "ch_mult"),
    "vq bomb": (with_text("vq/model.yaml", "a: &a [x,x]\n" + "\n".join(
        f"a{i}: &a{i} [*a{i - 1 if i > 1 else ''},*a{i - 1 if i > 1 else ''}]" for i in range(1, 40))), "model.yaml"),
    "vq code": (with_text("vq/model.yaml", "!!python/object/apply:os.system [id]"), "model.yaml"),
    "tokenizer deep": (with_text("lm/tokenizer.json", '{"model": ' + DEEP + "}"), "tokenizer"),
    "tokenizer empty": (with_text("lm/tokenizer.json", "{}"), "tokenizer"),
    "tokenizer text": (with_text("lm/tokenizer.json", "\0" * 1000), "tokenizer"),
    "tokenizer id": (with_piece(2**31), "tokenizer"),
    "tokenizer negative id": (with_piece(-1), "tokenizer"),
    "tokenizer settings deep": (with_text("lm/tokenizer_config.json", DEEP), "tokenizer_config.json"),
}  # fmt: skip
"""What is wrong -> the change that makes it, and what the message names."""


@pytest.mark.parametrize("case", HOSTILE)
def test_a_lying_description_is_refused(case: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, name = HOSTILE[case]
    change(root)
    assert dry_run(root) == 2
    out, err = capsys.readouterr()
    assert out == "" and name in err
    assert all(len(line) < 1500 for line in err.splitlines()) and len(err.splitlines()) < 20


def test_the_folders_themselves_are_fine(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(root) == 0, capsys.readouterr().err


@pytest.mark.parametrize("header", [b"[" * 100_000, b"{}" + b" " * 50, b"\xff" * 100, b'{"w": 5}', b""])
@pytest.mark.parametrize("size", [None, 2**63, 2**40, 100 * 2**20])
def test_a_safetensors_header_reserves_no_memory(header: bytes, size: int | None, tmp_path: Path) -> None:
    """A length beyond the limit is not believed, one beyond the file reads what there is."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header)
    if header.startswith(b"{}") and size in (None, 100 * 2**20):
        assert read_header(file)[0] == {}
        return
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable safetensors file"):
        read_header(file)
