"""The processes of one site that train together, as accelerate's launcher starts them.

The main one alone speaks with the federation. When it is about to train, it has the others make the
model and the adapter that it has, from the site's own copy of the ledger, and all take the steps.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
import tempfile
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from hedgerow.errors import ClientFailed, RunFailed

if TYPE_CHECKING:
    from hedgerow.engines.flower.site import Script


class _Next(BaseModel):
    """What the main process has the others do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    app: Path | None = None
    """Folder of the Flower app whose next round is trained."""
    run: str = ""
    date: datetime.date | None = None
    place: Path | None = None
    """In the end, the run's directory."""


class Processes:
    """The site's processes, as accelerate knows them; one is the ordinary case."""

    def __init__(self, accelerator: Any, name: str, place: Path) -> None:
        """Connect nobody yet.

        Args:
            accelerator: the trainer's.
            name: the client's.
            place: the site's folder.
        """
        self.is_main: bool = accelerator.is_main_process
        self._name, self._place = name, place
        self._count: int = accelerator.num_processes
        self._others: list[Connection] = []

    def __enter__(self) -> Processes:
        """Connect the main process with the others."""
        if self._count == 1:
            return self
        from accelerate.utils import gather_object

        # In a folder of its own, which only this user may enter.
        folder = Path(tempfile.mkdtemp(prefix="hedgerow-"))
        try:
            with Listener(str(folder / "socket"), family="AF_UNIX") as listener:
                addresses = gather_object([str(listener.address)])
                if self.is_main:
                    self._others = [Client(each, family="AF_UNIX") for each in addresses[1:]]
                else:
                    self._others = [listener.accept()]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for connection in self._others:
            connection.close()

    def join_in(self, app: Path, run: str, date: datetime.date | None) -> None:
        """In the main process, before it trains: have the others train, too.

        Args:
            app: the Flower app's folder.
            run: the run's name.
            date: day that its chat template writes.

        Raises:
            RunFailed: one of them has ended.
        """
        try:
            self._send(_Next(app=app, run=run, date=date))
        except OSError:
            raise RunFailed(f"{self._name}: one of its processes has ended") from None

    def end(self, place: Path) -> None:
        """In the main process: the run is over, and its directory is `place`."""
        with contextlib.suppress(OSError):
            self._send(_Next(place=place))

    def _send(self, what: _Next) -> None:
        for connection in self._others:
            connection.send_bytes(what.model_dump_json().encode())

    def follow(self, script: Script) -> Path:
        """In another process: train whenever the main one does; returns the run's directory.

        Raises:
            RunFailed: the main process has ended.
        """
        from hedgerow.engines.flower.site import Site, of_script

        (main,) = self._others
        site: Site | None = None
        app: Path | None = None
        while True:
            try:
                asked = _Next.model_validate_json(main.recv_bytes())
            except (EOFError, OSError):
                raise RunFailed(f"{self._name}: its main process has ended") from None
            if asked.place is not None:
                return asked.place
            if site is None or asked.app != app:
                assert asked.app is not None
                site, app = of_script(asked.app, self._name, self._place, script), asked.app
            with contextlib.suppress(ClientFailed):  # which the main process says
                site.follow(self._name, asked.run, asked.date)
