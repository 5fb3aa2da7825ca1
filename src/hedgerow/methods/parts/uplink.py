"""A client's update: what its change passes through on the way up, and what is owed of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hedgerow.errors import Diverged
from hedgerow.methods.base import Holds, float32_bytes
from hedgerow.methods.parts import feedback, shrink
from hedgerow.methods.parts.codec import Codec
from hedgerow.methods.parts.dense import Dense
from hedgerow.methods.parts.message import Message
from hedgerow.methods.parts.plain import Plain
from hedgerow.methods.parts.through import Piece, Through
from hedgerow.methods.parts.values import Shapes, Values
from hedgerow.wire import Kind, check_kinds, kinds

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hedgerow.methods.base import ClientRound


@dataclass(frozen=True)
class Uplink:
    """A map that everybody undoes, and a codec that the server undoes."""

    through: Through = field(default_factory=Dense)
    codec: Codec = field(default_factory=Plain)
    shrink: shrink.Shrink | None = None
    """How long what is mapped is sent, by its expected error; None: whole, or, with error feedback,
    so short that what is owed stays bounded."""
    feedback: float | None = None
    """Decay of what clients owe; None: there is no error feedback."""

    def encode(
        self, change: Values, client_round: ClientRound, device: torch.device
    ) -> dict[str, Tensor]:
        """Encode a change, and what is owed of earlier ones; what is lost of them is remembered.

        Raises:
            Diverged: the change is not finite.
        """
        kept: Mapping[str, Tensor] = {}
        if self.feedback is not None:
            kept = client_round.memory.load()
            change = feedback.owed(change, kept, self.feedback)
        message = Message(client_round.seeds, client_round.round, client_round.client.name)
        header, mapped = self.through.encode(change, message, self.codec)
        errors = self.through.errors(mapped.shapes, change.shapes, self.codec)
        length = self.shrink or (shrink.whole if self.feedback is None else shrink.contracting)
        lengths = {name: length(error) for name, error in errors.items()}
        if set(lengths.values()) != {1.0}:
            mapped = mapped.mapped(lambda name, each: each * lengths[name])
        try:
            tensors = {**self.codec.encode(mapped, self._seed(header)), **header}
        except ValueError:
            raise Diverged(
                "the update contains NaN or infinity: a lower training.learning_rate may help"
            ) from None
        if self.feedback is not None:
            sent = self.decode(tensors, change.shapes)
            rebuilt = self.through.decode([sent], change.shapes, device)
            # What is trained in turns is owed while it rests.
            resting = [name for name in kept if "/" not in name and name not in change.shapes]
            client_round.remember({name: kept[name] for name in resting})
            client_round.remember(feedback.lost(change, rebuilt))
        return tensors

    def update_holds(self, shapes: Shapes, message: Message) -> Holds:
        """Memory of `encode`, for a change of these shapes."""
        mapped = self.mapped_shapes(shapes, message)
        owed = float32_bytes(shapes) if self.feedback is not None else 0
        work = self.codec.encoding_holds(mapped)
        if not self.through.is_dense:
            work = max(work, self.through.encoding_holds(shapes))
        return Holds(self.codec.nbytes(mapped), sums=owed, work=work)

    def mapped_shapes(self, shapes: Shapes, message: Message) -> Shapes:
        """Shapes of what is coded, where it does not depend on the change."""
        return self.through.mapped_shapes(self.through.common(shapes, message), shapes)

    def decode(self, tensors: Mapping[str, Tensor], shapes: Shapes) -> Piece:
        """The mapped values, with the codec undone."""
        mapped = self.through.mapped_shapes(tensors, shapes)
        return Piece(tensors, self.codec.decode(tensors, mapped, self._seed(tensors)))

    def check(
        self,
        tensors: Mapping[str, Tensor],
        shapes: Shapes,
        message: Message,
        derived: Mapping[str, Kind],
    ) -> None:
        """Raise `InvalidMessage` unless these are an update's tensors.

        Args:
            tensors: as they arrived.
            shapes: of the change.
            message: which one it is.
            derived: kinds of what stands beside it, which the server can make itself.
        """
        given = kinds(tensors)
        header = self.through.check_update(tensors, shapes, message, self.codec)
        mapped = self.through.mapped_shapes(tensors, shapes)
        check_kinds(given, {**self.codec.kinds(mapped, given), **header, **derived})
        self.codec.check(tensors, mapped)

    def _seed(self, header: Mapping[str, Tensor]) -> int:
        """Seed of the rotations before rounding, which are others than the bases."""
        return self.through.seed(header) ^ 1 << 63
