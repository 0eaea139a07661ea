"""Two nodes: network namespaces joined by a cable that can be pulled, and a launcher in each."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.drills.processes import NODE, Run, wait_for
from tests.drills.sequence import START_S, Drill, Try

PORT = 29507
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PULLED_S = (1.0, 12.0)
"""Seconds until the cable is in again; a closed connection tells the other node at once, silence only at the limit."""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def can_make_namespaces() -> bool:
    """Whether this process may: root, and a kernel with them."""
    name = f"hgpt{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
    return made and subprocess.run(["ip", "netns", "delete", name], capture_output=True).returncode == 0


class Nodes(Run):
    """`hgpt train` on two nodes of one process each, which share the file system."""

    num_nodes = "2"

    def __init__(self, folder: Path, config: Path, overrides: Sequence[str], way: str = "hgpt") -> None:
        super().__init__(folder, config, overrides, way)
        self.names = [f"hgpt{self.mark[:6]}{number}" for number in range(2)]
        self.cables = [f"v{self.mark[:6]}{number}" for number in range(2)]

    def plug(self) -> None:
        """Make the namespaces and the cable."""
        for name in self.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        ends = ["netns", self.names[0], "type", "veth", "peer", "name", self.cables[1], "netns", self.names[1]]
        _ip("link", "add", self.cables[0], *ends)
        for name, cable, address in zip(self.names, self.cables, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            _ip("-n", name, "link", "set", cable, "up")

    def unplug(self) -> None:
        """Remove them; the cable goes with its ends."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def start(self) -> None:
        self.next_log()
        self.launchers = [self.launch_node(number) for number in range(2)]

    def launch_node(self, number: int) -> subprocess.Popen[bytes]:
        variables = {
            NODE: str(number), "NNODES": self.num_nodes, "NODE_RANK": str(number), "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": str(PORT), "NPROC_PER_NODE": "1", "GLOO_SOCKET_IFNAME": self.cables[number],
        }  # fmt: skip
        command = ["ip", "netns", "exec", self.names[number], *self.command(), *self.arguments]
        return self.launch(command, {**self.environment(), **variables})

    def lose(self, number: int) -> None:
        """The cable is pulled, so that nobody hears the processes of the node die."""
        _ip("-n", self.names[number], "link", "set", self.cables[number], "down")
        doomed = [process.pid for process in self.processes() if process.environment.get(NODE) == str(number)]
        self.signal(signal.SIGKILL, doomed)
        self.launchers[number].wait()

    def replace(self, number: int) -> None:
        """The cluster gives another machine of that number, and the same command starts there."""
        _ip("-n", self.names[number], "link", "set", self.cables[number], "up")
        self.launchers[number] = self.launch_node(number)


class LostNode(Drill):
    """The second node is lost and replaced; the launcher of the first is not touched."""

    name = "lost node, replaced"
    tries = 4
    run_type: type[Nodes] = Nodes
    run: Nodes
    overrides = ("timeouts.step_limit_s=5", "timeouts.step_warning_s=2")

    def prepare(self) -> None:
        self.run.plug()

    def clean(self) -> None:
        self.run.unplug()

    def strike(self, attempt: Try) -> None:
        self.run.lose(1)
        time.sleep(self.rng.uniform(*PULLED_S))
        self.run.replace(1)
        first = self.run.launchers[0]
        wait_for(lambda: first.poll() is not None or self.run.begun_at() is not None, START_S, "training again")
        if first.poll() is not None:
            attempt.notes.append("the first node's launcher ended")
            attempt.orphans += sum(process.environment.get(NODE) == "0" for process in self.run.processes())
            self.run.end()

    def check(self, attempt: Try, newest: int) -> None:
        super().check(attempt, newest)
        attempt.require(attempt.is_unattended, "the launcher of the first node did not go on")


class ElasticNodes(Nodes):
    """One is enough."""

    num_nodes = "1:2"


class ShrunkRun(LostNode):
    """The second node is lost for good, and the first goes on alone: NNODES=1:2."""

    name = "lost node, elastic"
    run_type = ElasticNodes
    ends_equal = False  # another order of summation

    def strike(self, attempt: Try) -> None:
        self.run.lose(1)
        first = self.run.launchers[0]
        wait_for(lambda: first.poll() is not None or self.run.begun_at() is not None, START_S, "training again")


def unfit(layout: str, kind: type[Drill]) -> bool:
    """A replica over two nodes does not go on with one."""
    return kind is ShrunkRun and layout not in ("dp2", "deepspeed")
