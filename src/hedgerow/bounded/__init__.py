"""Strangers' programs, run in a process of their own, which has bounds on its time and memory.

A model's folder brings programs: its chat template is written in Jinja, whose sandbox keeps it from
files and from Python, but not from loops without end, nor from texts that fill the memory; and
regular expressions may take longer than anybody can wait. So neither runs in this process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from hedgerow.bounded.process import Exceeded, Process

__all__ = ["Asked", "Exceeded", "Failure", "Marked", "matches", "render"]

_Conversation = Sequence[Mapping[str, Any]]
Asked = (
    tuple[_Conversation, bool | None]
    | tuple[_Conversation, bool | None, Sequence[Mapping[str, Any]] | None]
)
"""A conversation that a template is to write, as `render` has it."""

_process = Process()


class Failure(str):
    """Why a template or an expression has failed: at most 300 characters, all printable."""

    __slots__ = ()


class Marked(str):
    """A text, parts of which its template has marked as generated (`{% generation %}`)."""

    __slots__ = ("parts",)

    parts: list[tuple[int, int]]
    """From where to where in the text each of them stands, in order."""

    def __new__(cls, text: str, parts: list[tuple[int, int]]) -> Marked:
        marked = super().__new__(cls, text)
        marked.parts = parts
        return marked


def render(
    template: str,
    asked: Sequence[Asked],
    variables: Mapping[str, Any],
    *,
    continued: bool = False,
) -> list[str | Failure]:
    """What a chat template makes of conversations, as transformers renders it.

    One call with many conversations costs little more than transformers itself; each call costs
    what two processes need to exchange a message, about 0.1 ms.

    Args:
        template: its source, in Jinja.
        asked: conversations, each with whether an answer is to follow (`add_generation_prompt`);
            with None, none is, and its text is to be `Marked`. What follows, if anything, are the
            tools that may be called, or None.
        variables: what the template is told beside them, as the tokenizer's special tokens.
        continued: whether what the last message says is to be continued
            (`continue_final_message`).

    Returns:
        The text of each conversation, or why there is none.

    Raises:
        Exceeded: they take more time or memory than they may, or write more text.
    """
    request = {
        "template": template,
        "asked": asked,
        "variables": variables,
        "continued": continued,
    }
    outcomes = (_outcome(each) for each in _process.ask("render", request))
    return [
        Marked(each[0], [(start, stop) for start, stop in each[1]])
        if isinstance(each, list)
        else each
        for each in outcomes
    ]


def matches(
    expressions: Iterable[str], texts: Iterable[str], *, how: Literal["match", "fullmatch"]
) -> list[list[bool] | Failure]:
    """Whether regular expressions match each of some texts, by `re.match` or `re.fullmatch`.

    Returns:
        For each expression a bool for each text; or why it is no expression.

    Raises:
        Exceeded: they take more time or memory than they may.
    """
    request = {"expressions": list(expressions), "texts": list(texts), "how": how}
    return [_outcome(each) for each in _process.ask("match", request)]


def _outcome(reply: Mapping[str, Any]) -> Any:
    return Failure(reply["failure"]) if "failure" in reply else reply["done"]
