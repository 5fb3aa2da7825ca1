"""A script as a site: its process is the worker, and starts its SuperNode itself."""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Client, Listener
from pathlib import Path

from hedgerow.engines.flower import site
from hedgerow.engines.flower.node import IDLE
from hedgerow.engines.flower.supernode import supernode
from hedgerow.engines.flower.worker import Host, answer, listening
from hedgerow.errors import RunFailed, UserError

GRACE = 5.0
"""Seconds without a request after which a complete run is over, since its last reply is there."""


def host(name: str, place: Path, script: site.Script) -> Host:
    """What handles the requests to a script's site.

    Args:
        name: the client's.
        place: the site's folder.
        script: what the site has, and how it trains.
    """

    def open_site(app: Path, node: Mapping[str, object]) -> tuple[site.Site, float]:
        return site.of_script(app, name, place, script), IDLE

    return Host(open_site)


def serve(name: str, place: Path, host: Host, options: Sequence[str]) -> Path:
    """Take part in a run as a client, until its last entry has come.

    Args:
        name: the client's.
        place: the site's folder.
        host: handles what the site is asked.
        options: of `flower-supernode`, as `["--superlink", "fleet.example:8443"]`.

    Returns:
        The run's directory at this site.

    Raises:
        UserError: the site is another process's, or cannot take part in what is asked of it.
        RunFailed: the SuperNode has ended before.
    """
    place.mkdir(parents=True, exist_ok=True)
    with (place / "script.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{place} is the site of another process, which is {name} already: end that, or "
                "name another folder"
            ) from None
        with listening(place) as listener:

            def wake() -> None:
                with contextlib.suppress(OSError):
                    Client(str(listener.address), family="AF_UNIX").close()

            with supernode(name, place, options, wake) as process:
                return _answered(name, host, listener, process, wake)


def _answered(
    name: str,
    host: Host,
    listener: Listener,
    process: subprocess.Popen[bytes],
    wake: Callable[[], None],
) -> Path:
    """Answer until the run is over; returns its directory."""
    while process.poll() is None:
        is_done = host.site is not None and host.site.is_done
        timer = threading.Timer(GRACE, wake)
        if is_done or host.mistake is not None:
            timer.start()
        with listener.accept() as connection:
            asked = answer(connection, host)
        timer.cancel()
        if not asked and host.mistake is not None:
            raise host.mistake
        if not asked and is_done and host.site is not None:
            return host.site.place
    raise RunFailed(f"{name}: the SuperNode has ended ({process.returncode}): it has said why")
