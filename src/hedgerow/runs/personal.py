"""The models of a run: the global one, and each client's own, made of what the client keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hedgerow.errors import UserError, which_client
from hedgerow.ledger import Ledger
from hedgerow.methods.base import Method
from hedgerow.model import Model
from hedgerow.runs.memory import RoundMemory
from hedgerow.wire import Entry

if TYPE_CHECKING:
    from torch import Tensor

CLIENTS = "clients"
"""Folder of the clients' memories in a run's directory."""


class RunModels:
    """The models of a run after a round.

    A client's own model is the global one and what the client keeps in its memory, which lies where
    the client trains: in the run's directory of one process, or at the client's site.
    """

    def __init__(
        self, method: Method, ledger: Ledger, round: int, clients: Path | None = None
    ) -> None:
        """Read nothing yet.

        Args:
            method: the run's.
            ledger: the run's, which knows who took part in which round.
            round: number of the round that the models are of.
            clients: folder of the clients' memories; None for that beside the ledger.
        """
        self._method, self._ledger, self._round = method, ledger, round
        self._clients = clients or ledger.folder.parent / CLIENTS

    def models(self, model: Model, clients: Sequence[str]) -> Iterator[str | None]:
        """Put one model after another into `model`, which is at the round, for the caller to use.

        Args:
            model: the global one.
            clients: those whose own models are meant; none for the global one.

        Yields:
            The client's name; None for the global model.

        Raises:
            UserError: a client's memory is not here.
        """
        if not self._method.personal or not clients:
            yield from self._method.models(model, clients)
            return
        for name in clients:
            with self._personalized(model, name):
                for _ in self._method.models(model, []):
                    yield name

    def of_client(self, model: Model, client: str) -> Iterator[None]:
        """Put the model that a client has into `model`: its own, or the global one."""
        shared = self._method.has_global_model and not self._method.personal
        for _ in self.models(model, [] if shared else [client]):
            yield

    def merge(self, model: Model, client: str | None) -> None:
        """Put a client's model, or the global one, into the weights of `model`; as `Method.merge`.

        Raises:
            UserError: the client's memory is not here, or it is not said whose model is meant.
        """
        if self._is_own(client):
            with self._personalized(model, client):
                self._method.merge(model, None)
        else:
            self._method.merge(model, client)

    def adapter(self, client: str | None, load_model: Callable[[], Model]) -> dict[str, Tensor]:
        """Adapter of a client's model, or of the global one; as `Method.adapter`.

        Raises:
            UserError: as `merge`, or the method makes no adapters.
        """
        entries: Iterable[Entry] = self._ledger.entries(self._round)
        if not self._is_own(client):
            return self._method.adapter(entries, client, load_model)
        model = load_model()
        with self._personalized(model, client):
            return self._method.adapter(entries, None, lambda: model)

    def _is_own(self, client: str | None) -> bool:
        """Whether a client's own model is meant, of a method whose clients keep some of it."""
        if not self._method.personal:
            return False
        if client is None and not self._method.has_global_model:
            raise which_client(f"a {self._method.name} run", self._ledger.clients(self._round))
        return client is not None

    @contextmanager
    def _personalized(self, model: Model, client: str | None) -> Iterator[None]:
        assert client is not None
        with self._method.personalized(model, self._kept(client)):
            yield

    def _kept(self, client: str) -> Mapping[str, Tensor]:
        """What a client kept of the last round that it took part in; nothing before its first.

        Raises:
            UserError: its file is not here.
        """
        folder = self._clients / client
        for round in range(self._round, 0, -1):
            is_here = (folder / f"{round:04d}.safetensors").is_file()
            # At some sites the entries that say who took part are not kept.
            has_entry = self._ledger.has(round)
            if has_entry and self._ledger.names_all(round):
                if not is_here:
                    continue
                # Nobody is told whether the client took part since: the last that it kept counts.
                return RoundMemory(folder, round + 1, parent=self._ledger.parent).load()
            if not (self._ledger.took_part(client, round) if has_entry else is_here):
                continue
            if not is_here:
                raise UserError(
                    f"client {client}: {folder} has nothing of round {round}, without which its "
                    "model cannot be made: what a client keeps lies where it trains, of the last "
                    "two rounds; run this there, on one of them"
                )
            memory = RoundMemory(folder, round + 1, parent=self._ledger.parent)
            memory.check(since=round)
            return memory.load()
        return {}
