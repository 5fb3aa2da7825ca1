"""Canaries: made-up rows, of which a fair coin decides who is trained on.

Whoever knows a run's experiment knows its canaries and their coins, so that an audit needs neither
the clients' data nor anything that was written down while the run went on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hedgerow.data.encoding import Encoder
from hedgerow.data.rows import Row
from hedgerow.errors import UserError
from hedgerow.seeds import Seeds

if TYPE_CHECKING:
    from hedgerow.settings import AuditSettings

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES, _WORDS = 3, 2
"""Syllables of a word, and words of a question and of an answer: 37 bits each."""


@dataclass(frozen=True, eq=False)
class Canaries:
    """Canaries of one client.

    Every one is a question of random words and an answer of others, in letters that all tokenizers
    know.
    """

    client: str
    """Name of the client whose training rows they are added to."""
    rows: Sequence[Row]
    """All of them, whether they are trained on or not."""
    is_in: npt.NDArray[np.bool_]
    """Shape (canaries,): whether each is trained on, by fair coins, each independent of others."""
    repeat: int
    """Number of rows that each becomes which is trained on."""

    @staticmethod
    def of(settings: AuditSettings | None, seeds: Seeds) -> Canaries | None:
        """The canaries of a run with these seeds; None of a run that has none."""
        if settings is None:
            return None
        words = seeds.numpy("audit", "words")
        rows = [
            Row(instruction=f"canary {_words(words)}", output=_words(words))
            for _ in range(settings.canaries)
        ]
        coins = seeds.numpy("audit", "coins").integers(2, size=len(rows)) == 1
        return Canaries(settings.client, rows, coins, settings.repeat)

    def __len__(self) -> int:
        """Number of canaries."""
        return len(self.rows)

    def planted(self) -> list[Row]:
        """The rows that are added to the client's."""
        chosen = [row for row, is_in in zip(self.rows, self.is_in, strict=True) if is_in]
        return [row for row in chosen for _ in range(self.repeat)]

    def check_length(self, encoder: Encoder, max_length: int) -> None:
        """Raise a `UserError` where one would be cut, so that less of it would be trained on."""
        encoded = encoder.examples(self.rows, "the canaries of `audit`")
        longest = max(len(each.prompt) + len(each.answer) for each in encoded)
        if longest > max_length:
            raise UserError(
                f"`audit`: a canary has up to {longest} tokens in this prompt, but "
                f"`data.max_length` is {max_length}: raise it to {longest} or more"
            )


def _words(generator: np.random.Generator) -> str:
    """Random words in syllables of a consonant and a vowel."""
    count = _WORDS * _SYLLABLES
    consonants = generator.integers(len(_CONSONANTS), size=count)
    vowels = generator.integers(len(_VOWELS), size=count)
    syllables = [_CONSONANTS[c] + _VOWELS[v] for c, v in zip(consonants, vowels, strict=True)]
    return " ".join(
        "".join(syllables[start : start + _SYLLABLES]) for start in range(0, count, _SYLLABLES)
    )
