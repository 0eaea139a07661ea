"""The demo's frame: its commands, their failures, and when a stage starts afresh."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from megatron_hgpt.checkpoint import description
from megatron_hgpt.demo import assets, run, stage_configs
from megatron_hgpt.errors import ConfigError, DataError


def test_a_command_gets_its_environment_and_gives_its_output() -> None:
    result = run.call(["sh", "-c", "echo $COLOUR; pwd"], stdout=subprocess.PIPE, COLOUR="two words")
    assert result.stdout.splitlines() == ["two words", str(run.ROOT)]


def test_a_failed_step_ends_the_demo_with_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(run.StepError, match=r"exit status 3\): sh -c exit 3"):
        run.call(["sh", "-c", "exit 3"])
    monkeypatch.setattr(run, "build_assets", lambda *args, **options: run.call(["sh", "-c", "exit 3"]))
    assert run.run(output=tmp_path) == 3
    assert capsys.readouterr().err == "step failed (exit status 3): sh -c exit 3\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.sed=1", "did you mean training.seed"),
        ("training.num_steps=x", "training.num_steps='x'"),
        ("parallel.tensor_model_parallel_size=3", "use 1, 2, 4"),
        ("output_dir=elsewhere", "choose its folder with --output"),
    ],
)
def test_a_wrong_override_is_refused_before_anything_is_built(
    override: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "build_assets", lambda *args, **options: pytest.fail("built"))
    with pytest.raises(ConfigError, match=message):
        run.run(output=tmp_path / "demo", overrides=[override])
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("name", ["stage1", "stage3", "data/train"])
def test_a_folder_of_somebody_else_is_refused_and_stays(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "metrics.jsonl").write_text("precious")
    monkeypatch.setattr(run, "build_assets", lambda *args, **options: pytest.fail("built"))
    with pytest.raises(DataError, match=f"{name} exists and the demo did not write it") as caught:
        run.run(output=tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / name / "metrics.jsonl").read_text() == "precious"


def test_a_stage_starts_afresh_when_something_that_it_depends_on_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = tmp_path / "stage2" / "metrics.jsonl"

    def write(*overrides: str) -> Path:
        return stage_configs.write_stage_config(tmp_path, "tiny", "stage2", {}, overrides)

    path = write()
    assert yaml.safe_load(path.read_text())["checkpoint"] == {"init_from": [str(tmp_path / "stage1")]}
    kept.write_text("kept")
    write()
    assert kept.exists()
    write("training.num_steps=7")
    assert not kept.exists()
    for changed in (f"assets/vqgan/{assets.MARKER}", f"stage1/{stage_configs.MARKER}"):
        kept.write_text("made from something else")
        (tmp_path / changed).parent.mkdir(parents=True)
        (tmp_path / changed).write_text("{}")
        write("training.num_steps=7")
        assert not kept.exists()
    kept.write_text("of an older format")
    monkeypatch.setattr(description, "FORMAT_VERSION", description.FORMAT_VERSION + 1)
    write("training.num_steps=7")
    assert not kept.exists()


def test_a_dataset_is_written_again_when_a_setting_or_a_file_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the overrides reach the command that writes it."""
    commands: list[list[str]] = []

    def call(command: list[str], **environment: str) -> None:
        commands.append(command)
        target = Path(command[command.index("--output") + 1])
        target.mkdir(parents=True, exist_ok=True)
        (target / "manifest.json").write_text("{}")

    monkeypatch.setattr(run, "call", call)
    config = stage_configs.write_stage_config(tmp_path, "tiny", "stage1", {}, [])
    assets = {"train": "train.json", "test": "test.json"}
    for name in assets.values():
        (tmp_path / name).write_text("[]")

    def number_written(*overrides: str) -> int:
        commands.clear()
        run.preprocess(tmp_path, config, overrides, assets, tmp_path)
        assert all(command[-len(overrides) :] == list(overrides) for command in commands if overrides)
        return len(commands)

    assert number_written() == 2
    assert number_written() == 0
    assert number_written("data.max_image_side=32") == 2
    assert number_written("data.max_image_side=32") == 0
    (tmp_path / "test.json").write_text("[{}]")
    assert number_written("data.max_image_side=32") == 1
    assert number_written("data.max_image_side=32", "optimizer.lr=1e-3") == 0


def test_every_evaluated_split_is_one_of_the_assets() -> None:
    assert list(run.SPLITS.values()) == ["train", "test", "wordings"]


def test_the_thread_count_is_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), assets._one_thread():
        assert torch.get_num_threads() == 1
        _ = 1 / 0
    assert torch.get_num_threads() == before
