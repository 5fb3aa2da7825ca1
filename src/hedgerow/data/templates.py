"""Prompt templates: how a row becomes the text that the model continues, and the text it should.

A template is a text with `{instruction}` and `{input}`; what stands between `{?input}` and
`{/input}` is there only for rows whose input is not empty. `chat` is the tokenizer's own template.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from hedgerow.data.chat import ChatTemplate, Conversation
from hedgerow.data.rows import Message, Row
from hedgerow.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hedgerow.settings import TextSettings

_BLOCKS = (
    "### Instruction:\n{instruction}\n\n{?input}### Input:\n{input}\n\n{/input}### Response:\n"
)
TEXTS = {
    # https://github.com/tatsu-lab/stanford_alpaca#data-release, word for word
    "alpaca": "Below is an instruction that describes a task{?input}, paired with an input that "
    "provides further context{/input}. Write a response that appropriately completes the "
    "request.\n\n" + _BLOCKS,
    "alpaca-short": _BLOCKS,
    "plain": "{instruction}\n\n{?input}{input}\n\n{/input}",
}
"""The named templates, in the language of template files."""

_USER_MESSAGE = "{instruction}{?input}\n\n{input}{/input}"
_MARK = re.compile(r"\{[?/]?\w+\}")
_FIELD = re.compile(r"\{(instruction|input)\}")
_JINJA = re.compile(r"\{%|\{\{-?\s*\w+[^{}]*\}\}")
_SECTION = re.compile(r"\{\?input\}(.*?)\{/input\}", re.DOTALL)


class Template(Protocol):
    """Turns rows into text."""

    @property
    def has_special_tokens(self) -> bool:
        """Whether the prompt's text holds the tokenizer's special tokens (BOS …) already."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Numbers of the tokens with which it ends an answer, if any, beside the model's own."""

    @property
    def date(self) -> datetime.date | None:
        """Day that it writes; None where it writes no date."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that tell what is unexpected about its prompts."""

    @property
    def written(self) -> str:
        """What it writes around a row's texts."""

    @property
    def writes_tools(self) -> bool:
        """Whether it writes tools, calls of them, and what they return."""

    def prompt(self, row: Row) -> str:
        """The text that the model is given."""

    def prompts(self, rows: Iterable[Row]) -> Iterator[str]:
        """The text that the model is given, of each row."""

    def examples(self, rows: Iterable[Row]) -> Iterator[tuple[str, str, str]]:
        """Of each row the text that the model is given, what should follow, and what ends that."""

    def conversations(self, rows: Iterable[Row]) -> Iterator[Conversation]:
        """The texts of each row as `examples` has them, and where its earlier answers stand."""


def in_turns(texts: Sequence[str]) -> Row:
    """The row of a conversation, of the texts of user, assistant, user … up to the user's."""
    roles: tuple[Literal["user"], Literal["assistant"]] = ("user", "assistant")
    earlier = (Message(roles[n % 2], text) for n, text in enumerate(texts[:-1]))
    return Row(instruction=texts[-1], history=tuple(earlier))


