"""The watchdog's judgement and its stacks; what it does to real runs is in tests/distributed/test_hangs.py."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hgpt.config import TimeoutsConfig
from megatron_hgpt.hooks import watchdog as module
from megatron_hgpt.hooks.base import Phase, TrainState
from megatron_hgpt.hooks.beats import Beat, host_name, kill_silent, process_start, ranks_behind
from megatron_hgpt.hooks.watchdog import WatchdogHook

ROOT = str(Path(__file__).parents[3])


def beat(progress: int = 5, *, is_waiting: bool = False, **changes: Any) -> Beat:
    values = {"number": 1, "step": 2, "phase": Phase.COMPUTE, "place": "a.py:1 in f", "host": "node", "pid": 1}
    return Beat(progress=progress, is_waiting=is_waiting, started="1", **(values | changes))


@pytest.mark.parametrize(
    ("beats", "silent", "behind"),
    [
        ({0: beat(5), 1: beat(4), 2: beat(5)}, [], [1]),
        ({0: beat(is_waiting=True), 1: beat(), 2: beat(is_waiting=True)}, [], [1]),
        ({0: beat(), 1: beat()}, [], [0, 1]),
        ({0: beat(4), 1: beat(5), 2: beat(5)}, [2], [2]),
    ],
    ids=["fewer phases", "does not wait for others", "nothing tells them apart", "does not run"],
)
def test_who_is_behind(beats: dict[int, Beat], silent: list[int], behind: list[int]) -> None:
    assert ranks_behind(beats, silent) == behind


def test_a_beat_survives_the_store() -> None:
    one = beat(place="megatron_hgpt/trainer.py:3 in fit")
    assert Beat.from_json(one.to_json().encode()) == one


def test_only_the_very_process_that_was_silent_is_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        mine = beat(pid=process.pid, host=host_name())
        other_process, elsewhere = dataclasses.replace(mine, started="7"), dataclasses.replace(mine, host="elsewhere 1")
        started = process_start(process.pid)
        kill_silent({0: other_process, 1: dataclasses.replace(elsewhere, started=started)}, [0, 1], host_name())
        time.sleep(0.2)
        assert process.poll() is None
        kill_silent({0: dataclasses.replace(mine, started=started)}, [0], host_name())
        assert process.wait(timeout=10) == -9
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why a watchdog would have ended this process."""
    texts: list[str] = []
    monkeypatch.setattr(WatchdogHook, "_end", lambda _, text, silent: texts.append(text))
    return texts


@pytest.fixture
def make(
    tmp_path: Path, make_state: Callable[..., TrainState], ended: list[str]
) -> Iterator[Callable[..., WatchdogHook]]:
    hooks: list[WatchdogHook] = []

    def build(rank: int = 0, world_size: int = 1, store: Any = None, **timeouts: float) -> WatchdogHook:
        hook = WatchdogHook(TimeoutsConfig(**timeouts), rank=rank, world_size=world_size, output_dir=tmp_path)
        hook.connect(store)
        hook.start()
        hook.on_fit_start(make_state())
        hook.on_phase(make_state(), Phase.COMPUTE)
        hooks.append(hook)
        return hook

    yield build
    for hook in hooks:
        hook.stop()
        hook._thread.join()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "not within 10 s"
        time.sleep(0.02)


def test_nothing_is_left_of_a_usual_run(make: Callable[..., WatchdogHook], tmp_path: Path, caplog: Any) -> None:
    hook = make()
    assert (tmp_path / "watchdog").exists()
    hook.stop()
    assert not (tmp_path / "watchdog").exists() and caplog.text == ""


def test_the_folder_is_left_alone_before_the_run_has_begun(tmp_path: Path) -> None:
    """It may be another run's, which is only known when the process group is there."""
    hook = WatchdogHook(TimeoutsConfig(), rank=0, world_size=1, output_dir=tmp_path)
    hook.start()
    hook.stop()
    assert not list(tmp_path.iterdir())


