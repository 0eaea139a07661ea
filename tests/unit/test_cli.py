from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_hgpt import cli, processes
from megatron_hgpt.errors import ConfigError

CONFIG = Path(__file__).parents[2] / "examples" / "configs" / "tiny_stage2.yaml"


def test_options_and_overrides_may_be_mixed() -> None:
    config, dry_run = cli.parse_args(["training.seed=7", "--config", str(CONFIG), "--dry-run", "name=mine"])
    assert (config.training.seed, config.name, config.training.stage, dry_run) == (7, "mine", "stage2", True)


def test_a_preset_without_a_file() -> None:
    config, dry_run = cli.parse_args(["--preset", "healthgpt_l14"])
    assert config.model.hf_config["num_key_value_heads"] == 10
    assert not dry_run


def test_a_dry_run_prints_configuration_parameters_and_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--config", str(CONFIG), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for heading in ("# resolved configuration", "# parameters", "# batch arithmetic"):
        assert heading in out
    # The tensor parallel size of the file, as the launcher would start it on a CPU.
    assert "processes                       2\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.lrr=1"], "did you mean optimizer.lr?"),
        (["parallel.tensor_model_parallel_size=3", "model.vocabulary.pad_to_multiple=192"], "use 1, 2, 4"),
        (["model.vision.hf_config=5"], "model.vision.hf_config=5 must be dict"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["--config", str(CONFIG), "--dry-run", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ConfigError: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_run_without_its_folders_stops_before_a_process_group_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--preset", "tiny", "training.num_steps=1", "training.global_batch_size=1"]) == 2
    assert "set model.tokenizer" in capsys.readouterr().err
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("gpus", "tensor", "pipeline", "context", "expected"),
    [
        (0, 2, 1, 1, 2), (0, 1, 1, 1, 1), (0, 2, 2, 3, 12), (8, 1, 1, 1, 8), (8, 2, 1, 1, 8), (8, 3, 1, 1, 6),
        (3, 3, 1, 1, 3), (8, 2, 2, 1, 8), (8, 3, 1, 2, 6),
    ],
)  # fmt: skip
def test_processes_per_node(
    gpus: int, tensor: int, pipeline: int, context: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    layout = [
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.pipeline_model_parallel_size={pipeline}",
        f"parallel.context_parallel_size={context}",
    ]
    assert processes.processes_per_node(layout) == expected


def test_fewer_gpus_than_one_replica_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="tensor_model_parallel_size=2 needs 2 GPUs, this machine has 1; lower it"):
        processes.processes_per_node(["parallel.tensor_model_parallel_size=2"])
    with pytest.raises(ConfigError, match=r"size=2 x parallel\.context_parallel_size=3 needs 6 GPUs"):
        processes.processes_per_node(["parallel.tensor_model_parallel_size=2", "parallel.context_parallel_size=3"])
