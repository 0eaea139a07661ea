"""The layout that a trained run is loaded in."""

from __future__ import annotations

import pytest

from megatron_hgpt.config import ParallelConfig
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.inference.loading import layout_of_overrides


def test_the_overrides_decide_and_not_the_run() -> None:
    assert layout_of_overrides([]) == ParallelConfig()
    overrides = ["model.backbone=elsewhere", "parallel.tensor_model_parallel_size=2"]
    assert layout_of_overrides(overrides) == ParallelConfig(tensor_model_parallel_size=2)


@pytest.mark.parametrize("name", ["pipeline_model_parallel_size", "context_parallel_size"])
def test_a_loaded_run_has_every_layer_and_token(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"parallel\.{name}=2: a loaded run"):
        layout_of_overrides([f"parallel.{name}=2"])
