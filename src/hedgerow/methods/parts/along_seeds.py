"""Steps along directions of seeds, Σ_z c_z z: how they travel, and what is refused of them.

seeds          z, int64, distinct and of at least 0
coordinates    c_z, float32
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING

from hedgerow.errors import InvalidMessage
from hedgerow.lazy import torch
from hedgerow.wire import Kind, check_kinds, kinds

if TYPE_CHECKING:
    from torch import Tensor


def summed(steps: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Coordinates by direction; a direction that was taken twice has their sum."""
    sums: dict[int, float] = {}
    for seed, coordinate in steps:
        sums[seed] = sums.get(seed, 0.0) + coordinate
    return sums


def revealed(directions: Sequence[Set[int]]) -> int:
    """Number of clients with a direction that no other client took.

    Args:
        directions: seeds of each client's.
    """
    taken = Counter(seed for own in directions for seed in own)
    return sum(any(taken[seed] == 1 for seed in own) for own in directions)


def steps_to_tensors(steps: Mapping[int, float]) -> dict[str, Tensor]:
    """Coordinates by direction, as they travel."""
    return {
        "seeds": torch.tensor(list(steps), dtype=torch.int64),
        "coordinates": torch.tensor(list(steps.values()), dtype=torch.float32),
    }


def steps_of_tensors(tensors: Mapping[str, Tensor]) -> dict[int, float]:
    """The inverse of `steps_to_tensors`."""
    return dict(zip(tensors["seeds"].tolist(), tensors["coordinates"].tolist(), strict=True))


def check_steps(tensors: Mapping[str, Tensor], most: float = math.inf) -> set[int]:
    """The seeds of at most so many steps.

    Raises:
        InvalidMessage: the tensors are not what `steps_to_tensors` makes of such steps.
    """
    given = kinds(tensors)
    count = given["seeds"].shape[0] if "seeds" in given and given["seeds"].shape else 1
    each = {"seeds": Kind(torch.int64, (count,)), "coordinates": Kind(torch.float32, (count,))}
    check_kinds(given, each)
    if not 1 <= count <= most:
        raise InvalidMessage(
            f"expected at most {most} steps, got {count}" if count else "seeds must not be empty"
        )
    seeds = set(tensors["seeds"].tolist())
    if len(seeds) < count or min(seeds) < 0:
        raise InvalidMessage("seeds must be distinct and non-negative")
    return seeds
