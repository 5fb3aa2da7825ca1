"""What a client, or the server, keeps from round to round, on disk."""

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
    """What a client, or the server, keeps from round to round: a file each, the latest two of them.

    A run that is resumed at an earlier round than the file's finds the one before it.
    """

    def __init__(self, folder: Path, round: int) -> None:
        self._folder, self._round = folder, round

    def load(self) -> Mapping[str, Tensor]:
        """What was kept in the last round before this one.

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
        """Raise a `UserError` unless there is what was kept in round `since` (0: none) or later."""
        latest = self._latest()
        if since and (latest is None or int(latest.stem) < since):
            raise UserError(
                f"{self._folder} lacks what was kept in round {since}, without which the run would "
                "go on as another: restore it from a copy, or begin anew with another --out"
            )
        self.load()

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors of this round."""
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
