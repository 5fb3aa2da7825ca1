"""Words of a text in any script, for the metrics that compare answers by theirs.

Scripts without spaces between words (Chinese, Japanese, Thai …) have characters in their place, as
is usual where no dictionary of the language is at hand.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

import regex

_SPACELESS = "".join(
    rf"\p{{scx={script}}}"
    for script in (
        *("Han", "Hiragana", "Katakana", "Bopomofo", "Yi"),
        *("Thai", "Lao", "Khmer", "Myanmar"),
        *("Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Javanese", "Balinese"),
    )
)
_LETTERS = r"[\p{L}\p{N}\p{M}]"
_CHARACTER = rf"[[{_SPACELESS}]&&[\p{{L}}\p{{N}}]]\p{{M}}*"
# A joiner stands inside words, as in Persian; an emoji may be several, joined or with a modifier.
_WORD = rf"[{_LETTERS}--[{_SPACELESS}]](?:\p{{M}}|[\u200c\u200d]?[{_LETTERS}--[{_SPACELESS}]])*"
_EMOJI = r"(?:\p{RI}{1,2}|\p{Extended_Pictographic}(?:\p{M}|\p{EMod}|\u200d\X)*)"


def words(text: str) -> list[str]:
    """The words of a text, in lower case and in Unicode's normal form NFKC.

    A word is a run of letters, digits and marks; one character of a script without spaces; or an
    emoji. Of ASCII, these are the runs of letters and digits.
    """
    found: list[str] = _pattern().findall(unicodedata.normalize("NFKC", text).lower())
    return found


def spaced(text: str) -> str:
    """The text in normal form NFC, with spaces around each character of a script without them."""
    return str(_character().sub(r" \g<0> ", unicodedata.normalize("NFC", text)))


@cache
def _pattern() -> Any:
    return regex.compile(f"{_CHARACTER}|{_WORD}|{_EMOJI}", regex.V1)


@cache
def _character() -> Any:
    return regex.compile(_CHARACTER, regex.V1)
