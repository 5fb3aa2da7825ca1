"""The metrics: one file each, which says all that is known of it.

To add one, put a subclass of a class in `hedgerow.evaluation.metrics.base` into a file here, or
anywhere: `evaluation: {metrics: ["package.module:Class"]}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hedgerow.errors import UserError
from hedgerow.evaluation.metrics.base import (
    AnswerMetric,
    ChoiceMetric,
    CorpusMetric,
    LikelihoodMetric,
    Metric,
    PreferenceMetric,
    Score,
    Weighted,
)
from hedgerow.plugins import Registry

METRICS: Registry[Metric] = Registry(
    "metric", Metric, "hedgerow.evaluation.metrics", see="hedgerow explain evaluation.metrics"
)
"""Every metric by the name that the experiment file uses, installed plug-ins included."""

_KEY = re.compile("[a-z][a-z0-9_]*")
_TAKEN = {
    *("round", "bytes_up", "bytes_down", "seconds", "clients", "failed"),
    *("participants", "failures", "by_client", "train_loss"),
    *("rows", "truncated", "dropped", "skipped"),
    *("method", "seed", "seeds", "series", "target", "bytes", "rounds_to_target"),
    *("bytes_to_target", "epsilon", "clipped", "clip", "revealed_clients", "secure_bytes"),
    "client_sampling_rate",
}
"""Keys of other numbers in a row of metrics.jsonl, of `hedgerow evaluate`, or in tables of runs."""
_ENDINGS = (
    *("_by", "_by_client", "_over_clients", "_cut", "_error", "_seconds", "_spread"),
    *("_to_target", "_total"),
)
"""How further keys of these end."""


def check_metrics(names: Iterable[str]) -> None:
    """Raise a `UserError` where one of these metrics cannot be computed here."""
    for metric in metrics_of(names):
        metric.check()


def metrics_of(names: Iterable[str]) -> list[Metric]:
    """Metrics by their names in `evaluation.metrics`, in that order.

    Raises:
        UserError: there is no such metric; it is not complete; or two give the same score.
    """
    chosen: list[Metric] = []
    giver: dict[str, str] = {}
    for place, name in enumerate(names):
        metric = _metric(name, f"evaluation.metrics.{place}")
        for score in metric.scores:
            if score.key in giver:
                raise UserError(
                    f"`evaluation.metrics`: {giver[score.key]} and {name} both give "
                    f"{score.key}: leave one out, or give its score another key"
                )
            giver[score.key] = name
        chosen.append(metric)
    return chosen


def scores_of(names: Iterable[str]) -> dict[str, Score]:
    """Scores by their keys, of metrics by their names; where several give one, the first one's.

    Raises:
        UserError: there is no such metric, or it is not complete.
    """
    scores: dict[str, Score] = {}
    for name in names:
        for score in _metric(name).scores:
            scores.setdefault(score.key, score)
    return scores


def main_scores_of(names: Iterable[str]) -> dict[str, Score]:
    """Main scores by their keys, as `scores_of` gives all."""
    mains: dict[str, Score] = {}
    for name in names:
        score = _metric(name).scores[0]
        mains.setdefault(score.key, score)
    return mains


def _metric(name: str, key: str = "evaluation.metrics") -> Metric:
    """Metric of a name that stands under `key`, once it is known to be complete."""
    kind = METRICS.find(name, key)
    where = f"`{key}`: {name}"
    scores = kind.scores
    if not (isinstance(scores, tuple) and scores and all(isinstance(s, Score) for s in scores)):
        raise UserError(
            f"{where} declares no scores: give it `scores`, a tuple of hedgerow's Score, as "
            '(Score("length", label="length"),)'
        )
    if scores[0].derived:
        raise UserError(f"{where} begins with a derived score: declare first what it is of")
    for score in scores:
        _check(score, where)
    if len({score.key for score in scores}) < len(scores):
        raise UserError(f"{where} declares a key twice: give each score its own")
    try:
        # By whichever name it is called here: of options, it has none but their defaults.
        return kind.model_validate({})
    except UserError as error:
        fields = kind.model_fields.items()
        lacking = [name for name, field in fields if field.is_required() and name != "name"]
        raise UserError(
            f"{where} cannot be made without options ({', '.join(lacking) or error}): give each a "
            "default"
        ) from None


def _check(score: Score, where: str) -> None:
    """Raise a `UserError` where a score could not stand beside others."""
    key = score.key
    if not (isinstance(key, str) and _KEY.fullmatch(key)):
        raise UserError(
            f"{where}: the key {key!r} must be lower-case letters, digits or `_`, and begin with a "
            "letter"
        )
    if key in _TAKEN or key.endswith(_ENDINGS):
        raise UserError(
            f"{where}: the key {key!r} is, or may be, another number's of a run: choose another, "
            "as one that begins with your name"
        )
    if not (isinstance(score.label, str) and score.label.strip()):
        raise UserError(f"{where}: the score {key} needs a label, which people are shown")
    if score.direction not in ("lower", "higher", None):
        raise UserError(
            f"{where}: the direction of {key} must be 'lower', 'higher' or None, not "
            f"{score.direction!r}"
        )


__all__ = [
    "METRICS",
    "AnswerMetric",
    "ChoiceMetric",
    "CorpusMetric",
    "LikelihoodMetric",
    "Metric",
    "PreferenceMetric",
    "Score",
    "Weighted",
    "check_metrics",
    "main_scores_of",
    "metrics_of",
    "scores_of",
]
