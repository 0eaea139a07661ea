"""hgpt verify goes through everything that it is given and says a line for each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_hgpt.checkpoint.description import FORMAT_VERSION, INFO
from megatron_hgpt.cli import main
from megatron_hgpt.testing.checkpoints import seal_folder

VALID = {
    "format_version": FORMAT_VERSION, "is_healthy": True, "stage": "stage3_joint", "trained_groups": ["new_rows"],
    "optimizer_steps": {}, "loader": {"step": 1}, "rng_layout": [1, 1, 1], "fingerprint": {}, "base": {},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        for name in (".metadata", "shard_0.distcp", "resolved_config.yaml"):
            (folder / name).write_text(f"{name} of step {step}")
        (folder / INFO).write_text(json.dumps(VALID))
        seal_folder(folder, step=step, publication=step)
    return tmp_path / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_whole_checkpoints_are_as_they_were_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = sorted((run / "checkpoints").iterdir())
    assert main(["verify", str(run), str(second)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{path}: as it was written" for path in (first, second, second)] and err == ""


@pytest.mark.parametrize("name", [".metadata", "shard_0.distcp", "resolved_config.yaml"])
def test_a_damaged_checkpoint_is_named_once_with_a_remedy(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run / "checkpoints" / "step_00000001"
    flip(folder / name)
    assert main(["verify", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"CheckpointError: the checkpoint is damaged: {folder / name}: its sha256 is not the one in {INFO}; "
        "put an intact copy back\n"
    )


def test_all_folders_are_gone_through_whatever_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever copied ten checkpoints wants to know all that did not arrive."""
    first, second = sorted((run / "checkpoints").iterdir())
    flip(first / ".metadata")
    (run / "empty").mkdir()
    assert main(["verify", str(run / "empty"), str(run)]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{second}: as it was written"]
    lines = err.splitlines()
    assert len(lines) == 2 and "is not a dataset folder" in lines[0] and str(first / ".metadata") in lines[1]
    (second / "shard_0.distcp").unlink()
    assert main(["verify", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 2
    flip(second / INFO)
    assert main(["verify", str(second)]) == 2
    _, err = capsys.readouterr()
    assert str(second / INFO) in err and err.endswith("put an intact copy back\n") and "another" not in err
