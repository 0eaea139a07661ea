"""AdamW whose moments live in host memory updates like the one whose moments do not."""

from __future__ import annotations

import torch

from megatron_hgpt.optim import GroupStepAdamW


def test_the_update_is_torchs_wherever_the_state_lives() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), torch.randn(4, 5, 3)
    values = []
    for build in (
        lambda p: torch.optim.AdamW([p], lr=0.1, weight_decay=0.1),
        lambda p: GroupStepAdamW([{"params": [p]}], lr=0.1, weight_decay=0.1),
        lambda p: GroupStepAdamW([{"params": [p]}], lr=0.1, weight_decay=0.1, state_device=torch.device("cpu")),
    ):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = build(parameter)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        values.append(parameter.detach())
        assert optimizer.state[parameter]["exp_avg"].abs().sum() > 0
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=0, atol=1e-7)
    assert not torch.equal(values[0], start)
