"""What a command takes, with all processes that it starts: processor time, wall time and memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_LOOK = 0.1
"""Seconds between two looks at processor times, which cost next to nothing."""
_WEIGH = 3
"""Looks between two at memory, for which the kernel walks through pages."""


@dataclass(frozen=True)
class Measured:
    """What a command has taken."""

    cpu: float
    """Seconds of user and system time of all its processes."""
    wall: float
    """Seconds from its start to its end."""
    peak: int
    """Largest sum of PSS over its processes at one moment, in bytes."""
    output: str


class Failed(Exception):
    """The command has failed; says how its output ends."""


def measure(command: Sequence[str], environment: Mapping[str, str], errors: Path) -> Measured:
    """Run a command, and look at its processes while it does. Linux only.

    Args:
        errors: file for what it writes to standard error.

    Raises:
        Failed: its exit code is not 0.
    """
    # What its processes leave behind, as daemons, comes to this one, and is counted in the end.
    ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, 1)
    seen: dict[tuple[int, float], float] = {}
    peak = looks = 0
    before, start = _of_dead_children(), time.monotonic()
    output = errors.with_suffix(".out")
    with errors.open("w") as to, output.open("w") as lines:
        whole = subprocess.Popen(command, env=environment, stdout=lines, stderr=to)
        try:
            while whole.poll() is None:
                peak = max(peak, _look(seen, weigh=looks % _WEIGH == 0))
                looks += 1
                time.sleep(_LOOK)
            wall = time.monotonic() - start
        finally:
            _end(seen)
    if whole.returncode:
        raise Failed((errors.read_text() + output.read_text()).strip()[-2_000:])
    # A parent that ignores its children's ends never learns their times, which were seen.
    cpu = max(_of_dead_children() - before, sum(seen.values()))
    return Measured(cpu, wall, peak, output.read_text())


def _of_dead_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _look(seen: dict[tuple[int, float], float], *, weigh: bool) -> int:
    """Note processor times of all descendants; returns their PSS, where it is asked for."""
    memory = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            with process.oneshot():
                times = process.cpu_times()
                seen[process.pid, process.create_time()] = times.user + times.system
            if weigh:
                memory += process.memory_full_info().pss
    return memory


def _end(seen: dict[tuple[int, float], float]) -> None:
    """End what is still there of a command, and wait for it, so that its times count."""
    _look(seen, weigh=False)
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(left, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
