"""The process at a site that stays: it keeps the model in memory from one message to the next.

The ClientApp starts it when it is needed. It ends by itself when its SuperNode has ended, or when
nothing has been asked of it for a while (`idle` in the node config).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from hedgerow.engines.flower.messages import Reply, Request
from hedgerow.engines.flower.node import IDLE
from hedgerow.environment import quieten
from hedgerow.errors import UserError
from hedgerow.files import replacing

if TYPE_CHECKING:
    from hedgerow.engines.flower.site import Site

ADDRESS = "worker.socket"
"""The file in a site's folder that names the worker's socket."""


class WorkerRequest(BaseModel):
    """Request of the ClientApp to the worker."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    app: Path
    """The app's folder."""
    node: dict[str, str | int | float | bool]
    """The node config."""
    request: Request
    files: list[Path]


class WorkerReply(BaseModel):
    """Reply of the worker to the ClientApp."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reply: Reply
    update: Path | None = None


def ask(place: Path, request: WorkerRequest) -> WorkerReply:
    """Ask the site's worker, which is started if there is none.

    Raises:
        RuntimeError: it could not be started, or ended before it replied.
    """
    with _connected(place) as connection:
        connection.send_bytes(request.model_dump_json().encode())
        try:
            return WorkerReply.model_validate_json(connection.recv_bytes())
        except EOFError:
            raise RuntimeError("the site's worker ended before it replied") from None


@contextlib.contextmanager
def inbox(place: Path) -> Iterator[Path]:
    """A folder for what this process receives; those of processes that were killed are removed."""
    for folder in place.glob("inbox-*"):
        number = folder.name.removeprefix("inbox-")
        if number.isdecimal() and not _is_alive(int(number)):
            shutil.rmtree(folder, ignore_errors=True)
    own = place / f"inbox-{os.getpid()}"
    own.mkdir()
    try:
        yield own
    finally:
        shutil.rmtree(own)


def _connected(place: Path) -> Connection:
    """A connection to the worker; of several processes that find none, one starts it."""
    with (place / "worker.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _found_or_started(place)


def _found_or_started(place: Path) -> Connection:
    address = place / ADDRESS
    process = None
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            return Client(address.read_text(), family="AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):
            pass
        if process is None:
            parent = os.getppid()  # Flower's process at the site, which ends with its SuperNode
            command = [sys.executable, "-m", __name__, str(place), str(parent)]
            process = subprocess.Popen(command, start_new_session=True)
        if process.poll() is not None:
            raise RuntimeError("the site's worker ended as soon as it was started; see the log")
        time.sleep(0.05)
    raise RuntimeError("the site's worker did not come up within two minutes")


class _Keeper(threading.Thread):
    """Ends this process when the SuperNode has ended, or nothing is asked for too long."""

    def __init__(self, parent: int, socket: Path) -> None:
        super().__init__(daemon=True)
        self.idle = IDLE
        self.resting_since: float | None = time.monotonic()
        self._parent, self._socket = parent, socket

    def run(self) -> None:
        while _is_alive(self._parent) and not self._has_rested():
            time.sleep(0.5)
        shutil.rmtree(self._socket.parent, ignore_errors=True)
        os._exit(0)

    def _has_rested(self) -> bool:
        since = self.resting_since
        return since is not None and time.monotonic() - since > self.idle


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (OSError, OverflowError):  # gone, or its number is now another user's, or nobody's
        return False
    return True


def serve(place: Path, parent: int) -> None:
    """Handle requests, one after another, until the process `parent` has ended."""
    with listening(place) as listener:
        keeper = _Keeper(parent, Path(str(listener.address)))
        keeper.start()
        host = Host()
        while True:
            with listener.accept() as connection:
                keeper.resting_since = None
                answer(connection, host)
                keeper.idle = host.idle
                keeper.resting_since = time.monotonic()


@contextlib.contextmanager
def listening(place: Path) -> Iterator[Listener]:
    """Listen for the ClientApps of the site whose folder this is."""
    # In a folder of its own, which only this user may enter: whoever connects is believed.
    socket = Path(tempfile.mkdtemp(prefix="hedgerow-")) / "socket"
    try:
        with Listener(str(socket), family="AF_UNIX") as listener:
            with replacing(place / ADDRESS) as file:
                file.write(str(socket).encode())
            yield listener
    finally:
        shutil.rmtree(socket.parent, ignore_errors=True)


def answer(connection: Connection, host: Host) -> bool:
    """Have a request handled, and say whether there was one.

    Who asked may be gone meanwhile, as when a run is stopped.
    """
    asked = False
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        request = WorkerRequest.model_validate_json(connection.recv_bytes())
        asked = True
        reply = host.handle(request)
        connection.send_bytes(reply.model_dump_json().encode())
    return asked


def _site_of_node(app: Path, node: Mapping[str, object]) -> tuple[Site, float]:
    from hedgerow.engines.flower import site

    settings, made = site.of_node(app, node)
    return made, settings.idle


class Host:
    """The site that requests are for; another app or node config makes another site."""

    def __init__(
        self, open_site: Callable[[Path, Mapping[str, object]], tuple[Site, float]] = _site_of_node
    ) -> None:
        """Make no site before the first request.

        Args:
            open_site: makes the site of an app's folder and a node config, and says how many
                seconds without a request it is kept; by default that of the config's files.
        """
        self._open = open_site
        self.idle = self._idle = IDLE
        """Seconds without a request after which this process ends."""
        self.site: Site | None = None
        self.mistake: UserError | None = None
        """What kept the last site that was asked for from being made."""
        self._made_for: object = None

    def handle(self, request: WorkerRequest) -> WorkerReply:
        """Hand a request to the site."""
        # Here, so that the ClientApp, which starts this module, need not import them.
        from hedgerow.engines.flower.site import wrong_settings

        name = str(request.node.get("name"))
        try:
            if self.site is None or self._made_for != (request.app, request.node):
                self.site, self._idle = self._open(request.app, request.node)
                self._made_for = (request.app, request.node)
        except UserError as error:
            self.mistake = error
            return WorkerReply(reply=wrong_settings(name, error))
        reply, update = self.site.handle(name, request.request, request.files)
        self.idle = self._idle + self.site.awaits
        return WorkerReply(reply=reply, update=update)


if __name__ == "__main__":
    quieten()
    serve(Path(sys.argv[1]), int(sys.argv[2]))
