"""Tensors by name that are made one by one, as often as somebody asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, Sequence[int]]
"""Shape of each tensor, by name, in the order in which they come."""


def sizes_of(shapes: Shapes) -> list[int]:
    """Number of entries of each tensor."""
    return [math.prod(shape) for shape in shapes.values()]


@dataclass(frozen=True)
class Values:
    """Tensors in float32 that are never all in memory, unless their maker has them there."""

    shapes: Shapes
    make: Callable[[], Iterator[tuple[str, Tensor]]]
    """Begins anew with each call; what it yields is the caller's to change."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each, in the order of `shapes`."""
        return self.make()

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Values:
        """The values with each tensor changed to one of the same shape."""
        return Values(self.shapes, lambda: ((name, change(name, each)) for name, each in self))
