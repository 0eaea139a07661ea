"""``hgpt train``: configuration, dry run, and how many processes start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_hgpt.cli import main
from megatron_hgpt.cli.frame import build_parser, load
from megatron_hgpt.cli.processes import meeting_point, processes_per_node
from megatron_hgpt.config import ParallelConfig
from megatron_hgpt.environment import Nodes, nodes_from_environment
from megatron_hgpt.errors import ConfigError

CONFIG = Path(__file__).parents[3] / "examples" / "configs" / "tiny_stage2.yaml"


def test_options_and_overrides_may_be_mixed() -> None:
    arguments = build_parser("train").parse_intermixed_args(
        ["training.seed=7", "--config", str(CONFIG), "--dry-run", "name=mine"]
    )
    config = load(arguments)
    assert (config.training.seed, config.name, config.training.stage) == (7, "mine", "stage2")
    assert arguments.dry_run


def test_a_preset_without_a_file() -> None:
    config = load(build_parser("train").parse_intermixed_args(["--preset", "healthgpt_l14"]))
    assert config.model.hf_config["num_key_value_heads"] == 10


def test_a_dry_run_prints_configuration_parameters_and_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(CONFIG), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for heading in ("# resolved configuration", "# parameters", "# batch arithmetic"):
        assert heading in out
    # The tensor parallel size of the file, as the command would start it on a CPU.
    assert "processes                       2\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.lrr=1"], "did you mean optimizer.lr?"),
        (["parallel.tensor_model_parallel_size=3", "model.vocabulary.pad_to_multiple=192"], "use 1, 2, 4"),
        (["model.vision.hf_config=5"], "model.vision.hf_config=5 must be"),
    ],
)
def test_a_dry_run_finds_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(CONFIG), "--dry-run", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ConfigError: ")
    assert message in captured.err


def test_a_run_without_its_folders_stops_before_a_process_group_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", "tiny", "training.num_steps=1", "training.global_batch_size=1"]) == 2
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
    layout = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, context_parallel_size=context
    )
    assert processes_per_node(layout, Nodes()) == expected
    assert processes_per_node(layout, Nodes(processes_per_node=5)) == 5


def test_fewer_gpus_than_one_replica_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="tensor_model_parallel_size=2 needs 2 GPUs, this machine has 1; lower it"):
        processes_per_node(ParallelConfig(tensor_model_parallel_size=2), Nodes())
    with pytest.raises(ConfigError, match=r"size=2 x parallel\.context_parallel_size=3 needs 6 GPUs"):
        processes_per_node(ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=3), Nodes())


def test_too_few_gpus_are_one_problem_among_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["train", "--config", str(CONFIG), "--dry-run", "optimizer.lr=-1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ConfigError: 2 problems\n")
    assert "needs 2 GPUs, this machine has 1" in error and "optimizer.lr=-1" in error


def test_one_machine_meets_by_itself_and_several_at_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert nodes_from_environment() == Nodes()
    alone = meeting_point(Nodes(), start_s=60)
    assert (alone.endpoint, alone.min_nodes, alone.max_nodes, alone.local_addr) == ("localhost:0", 1, 1, "127.0.0.1")
    for name, value in {"NNODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "127.0.0.2", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    among = meeting_point(nodes_from_environment(), start_s=60)
    assert (among.endpoint, among.min_nodes, among.max_nodes) == ("127.0.0.2:1234", 4, 4)
    assert (among.get_as_bool("is_host"), among.get_as_int("join_timeout")) == (False, 60)
    monkeypatch.setenv("NNODES", "2:4")
    monkeypatch.setenv("NODE_RANK", "0")
    among = meeting_point(nodes_from_environment(), start_s=60)
    assert (among.min_nodes, among.max_nodes, among.get_as_bool("is_host")) == (2, 4, True)
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(ConfigError, match="MASTER_ADDR=no-such-host.invalid: .*; name the first node"):
        meeting_point(nodes_from_environment(), start_s=60)
    monkeypatch.delenv("NODE_RANK")
    with pytest.raises(ConfigError, match="NNODES=4: set NODE_RANK and MASTER_ADDR on every node"):
        meeting_point(nodes_from_environment(), start_s=60)
    monkeypatch.setenv("NNODES", "3:2")
    with pytest.raises(ConfigError, match="NNODES='3:2' must be a whole number from 1 to"):
        nodes_from_environment()
    monkeypatch.setenv("NNODES", "many")
    with pytest.raises(ConfigError, match="NNODES='many' must be a whole number from 1"):
        nodes_from_environment()
