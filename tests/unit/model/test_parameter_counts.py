from __future__ import annotations

import pytest
import torch

from megatron_hgpt.config_io import load_config, preset_names
from megatron_hgpt.model.parameter_counts import count_parameters


@pytest.mark.parametrize(
    ("preset", "comprehension", "generation", "adapter"),
    [
        ("healthgpt_m3", 102_891_520, 404_881_408, 12_589_056),
        ("healthgpt_l14", 116_736_000, 450_969_600, 31_467_520),
        ("healthgpt_xl32", 283_377_664, None, 31_467_520),
    ],
)
def test_plugins_and_adapters_have_the_method_s_sizes(
    preset: str, comprehension: int, generation: int | None, adapter: int
) -> None:
    counts = count_parameters(load_config(preset=preset).model)
    assert counts["hlora_comprehension"] == comprehension
    assert counts.get("hlora_generation") == generation
    assert counts["abstract_adapter"] == adapter
    assert counts.get("concrete_adapter") == (adapter if generation else None)


@pytest.mark.parametrize("preset", preset_names())
def test_frozen_parts_are_as_large_as_transformers_own_models(preset: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

    model = load_config(preset=preset).model
    counts = count_parameters(model)
    family = {"Phi3ForCausalLM": "phi3", "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
    fields = {"vocab_size": model.vocabulary.text_size, "pad_token_id": None, "eos_token_id": 0, **model.hf_config}
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(**model.vision.hf_config))
        language = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family[fields["architectures"][0]]](**fields))
    assert counts["tower"] == sum(p.numel() for p in tower.parameters())
    rows = {name: p for name, p in language.named_parameters() if "embed_tokens" in name or "lm_head" in name}
    assert len(rows) == 2
    assert counts["backbone"] == sum(p.numel() for p in language.parameters()) - sum(p.numel() for p in rows.values())
