"""The audits of the runs that a page is about, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hedgerow.audit import found, words
from hedgerow.comparison import Outcome
from hedgerow.reporting.gather import Series


class AuditOfRun(NamedTuple):
    """What an audit of one run has found."""

    label: str
    """The run, where there are several."""
    parts: Sequence[words.Words]


def audits(series: Sequence[Series]) -> list[AuditOfRun]:
    """Audits of the runs that have one.

    Raises:
        UserError: the file of one is damaged.
    """
    outcomes = [(each, outcome) for each in series for outcome in each.outcomes]
    several = len(outcomes) > 1
    told = []
    for each, outcome in outcomes:
        audit = found.read(outcome.cell.folder)
        if audit is not None:
            label = f"{each.label}, seed {outcome.cell.seed}" if several else ""
            stale = _stale(audit, outcome)
            told.append(AuditOfRun(label, [*stale, *words.told(audit)]))
    return told


def _stale(audit: found.Audit, outcome: Outcome) -> list[words.Words]:
    """A sentence where the run has gone on since its audit."""
    last = outcome.rows[-1]["round"]
    if audit.round == last:
        return []
    said = (
        f"This is of round {audit.round}, and the run has gone on to round {last} since: "
        "`hedgerow audit` makes it anew."
    )
    return [words.Words([said], None)]
