"""How far a broadcast is cut: by singular values, by bits, or not at all.

The server re-factorises the aggregate by small SVDs (as FLoRIST does, arXiv 2506.09199), which is
lossless at its numeric rank. Beyond that, what is cut goes first where it is small for the numbers
that it takes: over all matrices together, since some need a much higher rank than others. What was
cut and rounded away can be carried to the next round's aggregate instead of being lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from hedgerow.methods.encoding import Bits


class Compress(BaseModel):
    """`method.compress` of flora; without `energy` and `rank`, by size."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    energy: float | None = Field(None, gt=0, le=1)
    """The share of the squared singular values of a round's step that is kept."""
    rank: int | None = Field(None, ge=1)
    """The rank that a matrix of the broadcast has at most, on average over matrices by size."""
    bits: Bits = 8
    """Of each number of the broadcast; more components in fewer bits lose less for their bytes."""
    carry: bool = True
    """What was cut or rounded away is added to the next round's aggregate."""

    def largest(self, rank: int) -> int | None:
        """The rank that bounds the broadcast where `rank` is that of the largest client.

        By default five eighths of the bytes that the client's factors have in float32: with
        headers and participants a broadcast is then about as large as an update.
        """
        if self.rank is None and self.energy is None:
            return max(rank, rank * 20 // self.bits)
        return self.rank


def ranks_to_keep(
    spectra: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    numbers: float,
    energy: float,
) -> dict[str, int]:
    """How many leading components of each matrix to keep.

    Args:
        spectra: singular values of each, descending, shape (k,).
        shapes: (m, n) of each; a component takes m + n numbers.
        numbers: how many numbers there may be in all.
        energy: how much may be left out, in squares of singular values, once there is room.

    Returns:
        Those that are left out are the smallest for what they take, matrices apart.
    """
    modules = list(spectra)
    sizes = [len(spectra[module]) for module in modules]
    owner = torch.repeat_interleave(torch.arange(len(modules)), torch.tensor(sizes))
    cost = torch.tensor([float(sum(shapes[module])) for module in modules])[owner].double()
    squares = torch.cat([spectra[module].double().square() for module in modules])
    order = torch.argsort(squares / cost, descending=True, stable=True)
    fits = cost[order].cumsum(0) <= numbers
    # What would be left out if a component and all that are smaller were.
    tail = squares[order].flip(0).cumsum(0).flip(0)
    kept = order[fits & (tail > energy)]
    counts = torch.bincount(owner[kept], minlength=len(modules))
    return dict(zip(modules, counts.tolist(), strict=True))
