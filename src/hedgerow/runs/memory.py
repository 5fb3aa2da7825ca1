"""Memory of a client, or of the server, from round to round, on disk."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.files import replacing
from hedgerow.wire import FileTensors, check_equal, to_safetensors

if TYPE_CHECKING:
    from torch import Tensor

_FILE = re.compile(r"[0-9]{4,}\.safetensors")
"""Name of a round's file; whatever else lies beside them is nobody's memory."""


class RoundMemory:
    """Memory of a client, or of the server: a file for each round, of which the latest stay.

    What was saved in a round that did not count, as that of a client whose update was lost, is not
    loaded: what its update had sent would be taken as received. Neither is what was saved in
    another history of the run, as before it was rolled back. Beside the last round that counts the
    latest two stay, so that a run that is resumed at an earlier round finds that round's; or more,
    where earlier rounds are needed, too.

    A file says whose it is, of which round, from which entry that began, and the SHA-256 of all
    that and of its tensors. Those of earlier versions do not, and are believed.
    """

    def __init__(
        self,
        folder: Path,
        round: int,
        counts: Callable[[int], bool] = lambda _: True,
        parent: Callable[[int], str] | None = None,
        *,
        stay: int = 2,
        is_secret: bool = False,
    ) -> None:
        """The memory in a round.

        Args:
            folder: of its files, called as whoever remembers.
            round: from 1.
            counts: whether an earlier round counts for whom the memory belongs to.
            parent: hash of the entry that a round begins from, by the ledger; None does not ask.
            stay: number of the latest files that stay.
            is_secret: whether nobody but their owner may read them.
        """
        self._folder, self._round = folder, round
        self._counts, self._parent = counts, parent
        self._stay, self._is_secret = stay, is_secret
        self._loaded: Mapping[str, Tensor] | None = None

    def load(self) -> Mapping[str, Tensor]:
        """Tensors of the last round that counts before this one, each read when it is asked for.

        Raises:
            UserError: its file is damaged, or is another's or another round's.
        """
        if self._loaded is None:  # once, since all of the file is read to be checked
            self._loaded = self._checked()
        return self._loaded

    def _checked(self) -> Mapping[str, Tensor]:
        latest = self._latest()
        if latest is None:
            return {}
        try:
            tensors = FileTensors(latest)
            if "sha256" in tensors.metadata:
                stamp = self._stamp(tensors, int(latest.stem), tensors.metadata.get("parent"))
                check_equal(tensors.metadata, stamp)
        except (InvalidMessage, OSError) as error:
            raise UserError(f"{latest} is damaged ({error}): restore it from a copy") from None
        return tensors

    def _stamp(
        self, tensors: Mapping[str, Tensor], round: int, parent: str | None
    ) -> dict[str, str]:
        """What a file of these tensors says of itself."""
        said = {"owner": self._folder.name, "round": str(round)}
        if parent is not None:
            said["parent"] = parent
        digest = hashlib.sha256()
        for part in to_safetensors(tensors, said):
            digest.update(part)
        return {**said, "sha256": digest.hexdigest()}

    def check(self, since: int) -> None:
        """Raise a `UserError` unless there are tensors of round `since` (0: no round) or later."""
        if self.lacks(since):
            file = self._folder / f"{since:04d}.safetensors"
            if file.is_file():
                raise UserError(
                    f"{file} is of another history of the run: it was not made from the entry "
                    f"that round {since} of the ledger began from; restore it from a copy"
                )
            raise UserError(
                f"{self._folder} lacks the tensors that were saved in round {since}, without "
                "which the run would go on as another: restore it from a copy, begin anew with "
                "another --out, or see `hedgerow ledger rollback`"
            )
        self.load()

    def lacks(self, since: int) -> bool:
        """Whether there are no tensors of round `since` (0: no round) or later that count."""
        latest = self._latest()
        return since > 0 and (latest is None or int(latest.stem) < since)

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Save tensors of this round; files of later rounds are removed."""
        self._folder.mkdir(mode=0o700 if self._is_secret else 0o777, parents=True, exist_ok=True)
        parent = None if self._parent is None else self._parent(self._round)
        with replacing(self._folder / f"{self._round:04d}.safetensors") as file:
            for part in to_safetensors(tensors, self._stamp(tensors, self._round, parent)):
                file.write(part)
        self.remove_later()
        latest = self._latest()
        for path in self._files()[: -self._stay]:
            if path != latest:
                path.unlink()

    def remove_later(self) -> None:
        """Remove the files of rounds after this one."""
        for path in self._files():
            if int(path.stem) > self._round:
                path.unlink()

    def _latest(self) -> Path | None:
        """The file of the last round that counts before this one."""
        for path in reversed(self._files()):
            round = int(path.stem)
            if round < self._round and self._counts(round) and self._fits(path, round):
                return path
        return None

    def _fits(self, path: Path, round: int) -> bool:
        """Whether a file does not say that it was made from another entry than the ledger's."""
        if self._parent is None:
            return True
        try:
            said = FileTensors(path).metadata
        except (InvalidMessage, OSError):
            return True  # that it is damaged is said when it is loaded; as is another round
        return said.get("round") != str(round) or said.get("parent") in (None, self._parent(round))

    def _files(self) -> list[Path]:
        found = [path for path in self._folder.glob("*.safetensors") if _FILE.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.stem))
