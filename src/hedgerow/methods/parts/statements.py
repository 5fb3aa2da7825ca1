"""What updates state of themselves: numbers in their metadata, beside the tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hedgerow.errors import InvalidMessage

if TYPE_CHECKING:
    from hedgerow.wire import Update


@dataclass(frozen=True)
class Statement:
    """Numbers of at least 0 that an update states, under one name."""

    name: str
    form: re.Pattern[str]
    """Form of the text."""
    digits: int
    """Number of significant digits of each number."""
    most: float
    """The largest number; what is larger, or no number, is stated as this."""

    def said(self, numbers: Iterable[float]) -> dict[str, str]:
        """Metadata of an update that states these numbers."""
        bounded = (number if number <= self.most else self.most for number in numbers)
        return {self.name: " ".join(f"{number:.{self.digits}g}" for number in bounded)}

    def read(self, about: Mapping[str, str]) -> list[float]:
        """Numbers that an update states, which `check_stated` has passed."""
        return [float(number) for number in about[self.name].split()]


def check_stated(update: Update, about: Mapping[str, str], statements: Sequence[Statement]) -> None:
    """Check the metadata of an update: what is known of it, and what it states.

    Args:
        update: as it arrived.
        about: metadata that it must have as they are.
        statements: what it has to state beside them.

    Raises:
        InvalidMessage: metadata are missing, unexpected or other ones, or have another form.
    """
    own = {each.name: update.about.get(each.name, "") for each in statements}
    update.check_about({**about, **own})
    for each in statements:
        if not each.form.fullmatch(own[each.name]):
            raise InvalidMessage(f"{each.name} has an invalid value: {own[each.name]!r:.60}")
    for each in statements:
        if any(number > each.most for number in each.read(own)):
            raise InvalidMessage(f"{each.name} contains values above {each.most:g}")
