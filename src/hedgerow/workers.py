"""Work side by side, in processes that are forked from this one.

A forked process sees the memory of this one as it is at that moment, and shares it: a base model is
there once, and a process takes what it writes, as the parameters that it trains, and what it makes.
So nothing has to be sent to it, and what it sends back is pickled, as between one's own processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from hedgerow.errors import ClientFailed, RunFailed, UserError
from hedgerow.lazy import torch

T = TypeVar("T")
R = TypeVar("R")

_LOOK = 0.25
"""Seconds for which it is looked at how busy the machine is."""


class WorkerDied(RunFailed):
    """A process that ended before its work was done, as where the system has killed it."""


class Outcome(NamedTuple, Generic[R]):
    """Result of a piece of work, or why there is none."""

    result: R | None
    error: BaseException | None = None

    def get(self) -> R:
        """The result.

        Raises:
            BaseException: what the work has raised; or a `WorkerDied`.
        """
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


class Workers:
    """So many processes at a time, each of which computes in one thread; with 1, this one alone."""

    def __init__(self, count: int = 1, *, is_auto: bool = False) -> None:
        """Begin nothing yet.

        Args:
            count: number of processes.
            is_auto: whether the machine has decided it, so that bytes must not depend on it.
        """
        self.count, self._is_auto = count, is_auto

    @classmethod
    def of(cls, given: int | str) -> Workers:
        """Workers as they are asked for.

        Args:
            given: their number, which may be a text; or `auto`, as many as there are processors
                that this process may use and that have nothing to do, whose bytes are the same
                however many those are.

        Raises:
            UserError: it is no such number, or the system cannot fork processes safely.
        """
        if given == "auto":
            return cls(_free_processors() if sys.platform == "linux" else 1, is_auto=True)
        if isinstance(given, str) and given.isdecimal():
            given = int(given)
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise UserError(f"workers {given}: give 1 or more, or auto")
        if given > 1 and sys.platform != "linux":
            raise UserError(
                f"workers {given}: processes that share their memory are for Linux: leave it out"
            )
        return cls(given)

    @property
    def is_alone(self) -> bool:
        """Whether this process does all the work."""
        return self.count == 1

    def on(self, device: str) -> Workers:
        """The workers for a model on a kind of device: on another than the CPU, one.

        Raises:
            UserError: somebody has asked for several there.
        """
        if device == "cpu" or self.is_alone:
            return self
        if self._is_auto:
            return ALONE
        raise UserError(
            f"workers {self.count}: the model is on a device ({device}) where clients train one "
            "after another: leave it out, or give model.device=cpu"
        )

    @contextlib.contextmanager
    def one_thread(self) -> Iterator[None]:
        """Have this process compute in one thread, too, so that its sums are those of any number.

        Not where it is alone and nobody has asked for anything else.
        """
        threads = torch.get_num_threads()
        if self.count > 1 or self._is_auto:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def each(self, work: Callable[[T], R], items: Sequence[T]) -> Generator[Outcome[R], None, None]:
        """Outcomes of the work on each item, in their order; each goes to whoever is free.

        What the work changes in memory is gone with the process that has done it. One that ends
        before its work is done costs the item that it has, alone.
        """
        if not self.is_alone:
            yield from self._forked(work, items)
            return
        for item in items:
            try:
                yield Outcome(work(item))
            except Exception as error:
                yield Outcome(None, error)

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """Results of the work on each item, in their order.

        Raises:
            WorkerDied: a process has ended before its work was done.
            Exception: what the work has raised.
        """
        for outcome in self.each(work, items):
            yield outcome.get()

    def _forked(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[Outcome[R]]:
        waiting = deque(range(len(items)))
        running: dict[Any, _Worker[R]] = {}
        found: dict[int, Outcome[R]] = {}
        try:
            for place in range(len(items)):
                while place not in found:
                    while waiting and len(running) < self.count:
                        worker: _Worker[R] = _Worker(work, items)
                        worker.begin(waiting.popleft())
                        running[worker.pipe] = worker
                    for pipe in wait(list(running)):
                        worker = running[pipe]
                        found[worker.place] = worker.outcome()
                        if worker.is_there and waiting:
                            worker.begin(waiting.popleft())
                        else:
                            worker.end()
                            del running[pipe]
                yield found.pop(place)
        finally:
            for worker in running.values():
                worker.kill()  # all of them, before an interrupt may come while one is waited for
            for worker in running.values():
                worker.end()


ALONE = Workers()
"""This process, by itself."""


class _Worker(Generic[R]):
    """A forked process, which works on one item at a time."""

    def __init__(self, work: Callable[[T], R], items: Sequence[T]) -> None:
        self.place = 0
        """Place of the item that it has."""
        self.is_there = True
        """Whether it has not ended by itself."""
        self.pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(
            target=_work, args=(work, items, theirs, os.getpid()), daemon=True
        )
        # Ctrl-C between its beginning and its first line would be told by it, too.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def begin(self, place: int) -> None:
        """Have it begin with an item."""
        self.place = place
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `outcome` says
            self.pipe.send(place)

    def outcome(self) -> Outcome[R]:
        """Wait for what comes of the item."""
        try:
            outcome: Outcome[R] = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.is_there = False
            self._process.join()
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"code {code}"
            return Outcome(
                None,
                WorkerDied(
                    f"a worker ended before it was done ({how}), as where there is too little "
                    "memory: give fewer --workers"
                ),
            )
        return outcome

    def kill(self) -> None:
        """Have the process end, whatever it does."""
        self._process.kill()

    def end(self) -> None:
        """Kill the process, and wait for its end."""
        self.kill()
        self._process.join()
        self.pipe.close()


def _work(work: Callable[[T], R], items: Sequence[T], pipe: Connection, parent: int) -> None:
    """What a forked process does: one item after another, until it is ended."""
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever waits
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # Whoever draws progress here has locks that nobody opens any more.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    # Its own processes, as those that load data, end with it.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or tokenizers say that they were forked
    torch.set_num_threads(1)
    while True:
        item = items[pipe.recv()]
        try:
            outcome: Outcome[R] = Outcome(work(item))
        except Exception as error:
            outcome = Outcome(None, _portable(error))
        pipe.send(outcome)


def _portable(error: Exception) -> Exception:
    """An error that another process can read, with where it was raised if it was not meant."""
    said = "".join(traceback.format_exception(error))
    if not isinstance(error, UserError | ClientFailed | RunFailed):
        error.add_note(said)
    try:
        found = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(said)
    return error if type(found) is type(error) else RuntimeError(said)


def _end_with(parent: int) -> None:
    """Have this process be killed when the one that forked it ends, in whatever way."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def processors() -> int:
    """Number of processors that this process may use, busy or not."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _free_processors() -> int:
    """Number of processors that nobody uses at this moment, of those that this process may use.

    Not by the load, a mean over the last minute, which knows of what has just ended.
    """
    allowed = processors()
    before = _ticks()
    time.sleep(_LOOK)
    idle, all_of_them = (now - then for now, then in zip(_ticks(), before, strict=True))
    busy = round((os.cpu_count() or allowed) * (1 - idle / max(all_of_them, 1)))
    return max(1, min(allowed - busy, _quota()))


def _ticks() -> tuple[int, int]:
    """Ticks in which the machine's processors were idle, and all, since it was started."""
    ticks = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    return ticks[3] + ticks[4], sum(ticks)


def _quota() -> int:
    """Number of processors that a container may use at most (control groups, version 2)."""
    try:
        most, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if most == "max" else max(1, int(most) // int(period))
