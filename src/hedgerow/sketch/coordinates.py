"""Coordinates as they travel: by block, in few bits.

The coordinates of a rotated vector are nearly normal and of one size, so that one bit each, with
one scale for a group, loses little: the scale ‖γ‖²/⟨γ, q⟩ makes the result unbiased over rotations
(EDEN, Vargaftik et al., arXiv 2108.08842, section 3), at a mean squared error of π/2 - 1 = 0.57 of
‖γ‖² for 1 bit, 0.13 for 2 and 0.012 for 4. At equal bytes that is far better than fewer coordinates
of 32 bits: 1/32 of the bytes is an error of 0.57 instead of 31.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Bits = Literal[1, 2, 4, 8, 32]
BITS: tuple[Bits, ...] = get_args(Bits)

GROUP = 512
"""Neighbouring coordinates that share a scale."""

_STEP = {1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.0308}
"""Between the levels of the best uniform quantizer of a normal variable (Max, 1960)."""


class Quantized(NamedTuple):
    """Coordinates in few bits."""

    codes: Tensor
    """uint8: 8/bits coordinates in a byte, the first in its lowest bits."""
    scales: Tensor
    """float32: what a group's levels are multiplied by."""


def quantize(coordinates: Tensor, bits: Bits) -> Quantized:
    """Quantize to 2ᵇⁱᵗˢ levels.

    Args:
        coordinates: shape (k,), finite.
        bits: 1, 2, 4 or 8.
    """
    k = len(coordinates)
    padded = torch.nn.functional.pad(coordinates.detach().cpu().double(), (0, -k % GROUP))
    gamma = padded.view(-1, GROUP)
    inside = torch.arange(padded.numel()).view(-1, GROUP) < k
    deviation = (gamma.square().sum(1, keepdim=True) / inside.sum(1, keepdim=True)).sqrt()
    most = 2 ** (bits - 1)
    code = torch.floor(gamma / (deviation * _STEP[bits]).clamp_min(1e-300)).clamp_(-most, most - 1)
    level = torch.where(inside, code + 0.5, 0.0)
    along = (gamma * level).sum(1)
    scales = torch.where(along > 0, gamma.square().sum(1) / along.clamp_min(1e-300), 0.0)
    unsigned = (code + most).to(torch.uint8).flatten()[:k]
    per_byte = 8 // bits
    digits = torch.nn.functional.pad(unsigned, (0, -k % per_byte)).view(-1, per_byte)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return Quantized((digits << shifts).sum(1, dtype=torch.uint8), scales.float())


def dequantize(quantized: Quantized, bits: Bits, k: int) -> Tensor:
    """The k coordinates; float32.

    Raises:
        ValueError: there are not as many codes and scales as k coordinates have.
    """
    codes, scales = quantized
    per_byte = 8 // bits
    if codes.shape != (-(-k // per_byte),) or scales.shape != (-(-k // GROUP),):
        raise ValueError(
            f"{list(codes.shape)} codes and {list(scales.shape)} scales are not {k} coordinates"
        )
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    unsigned = (codes[:, None] >> shifts & (2**bits - 1)).flatten()[:k]
    level: Tensor = unsigned.float() - (2 ** (bits - 1) - 0.5)
    return level * scales.repeat_interleave(GROUP)[:k]


def pack(coordinates: Sequence[Tensor], bits: Bits) -> dict[str, Tensor]:
    """The coordinates of all blocks as a few tensors.

    Args:
        coordinates: γ_l of each block, shape (K_l,).
        bits: of a coordinate; 32 keeps it as it is.
    """
    counts = torch.tensor([len(gamma) for gamma in coordinates], dtype=torch.int32)
    if bits == 32:
        return {"counts": counts, "coordinates": torch.cat([g.cpu() for g in coordinates])}
    quantized = [quantize(gamma, bits) for gamma in coordinates]
    return {
        "counts": counts,
        "codes": torch.cat([q.codes for q in quantized]),
        "scales": torch.cat([q.scales for q in quantized]),
    }


def unpack(tensors: Mapping[str, Tensor], bits: Bits) -> list[Tensor]:
    """The inverse of `pack`, up to what the bits have lost.

    Raises:
        ValueError: the tensors are not what `pack` makes with these bits.
    """
    expected = {"counts"} | ({"coordinates"} if bits == 32 else {"codes", "scales"})
    if set(tensors) != expected:
        raise ValueError(f"its tensors are {sorted(tensors)}, not {sorted(expected)}")
    counts = tensors["counts"]
    if counts.dtype != torch.int32 or counts.dim() != 1 or not len(counts) or counts.min() < 1:
        raise ValueError("its counts are not positive numbers, one for each block")
    each = counts.tolist()
    if bits == 32:
        gamma = tensors["coordinates"]
        if gamma.dtype != torch.float32 or gamma.shape != (sum(each),):
            raise ValueError(f"its coordinates are not {sum(each)} float32 numbers")
        return list(torch.split(gamma, each))
    codes, scales = tensors["codes"], tensors["scales"]
    lengths = [-(-k * bits // 8) for k in each], [-(-k // GROUP) for k in each]
    if codes.dtype != torch.uint8 or codes.shape != (sum(lengths[0]),):
        raise ValueError(f"its codes are not {sum(lengths[0])} bytes")
    if scales.dtype != torch.float32 or scales.shape != (sum(lengths[1]),):
        raise ValueError(f"its scales are not {sum(lengths[1])} float32 numbers")
    parts = zip(torch.split(codes, lengths[0]), torch.split(scales, lengths[1]), each, strict=True)
    return [dequantize(Quantized(code, scale), bits, k) for code, scale, k in parts]
