"""Some of a message's tensors by other names, none of which is read for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

_T = TypeVar("_T")


class Renamed(Mapping[str, _T]):
    """Tensors that are each read when they are asked for."""

    def __init__(self, tensors: Mapping[str, _T], keys: Mapping[str, str]) -> None:
        """Rename.

        Args:
            tensors: by their names.
            keys: name of each by its new name.
        """
        self._tensors, self._keys = tensors, keys

    def __getitem__(self, name: str) -> _T:
        return self._tensors[self._keys[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def below(tensors: Mapping[str, _T], prefix: str) -> Renamed[_T]:
    """Those whose names begin with a prefix, without it."""
    keys = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
    return Renamed(tensors, keys)
