"""ROUGE-L of greedy answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache

from hedgerow.evaluation.metrics.base import AnswerMetric, Score
from hedgerow.evaluation.words import words


class RougeL(AnswerMetric):
    """F-measure of the longest common subsequence of words (Lin, 2004), the English ones stemmed.

    Of texts in ASCII it is rouge_score's. Of scripts without spaces between words, as Chinese or
    Thai, it is that of characters. Texts without any word are right where they are the same but for
    white space.
    """

    libraries = ("rouge_score",)

    name: str = "rouge_l"
    scores = (Score("rouge_l", label="ROUGE-L", unit="%", direction="higher"),)

    def score(self, reference: str, answer: str) -> float:
        """From 0 to 100."""
        right, said = _tokens(reference), _tokens(answer)
        if not (right or said):
            return 100.0 * (reference.split() == answer.split())
        common = _longest_common(right, said)
        if not common:
            return 0.0
        precision, recall = common / len(said), common / len(right)
        return 100 * (2 * precision * recall / (precision + recall))


def _tokens(text: str) -> list[str]:
    """Words of a text, those of ASCII as rouge_score has them."""
    stem = _stemmer()
    return [token for word in words(text) for token in (stem(word) if word.isascii() else [word])]


@cache
def _stemmer() -> Callable[[str], list[str]]:
    # Not at the top: it brings nltk, which takes 100 MB where scikit-learn is installed.
    from rouge_score.tokenizers import DefaultTokenizer

    tokenize: Callable[[str], list[str]] = DefaultTokenizer(use_stemmer=True).tokenize
    return tokenize


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time.

    The bits of `row` are 0 where the table's row steps up (Hyyrö, 2004). In rouge_score, which goes
    cell by cell, characters take a tenth of a second for an answer.
    """
    places: dict[str, int] = defaultdict(int)
    for place, token in enumerate(first):
        places[token] |= 1 << place
    every = row = (1 << len(first)) - 1
    for token in second:
        same = row & places.get(token, 0)
        row = ((row + same) | (row - same)) & every
    return len(first) - row.bit_count()
