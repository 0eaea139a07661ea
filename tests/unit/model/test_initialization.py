from __future__ import annotations

import torch

from megatron_hgpt.model.initialization import generator_for


def draw(name: str, seed: int) -> torch.Tensor:
    return torch.randn(64, generator=generator_for(name, seed))


def test_a_draw_depends_on_name_and_seed_alone() -> None:
    assert torch.equal(draw("decoder.layers.3.x", 1), draw("decoder.layers.3.x", 1))
    torch.manual_seed(9)  # the process's own generator has no part in it
    assert torch.equal(draw("decoder.layers.3.x", 1), draw("decoder.layers.3.x", 1))
    others = [draw("decoder.layers.4.x", 1), draw("decoder.layers.3.x", 2), draw("", 1)]
    assert not any(torch.equal(draw("decoder.layers.3.x", 1), other) for other in others)
