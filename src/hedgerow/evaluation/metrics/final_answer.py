"""Final answers of greedy answers to sums, as GSM8K is scored."""

from __future__ import annotations

import re
from decimal import Decimal

from hedgerow.evaluation.metrics.base import AnswerMetric, Score


class FinalAnswer(AnswerMetric):
    """How often an answer comes to the right number, as GSM8K is scored (arXiv 2110.14168).

    It is the first number after "####", or the last one where there is no such mark.
    """

    name: str = "final_answer"
    scores = (Score("final_answer", label="final answer", unit="%", direction="higher"),)

    def score(self, reference: str, answer: str) -> float:
        """100 where both come to the same number, or else 0."""
        right = _final_number(reference)
        return 100 * (right is not None and _final_number(answer) == right)


_NUMBER = re.compile(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?", re.ASCII)


def _final_number(text: str) -> Decimal | None:
    before, mark, after = text.partition("####")
    numbers = _NUMBER.findall(after if mark else before)
    if not numbers:
        return None
    return Decimal((numbers[0] if mark else numbers[-1]).replace(",", ""))
