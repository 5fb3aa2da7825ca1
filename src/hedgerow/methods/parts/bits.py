"""Values in few bits: randomly rotated, and rounded to the levels of a uniform quantizer.

EDEN, Vargaftik et al., arXiv 2108.08842, section 3, with a randomised Hadamard transform for the
rotation: unbiased over rotations. See `hedgerow.sketch.coordinates`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from hedgerow.lazy import torch
from hedgerow.methods.parts.codec import Codec
from hedgerow.methods.parts.values import Shapes, Values, sizes_of
from hedgerow.sketch.coordinates import ERROR, Bits, Packed, lengths, nbytes, pack
from hedgerow.wire import Kind

if TYPE_CHECKING:
    from torch import Tensor


class FewBits(Codec):
    """Rotation and rounding: 1, 2, 4 or 8 bits a number, and a scale for each few thousand."""

    name: str = "bits"

    bits: Bits = 1
    """Number of bits of a number; 32 sends it as it is."""

    @property
    def rotates(self) -> bool:
        """Yes."""
        return True

    @property
    def error(self) -> float:
        """Mean squared error over rotations, relative: 0.57 for 1 bit, 0.13 for 2, 0.012 for 4."""
        return ERROR[self.bits]

    def encode(self, values: Values, seed: int) -> dict[str, Tensor]:
        """Codes and scales of all values together."""
        packed = pack((each.reshape(-1) for _, each in values), self.bits, seed)
        del packed["counts"]  # the reader has the shapes
        return packed

    def decode(self, tensors: Mapping[str, Tensor], shapes: Shapes, seed: int) -> Values:
        """Unpack and rotate back one value at a time."""
        counts = torch.tensor(sizes_of(shapes), dtype=torch.int32)
        own = {name: tensors[name] for name in lengths([], self.bits)}
        packed = Packed({"counts": counts, **own}, self.bits, seed)

        def each() -> Iterator[tuple[str, Tensor]]:
            for index, (name, shape) in enumerate(shapes.items()):
                yield name, packed[index].view(tuple(shape))

        return Values(shapes, each)

    def kinds(self, shapes: Shapes, given: Mapping[str, Kind]) -> dict[str, Kind]:
        """Codes and scales, or coordinates in float32."""
        parts = lengths(sizes_of(shapes), self.bits)
        return {name: Kind(dtype, (sum(each),)) for name, (dtype, each) in parts.items()}

    def nbytes_of(self, size: int) -> int:
        """Bytes of a value of so many numbers."""
        return nbytes(size, self.bits)

    def encoding_holds(self, shapes: Shapes) -> int:
        """A value, and its rotation."""
        return (4 if self.bits == 32 else 2 * 4) * max(sizes_of(shapes))

    def decoding_holds(self, shapes: Shapes) -> int:
        """A value, and its rotation."""
        return (4 if self.bits == 32 else 2 * 4) * max(sizes_of(shapes))
