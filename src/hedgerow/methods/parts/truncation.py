"""Truncation of a broadcast: by singular values, by bits, or not at all.

The server re-factorises the aggregate by small SVDs (as FLoRIST does, arXiv 2506.09199), which is
lossless at its numeric rank. Beyond that, what is cut goes first where it is small for the numbers
that it takes: over all matrices together, since some need a much higher rank than others. What was
cut and rounded away can be carried to the next round's aggregate instead of being lost, as far as
that has a bounded rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from hedgerow import lowrank
from hedgerow.adapters import adapter_pair, adapter_tensors
from hedgerow.lazy import torch
from hedgerow.lowrank import Factors
from hedgerow.methods.parts.start_and_residual import START
from hedgerow.methods.quantization import Bits, dequantize, quantize

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.methods.parts.sums import Sums

UNEVEN = 2
"""Largest rank of a matrix of a bounded broadcast, in units of the average rank."""


class Compress(BaseModel):
    """Cut of the broadcast; without `energy` and `rank`, to the size of the largest client's
    update."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    energy: float | None = Field(None, gt=0, le=1)
    """Share of the squared singular values of a round's step that is kept; with null, `rank` or the
    size decides."""
    rank: int | None = Field(None, ge=1)
    """Rank that a matrix of the broadcast has at most, on average over matrices by size; with null,
    `energy` or the size decides."""
    bits: Bits = 8
    """Number of bits of each number of the broadcast; more components in fewer bits lose less for
    their bytes."""
    carry: bool = True
    """Whether what was cut or rounded away is added to the next round's aggregate, as far as it can
    be carried: at most twice the components that are broadcast."""

    def largest(self, rank: int) -> int | None:
        """The rank that bounds the broadcast where `rank` is that of the largest client.

        By default five eighths of the bytes that the client's factors have in float32, in 8 or 16
        bits: with headers and participants a broadcast is then about as large as an update. In
        float32 as many as the factors have themselves.
        """
        if self.rank is None and self.energy is None:
            return max(rank, rank * 20 // self.bits)
        return self.rank


def _as_compress(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


ChosenCompress = Annotated[Compress | None, BeforeValidator(_as_compress)]
"""Option that is a cut of the broadcast: `true` is one by default, `false` and null are none."""


class Sent(NamedTuple):
    """What was made of a round's sums."""

    tensors: dict[str, Tensor]
    """Of the entry: PEFT's keys, and those of the adapter that clients go on from."""
    owed: dict[str, Tensor]
    """What is to be sent in later rounds, by PEFT's keys; maybe nothing."""
    metrics: dict[str, float]
    """Errors relative to the exact sums, or to where the server steps instead of them."""
    apart: bool = False
    """Whether each client's own factors stand in the entry, beside the others'."""


def truncate_sums(
    compress: Compress,
    sums: Sums,
    owed: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    largest_rank: int,
) -> Sent:
    """Truncate a round's sums, and what is owed, to what `compress` allows.

    A few clients' factors are in memory at a time: of each module those components that may be
    kept, once its sum has been read.

    Args:
        compress: says how far to cut.
        sums: of each module.
        owed: factors that the rounds before left out, by PEFT's keys.
        shapes: (m, n) of the adapted matrices, by module.
        largest_rank: that of the largest client.

    Returns:
        An entry's tensors: the averages that clients go on from, if they do, and the residual; what
        they leave out and `carry` keeps, by PEFT's keys; and `aggregation_error`, how far they are
        from the exact sums and what is owed, relative to the exact sums, with
        `compression_error`, the same relative to what the round adds to the global function, and
        `dropped_error`, as much of that as is not carried. What sketched sums have missed is in all
        of them, as if it were orthogonal to the rest: then they are estimates, rather too large.
    """
    bound = compress.largest(largest_rank)
    tensors: dict[str, Tensor] = {}
    spectra: dict[str, Tensor] = {}
    leading: dict[str, Factors] = {}
    size = step = beyond = room = 0.0
    for module, each in sums:
        exact, average = each.exact, each.average
        past = adapter_pair(owed, module)
        due = exact if past is None else lowrank.stack([exact, past.double()])
        if average is not None:
            start = _quantized(module, average, compress.bits)
            tensors |= {START + name: tensor for name, tensor in start.items()}
            due = lowrank.difference(due, _dequantized(module, start))
            room -= largest_rank * sum(shapes[module])
        room += (bound or math.inf) * sum(shapes[module])
        decomposed = lowrank.svd(due)
        norm = float(decomposed.values.norm()) if due is exact else lowrank.norm(exact)
        size += norm**2
        step += norm**2 if each.start is None else lowrank.norm(each.step()) ** 2
        numeric = max(decomposed.rank(beside=norm), 1)
        most = min(numeric, UNEVEN * bound) if bound else numeric
        spectra[module] = decomposed.values[:most].clone()
        leading[module] = decomposed.factors(most).float()
        beyond += float(decomposed.values[most:].square().sum())
    spare = 0.0 if compress.energy is None else (1 - compress.energy) * step - beyond
    ranks = ranks_to_keep(spectra, shapes, room, spare)
    missed = dropped = beyond + sums.missed
    left: dict[str, Factors] = {}
    for module in list(leading):
        pair, rank = leading.pop(module), ranks[module]
        kept = pair.leading(rank)
        quantized = _quantized(module, kept, compress.bits)
        tensors |= quantized
        sent = _dequantized(module, quantized)
        # What is left out is orthogonal to what is kept, and so to its rounding.
        missed += float(spectra[module][rank:].square().sum()) + lowrank.distance(kept, sent) ** 2
        if compress.carry:
            rest = lowrank.svd(lowrank.difference(pair, sent))
            most = UNEVEN * bound if bound else len(rest.values)
            left[module] = rest.factors(most).float()
            dropped += float(rest.values[most:].square().sum())
    errors = {"aggregation_error": (missed, size), "compression_error": (missed, step)}
    if compress.carry:
        errors["dropped_error"] = dropped, step
    metrics = {name: (x / of) ** 0.5 if of else math.inf for name, (x, of) in errors.items()}
    return Sent(tensors, adapter_tensors(left), metrics)


def _quantized(module: str, pair: Factors, bits: Bits) -> dict[str, Tensor]:
    """A module's factors as they are broadcast."""
    return quantize(adapter_tensors({module: pair.float()}), bits)


def _dequantized(module: str, tensors: Mapping[str, Tensor]) -> Factors:
    """Factors in float32 again, as participants see them."""
    pair = adapter_pair(dequantize(tensors), module)
    assert pair is not None
    return pair


def ranks_to_keep(
    spectra: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    numbers: float,
    energy: float,
) -> dict[str, int]:
    """Number of leading components of each matrix to keep.

    Args:
        spectra: singular values of each, descending, shape (k,).
        shapes: (m, n) of each; a component takes m + n numbers.
        numbers: how many numbers there may be in all.
        energy: how much may be left out, in squares of singular values, once there is room.

    Returns:
        At least one of each; those that are left out are the smallest for what they take.
    """
    modules = list(spectra)
    sizes = [len(spectra[module]) for module in modules]
    owner = torch.repeat_interleave(torch.arange(len(modules)), torch.tensor(sizes))
    cost = torch.tensor([float(sum(shapes[module])) for module in modules])[owner].double()
    squares = torch.cat([spectra[module].double().square() for module in modules])
    first = torch.cat([torch.arange(size) == 0 for size in sizes])
    order = torch.argsort((squares / cost).where(~first, torch.inf), descending=True, stable=True)
    fits = first[order] | (cost[order].cumsum(0) <= numbers)
    # What would be left out if a component and all that are smaller were.
    tail = squares[order].flip(0).cumsum(0).flip(0)
    kept = order[fits & (first[order] | (tail > energy))]
    counts = torch.bincount(owner[kept], minlength=len(modules))
    return dict(zip(modules, counts.tolist(), strict=True))
