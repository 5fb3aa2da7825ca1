"""Final answers of greedy answers to sums, as GSM8K is scored."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from hedgerow.evaluation.metrics.base import AnswerMetric, Score


class FinalAnswer(AnswerMetric):
    r"""How often an answer comes to the right number, as GSM8K is scored (arXiv 2110.14168).

    It is the first number after "####", or in the last \boxed{…}, or the last one where there is
    no such mark. 1,234.5, 1.234,5 and 1'234.5 are one number, as are 1/2, 0.5, 0,5 and \frac{1}{2};
    1.234 and 1,234 are read as in English.
    """

    name: str = "final_answer"
    scores = (Score("final_answer", label="final answer", unit="%", direction="higher"),)

    def score(self, reference: str, answer: str) -> float:
        """100 where both come to the same number, or else 0."""
        right = _final_number(reference)
        return 100 * (right is not None and _final_number(answer) == right)


_CURRENCY = r"\$€£¥₹₩₽₺₫฿"
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<!\d)-(?=[{_CURRENCY}]?[\d.]))?
    [{_CURRENCY}]?
    (?P<digits>\d+(?:[.,']\d+)*|(?<![\w.,'])\.\d+)
    (?:[eE](?P<exponent>[+-]?\d{{1,3}})(?!\w)|/(?P<denominator>\d+)(?![\d/]))?
    """,
    re.ASCII | re.VERBOSE,
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", re.ASCII)

# Of whole numbers in groups, and of decimals: which mark divides, and which is the point.
_FORMS = [
    (re.compile(form, re.ASCII), marks, point)
    for form, marks, point in (
        (r"\d+", "", ""),
        (r"[1-9]\d{0,2}(,\d{3})+(\.\d+)?", ",", "."),
        (r"[1-9]\d?(,\d{2})+,\d{3}(\.\d+)?", ",", "."),
        (r"\d*\.\d+", "", "."),
        (r"[1-9]\d{0,2}(\.\d{3}){2,}(,\d+)?", ".", ","),
        (r"[1-9]\d{0,2}(\.\d{3})+,\d+", ".", ","),
        (r"[1-9]\d{0,2}('\d{3})+([.,]\d+)?", "'", ".,"),
        (r"\d+,\d+", "", ","),
    )
]


def _final_number(text: str) -> Fraction | None:
    text = _plain(text)
    before, mark, after = text.partition("####")
    if mark:
        return next(iter(_numbers(after)), None)
    boxed = _BOXED.findall(text)
    found = _numbers(boxed[-1] if boxed else before)
    return found[-1] if found else None


def _plain(text: str) -> str:
    """The text with digits and signs of other scripts, and those of TeX, in ASCII."""
    text = _FRACTION.sub(r"\1/\2", text.replace("{,}", ",").replace(r"\$", "$"))
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f’٬](?=\d{3}(?!\d))", "'", text)
    text = text.translate(_SIGNS)
    return text if text.isascii() else "".join(str(int(c)) if c.isdecimal() else c for c in text)


_SIGNS = str.maketrans("−－﹣．٫⁄", "---../")


def _numbers(text: str) -> list[Fraction]:
    """The numbers in a text, in their order."""
    found = []
    for match in _NUMBER.finditer(text):
        values = _values(match["digits"])
        if match["sign"]:
            values[0] = -values[0]
        if match["exponent"]:
            values[-1] *= Fraction(10) ** int(match["exponent"])
        if match["denominator"] and (divisor := Fraction(Decimal(match["denominator"]))):
            values[-1] /= divisor
        found += values
    return found


def _values(digits: str) -> list[Fraction]:
    """The number that a run of digits and marks is; several where it is a list, as 3,5,7."""
    for form, marks, point in _FORMS:
        if form.fullmatch(digits):
            plain = digits.translate(dict.fromkeys(map(ord, marks)))
            for mark in point:
                plain = plain.replace(mark, ".")
            return [Fraction(Decimal(plain))]
    return [Fraction(Decimal(part)) for part in re.split("[.,']", digits)]
