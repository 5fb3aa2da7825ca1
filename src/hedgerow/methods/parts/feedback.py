"""Error feedback: what a codec has lost is added to what is sent the next time.

Seide et al. (2014); Karimireddy et al., arXiv 1901.09847. With a decay it is DeMo's and
SparseLoCo's momentum (arXiv 2508.15706, algorithm 1): e <- decay·e + Δ, less what was sent of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, StrictBool

from hedgerow.methods.parts.values import Values

if TYPE_CHECKING:
    from torch import Tensor

Feedback = StrictBool | Annotated[float, Field(gt=0, le=1)]
"""Whether what a codec has lost is added to what is sent next, times a decay: `true` is 1."""


def owed(change: Values, kept: Mapping[str, Tensor], decay: float) -> Values:
    """A change, and what is still owed of earlier ones: Δ + decay·e.

    Args:
        change: Δ.
        kept: e, by name; nothing before the first time.
        decay: of what is owed, above 0; 1 is none.
    """

    def add(name: str, each: Tensor) -> Tensor:
        if name not in kept:
            return each
        lost = kept[name].to(each.device)
        return each.add_(lost) if decay == 1 else each.add_(lost, alpha=decay)

    return change.mapped(add)


def lost(due: Values, sent: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """What was due and not sent, on the CPU, for the next time."""
    return {
        name: (each - estimate).cpu() for (name, each), (_, estimate) in zip(due, sent, strict=True)
    }
