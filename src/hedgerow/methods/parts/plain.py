"""Values as they are: each tensor in float32, under its own name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hedgerow.methods.parts.codec import Codec
from hedgerow.methods.parts.values import Shapes, Values
from hedgerow.wire import in_float32

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.wire import Kind


class Plain(Codec):
    """No coding: nothing is lost."""

    name: str = "plain"

    @property
    def error(self) -> float:
        """None."""
        return 0.0

    def encode(self, values: Values, seed: int) -> dict[str, Tensor]:
        """The values; that they are finite is checked when an update is."""
        return {name: each.cpu() for name, each in values}

    def decode(self, tensors: Mapping[str, Tensor], shapes: Shapes, seed: int) -> Values:
        """The tensors."""
        return Values(shapes, lambda: ((name, tensors[name]) for name in shapes))

    def encoding_holds(self, shapes: Shapes) -> int:
        """Nothing beside the values, which are what it makes."""
        return 0

    def decoding_holds(self, shapes: Shapes) -> int:
        """Nothing beside what is read."""
        return 0

    def kinds(self, shapes: Shapes, given: Mapping[str, Kind]) -> dict[str, Kind]:
        """One of float32 for each value."""
        return in_float32(shapes)
