"""The frame around every command: errors of one process of many, pipes that close, logging."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_hgpt.cli import frame, library_messages
from megatron_hgpt.environment import rank_from_environment, world_size_from_environment
from megatron_hgpt.errors import ConfigError, DivergedError, HungError, raise_problems

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_a_message_of_several_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.report_error(ConfigError("a library says:\n  a=1 is odd\n")) == 2
    assert capsys.readouterr().err == "ConfigError: a library says: a=1 is odd\n"
    with pytest.raises(ConfigError) as several:
        raise_problems(["a=1 is odd", "b=2 is even"])
    frame.report_error(several.value)
    assert capsys.readouterr().err == "ConfigError: 2 problems\n  1. a=1 is odd\n  2. b=2 is even\n"
    frame.report_error(ConfigError("once"), verbose=True)
    assert "ConfigError: once\nConfigError: once\n" in capsys.readouterr().err.replace("megatron_hgpt.errors.", "")


def test_another_rank_waits_to_be_ended_before_it_says_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(frame.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for local in "03":
        (tmp_path / local).mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "3" / "error.json"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert frame.report_error(ConfigError("only here")) == 2
        (tmp_path / "0" / "error.json").write_text(json.dumps({"message": {"message": "ConfigError: everywhere"}}))
        assert frame.report_error(ConfigError("everywhere")) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert waited == [frame.RANK_ERROR_DELAY_S] * 2
    assert capsys.readouterr().err == "rank 3: ConfigError: only here\n"
    left = json.loads((tmp_path / "3" / "error.json").read_text())
    assert left["message"]["message"] == "rank 3: ConfigError: only here"


def test_a_rank_that_is_ended_meanwhile_says_its_own_all_the_same(tmp_path: Path) -> None:
    """Another rank failed for want of this one, and its launcher ends this one, which knows why."""
    code = (
        "import sys; from megatron_hgpt.cli.frame import report_error; from megatron_hgpt.errors import DivergedError\n"
        "print('ready', flush=True); sys.exit(report_error(DivergedError('step 3')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "1", "WORLD_SIZE": "2"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(1)
        process.terminate()
        assert process.communicate(timeout=20)[1] == "rank 1: DivergedError: step 3\n"
    assert process.returncode == 3


def test_a_reader_may_leave_early() -> None:
    """`hgpt config --explain | head`: a pipe without a reader is no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hgpt", "config", "--explain"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_only_the_known_messages_are_silenced() -> None:
    """The list bites, and nothing beside it: the same message of another module, another message of the same kind."""
    code = (
        "import warnings\n"
        "from megatron_hgpt.cli.library_messages import silence_known\n"
        "silence_known()\n"
        "warnings.warn('Apex is not installed. Falling back to Torch Norm')\n"
        "warnings.warn('The .grad attribute of a Tensor that is not a leaf Tensor is being accessed')\n"
        "warnings.warn('something new is deprecated', FutureWarning)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert "Apex" not in done.stderr
    assert "The .grad attribute" in done.stderr and "something new" in done.stderr
    assert all(message for message, _, _ in library_messages._WARNINGS)


def test_the_system_refuses_a_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_with(error: OSError) -> int:
        def run_command(name: str, argv: list[str]) -> int:
            raise error

        monkeypatch.setattr(frame, "run_command", run_command)
        return frame.main(["config"])

    assert fail_with(PermissionError(errno.EACCES, "Permission denied", "out/a.json")) == 2
    assert fail_with(OSError(errno.ENOSPC, "No space left on device")) == 2
    assert capsys.readouterr().err == (
        "FileError: cannot read or write out/a.json: Permission denied\n"
        "FileError: cannot read or write a file: No space left on device\n"
    )
    with pytest.raises(OSError, match="Input/output"):  # the disk may answer the next time
        fail_with(OSError(errno.EIO, "Input/output error", "out/a.json"))
    with pytest.raises(ConnectionResetError):  # about no file: a fault, and its traceback says where
        fail_with(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"))


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_rank_that_is_no_number(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "x")
    monkeypatch.setattr(frame.signal, "signal", None)
    with pytest.raises(ConfigError) as refused:
        rank_from_environment() + world_size_from_environment()
    assert frame.report_error(refused.value) == 2
    assert capsys.readouterr().err.startswith(f"ConfigError: {name}='x' must be a whole number from ")


def test_the_status_says_whether_starting_again_helps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert frame.report_error(DivergedError("step 3: …")) == 3
    monkeypatch.setenv("RANK", "1")  # what hangs on one rank is said by it, and at once
    monkeypatch.setattr(frame, "RANK_ERROR_DELAY_S", 1000.0)
    assert frame.report_error(HungError("the samples of step 3 …")) == 75
    assert capsys.readouterr().err == "DivergedError: step 3: …\nrank 1: HungError: the samples of step 3 …\n"
