"""No map: updates are the changes themselves, which all add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from hedgerow.lazy import torch
from hedgerow.methods.parts.codec import Codec
from hedgerow.methods.parts.message import Message, check_derived
from hedgerow.methods.parts.through import Basis, Piece, Through
from hedgerow.methods.parts.values import Shapes, Values
from hedgerow.wire import Kind, kinds, seed_kind

if TYPE_CHECKING:
    from torch import Tensor


class Dense(Through):
    """The identity; the seed of a codec's rotations travels, where it has some."""

    is_dense: ClassVar[bool] = True
    is_fixed: ClassVar[bool] = True

    def common(self, shapes: Shapes, message: Message) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    def encode(self, change: Values, message: Message, codec: Codec) -> Piece:
        """The change."""
        return Piece(self.broadcast((), change.shapes, message, codec), change)

    def decode(
        self, pieces: Sequence[Piece], shapes: Shapes, device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """The values of the one piece that there is."""
        (piece,) = pieces
        for name, each in piece.values:
            yield name, each.to(device)

    def errors(self, mapped: Shapes, shapes: Shapes, codec: Codec) -> dict[str, float]:
        """The codec's."""
        return dict.fromkeys(mapped, codec.error)

    def seed(self, header: Mapping[str, Tensor]) -> int:
        """Seed of the rotations."""
        return int(header["seed"]) if "seed" in header else 0

    def basis(self, header: Mapping[str, Tensor]) -> Basis:
        """The same for all."""
        return ()

    def mapped_shapes(self, header: Mapping[str, Tensor], shapes: Shapes) -> Shapes:
        """The same shapes."""
        return shapes

    def check_update(
        self, tensors: Mapping[str, Tensor], shapes: Shapes, message: Message, codec: Codec
    ) -> dict[str, Kind]:
        """Check for the message's seed."""
        expected = self.broadcast((), shapes, message, codec)
        check_derived(tensors, expected)
        return kinds(expected)

    def broadcast(
        self, basis: Basis, shapes: Shapes, message: Message, codec: Codec
    ) -> dict[str, Tensor]:
        """The seed of the server's own rotations."""
        return {"seed": torch.tensor([message.seed("rotations")])} if codec.rotates else {}

    def pieces(self, tensors: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """All tensors, of one piece."""
        return [tensors]

    def check_entry(
        self, tensors: Mapping[str, Tensor], shapes: Shapes, clients: int, codec: Codec
    ) -> dict[str, dict[str, Kind]]:
        """Check for a seed where there are rotations."""
        return {"": {"seed": seed_kind()} if codec.rotates else {}}

    def check_seeds(
        self, tensors: Mapping[str, Tensor], message: Message, clients: Sequence[str], codec: Codec
    ) -> None:
        """Check for the seed of the server's rotations, where there are some."""
        check_derived(tensors, self.broadcast((), {}, message, codec))
