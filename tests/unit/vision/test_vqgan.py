"""The VQGAN's files, architecture and index maps."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional

from megatron_hgpt.errors import CheckpointError, ConfigError, DataError
from megatron_hgpt.vision.vqgan import GUMBEL, NEAREST, VQGAN, VQGANConfig
from megatron_hgpt.vision.vqgan_blocks import AttnBlock, AutoencoderConfig, Downsample, ResnetBlock


def _tiny(**changes: Any) -> AutoencoderConfig:
    values: dict[str, Any] = {
        "z_channels": 8,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "attn_resolutions": (8,),
    }
    return AutoencoderConfig(**(values | changes))


def _model(target: str = GUMBEL, **changes: Any) -> VQGAN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VQGAN(VQGANConfig(target=target, embed_dim=8, n_embed=12, ddconfig=_tiny(**changes)))


def _yaml(target: str = GUMBEL, **changes: Any) -> dict[str, Any]:
    autoencoder = {"double_z": False, "z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32}
    autoencoder |= {"ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0} | changes
    params = {"kl_weight": 1e-8, "embed_dim": 8, "n_embed": 12, "lossconfig": {"target": "x"}, "ddconfig": autoencoder}
    return {"model": {"base_learning_rate": 1e-6, "target": target, "params": params}}


def _write(folder: Path, content: dict[str, Any], checkpoint: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.yaml").write_text(yaml.safe_dump(content))
    torch.save(checkpoint, folder / "last.ckpt")
    return folder


def _images(n: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _openimages_shapes() -> dict[str, list[int]]:
    """The keys of taming-transformers' "vqgan_gumbel_f8_8192" (ch 128, ch_mult 1 1 2 4), written out from its code."""
    shapes: dict[str, list[int]] = {}

    def conv(name: str, out: int, inner: int, kernel: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [out, inner, kernel, kernel], [out]

    def norm(name: str, channels: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = [channels]

    def resnet(name: str, inner: int, out: int) -> None:
        norm(f"{name}.norm1", inner)
        conv(f"{name}.conv1", out, inner, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if inner != out:
            conv(f"{name}.nin_shortcut", out, inner, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    for side, end_in, end_out in (("encoder", 3, 256), ("decoder", 256, 3)):
        conv(f"{side}.conv_in", 128 if side == "encoder" else 512, end_in, 3)
        resnet(f"{side}.mid.block_1", 512, 512)
        attention(f"{side}.mid.attn_1", 512)
        resnet(f"{side}.mid.block_2", 512, 512)
        norm(f"{side}.norm_out", 512 if side == "encoder" else 128)
        conv(f"{side}.conv_out", end_out, 512 if side == "encoder" else 128, 3)
    for level, (first, width) in enumerate([(128, 128), (128, 128), (128, 256), (256, 512)]):
        for block in range(2):
            resnet(f"encoder.down.{level}.block.{block}", width if block else first, width)
    for level, (first, width) in enumerate([(128, 128), (256, 128), (512, 256), (512, 512)]):
        for block in range(3):
            resnet(f"decoder.up.{level}.block.{block}", width if block else first, width)
    for level, width in enumerate([128, 128, 256]):
        conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    for level, width in ((1, 128), (2, 256), (3, 512)):
        conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    for block in range(3):
        attention(f"decoder.up.3.attn.{block}", 512)
        if block < 2:
            attention(f"encoder.down.3.attn.{block}", 512)
    conv("quant_conv", 256, 256, 1)
    conv("post_quant_conv", 256, 256, 1)
    conv("quantize.proj", 8192, 256, 1)
    shapes["quantize.embed.weight"] = [8192, 256]
    return shapes


def test_released_configuration_has_the_published_keys_and_shapes() -> None:
    autoencoder = _tiny(
        z_channels=256, resolution=256, ch=128, ch_mult=(1, 1, 2, 4), num_res_blocks=2, attn_resolutions=(32,)
    )
    with torch.device("meta"):
        model = VQGAN(VQGANConfig(target=GUMBEL, embed_dim=256, n_embed=8192, ddconfig=autoencoder))
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == _openimages_shapes()
    assert (model.num_codes, model.num_indices, model.resolution) == (8192, 1024, 256)
    assert model.latents(torch.empty(1, 3, 256, 256, device="meta")).shape == (1, 256, 32, 32)
    assert model.images(torch.empty(1, 256, 32, 32, device="meta")).shape == (1, 3, 256, 256)


def test_vq_model_keeps_its_codebook_under_embedding() -> None:
    keys = set(_model(NEAREST).state_dict())
    assert {key for key in keys if key.startswith("quantize.")} == {"quantize.embedding.weight"}


def test_blocks_follow_the_reference_formulas() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        attention, resnet, down = AttnBlock(32), ResnetBlock(32, 64, 0.0), Downsample(32)
        x = torch.randn(2, 32, 4, 4)
    q, k, v = (layer(attention.norm(x)).reshape(2, 32, 16) for layer in (attention.q, attention.k, attention.v))
    weights = (q.transpose(1, 2) @ k * 32**-0.5).softmax(dim=2)  # [n, query, key]
    expected = x + attention.proj_out((v @ weights.transpose(1, 2)).reshape(2, 32, 4, 4))
    torch.testing.assert_close(attention(x), expected)

    def swish(value: torch.Tensor) -> torch.Tensor:
        return value * value.sigmoid()

    hidden = resnet.conv1(swish(functional.group_norm(x, 32, resnet.norm1.weight, resnet.norm1.bias, 1e-6)))
    hidden = resnet.conv2(swish(functional.group_norm(hidden, 32, resnet.norm2.weight, resnet.norm2.bias, 1e-6)))
    torch.testing.assert_close(resnet(x), resnet.nin_shortcut(x) + hidden)
    padded = torch.zeros(2, 32, 5, 5)
    padded[..., :4, :4] = x
    torch.testing.assert_close(down(x), functional.conv2d(padded, down.conv.weight, down.conv.bias, stride=2))


def test_gumbel_index_is_the_argmax_of_the_projection_in_raster_order() -> None:
    model = _model()
    images = _images()
    with torch.no_grad():
        logits = model.quantize.proj(model.quant_conv(model.encoder(images)))
    indices = model.encode(images)
    assert indices.dtype == torch.int64
    assert indices.shape == (2, 64)
    for row, column in ((0, 0), (0, 7), (3, 5), (7, 7)):
        assert indices[1, row * 8 + column] == logits[1, :, row, column].argmax()
    assert len(indices.unique()) > 1


def test_nearest_index_is_the_closest_codebook_row() -> None:
    model = _model(NEAREST)
    images = _images()
    with torch.no_grad():
        latents = model.latents(images).permute(0, 2, 3, 1).reshape(2, 64, 8)
        distances = torch.cdist(latents.double(), model.quantize.embedding.weight.double()[None])
    assert torch.equal(model.encode(images), distances.argmin(dim=2))
    with pytest.raises(ConfigError, match="sample"):
        model.encode(images, sample=True)


def test_sampling_follows_the_softmax_and_its_generator() -> None:
    model = _model()
    images = _images(1)
    with torch.no_grad():
        expected = model.quantize.proj(model.latents(images)).softmax(dim=1)[0].flatten(1)  # [codes, positions]
    draws = [model.encode(images, sample=True, generator=torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert torch.equal(draws[3], model.encode(images, sample=True, generator=torch.Generator().manual_seed(3)))
    drawn = functional.one_hot(torch.cat(draws), 12).double().mean(dim=0).T
    # A frequency of 400 draws deviates by at most sqrt(0.25 / 400) = 0.025; six of these for the largest of 768.
    assert (drawn - expected).abs().max() < 0.15
    # Averaged over 64 positions the deviation is below 0.025 / 8; a wrong distribution differs by more.
    assert (drawn.mean(dim=1) - expected.mean(dim=1)).abs().max() < 0.0125


def test_decode_looks_rows_up_and_clamps() -> None:
    model = _model()
    indices = torch.arange(64)[None] % 12
    codes = model.quantize.embed.weight[indices[0]].T.reshape(1, 8, 8, 8)
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(50)  # far outside [-1, 1]
        raw = model.decoder(model.post_quant_conv(codes))
    assert raw.abs().max() > 1
    torch.testing.assert_close(model.decode(indices), raw.clamp(-1, 1))


def test_wrong_shapes_and_indices_are_refused() -> None:
    model = _model()
    with pytest.raises(DataError, match="shape"):
        model.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(DataError, match="64"):
        model.decode(torch.zeros(1, 63, dtype=torch.int64))
    for value in (-1, 12):
        with pytest.raises(DataError, match="12 entries"):
            model.decode(torch.full((1, 64), value))


def test_pixels_survive_preprocess_and_to_pil() -> None:
    model = _model()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    tensor = model.preprocess(image)
    assert tensor.dtype == torch.float32
    assert (np.asarray(model.to_pil(tensor)) == pixels).all()
    wide = image.resize((40, 20))
    resized = wide.resize((16, 16), Image.Resampling.LANCZOS)
    assert model.to_pil(model.preprocess(wide)).tobytes() == resized.tobytes()
    assert model.preprocess(Image.new("L", (4, 4), 255)).eq(1).all()


@pytest.mark.parametrize("target", [GUMBEL, NEAREST])
def test_load_restores_the_model_without_its_loss(tmp_path: Path, target: str) -> None:
    model = _model(target)
    state = model.state_dict() | {"loss.discriminator.main.0.weight": torch.ones(2)}
    folder = _write(tmp_path / "v", _yaml(target), {"state_dict": state, "epoch": 3})
    loaded = VQGAN.load(folder)
    assert torch.equal(loaded.encode(_images()), model.encode(_images()))
    indices = torch.arange(64)[None] % 12
    assert torch.equal(loaded.decode(indices), model.decode(indices))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.train().training


def test_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    state = _model().state_dict()
    state["decoder.extra.weight"] = state.pop("quant_conv.bias")
    state["quantize.proj.bias"] = torch.zeros(13)
    folder = _write(tmp_path / "v", _yaml(), {"state_dict": state})
    with pytest.raises(CheckpointError, match=r"quant_conv.bias.*decoder.extra.weight.*quantize.proj.bias \(13,\)"):
        VQGAN.load(folder)


def test_unreadable_checkpoints(tmp_path: Path) -> None:
    folder = _write(tmp_path / "v", _yaml(), {"weights": {}})
    with pytest.raises(CheckpointError, match="state_dict"):
        VQGAN.load(folder)
    (folder / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        VQGAN.load(folder)
    (folder / "last.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        VQGAN.load(folder)
    (folder / "model.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"model\.yaml"):
        VQGAN.load(folder)


def test_a_checkpoint_with_a_lightning_callback_loads_without_that_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What taming's trainer leaves: the callback's class as a key, and an instance with a state of its own."""
    package = "pytorch_lightning"
    callback = type("ModelCheckpoint", (), {"__module__": package})
    module = types.ModuleType(package)
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    instance = callback()
    instance.best_model_score = 0.5  # type: ignore[attr-defined]
    model = _model()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, package, module)
        content = {"state_dict": model.state_dict(), "callbacks": {callback: {"best": instance}}, "epoch": 3}
        folder = _write(tmp_path / "v", _yaml(), content)
    loaded = VQGAN.load(folder)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert package not in sys.modules


class _RunsCode:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_runs_code_is_refused_before_it_does(tmp_path: Path) -> None:
    trap = _RunsCode(tmp_path / "trap")
    folder = _write(tmp_path / "v", _yaml(), {"state_dict": _model().state_dict(), "callbacks": trap})
    with pytest.raises(CheckpointError, match=r"last\.ckpt is refused: it names posix\.mkdir"):
        VQGAN.load(folder)
    assert not trap.path.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_yaml("taming.models.cond_transformer.Net2NetTransformer"), "Net2NetTransformer"),
        (_yaml(ch_mult=4), "ch_mult"),
        (_yaml(ch=20), "multiple of 32"),
        (_yaml(z_channels=0), "z_channels=0"),
        (_yaml(resolution=15), "resolution=15"),
        (_yaml(colour="x"), "colour"),
        (_yaml(double_z=True), "double_z"),
        (_yaml(in_channels=1), "in_channels=1"),
        (_yaml(z_channels=16), "embed_dim=8"),
        ({"model": {"target": GUMBEL, "params": {"embed_dim": 8}}}, "ddconfig"),
        ({"weights": 1}, "model"),
    ],
)
def test_unusable_model_yaml(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VQGAN.load(_write(tmp_path / "v", content, {"state_dict": {}}))