def test_a_standstill_is_said_once_with_the_stacks(
    make: Callable[..., WatchdogHook], make_state: Any, tmp_path: Path, caplog: Any
) -> None:
    hook = make(step_warning_s=0.3, step_limit_s=100.0)
    with caplog.at_level(logging.WARNING, logger="megatron_hgpt"):
        wait_for(lambda: bool(caplog.records))
        time.sleep(0.5)
        (record,) = caplog.records
        assert record.getMessage().startswith("no progress after step 0 for 0.")
        assert f"; behind is rank 0 (pid {os.getpid()} on " in record.getMessage().replace(": behind", "; behind")
        assert f"stacks in {tmp_path}/watchdog/rank_0.txt" in record.getMessage()
        assert "exit status 75 and can be started again (timeouts.step_limit_s)" in record.getMessage()
        assert "test_a_standstill_is_said_once_with_the_stacks" in (tmp_path / "watchdog" / "rank_0.txt").read_text()
        hook.on_phase(make_state(step=1), Phase.LOAD)
        wait_for(lambda: len(caplog.records) > 1)
        assert caplog.records[1].getMessage() == "the run goes on, at step 1"


@pytest.mark.parametrize("phase", [Phase.START, Phase.SAVE])
def test_phases_with_a_limit_of_their_own_are_not_slow_so_soon(
    phase: Phase, make: Callable[..., WatchdogHook], make_state: Any, caplog: Any
) -> None:
    hook = make(step_warning_s=0.2, step_limit_s=0.5, start_s=100.0, save_s=100.0)
    hook.on_phase(make_state(), phase)
    time.sleep(1.0)
    assert caplog.text == ""


def test_a_rank_whose_peer_failed_does_not_wait_for_ever(
    make: Callable[..., WatchdogHook], make_state: Any, ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PEER_ERROR_S", 0.5)
    store = torch.distributed.HashStore()
    waiting, failed = (make(rank, 2, store, step_warning_s=0.3) for rank in (0, 1))
    failed.on_error(make_state(), ValueError("a fault"))
    wait_for(lambda: bool(ended))
    assert ended[0] == "another rank ended with an error, and this one waited for it"
    assert waiting.rank == 0


def test_ranks_that_nobody_watches_end_by_themselves(make: Callable[..., WatchdogHook], ended: list[str]) -> None:
    """Rank 2 of 3, whose peers never beat."""
    make(2, 3, torch.distributed.HashStore(), step_warning_s=0.3, step_limit_s=0.6)
    wait_for(lambda: bool(ended))
    assert "behind is rank 2" in ended[0]


class StuckFile:
    """On a disk that answers nobody."""

    def write(self, text: str) -> int:
        threading.Event().wait()
        return len(text)

    def fileno(self) -> int:
        return sys.__stderr__.fileno() if sys.__stderr__ else 2

    def close(self) -> None:
        """Nothing."""


def test_a_disk_that_hangs_does_not_stop_the_watch(make: Callable[..., WatchdogHook], ended: list[str]) -> None:
    hook = make(step_warning_s=0.3, step_limit_s=1.0)
    assert hook._file is not None
    hook._file.close()
    hook._file = StuckFile()  # type: ignore[assignment]
    wait_for(lambda: bool(ended))
    assert hook._is_dumped and "behind is rank 0" in ended[0]


def test_a_disk_that_hangs_does_not_stop_the_end(tmp_path: Path) -> None:
    code = f"""
import pathlib, threading
from megatron_hgpt.config import TimeoutsConfig
from megatron_hgpt.hooks import watchdog
watchdog._LAST_S = 1.0
hook = watchdog.WatchdogHook(TimeoutsConfig(), rank=0, world_size=1, output_dir=pathlib.Path({str(tmp_path)!r}))
class Stuck:
    def write(self, text): threading.Event().wait()
hook._file = Stuck()
watchdog.write_error_file = lambda message: threading.Event().wait()
hook._end("it hangs", {{}})
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ROOT}, timeout=60)
    assert done.returncode == 75
