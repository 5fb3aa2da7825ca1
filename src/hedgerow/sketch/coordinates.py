"""Coordinates as they travel: by block, in few bits.

At equal bytes, more coordinates of one bit are far better than fewer of 32. Before they are rounded
they are rotated (random signs and a Walsh–Hadamard transform: a sketch that keeps every row), which
makes the numbers of a group nearly normal and of one size, wherever in the model they come from.
Rounded to the levels of the best uniform quantizer and scaled by ‖γ‖²/⟨γ, q⟩ they are unbiased over
rotations (EDEN, Vargaftik et al., arXiv 2108.08842, section 3, for uniform rotations; this one
comes close), with a mean squared error of π/2 - 1 = 0.57 of ‖γ‖² for 1 bit, 0.13 for 2, 0.012 for
4. A 1/32 of the bytes is then an error of 0.57 instead of 31.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args, overload

import numpy as np

from hedgerow.lazy import torch
from hedgerow.sketch import layout, project, reconstruct

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Bits = Literal[1, 2, 4, 8, 32]
BITS: tuple[Bits, ...] = get_args(Bits)

SMALLEST_GROUP = 256
"""Numbers that are worth a scale of their own; what is left after longer segments shares one."""

ERROR = {1: 0.571, 2: 0.134, 4: 0.0117, 8: 0.0001, 32: 0.0}
"""The mean squared error that rounding to so many bits adds, relative to ‖γ‖²."""

_PIECE = 32 * layout.TILE
"""Numbers that are rounded at a time: in float64, as many as a core's own cache holds."""

_STEP = {1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.0308}
"""Between the levels of the best uniform quantizer of a normal variable (Max, 1960)."""


class Quantized(NamedTuple):
    """Coordinates in few bits."""

    codes: Tensor
    """Levels, uint8: 8/bits numbers in a byte, the first in its lowest bits."""
    scales: Tensor
    """Factors of the groups' levels, float32."""


