"""Factors of adapters by PEFT's key names: how they begin, go on, and what is expected of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from hedgerow.adapters import adapter_pairs, adapter_tensors
from hedgerow.errors import InvalidMessage
from hedgerow.lazy import torch
from hedgerow.lowrank import Factors
from hedgerow.methods.quantization import Bits, quantized_kinds
from hedgerow.wire import Kind, check_kinds, kinds

if TYPE_CHECKING:
    from torch import Tensor, nn

Factor = Literal["lora_A", "lora_B"]

_T = TypeVar("_T")


def of_factor(factor: Factor, tensors: Mapping[str, _T]) -> dict[str, _T]:
    """One factor of each module, of all that there are by PEFT's key names."""
    return {name: each for name, each in tensors.items() if f".{factor}." in name}


def with_scale(factors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """An adapter's factors with its scale s in them, as entries have them: A and s·B."""
    return {name: f * scale if ".lora_B." in name else f for name, f in factors.items()}


def check_factors(
    given: Mapping[str, Kind], shapes: Mapping[str, Sequence[int]], ranks: Sequence[int]
) -> None:
    """Raise `InvalidMessage` unless these are an adapter's factors, in float32.

    Args:
        given: what they are, by PEFT's key names.
        shapes: (m, n) of the adapted matrices, by module.
        ranks: those that the adapter may have, in ascending order.
    """
    first = next(iter(factor_kinds(shapes, 1)), "")
    rank = given[first].shape[0] if first in given and given[first].shape else ranks[0]
    if rank not in ranks:
        possible = " to ".join(str(rank) for rank in sorted({ranks[0], ranks[-1]}))
        raise InvalidMessage(f"expected an adapter of rank {possible}, got rank {rank}")
    check_kinds(given, factor_kinds(shapes, rank))


def check_pairs(
    given: Mapping[str, Kind],
    shapes: Mapping[str, Sequence[int]],
    most: Mapping[str, int],
    bits: Bits = 32,
    least: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Raise `InvalidMessage` unless these are factors, each module's of its own rank.

    Args:
        given: what they are, by PEFT's key names.
        shapes: (m, n) of the adapted matrices, by module.
        most: the largest rank that each module may have.
        bits: of each number, as `quantize` has them.
        least: the smallest rank that each module may have; 1 if not given.

    Returns:
        The rank of each module.
    """
    ranks: dict[str, int] = {}
    expected: dict[str, Kind] = {}
    for module, shape in shapes.items():
        first = next(iter(factor_kinds({module: shape}, 1)))
        ranks[module] = given[first].shape[0] if first in given and given[first].shape else 1
        if ranks[module] > most[module]:
            raise InvalidMessage(
                f"rank of {module} must be at most {most[module]}, got {ranks[module]}"
            )
        expected |= factor_kinds({module: shape}, ranks[module])
    check_kinds(given, quantized_kinds(expected, bits))
    for module, rank in ranks.items():
        fewest = 1 if least is None else least[module]
        if rank < fewest:
            raise InvalidMessage(f"rank of {module} must be at least {fewest}, got {rank}")
    return ranks


def factor_kinds(shapes: Mapping[str, Sequence[int]], rank: int) -> dict[str, Kind]:
    """Kinds of an adapter's factors, of this rank, for matrices of these shapes (m, n)."""
    with torch.device("meta"):
        pairs = {
            module: Factors(torch.empty(rank, n), torch.empty(m, rank))
            for module, (m, n) in shapes.items()
        }
    return kinds(adapter_tensors(pairs))


def init_factors(parameters: Mapping[str, Tensor], generator: torch.Generator, rows: int) -> None:
    """Initialise an adapter that changes nothing yet: A as peft draws it, B zero.

    `rows` rows of A are drawn and the first r kept, so that clients of different ranks that share
    a generator's seed share rows.
    """
    with torch.no_grad():
        for _, (A, B) in adapter_pairs(parameters):
            bound = A.shape[1] ** -0.5  # Kaiming's with a = √5
            draws = torch.empty(rows, A.shape[1]).uniform_(-bound, bound, generator=generator)
            A.copy_(draws[: A.shape[0]])
            B.zero_()


def draw_adapter(
    shapes: Mapping[str, Sequence[int]], generator: torch.Generator, rank: int
) -> dict[str, Tensor]:
    """The adapter of this rank that `init_factors` gives a model with matrices of these shapes."""
    pairs = {m: Factors(torch.empty(rank, n), torch.empty(o, rank)) for m, (o, n) in shapes.items()}
    factors = adapter_tensors(pairs)
    init_factors(factors, generator, rank)
    return factors


def copy_factors(
    parameters: Mapping[str, nn.Parameter], factors: Mapping[str, Tensor], scale: float
) -> None:
    """Continue from an entry's factors (scale in B): as many rows of A, columns of B as both have.

    What an adapter has beyond them stays as it is: the entry is of a lower rank where no client of
    the largest took part.
    """
    source = dict(adapter_pairs(factors))
    with torch.no_grad():
        for module, (A, B) in adapter_pairs(parameters):
            rank = min(A.shape[0], source[module].rank)
            A[:rank] = source[module].A[:rank]
            B[:, :rank] = source[module].B[:, :rank] / scale
