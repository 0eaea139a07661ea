"""HVPTower against transformers' CLIPVisionModel with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_hgpt.config import VisionConfig
from megatron_hgpt.data.samples import TASKS, Task
from megatron_hgpt.testing.checkpoints import write_tiny_clip
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
