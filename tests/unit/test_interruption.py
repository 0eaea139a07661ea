"""Signals that ask a run to stop; under real launchers they are in tests/distributed/test_processes.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_hgpt.interruption import StopSignals


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    listening = StopSignals()
    listening.listen()
    yield listening
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_a_signal_while_the_ranks_agree_is_not_lost(signals: StopSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    """It came after this rank's share of the all-reduce: not this time, alike on every rank, but the next."""
    came = []

    def all_reduce(number: torch.Tensor, op: Any) -> None:
        if not came:
            os.kill(os.getpid(), signal.SIGTERM)
        came.append(int(number.item()))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    context: Any = types.SimpleNamespace(world_size=2, device=torch.device("cpu"))
    assert [signals.agree(context), signals.agree(context)] == [False, True]
    assert came == [0, signal.SIGTERM] and signals.number == signal.SIGTERM


def test_repeats_change_nothing_and_end_the_process_with_its_status_after_the_run(signals: StopSignals) -> None:
    context: Any = types.SimpleNamespace(world_size=1, device=torch.device("cpu"))
    for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), signum)
    assert signals.agree(context) and signals.number == signal.SIGTERM
    signals.leave()
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143


@pytest.mark.parametrize(("is_there", "status"), [(True, 0), (False, -signal.SIGKILL)])
def test_a_launcher_that_ended_before_its_process_ran(is_there: bool, status: int) -> None:
    code = "from megatron_hgpt.interruption import die_with_launcher; die_with_launcher()"
    launcher = str(os.getpid() if is_there else 2**22 - 1)
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "hgpt", "HGPT_LAUNCHER_PID": launcher}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == status