def quantize(coordinates: Tensor, bits: Bits, seed: int) -> Quantized:
    """Rotate, and round to 2ᵇⁱᵗˢ levels.

    Args:
        coordinates: shape (k,).
        bits: 1, 2, 4 or 8.
        seed: of the rotation.

    Raises:
        ValueError: a coordinate is not finite.
    """
    from hedgerow.sketch import cpu  # which loads a compiler

    gamma = project(coordinates, seed, len(coordinates)).cpu().numpy()

    def rounded(piece: tuple[int, int]) -> Quantized:
        own = gamma[slice(*piece)]
        levels, scales = cpu.round_groups(own, groups(len(own)), _STEP[bits], bits)
        return Quantized(torch.from_numpy(_packed(levels, bits)), torch.from_numpy(scales))

    # No group is in two pieces, and no byte.
    pieces = cpu.in_threads(rounded, len(gamma), _PIECE)
    return Quantized(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _packed(levels: NDArray[np.uint8], bits: Bits) -> NDArray[np.uint8]:
    """Levels as they travel, 8/bits of them in a byte."""
    codes, width = np.pad(levels, (0, -len(levels) % (8 // bits))), int(bits)
    while width < 8:  # neighbours move together, two and two
        pairs = codes.view("<u2")
        codes, width = (pairs | pairs >> (8 - width)).astype(np.uint8), 2 * width
    return codes


def dequantize(quantized: Quantized, bits: Bits, k: int, seed: int) -> Tensor:
    """Coordinates from their codes and scales: float32 of shape (k,), on the CPU."""
    from hedgerow.sketch import cpu  # which loads a compiler

    gamma = torch.empty(k)
    codes, scales = quantized.codes.numpy(), quantized.scales.numpy()

    def spread(piece: tuple[int, int]) -> None:
        start, stop = piece
        own = codes[num_codes(start, bits) : num_codes(stop, bits)]
        lengths = groups(stop - start)
        scale = scales[num_groups(start) :][: len(lengths)]
        cpu.read_groups(own, scale, lengths, bits, gamma.numpy()[start:stop])

    for _ in cpu.in_threads(spread, k, _PIECE):
        pass
    return reconstruct(gamma, seed, k)


def groups(k: int) -> NDArray[np.int64]:
    """Sizes of the groups of k numbers that share a scale: those that were rotated together."""
    own = [length for _, length in layout.segments(k) if length >= SMALLEST_GROUP]
    lengths = [layout.TILE] * (k // layout.TILE) + own
    rest = k - sum(lengths)
    return np.array(lengths + ([rest] if rest else []))


def num_groups(k: int) -> int:
    """`len(groups(k))` by arithmetic, since a count that a stranger has made up may be huge."""
    whole, rest = divmod(k, layout.TILE)
    return whole + (rest // SMALLEST_GROUP).bit_count() + bool(rest % SMALLEST_GROUP)


def num_codes(k: int, bits: Bits) -> int:
    """Number of bytes of the codes of k coordinates."""
    return -(-k * bits // 8)


def nbytes(k: int, bits: Bits) -> int:
    """Bytes of k coordinates of one block: codes and scales, or float32 numbers."""
    return 4 * k if bits == 32 else num_codes(k, bits) + 4 * num_groups(k)


def lengths(counts: Sequence[int], bits: Bits) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Types and sizes of what `pack` makes of so many coordinates by block, beside `counts`.

    Returns:
        By name: the type of a tensor, and how much of it each block has.
    """
    if bits == 32:
        return {"coordinates": (torch.float32, list(counts))}
    return {
        "codes": (torch.uint8, [num_codes(k, bits) for k in counts]),
        "scales": (torch.float32, [num_groups(k) for k in counts]),
    }


def pack(coordinates: Iterable[Tensor], bits: Bits, seed: int) -> dict[str, Tensor]:
    """Pack the coordinates of all blocks into a few tensors.

    Args:
        coordinates: γ_l of each block, shape (K_l,); each is asked for when the last is packed.
        bits: of a coordinate; 32 keeps it as it is.
        seed: of the rotations, `seed + l` for block l.

    Raises:
        ValueError: a coordinate is not finite.
    """
    counts: list[int] = []
    parts: list[tuple[Tensor, ...]] = []
    for index, gamma in enumerate(coordinates):
        counts.append(len(gamma))
        if bits < 32:
            parts.append(quantize(gamma, bits, (seed + index) % 2**64))
        elif gamma.isfinite().all():
            parts.append((gamma.float().cpu(),))
        else:
            raise ValueError("coordinates must be finite")
    joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    names = ("coordinates",) if bits == 32 else ("codes", "scales")
    tensors = dict(zip(names, joined, strict=True))
    return {"counts": torch.tensor(counts, dtype=torch.int32), **tensors}


class Packed(Sequence["Tensor"]):
    """Coordinates of each block, unpacked from what `pack` has made when they are asked for.

    Args:
        tensors: from `pack`, with the same `bits` and `seed`.

    Raises:
        ValueError: the tensors are not what `pack` makes with these bits.
    """

    def __init__(self, tensors: Mapping[str, Tensor], bits: Bits, seed: int) -> None:
        expected = {"counts", *lengths([], bits)}
        if set(tensors) != expected:
            raise ValueError(f"expected tensors {sorted(expected)}, got {sorted(tensors)}")
        counts = tensors["counts"]
        if counts.dtype != torch.int32 or counts.dim() != 1 or not len(counts) or counts.min() < 1:
            raise ValueError("counts must be positive numbers of dtype int32, one for each block")
        self.counts: list[int] = counts.tolist()
        self._bits, self._seed = bits, seed
        self._parts = []
        for name, (dtype, parts) in lengths(self.counts, bits).items():
            tensor = tensors[name]
            if tensor.dtype != dtype or tensor.shape != (sum(parts),):
                raise ValueError(f"{name} must be {sum(parts)} numbers of {dtype}")
            self._parts.append(torch.split(tensor, parts))

    def __len__(self) -> int:
        return len(self.counts)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        parts = [part[index] for part in self._parts]
        if self._bits == 32:
            return parts[0]
        seed = (self._seed + index) % 2**64
        return dequantize(Quantized(*parts), self._bits, self.counts[index], seed)
