"""A codec: values to the tensors of a message, and back; what is lost on the way is its error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from hedgerow.methods.parts.values import Shapes, Values, sizes_of
from hedgerow.plugins import Plugin, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.wire import Kind


class Codec(Plugin, ABC):
    """How values are written into a message: its fields are options in the experiment file."""

    section = ("method", "up")

    @property
    def rotates(self) -> bool:
        """Whether it draws random rotations, whose seed then travels beside what it makes."""
        return False

    @property
    @abstractmethod
    def error(self) -> float:
        """Mean squared error, in units of the squared length of what is encoded."""

    @abstractmethod
    def encode(self, values: Values, seed: int) -> dict[str, Tensor]:
        """Encode values, as tensors on the CPU.

        Args:
            values: as they are.
            seed: of its rotations, where it has some.

        Raises:
            ValueError: a value is not finite.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], shapes: Shapes, seed: int) -> Values:
        """Values in float32 again, each when it is asked for; `check` has passed the tensors."""

    @abstractmethod
    def kinds(self, shapes: Shapes, given: Mapping[str, Kind]) -> dict[str, Kind]:
        """Kinds of what `encode` makes of values of these shapes.

        Args:
            shapes: of the values.
            given: kinds of what has arrived, for a tensor whose length depends on the values; its
                kind is then the nearest possible one.
        """

    def load_kernels(self) -> None:
        """Load compiled kernels that `encode` needs, which clients' processes would each load.

        By default there are none.
        """

    def nbytes(self, shapes: Shapes) -> int:
        """Bytes of what `encode` makes of values of these shapes, but for what depends on them."""
        return sum(kind.nbytes for kind in self.kinds(shapes, {}).values())

    def encoding_holds(self, shapes: Shapes) -> int:
        """Bytes that `encode` holds at a time, at most, beside what it makes.

        By default those of the largest value.
        """
        return 4 * max(sizes_of(shapes))

    def decoding_holds(self, shapes: Shapes) -> int:
        """Bytes that iterating over what `decode` returns holds at a time, at most.

        By default those of the largest value.
        """
        return 4 * max(sizes_of(shapes))

    def between_holds(self, shapes: Shapes) -> int:
        """Bytes that iterating over what `decode` returns holds from one value to the next.

        By default none.
        """
        return 0

    def check(self, tensors: Mapping[str, Tensor], shapes: Shapes) -> None:
        """Raise `InvalidMessage` unless `encode` makes such tensors, which are of its `kinds`.

        Args:
            tensors: as they arrived.
            shapes: of the values.
        """


CODECS: Registry[Codec] = Registry(
    "codec", Codec, "hedgerow.methods.parts", see="hedgerow explain method.up"
)
"""Every codec by the name that the experiment file uses, installed plug-ins included."""


def _codec_of(given: Any) -> Any:
    unnamed = "a codec needs a name, as in {name: top_k, k: 64}; see `hedgerow explain`"
    return CODECS.chosen(given, "method.up", unnamed)


ChosenCodec = Annotated[SerializeAsAny[Codec] | None, BeforeValidator(_codec_of)]
"""Option that is a codec, by its name or with options; null is none."""
