"""What a metric makes of a model's evidence: a number for each of its scores, and by group.

A metric may be anybody's: whatever it does wrong is one sentence that names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from hedgerow.errors import UserError, readable
from hedgerow.evaluation.likelihood import Int64
from hedgerow.evaluation.metrics import Metric, Weighted


class Evidence(NamedTuple):
    """What was asked of the model for metrics, of the rows of a test set that it can be asked."""

    rows: Int64
    """Shape (n,): the place of each in the test set."""
    found: Sequence[Any]
    """An `Answer`, `Likelihood` or `Choice` for each of `rows`."""


class Measured(NamedTuple):
    """A metric's scores, but for the derived ones."""

    whole: dict[str, float]
    """Of all rows, by key."""
    by: dict[str, dict[str, float]]
    """Of each group of rows, by key and group, the groups in order; empty where there are none."""


def measure(metric: Metric, evidence: Evidence, groups: Sequence[str] | None) -> Measured:
    """A metric's scores of some evidence.

    Args:
        groups: the group of each row of the test set; None gives none by group.

    Raises:
        UserError: the metric fails, or gives something else than finite numbers.
    """
    of_rows = _means if metric.per == "row" else _over_corpora
    if groups is None:
        return of_rows(metric, evidence, [], np.zeros(len(evidence.rows), dtype=np.int64))
    values, index = np.unique([groups[row] for row in evidence.rows], return_inverse=True)
    return of_rows(metric, evidence, values.tolist(), index)


def derived(metric: Metric, scores: Mapping[str, float]) -> dict[str, float]:
    """A metric's derived scores, from `scores` that hold its others.

    Raises:
        UserError: the metric fails, or gives something else than numbers.
    """
    keys = {score.key for score in metric.scores if score.derived}
    try:
        found = metric.derive(scores)
    except Exception as error:
        raise _failed(metric, error, "on the scores of the test data") from error
    is_whole = isinstance(found, Mapping) and set(found) == keys
    if not (is_whole and all(isinstance(value, Real) for value in found.values())):
        raise UserError(
            f"the metric {metric.name} derives {_shown(found)}: it must be a number for each of "
            f"{sorted(keys)}"
        )
    return {key: float(value) for key, value in found.items()}


def _means(metric: Metric, evidence: Evidence, names: list[str], index: Int64) -> Measured:
    """Weighted means of the scores of rows.

    Args:
        names: of the groups.
        index: the place of each row's group in `names`.
    """
    by_row = [
        _scores(metric, one, f"on row {row + 1} of the test data")
        for row, one in zip(evidence.rows.tolist(), evidence.found, strict=True)
    ]
    measured = Measured({}, {})
    for key in by_row[0]:
        totals = np.array([scores[key].total for scores in by_row])
        weights = np.array([scores[key].weight for scores in by_row])
        measured.whole[key] = float(totals.sum() / weights.sum())
        if names:
            means = np.bincount(index, totals) / np.bincount(index, weights)
            measured.by[key] = dict(zip(names, means.tolist(), strict=True))
    return measured


def _over_corpora(metric: Metric, evidence: Evidence, names: list[str], index: Int64) -> Measured:
    """Scores of all rows together, and of those of each group together; as `_means` has them."""
    whole = _scores(metric, evidence.found, "on the test data")
    measured = Measured({key: part.total / part.weight for key, part in whole.items()}, {})
    for number, name in enumerate(names):
        found = [evidence.found[place] for place in np.flatnonzero(index == number).tolist()]
        for key, part in _scores(metric, found, f"on the rows of {name!r}").items():
            measured.by.setdefault(key, {})[name] = part.total / part.weight
    return measured


def _scores(metric: Metric, evidence: Any, where: str) -> dict[str, Weighted]:
    """The scores of a row, or of many, once they are known to be what they should."""
    try:
        given = metric.measure(evidence)
    except Exception as error:
        raise _failed(metric, error, where) from error
    keys = [score.key for score in metric.scores if not score.derived]
    scores = given if isinstance(given, Mapping) else {keys[0]: given}
    if set(scores) != set(keys):
        raise UserError(
            f"the metric {metric.name} gives {_shown(given)} {where}: it must be a number for each "
            f"of {', '.join(keys)}"
        )
    parts = {key: _part(scores[key]) for key in keys}
    # A model that has diverged is no mistake of a metric's.
    must_be_finite = getattr(evidence, "finite", True)
    for part in parts.values():
        if part is None or (must_be_finite and not math.isfinite(part.total)):
            raise UserError(
                f"the metric {metric.name} gives {_shown(given)} {where}: each score must be a "
                "finite number (in a Weighted, its weight above 0)"
            )
    return {key: part for key, part in parts.items() if part is not None}


def _part(value: Any) -> Weighted | None:
    """A score as a part of a mean; None of what is no number."""
    total, weight = value if isinstance(value, Weighted) else (value, 1.0)
    if not (isinstance(total, Real) and isinstance(weight, Real)):
        return None
    return Weighted(float(total), float(weight)) if 0 < weight < math.inf else None


def _failed(metric: Metric, error: Exception, where: str) -> UserError:
    said = readable(f"{type(error).__name__}: {error}")
    return UserError(f"the metric {metric.name} fails {where} ({said})")


def _shown(value: Any) -> str:
    return readable(repr(value))[:100]
