"""A script as a site: its process is the worker, and starts its SuperNode itself."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client, Listener
from pathlib import Path

from hedgerow.engines.flower import site
from hedgerow.engines.flower.node import IDLE
from hedgerow.engines.flower.supernode import supernode
from hedgerow.engines.flower.worker import Host, answer, listening
from hedgerow.errors import RunFailed

GRACE = 5.0
"""Seconds after the last reply of a run in which the SuperNode delivers it."""


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
    """Take part in a run as a client, until it is over.

    Args:
        name: the client's.
        place: the site's folder.
        host: handles what the site is asked.
        options: of `flower-supernode`, as `["--superlink", "fleet.example:8443"]`.

    Returns:
        The run's directory at this site.

    Raises:
        RunFailed: the SuperNode has ended before.
    """
    place.mkdir(parents=True, exist_ok=True)
    with listening(place) as listener:

        def wake() -> None:
            with contextlib.suppress(OSError):
                Client(str(listener.address), family="AF_UNIX").close()

        with supernode(name, place, options, wake) as process:
            return _answered(name, host, listener, process)


def _answered(name: str, host: Host, listener: Listener, process: subprocess.Popen[bytes]) -> Path:
    """Answer until the run is over; returns its directory."""
    while process.poll() is None:
        with listener.accept() as connection:
            answer(connection, host)
        if host.site is not None and host.site.is_done:
            time.sleep(GRACE)
            return host.site.place
    raise RunFailed(f"{name}: the SuperNode has ended with {process.returncode}: see above")