def load(text: TextSettings, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that `text.prompt` names.

    A text file is taken as it stands, with the newline at its end.

    Raises:
        UserError: there is no such template, or it cannot be used.
    """
    name, every_turn = text.prompt, text.loss_on == "turns"
    if name == "chat":
        message = TextTemplate(_USER_MESSAGE, "chat")
        return ChatTemplate(tokenizer, text.template, message.asked, every_turn=every_turn)
    end = (tokenizer.eos_token or "") if every_turn else ""
    if name in TEXTS:
        return TextTemplate(TEXTS[name], name, end)
    try:
        return TextTemplate(Path(name).read_text(encoding="utf-8-sig"), name, end)
    except OSError:
        known = ", ".join([*TEXTS, "chat"])
        raise UserError(
            f"`data.prompt`: {name} is neither a file that can be read nor one of {known}"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{name}: is not text in UTF-8: give a template's text file") from None


class TextTemplate:
    """A text with placeholders.

    Args:
        text: the template.
        where: the template's name or file, for messages.
        end: token that ends an earlier answer, as EOS ends the last one; empty is none.

    Raises:
        UserError: a placeholder is missing or unknown, or a section is not closed.
    """

    has_special_tokens = False
    ends = ()
    date = None
    notes = ()
    writes_tools = False

    def __init__(self, text: str, where: str, end: str = "") -> None:
        if _JINJA.search(text):
            raise UserError(
                f"{where}: is written in Jinja, as tokenizers' chat templates are: write "
                "{instruction} and {input} where a row's texts stand; or put it into the model's "
                "folder as chat_template.jinja, and set data.prompt=chat"
            )
        self.written, self._end = text + end, end
        self.with_input = _SECTION.sub(lambda section: section[1], text)
        self.without_input = _SECTION.sub("", text)
        for mark in _MARK.findall(self.with_input):
            if mark in ("{?input}", "{/input}"):
                raise UserError(f"{where}: {mark} stands alone: write {{?input}} … {{/input}}")
            if not _FIELD.fullmatch(mark):
                raise UserError(
                    f"{where}: {mark} is not a known placeholder (known: {{instruction}}, "
                    "{input}, {?input} … {/input})"
                )
        if "{instruction}" not in self.without_input:
            raise UserError(
                f"{where}: must hold {{instruction}} outside of {{?input}} … {{/input}}"
            )

    def prompt(self, row: Row) -> str:
        """The text that the model is given.

        What comes before the instruction's own paragraph, as alpaca's introduction, stands once;
        what follows it is repeated for each turn. An empty line ends each other turn.
        """
        return self._conversation(row).prompt

    def prompts(self, rows: Iterable[Row]) -> Iterator[str]:
        """The text that the model is given, of each row."""
        return map(self.prompt, rows)

    def examples(self, rows: Iterable[Row]) -> Iterator[tuple[str, str, str]]:
        """Of each row the text that the model is given, what should follow, and what ends that."""
        return ((self.prompt(row), row.output, "") for row in rows)

    def conversations(self, rows: Iterable[Row]) -> Iterator[Conversation]:
        """The texts of each row as `examples` has them, and where its earlier answers stand."""
        return map(self._conversation, rows)

    def _conversation(self, row: Row) -> Conversation:
        if not row.history:
            return Conversation(self.asked(row), row.output, "", [])
        introduction, turn = _parts(self.without_input)
        told = [f"{each.content}\n\n" for each in row.history if each.role == "system"]
        prompt = "".join([*told, _filled(introduction)])
        earlier = []
        for each in row.history:
            if each.role == "user":
                prompt += _filled(turn, each.content)
            elif each.role == "assistant":
                said = each.content + self._end
                if each.content.strip():
                    earlier.append((len(prompt), len(prompt) + len(said)))
                prompt += f"{said}\n\n"
        prompt += _filled(_parts(self._text(row))[1], row.instruction, row.input)
        return Conversation(prompt, row.output, "", earlier)

    def asked(self, row: Row) -> str:
        """The text of a row without its earlier turns."""
        return _filled(self._text(row), row.instruction, row.input)

    def _text(self, row: Row) -> str:
        return self.with_input if row.input.strip() else self.without_input


def _filled(text: str, instruction: str = "", input: str = "") -> str:
    # In one pass: a value that holds "{input}" itself must stay as it is.
    values = {"instruction": instruction, "input": input}
    return _FIELD.sub(lambda field: values[field[1]], text)


def _parts(text: str) -> tuple[str, str]:
    """A template's introduction, which may be empty, and what is said in each turn."""
    before = text.partition("{instruction}")[0]
    introduction = before[: before.rfind("\n\n") + 2] if "\n\n" in before else ""
    return introduction, text.removeprefix(introduction)
