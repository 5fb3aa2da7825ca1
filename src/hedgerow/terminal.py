"""What is shown in a terminal: text alone, whoever has written it.

Names in ledgers, values of columns, keys of files and what others' programs say reach the screen
through here or through `hedgerow.console`, which asks this room.
"""

from __future__ import annotations

import json
import sys
from unicodedata import category

_JOINERS = "\u200c\u200d"
"""Characters without a width that Persian, Indic scripts and emoji are written with."""


def printable(text: str) -> str:
    r"""Text in which whatever moves the cursor or turns the direction of writing is escaped.

    These are control characters (C0, but for line breaks and tabs, and C1, so that there are no
    escape sequences), bidirectional formatting, other characters that are not seen, and halves of
    surrogate pairs. They become JSON's escapes (`\u001b`), so that JSON stays the same JSON.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_text(c) else json.dumps(c)[1:-1] for c in text)


def show(text: str) -> None:
    """Print text on stdout."""
    print(printable(text))


def say(sentence: str) -> None:
    """Print a sentence on stderr, beside results that may be read by a program."""
    print(printable(sentence), file=sys.stderr, flush=True)


def _is_text(character: str) -> bool:
    return (
        character.isprintable()
        or character in "\n\t"
        or character in _JOINERS
        or category(character) == "Zs"
    )
