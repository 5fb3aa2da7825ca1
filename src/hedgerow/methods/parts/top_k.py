"""The largest values alone: their places, their signs, and their sizes in few bits.

By tiles as SparseLoCo has it (arXiv 2508.15706: 64 of 4,096, in 2 bits), or of all values together,
as STC (arXiv 1903.02891: signs times the mean size); of the change itself, or of its values in
another orthonormal basis (`transforms`), as DeMo has it. Places are Rice-coded gaps.

After a random rotation, which makes values nearly normal, what is sent is scaled by ‖z‖²/⟨z, q⟩ and
so unbiased over rotations, as EDEN's codes are (arXiv 2108.08842, section 3).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from hedgerow.errors import InvalidMessage
from hedgerow.lazy import torch
from hedgerow.methods.parts import rice
from hedgerow.methods.parts.codec import Codec
from hedgerow.methods.parts.transforms import TRANSFORMS, TransformName
from hedgerow.methods.parts.values import Shapes, Values, sizes_of
from hedgerow.wire import Kind

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


ROTATED_TILE = 1 << 16
"""Values of a rotation among which the largest are sought by `TopK.within`."""


class TopK(Codec):
    """Sparse values: the k largest of each tile, or of all."""

    name: str = "top_k"

    k: int = Field(64, ge=1)
    """Number of values of each `tile` that are sent."""
    tile: int = Field(4096, ge=2)
    """Number of neighbouring values of which the `k` largest are sent; a tensor's last tile may be
    smaller, and sends its share, rounded up."""
    group: Literal["tile", "all"] = "tile"
    """Values among which the largest are sought. `tile`: those of each tile, so that all parts of
    the model move; `all`: those of all tensors together, k/tile of them."""
    bits: Literal[1, 2, 4, 8] = 2
    """Number of bits of each value: a sign, and the number of one of 2ᵇⁱᵗˢ⁻¹ sizes; with 1 bit all
    values of a tensor have their mean size."""
    transform: TransformName | None = None
    """Orthonormal basis in which the largest values are sought: `hadamard`, a random rotation of
    each tensor, after which what is sent is unbiased; `dct`, a cosine transform of pieces of up to
    64 × 64 values, tiles of which follow one another; with null, the values are taken as they
    are."""

    @model_validator(mode="after")
    def _fewer(self) -> TopK:
        if self.k >= self.tile:
            raise ValueError(f"`k` ({self.k}) must be below `tile` ({self.tile})")
        return self

    @classmethod
    def within(cls, size: float, bits: Literal[1, 2, 4, 8]) -> TopK:
        """As many of the largest values of random rotations as take so much.

        Args:
            size: bits for each value that there is, sent or not.
            bits: number of bits of each value that is sent.

        Raises:
            ValueError: not one value in 65,536 fits, or more than every second one.
        """

        def needed(k: int) -> float:
            return k / ROTATED_TILE * (bits + rice.expected_bits(k, ROTATED_TILE))

        most = ROTATED_TILE // 2
        k = bisect.bisect_right(range(1, most + 2), size, key=needed)
        if not 1 <= k <= most:
            raise ValueError(f"no such share of values takes {size:g} bits for each that there is")
        return cls(k=k, tile=ROTATED_TILE, bits=bits, transform="hadamard")

    @property
    def rotates(self) -> bool:
        """Whether the transform is random."""
        return self.transform is not None and TRANSFORMS[self.transform].is_random

    @property
    def error(self) -> float:
        """At most the share of the values that are left out, beside the rounding of sizes.

        Where what is sent is unbiased: the share of a normal variable's energy that is lost, in
        units of that which is kept.
        """
        share = self.k / self.tile
        if not self.rotates:
            return 1 - share
        least = NormalDist().inv_cdf(1 - share / 2)
        density = 2 * NormalDist().pdf(least)
        kept = density**2 / share if self.bits == 1 else density * least + share
        return 1 / kept - 1

    def load_kernels(self) -> None:
        """Load the kernel that seeks the largest."""
        from hedgerow.sketch import cpu  # which loads a compiler

        cpu.largest(torch.ones(2), 2, 1)

    def encode(self, values: Values, seed: int) -> dict[str, Tensor]:
        """Places, codes and sizes of the largest values."""
        each = (self._transformed(tensor, seed + i) for i, (_, tensor) in enumerate(values))
        # Tiles are done with one tensor after another; of all, all have to be there.
        chosen = self._of_all(list(each)) if self.group == "all" else map(self._by_tile, each)
        sizes, count, stop = sizes_of(values.shapes), self._count(values.shapes), 0
        places, codes = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.uint8)
        levels: list[NDArray[np.float32]] = []
        sent: list[float] = []
        energies: list[float] = []
        for one, (first, _) in zip(chosen, _spans(sizes), strict=True):
            own = slice(stop, stop := stop + len(one.places))
            np.add(one.places, first, out=places[own])
            level, codes[own] = _quantized(one.values, 2 ** (self.bits - 1))
            levels.append(level)
            if self.rotates:
                sent.append(float(np.square(level[codes[own] >> 1].astype(np.float64)).sum()))
                energies.append(one.energy)
        if self.rotates:
            levels = self._unbiased(levels, sent, energies)
        gaps = rice.encode(places, sum(sizes))
        return {
            "unary": gaps.unary,
            "binary": gaps.binary,
            "codes": torch.from_numpy(_pack(codes, self.bits)),
            "levels": torch.from_numpy(np.concatenate(levels)),
        }

    def decode(self, tensors: Mapping[str, Tensor], shapes: Shapes, seed: int) -> Values:
        """Dense values, zero where none was sent."""
        sizes = sizes_of(shapes)

        def each() -> Iterator[tuple[str, Tensor]]:
            # Unpacked when they are asked for: many updates may wait in their codec.
            places = rice.decode(_gaps(tensors), self._count(shapes), sum(sizes))
            ends = np.searchsorted(places, np.cumsum([0, *sizes]))
            codes = _unpack(tensors["codes"].numpy(), self.bits, len(places))
            levels = tensors["levels"].numpy().reshape(len(sizes), -1)
            for index, ((name, shape), (first, size)) in enumerate(
                zip(shapes.items(), _spans(sizes), strict=True)
            ):
                own = slice(ends[index], ends[index + 1])
                # Without a name, which would keep it until the next is asked for.
                yield (
                    name,
                    self._restored(
                        _dense(places[own] - first, codes[own], levels[index], size),
                        tuple(shape),
                        seed + index,
                    ),
                )

        return Values(shapes, each)

    def kinds(self, shapes: Shapes, given: Mapping[str, Kind]) -> dict[str, Kind]:
        """Kinds of the tensors; of the unary parts there are as many as the places take."""
        count, total = self._count(shapes), sum(sizes_of(shapes))
        unary = given["unary"].shape if "unary" in given else ()
        length = unary[0] if len(unary) == 1 else 0
        length = min(max(length, -(-count // 8)), rice.most_unary(count, total))
        return {
            "unary": Kind(torch.uint8, (length,)),
            "binary": Kind(torch.uint8, (rice.binary_size(count, total),)),
            "codes": Kind(torch.uint8, (-(-count * self.bits // 8),)),
            "levels": Kind(torch.float32, (len(shapes) * 2 ** (self.bits - 1),)),
        }

    def nbytes(self, shapes: Shapes) -> int:
        """Bytes of places, codes and sizes; of the places' unary parts, as many as are expected."""
        count, total = self._count(shapes), sum(sizes_of(shapes))
        places = rice.expected_bits(count, total) * count / 8
        kinds = self.kinds(shapes, {})
        return int(places) + kinds["codes"].nbytes + kinds["levels"].nbytes

    def encoding_holds(self, shapes: Shapes) -> int:
        """A value and its transform, and the places, codes and packed digits of all that travels.

        With `group: all` the transforms of all values, twice, and their sizes.
        """
        sizes = sizes_of(shapes)
        largest = max(sizes)
        pieces = 2 * 8 * min(largest, _PIECE) if self.rotates else 0
        values = 3 * 4 * sum(sizes) if self.group == "all" else 2 * 4 * largest
        return values + pieces + (8 + 1 + max(5, 2 * self.bits)) * self._count(shapes)

    def decoding_holds(self, shapes: Shapes) -> int:
        """A value and its transform, and the places of all that travels, twice, or its codes."""
        return 2 * 4 * max(sizes_of(shapes)) + max(2 * 8, 8 + 2 * self.bits) * self._count(shapes)

    def between_holds(self, shapes: Shapes) -> int:
        """Places and codes of all that travels."""
        return (8 + 1) * self._count(shapes)

    def check(self, tensors: Mapping[str, Tensor], shapes: Shapes) -> None:
        """Check the places, tile by tile."""
        sizes = sizes_of(shapes)
        places = rice.decode(_gaps(tensors), self._count(shapes), sum(sizes))
        if self.group == "tile":
            starts = np.concatenate(
                [first + np.arange(0, size, self.tile) for first, size in _spans(sizes)]
            )
            found = np.bincount(np.searchsorted(starts, places, side="right") - 1)
            if found.tolist() != self._counts(sizes):
                raise InvalidMessage(f"each tile of {self.tile} values must have {self.k} places")
        unused = np.unpackbits(tensors["codes"].numpy(), bitorder="little")
        if unused[len(places) * self.bits :].any():
            raise InvalidMessage("codes must end with zeros")

    def _transformed(self, tensor: Tensor, seed: int) -> Tensor:
        """Values among which the largest are sought, shape (size,), on the CPU; finite."""
        flat = tensor.float()
        if self.transform is not None:
            flat = TRANSFORMS[self.transform].forward(flat, seed % 2**64)
        flat = flat.reshape(-1).cpu()
        if not all(end.isfinite() for end in flat.aminmax()):  # which are NaN where a value is
            raise ValueError("values must be finite")
        return flat

    def _restored(self, values: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
        """The tensor with these values."""
        if self.transform is None:
            return values.view(shape)
        return TRANSFORMS[self.transform].backward(values, shape, seed % 2**64)

    def _unbiased(
        self, levels: list[NDArray[np.float32]], sent: list[float], energies: list[float]
    ) -> list[NDArray[np.float32]]:
        """Sizes times ‖z‖²/⟨z, q⟩, of each tensor, or of all where the largest of all are sent.

        A level is the mean of what it stands for, so that ⟨z, q⟩ is ‖q‖², which is `sent`.
        """
        if self.group == "all":
            sent, energies = [sum(sent)] * len(levels), [sum(energies)] * len(levels)
        return [
            level * np.float32(energy / along) if along else level
            for level, energy, along in zip(levels, energies, sent, strict=True)
        ]

    def _of_all(self, flat: list[Tensor]) -> list[_Chosen]:
        """The largest of all tensors together."""
        from hedgerow.sketch import cpu  # which loads a compiler

        sizes = [len(each) for each in flat]
        whole = torch.cat(flat)
        count = max(1, len(whole) * self.k // self.tile)
        found = cpu.largest(whole, len(whole), count)
        each_own = np.split(found, np.searchsorted(found, np.cumsum(sizes)[:-1]))
        return [
            self._chosen(each, own - first)
            for each, own, (first, _) in zip(flat, each_own, _spans(sizes), strict=True)
        ]

    def _by_tile(self, flat: Tensor) -> _Chosen:
        """The largest of each tile of a tensor."""
        from hedgerow.sketch import cpu  # which loads a compiler

        end = len(flat) // self.tile * self.tile
        places = cpu.largest(flat[:end], self.tile, self.k)
        if rest := len(flat) - end:  # the last tile may be smaller
            own = cpu.largest(flat[end:], rest, self._share(rest)) + end
            places = np.concatenate([places, own])
        return self._chosen(flat, places)

    def _chosen(self, flat: Tensor, places: NDArray[np.int64]) -> _Chosen:
        """The values of a tensor at places, shape (number of places,), ascending."""
        energy = _energy(flat) if self.rotates else 0.0
        return _Chosen(places, flat.numpy()[places], energy)

    def _share(self, size: int) -> int:
        """Number of values that a tile of this size sends."""
        return -(-size * self.k // self.tile)

    def _counts(self, sizes: list[int]) -> list[int]:
        """Number of values that each tile sends."""
        counts = []
        for size in sizes:
            counts += [self.k] * (size // self.tile)
            counts += [self._share(size % self.tile)] if size % self.tile else []
        return counts

    def _count(self, shapes: Shapes) -> int:
        """Number of values that are sent in all."""
        sizes = sizes_of(shapes)
        if self.group == "all":
            return max(1, sum(sizes) * self.k // self.tile)
        return sum(self._counts(sizes))


class _Chosen(NamedTuple):
    """The largest values of one tensor."""

    places: NDArray[np.int64]
    values: NDArray[np.float32]
    energy: float
    """Sum of the squares of all its values, which what is sent is scaled by after a rotation; 0
    where there was none, and nobody asks for it."""


_PIECE = 1 << 22
"""Numbers whose energy is added up at a time."""


def _energy(flat: Tensor) -> float:
    # In pieces, since in float64 all of it would take as much again as it has twice over.
    buffer = torch.empty(min(len(flat), _PIECE), dtype=torch.float64)
    pieces = [(piece, buffer[: len(piece)]) for piece in torch.split(flat, _PIECE)]
    return math.fsum(float(own.copy_(piece).square_().sum()) for piece, own in pieces)


def _dense(
    places: NDArray[np.int64], codes: NDArray[np.uint8], levels: NDArray[np.float32], size: int
) -> Tensor:
    """Values, shape (size,), with those of the codes at the places, and zeros elsewhere."""
    values = torch.zeros(size)
    signs = 1 - 2 * (codes & 1).astype(np.float32)
    values[torch.from_numpy(places)] = torch.from_numpy(levels[codes >> 1] * signs)
    return values


def _quantized(
    values: NDArray[np.float32], count: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Sizes, at most `count` different ones, and for each value its size's number and its sign.

    Bins of one width, each standing for the mean of what is in it; 0 where it is empty.
    """
    sizes = np.abs(values).astype(np.float64)
    low, high = (sizes.min(), sizes.max()) if len(sizes) else (0.0, 0.0)
    width = (high - low) / count
    bins = np.minimum((sizes - low) // width, count - 1) if width > 0 else np.zeros(len(sizes))
    number = bins.astype(np.uint8)
    total = np.bincount(number, weights=sizes, minlength=count)
    level = total / np.maximum(np.bincount(number, minlength=count), 1)
    codes = (number << 1 | np.signbit(values)).astype(np.uint8)
    return level.astype(np.float32), codes


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    digits = codes[:, None] >> np.arange(bits, dtype=np.uint8) & np.uint8(1)
    return np.packbits(digits, bitorder="little")


def _unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    digits = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    codes: NDArray[np.uint8] = (digits << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    return codes


def _gaps(tensors: Mapping[str, Tensor]) -> rice.Gaps:
    return rice.Gaps(tensors["unary"], tensors["binary"])


def _spans(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """First place and size of each tensor."""
    first = 0
    for size in sizes:
        yield first, size
        first += size
