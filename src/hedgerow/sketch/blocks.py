"""A model's parameters in blocks, each sketched on its own; the model is never concatenated.

Blocks are what makes the paper's bases affordable (cost Σ d_l K_l instead of d K) and what lets a
budget of coordinates go where the update is (Ferret, arXiv 2409.06277, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hedgerow.lazy import torch
from hedgerow.sketch import Basis, project, reconstruct

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Consecutive tensors that are sketched together."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each tensor, by name."""

    @property
    def size(self) -> int:
        """Number of entries of all its tensors, d_l."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def group(shapes: Mapping[str, Sequence[int]]) -> list[Block]:
    """Consecutive tensors, grouped until a block has at least the median tensor's size."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    enough = sorted(sizes)[len(sizes) // 2]
    blocks: list[Block] = []
    open_block: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        open_block[name] = tuple(shape)
        if Block(open_block).size >= enough:
            blocks.append(Block(open_block))
            open_block = {}
    return [*blocks, Block(open_block)] if open_block else blocks


def allocate(budget: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """K_l in proportion to `weights`: at least 1 and at most `most[l]` each, and `budget` in all.

    Raises:
        ValueError: the budget is below one for each block, or above all that is possible.
    """
    limits, share = np.asarray(most, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if not len(limits) <= budget <= limits.sum():
        raise ValueError(
            f"budget must be {len(limits)} to {int(limits.sum())} for {len(limits)} blocks, "
            f"got {budget}"
        )
    share = np.clip(share / share.max(), 1e-12, 1) if share.max() > 0 else np.ones(len(limits))
    # The common factor at which what is left after the limits is the budget.
    low, high = 0.0, float(limits.max() / share.min())
    for _ in range(200):
        middle = (low + high) / 2
        filled = np.clip(share * middle, 1, limits).sum()
        low, high = (middle, high) if filled < budget else (low, middle)
    exact = np.clip(share * low, 1, limits)
    counts = np.floor(exact)
    missing = budget - int(counts.sum())
    room = np.where(counts < limits, exact - counts, -1)
    counts[np.argsort(-room, kind="stable")[:missing]] += 1
    return [int(count) for count in counts]


def project_blocks(
    tensors: Iterator[tuple[str, Tensor]],
    blocks: Sequence[Block],
    seed: int,
    counts: Sequence[int],
    basis: Basis,
) -> Iterator[Tensor]:
    """Coordinates of each block, float32 of shape (K_l,), one block after another.

    Args:
        tensors: name and tensor, in the blocks' order; each is asked for when its block is due.
        seed: block l is projected with `seed + l`.
        counts: K_l.
        basis: the kind of bases.

    Raises:
        ValueError: a tensor comes out of order or is missing, or a count is not possible.
    """
    for index, (block, count) in enumerate(zip(blocks, counts, strict=True)):
        yield project(_flat(tensors, block), _seed(seed, index), count, basis)


def norms(tensors: Iterator[tuple[str, Tensor]], blocks: Sequence[Block]) -> list[float]:
    """Euclidean norm of each block, ‖Δ_l‖."""
    return [float(torch.linalg.vector_norm(_flat(tensors, block))) for block in blocks]


def reconstruct_block(
    coordinates: Tensor, block: Block, index: int, seed: int, basis: Basis
) -> dict[str, Tensor]:
    """The estimate of each tensor of one block, which is the `index`-th, from its coordinates."""
    flat = reconstruct(coordinates, _seed(seed, index), block.size, basis)
    sizes = [math.prod(shape) for shape in block.shapes.values()]
    parts = torch.split(flat, sizes)
    return {
        name: part.view(shape)
        for (name, shape), part in zip(block.shapes.items(), parts, strict=True)
    }


def _seed(seed: int, index: int) -> int:
    return (seed + index) % 2**64


def _flat(tensors: Iterator[tuple[str, Tensor]], block: Block) -> Tensor:
    """The block's tensors, taken from the stream; only small ones are ever put together."""
    parts = []
    for expected, (name, tensor) in zip(block.shapes, tensors, strict=False):
        if name != expected:
            raise ValueError(f"expected tensor {expected}, got {name}")
        parts.append(tensor.reshape(-1))
    if len(parts) != len(block.shapes):
        raise ValueError("expected as many tensors as the blocks have, got fewer")
    return parts[0] if len(parts) == 1 else torch.cat(parts)
