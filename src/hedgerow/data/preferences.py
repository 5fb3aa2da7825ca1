"""What an objective learns from: answers, pairs of two, or answers that are labelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from hedgerow.data.rows import Row
from hedgerow.errors import NothingToLearn, UserError

Learns = Literal["answers", "pairs", "labels"]
"""Kinds of examples: answers, all of which are good ones; pairs of a better and a worse answer to
one prompt; or answers that are labelled as good ones or bad ones."""


def learnt_rows(rows: Sequence[Row], learns: Learns, name: str) -> Sequence[Row]:
    """Rows of a client in the form that an objective learns from.

    For `answers`, they are the better ones of pairs, and those that are labelled as good. For
    `labels`, a pair is two answers, all better ones before all worse ones; and each row has the
    answer of the row before it beside its own (`Row.other`; the first has the last one's), by which
    KTO estimates a divergence.

    Args:
        rows: of one client, as they were checked.
        name: whose rows they are, for messages.

    Raises:
        UserError: pairs are needed, and the rows are none.
        NothingToLearn: no row is left.
    """
    if not rows:
        return rows
    paired = all(row.other for row in rows)
    if learns == "answers":
        found = good_answers(rows)
        if not found:
            raise NothingToLearn(f"{name}: no answer is labelled as a good one")
        return found
    if learns == "pairs":
        if not paired:
            raise UserError(
                f"{name}: `training.objective` learns from pairs of answers, and the rows have "
                "one answer each: name the columns of both as `data.fields.chosen` and "
                "`data.fields.rejected`"
            )
        return rows
    if paired:
        worse = [replace(row, output=row.other, desirable=False) for row in rows]
        rows = [*rows, *worse]
    return [replace(row, other=rows[n - 1].output) for n, row in enumerate(rows)]


def good_answers(rows: Sequence[Row]) -> list[Row]:
    """Rows whose answers are not labelled as bad ones."""
    return [row for row in rows if row.desirable]
