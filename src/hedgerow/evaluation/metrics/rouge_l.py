"""ROUGE-L of greedy answers."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from hedgerow.evaluation.metrics.base import AnswerMetric, Score
from hedgerow.evaluation.words import words

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


class RougeL(AnswerMetric):
    """F-measure of the longest common subsequence of words (Lin, 2004), the English ones stemmed.

    Of scripts without spaces between words, as Chinese or Thai, it is that of characters. Texts
    without any word are right where they are the same but for white space.
    """

    name: str = "rouge_l"
    scores = (Score("rouge_l", label="ROUGE-L", unit="%", direction="higher"),)

    def score(self, reference: str, answer: str) -> float:
        """From 0 to 100."""
        if not (words(reference) or words(answer)):
            return 100.0 * (reference.split() == answer.split())
        measured: float = _scorer().score(reference, answer)["rougeL"].fmeasure
        return 100 * measured


@cache
def _scorer() -> RougeScorer:
    # Not at the top: it brings nltk, which takes 100 MB where scikit-learn is installed.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

    stem = DefaultTokenizer(use_stemmer=True).tokenize

    class Words(Tokenizer):  # type: ignore[misc]
        """rouge_score's own tokens of ASCII, and words of all other scripts."""

        def tokenize(self, text: str) -> list[str]:
            return [
                token
                for word in words(text)
                for token in (stem(word) if word.isascii() else [word])
            ]

    return RougeScorer(["rougeL"], tokenizer=Words())
