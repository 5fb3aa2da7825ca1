"""Clients that a rule has weighed otherwise than the others, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hedgerow.reporting.gather import Series


class Weighed(NamedTuple):
    """A client whose update counted less, or not at all, in some rounds of a run."""

    run: str
    client: str
    rounds: int
    """Number of rounds."""
    reason: str
    """What the last of them said."""


def weighed_otherwise(series: Sequence[Series]) -> list[Weighed]:
    """All such clients of the runs, those of most rounds first."""
    found = []
    for each in series:
        for outcome in each.outcomes:
            notes: dict[str, list[str]] = {}
            for row in outcome.rows:
                for client, note in (row.get("weighed_otherwise") or {}).items():
                    notes.setdefault(client, []).append(note)
            run = f"{each.label}, seed {outcome.cell.seed}"
            found += [Weighed(run, name, len(said), said[-1]) for name, said in notes.items()]
    return sorted(found, key=lambda one: -one.rounds)
