"""An adapter that clients go on from, beside the residual that is merged, in one entry.

start.{PEFT's key}    the adapter, where there is one
{PEFT's key}          the residual
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from hedgerow.methods.parts.renamed import Renamed, below

START = "start."
"""What the adapter's keys begin with."""

_T = TypeVar("_T")


def split(tensors: Mapping[str, _T]) -> tuple[Mapping[str, _T], Mapping[str, _T]]:
    """The start adapter, by PEFT's keys, and the residual, neither of which is read for it."""
    residual = {key: key for key in tensors if not key.startswith(START)}
    return below(tensors, START), Renamed(tensors, residual)
