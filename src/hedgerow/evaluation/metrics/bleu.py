"""Corpus BLEU of greedy answers."""

from __future__ import annotations

from collections.abc import Sequence

from hedgerow.evaluation.metrics.base import CorpusMetric, Score
from hedgerow.evaluation.words import spaced


class Bleu(CorpusMetric):
    """Corpus BLEU as sacrebleu computes it by default (Papineni et al., 2002; arXiv 1804.08771).

    Matches of one to four words (its tokenizer 13a, case counts), with exponential smoothing. Each
    character of a script without spaces between words, as Chinese or Thai, is a word.
    """

    libraries = ("sacrebleu",)

    name: str = "bleu"
    scores = (Score("bleu", label="BLEU", unit="points of 100", direction="higher"),)

    def corpus(self, references: Sequence[str], answers: Sequence[str]) -> float:
        """From 0 to 100."""
        # Not at the top: who reads an experiment file needs no sacrebleu.
        import sacrebleu

        return sacrebleu.corpus_bleu(
            hypotheses=[spaced(text) for text in answers],
            references=[[spaced(text) for text in references]],
        ).score
