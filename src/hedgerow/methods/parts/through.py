"""What passes through the server: a linear map, under which updates add and which all can undo."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from hedgerow.methods.parts.codec import Codec
from hedgerow.methods.parts.message import Message
from hedgerow.methods.parts.values import Shapes, Values, sizes_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hedgerow.wire import Kind

Basis = tuple[int, ...]
"""Which bases values are coordinates on: those on equal ones add."""


class Piece(NamedTuple):
    """Values, and the tensors that say which bases they are on."""

    header: Mapping[str, Tensor]
    values: Values

    def times(self, factor: float) -> Piece:
        """The piece with its values times a factor."""
        return self._replace(values=self.values.mapped(lambda _, each: each * factor))


class Through(ABC):
    """A linear map of an update's values."""

    adds: ClassVar[bool] = True
    """Whether the server adds updates on equal bases; else each stays a piece of its own."""
    is_dense: ClassVar[bool] = False
    """Whether the server has the sum of the changes themselves at hand, and can step along it."""
    is_fixed: ClassVar[bool] = False
    """Whether it is the same map in every round."""

    @property
    def is_one_sum(self) -> bool:
        """Whether a broadcast is made from nothing of a round's updates but one sum."""
        return self.adds

    @abstractmethod
    def common(self, shapes: Shapes, message: Message) -> Mapping[str, Tensor]:
        """Header that all updates of a round share, where `is_one_sum`, but for codecs' seeds."""

    @abstractmethod
    def encode(self, change: Values, message: Message, codec: Codec) -> Piece:
        """Map a client's change; `codec` is what the mapped values are written with."""

    @abstractmethod
    def decode(
        self, pieces: Sequence[Piece], shapes: Shapes, device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Undo the map of the sum of all pieces, tensor by tensor."""

    @abstractmethod
    def errors(self, mapped: Shapes, shapes: Shapes, codec: Codec) -> dict[str, float]:
        """Expected squared error ω of each mapped value, relative to what it was mapped from.

        Args:
            mapped: shapes of the mapped values.
            shapes: of what was mapped.
            codec: what the mapped values are written with.
        """

    @abstractmethod
    def seed(self, header: Mapping[str, Tensor]) -> int:
        """Seed that the codec's randomness derives from; 0 where it has none."""

    @abstractmethod
    def basis(self, header: Mapping[str, Tensor]) -> Basis:
        """Which bases these are."""

    @abstractmethod
    def mapped_shapes(self, header: Mapping[str, Tensor], shapes: Shapes) -> Shapes:
        """Shapes of the mapped values."""

    @abstractmethod
    def check_update(
        self, tensors: Mapping[str, Tensor], shapes: Shapes, message: Message, codec: Codec
    ) -> dict[str, Kind]:
        """Kinds of an update's header, which is the one that `encode` makes for this message.

        Raises:
            InvalidMessage: it is another, or is missing.
        """

    @abstractmethod
    def broadcast(
        self, basis: Basis, shapes: Shapes, message: Message, codec: Codec
    ) -> dict[str, Tensor]:
        """Header of summed values of these shapes in the server's message."""

    @abstractmethod
    def pieces(self, tensors: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """Tensors of each piece of an entry, without the piece's prefix."""

    @abstractmethod
    def check_entry(
        self, tensors: Mapping[str, Tensor], shapes: Shapes, clients: int, codec: Codec
    ) -> dict[str, dict[str, Kind]]:
        """Kinds of the headers of an entry's pieces, by their prefixes.

        Raises:
            InvalidMessage: so many clients' updates do not add up to such pieces.
        """

    @abstractmethod
    def check_seeds(
        self, tensors: Mapping[str, Tensor], message: Message, clients: Sequence[str], codec: Codec
    ) -> None:
        """Raise `InvalidMessage` unless an entry's pieces have the seeds that the run derives.

        Args:
            tensors: of the entry, which `check_entry` has passed.
            message: the server's.
            clients: names of those whose updates it has, in their order.
            codec: what the mapped values are written with.
        """

    def encoding_holds(self, shapes: Shapes) -> int:
        """Bytes that the mapped values take at a time, at most, while they are made; by default
        those of the largest."""
        return 4 * max(sizes_of(shapes))

    def prefix(self, index: int) -> str:
        """Prefix of the names of an entry's piece."""
        return ""
