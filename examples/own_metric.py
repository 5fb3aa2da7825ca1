"""A metric of one's own: how long answers are beside the right ones.

With this file in the working directory, or anywhere in PYTHONPATH:

    hedgerow evaluate runs/first --metrics loss,own_metric:LengthRatio
    hedgerow run experiment.yaml 'evaluation.metrics=[loss, "own_metric:LengthRatio"]' --out runs/b

Its label, unit and direction are used by the console, tables, reports and charts.
"""

from hedgerow.evaluation.metrics import AnswerMetric, Score


class LengthRatio(AnswerMetric):
    """Words of the model's answer for each word of the right one; the mean over rows."""

    scores = (Score("length_ratio", label="length ratio"),)

    def score(self, reference: str, answer: str) -> float:
        """0 for an empty answer; 1 for one that is as long as the right one."""
        return len(answer.split()) / max(len(reference.split()), 1)
