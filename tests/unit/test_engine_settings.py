from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import load_config
from megatron_hgpt.engines.deepspeed_settings import deepspeed_json, missing_requirements
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.validation import validate


def tiny(*overrides: str) -> RunConfig:
    return load_config(
        None,
        ["training.num_steps=10", "training.global_batch_size=8", "engine.name=deepspeed", *overrides],
        preset="tiny",
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_is_valid(stage: int) -> None:
    validate(tiny(f"engine.zero_stage={stage}", "engine.offload_optimizer=cpu"), 4, check_paths=False)


@pytest.mark.parametrize(
    ("world_size", "overrides", "message"),
    [
        (1, ["engine.name=horovod"], "engine.name='horovod' must be one of megatron, deepspeed"),
        (1, ["engine.zero_stage=4"], "engine.zero_stage=4 must be one of 1, 2, 3"),
        (1, ["engine.offload_optimizer=disk"], "engine.offload_optimizer='disk' must be one of none, cpu"),
        (1, ["engine.offload_parameters=cpu"], "engine.offload_parameters=cpu needs engine.zero_stage=3, it is 2"),
        (2, ["parallel.tensor_model_parallel_size=2"], "tensor_model_parallel_size=2 needs engine.name=megatron"),
        (2, ["parallel.pipeline_model_parallel_size=2"], "pipeline_model_parallel_size=2 needs engine.name=megatron"),
        (2, ["parallel.context_parallel_size=2"], "context_parallel_size=2 needs engine.name=megatron"),
        (1, ["parallel.sequence_parallel=true"], "sequence_parallel=true needs engine.name=megatron"),
        (1, ["parallel.use_distributed_optimizer=true"], "set it to false and choose engine.zero_stage"),
        (1, ["optimizer.megatron_overrides={adam_eps: 1}"], "megatron_overrides need engine.name=megatron"),
        (1, ["engine.zero_stage=3", "logging.sample_images_interval_steps=5"], "needs whole weights; set it to 0"),
        (1, ["engine.overrides={optimizer: {}}"], "engine.overrides.optimizer is not one of comms_logger"),
        (1, ["engine.overrides={zero_optimisation: {}}"], "did you mean zero_optimization?"),
        (1, ["engine.overrides={zero_optimization: 3}"], "zero_optimization=3 must be a mapping"),
        (1, ["engine.overrides={zero_optimization: {stage: 1}}"], "zero_optimization.stage is decided by engine"),
        (1, ["engine.overrides={zero_optimization: {offload_optimizer: {device: nvme}}}"], "device is decided by"),
        (1, ["engine.overrides={zero_optimization: {offload_optimizer: none}}"], "offload_optimizer is decided by"),
        (1, ["engine.overrides={zero_optimization: {zenflow: {}}}"], "zero_optimization.zenflow is not supported"),
        (1, ["engine.name=megatron", "engine.offload_optimizer=cpu"], "offload_optimizer=cpu needs engine.name=deep"),
        (1, ["engine.name=megatron", "engine.offload_parameters=cpu"], "offload_parameters=cpu needs engine.name=deep"),
        (1, ["engine.name=megatron", "engine.overrides={dump_state: true}"], "needs engine.name=deepspeed"),
    ],
)  # fmt: skip
def test_each_rule(world_size: int, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(tiny(*overrides), world_size, check_paths=False)


def test_a_machine_without_deepspeed_is_told_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec

    def without(name: str, *args: Any) -> Any:
        return None if name == "deepspeed" else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ConfigError, match=r"needs the package deepspeed: DS_BUILD_OPS=0 pip install -e '.\[deepspeed"):
        validate(tiny(), 1)
    validate(tiny(), 1, check_paths=False)  # a dry run does not need it
    assert list(missing_requirements(RunConfig())) == []


def test_overrides_join_what_the_other_sections_decide() -> None:
    config = tiny(
        "engine.zero_stage=3", "engine.offload_parameters=cpu", "optimizer.clip_grad=0.5", "training.precision=bf16",
        "training.micro_batch_size=2",
        "engine.overrides={zero_optimization: {offload_param: {pin_memory: true}, reduce_bucket_size: 7}, "
        "communication_data_type: bf16}",
    )  # fmt: skip
    validate(config, 4, check_paths=False)
    settings = deepspeed_json(config)
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"]) == (3, 7)
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_optimizer"] == {"device": "none"}
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 1
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"] == {"enabled": True}
    assert settings["communication_data_type"] == "bf16"
    assert config.engine.overrides["zero_optimization"] == {
        "offload_param": {"pin_memory": True}, "reduce_bucket_size": 7
    }  # fmt: skip
