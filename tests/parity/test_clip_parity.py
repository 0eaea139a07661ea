"""HVPTower against transformers' CLIPVisionModel with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_hgpt.config import VisionConfig
from megatron_hgpt.demo.checkpoints import write_tiny_clip
from megatron_hgpt.samples import TASKS, Task
from megatron_hgpt.vision.clip import HVPTower


@pytest.mark.parametrize(("comprehension", "generation"), [(-2, 1), (-1, 2), (0, -4), (3, -3)])
def test_features_are_the_hidden_states_without_the_class_token(
    tmp_path: Path, comprehension: int, generation: int
) -> None:
    from transformers import CLIPVisionModel

    write_tiny_clip(tmp_path, seed=4)
    reference = CLIPVisionModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    vision = VisionConfig(
        tower=str(tmp_path), comprehension_hidden_state=comprehension, generation_hidden_state=generation
    )
    tower = HVPTower.from_config(vision, TASKS)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden_states = reference(pixels, output_hidden_states=True).hidden_states
    assert len(hidden_states) == 4
    for task, index in ((Task.COMPREHENSION, comprehension), (Task.GENERATION, generation)):
        # Two attention kernels (fused here, eager there) in float32, features of size up to about 5: a few ulp.
        torch.testing.assert_close(tower(pixels, task), hidden_states[index][:, 1:], atol=2e-5, rtol=1e-5)


def test_a_whole_clip_model_gives_its_vision_hidden_states_bit_for_bit(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = vision | {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text, vision_config=vision, attn_implementation="sdpa")
        reference = CLIPModel(config).eval()
    reference.save_pretrained(tmp_path)
    tower = HVPTower.from_config(VisionConfig(tower=str(tmp_path)), TASKS)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden_states = reference.vision_model(pixels, output_hidden_states=True).hidden_states
    for task, index in ((Task.COMPREHENSION, -2), (Task.GENERATION, 1)):
        assert torch.equal(tower(pixels, task), hidden_states[index][:, 1:])
