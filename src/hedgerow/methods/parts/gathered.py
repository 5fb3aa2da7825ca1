"""Every client's update beside the others in the broadcast, as an all-gather does it.

The server rounds nothing anew, everybody weighs and adds, and the broadcast grows with the clients:
for updates that are so small that all of them together are smaller than their mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from hedgerow.errors import InvalidMessage
from hedgerow.methods.parts.codec import Codec
from hedgerow.methods.parts.dense import Dense
from hedgerow.methods.parts.message import Message
from hedgerow.methods.parts.renamed import below
from hedgerow.methods.parts.through import Piece
from hedgerow.methods.parts.values import Shapes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hedgerow.wire import Kind


class Gathered(Dense):
    """The identity, of updates that everybody adds up."""

    adds: ClassVar[bool] = False
    is_dense: ClassVar[bool] = False

    def decode(
        self, pieces: Sequence[Piece], shapes: Shapes, device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Sum of the pieces, tensor by tensor."""
        for together in zip(*(piece.values for piece in pieces), strict=True):
            name, total = together[0]
            total = total.to(device, copy=True)
            for _, each in together[1:]:
                total += each.to(device)
            yield name, total

    def prefix(self, index: int) -> str:
        """Number of the piece."""
        return f"{index}."

    def pieces(self, tensors: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """Tensors of each client."""
        count = len({name.partition(".")[0] for name in tensors})
        return [below(tensors, self.prefix(index)) for index in range(count)]

    def check_entry(
        self, tensors: Mapping[str, Tensor], shapes: Shapes, clients: int, codec: Codec
    ) -> dict[str, dict[str, Kind]]:
        """Check for as many updates as there are clients."""
        numbers = {name.partition(".")[0] for name in tensors}
        if numbers != {str(index) for index in range(clients)}:
            raise InvalidMessage(f"expected the updates of {clients} participants, and no other")
        (header,) = super().check_entry(tensors, shapes, clients, codec).values()
        return {self.prefix(index): header for index in range(clients)}

    def check_seeds(
        self, tensors: Mapping[str, Tensor], message: Message, clients: Sequence[str], codec: Codec
    ) -> None:
        """Check for the seed of each client's own rotations, where there are some."""
        for index, client in enumerate(clients):
            own = below(tensors, self.prefix(index))
            super().check_seeds(own, replace(message, sender=client), clients, codec)
