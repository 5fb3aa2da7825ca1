"""The process that runs strangers' programs: started when it is first needed, and again when it
has been ended at its bounds.

It ends by itself when this process has ended, in whatever way. Ctrl-C in a terminal does not reach
it, but ends whoever waits for it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

SECONDS = 10
"""Seconds of computing for one request, and one more for each megabyte of it."""
MEMORY = 512 * 2**20
"""Bytes of memory for one request, on Linux, and 50 more for each byte of it."""
_WORKER = "hedgerow.bounded.worker"


class Exceeded(Exception):
    """A program goes beyond its bounds; the text says which, for what it is to precede it."""


class Process:
    """A process that handles one request after another; any thread may ask it.

    Args:
        seconds: of computing for each request, and one more for each megabyte of it.
        memory: bytes for each request, and 50 more for each byte of it.
    """

    def __init__(self, *, seconds: int = SECONDS, memory: int = MEMORY) -> None:
        self._bounds = {"seconds": seconds, "memory": memory}
        self._lock = threading.Lock()
        self._started: _Started | None = None

    def ask(self, what: str, request: Mapping[str, Any]) -> Any:
        """The reply to a request: JSON, as the request.

        Raises:
            Exceeded: it has taken more than it may.
            RuntimeError: the process cannot be started.
        """
        message = json.dumps([what, self._bounds, request], ensure_ascii=False)
        with self._lock:
            if self._started is None or self._started.process.poll() is not None:
                self._started = _Started()
            try:
                reply = self._started.ask(message.encode("utf-8", "surrogatepass"))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                code = self._started.process.wait()
                self._started = None
                raise self._reason(code) from None
            except BaseException:
                # Of an interrupt, say: the next request would get the reply to this one.
                self._started.end()
                self._started = None
                raise
        found = json.loads(reply.decode("utf-8", "surrogatepass"))
        if "exceeded" in found:
            raise Exceeded(self._sentence(found["exceeded"]))
        return found["reply"]

    def _reason(self, code: int) -> Exception:
        if code == -signal.SIGXCPU:
            return Exceeded(self._sentence("time"))
        if code < 0:
            return Exceeded(f"ends the process that it runs in ({signal.Signals(-code).name})")
        return RuntimeError(f"python -m {_WORKER} ended with code {code}")

    def _sentence(self, bound: str) -> str:
        return {
            "time": f"takes more than {self._bounds['seconds']} seconds of computing",
            "memory": f"needs more than {self._bounds['memory'] // 2**20} MB of memory",
            "length": "writes much more than it is given",
        }[bound]


class _Started:
    """A process that has been started, and the pipes to it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # It finds modules where this process does, which may be in a notebook.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # or Ctrl-C in a terminal would reach it
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests = Connection(os.dup(self.process.stdin.fileno()), readable=False)
        self._replies = Connection(os.dup(self.process.stdout.fileno()), writable=False)
        self.process.stdin.close()
        self.process.stdout.close()
        self.end = weakref.finalize(self, _end, self.process, self._requests, self._replies)

    def ask(self, message: bytes) -> bytes:
        """The reply to a message."""
        self._requests.send_bytes(message)
        return self._replies.recv_bytes()


def _end(process: subprocess.Popen[bytes], *pipes: Connection) -> None:
    process.kill()
    process.wait()
    for pipe in pipes:
        pipe.close()
