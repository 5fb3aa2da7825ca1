"""Memory of a client, or of the server, from round to round, on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.files import replacing
from hedgerow.wire import FileTensors, to_safetensors

if TYPE_CHECKING:
    from torch import Tensor


class RoundMemory:
    """Memory of a client, or of the server: a file for each round, of which the latest two stay.

    A run that is resumed at an earlier round than the file's finds the one before it.
    """

    def __init__(self, folder: Path, round: int) -> None:
        self._folder, self._round = folder, round

    def load(self) -> Mapping[str, Tensor]:
        """Tensors of the last round before this one, by name, each read when it is asked for.

        Raises:
            UserError: its file is damaged.
        """
        latest = self._latest()
        if latest is None:
            return {}
        try:
            return FileTensors(latest)
        except (InvalidMessage, OSError) as error:
            raise UserError(f"{latest} is damaged ({error}): restore it from a copy") from None

    def check(self, since: int) -> None:
        """Raise a `UserError` unless there are tensors of round `since` (0: no round) or later."""
        latest = self._latest()
        if since and (latest is None or int(latest.stem) < since):
            raise UserError(
                f"{self._folder} lacks the tensors that were saved in round {since}, without "
                "which the run would go on as another: restore it from a copy, or begin anew "
                "with another --out"
            )
        self.load()

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Save tensors of this round; files of later rounds are removed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._folder / f"{self._round:04d}.safetensors") as file:
            for part in to_safetensors(tensors, {}):
                file.write(part)
        for path in self._files():
            if int(path.stem) > self._round:
                path.unlink()
        for path in self._files()[:-2]:
            path.unlink()

    def _latest(self) -> Path | None:
        """The file of the last round before this one."""
        earlier = [path for path in self._files() if int(path.stem) < self._round]
        return earlier[-1] if earlier else None

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.safetensors"), key=lambda path: int(path.stem))
