"""Prompt templates: how a row becomes the text that the model continues, and the text it should.

A template is a text with `{instruction}` and `{input}`; what stands between `{?input}` and
`{/input}` is there only for rows whose input is not empty. `chat` is the tokenizer's own template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hedgerow.data.rows import Message, Row
from hedgerow.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
_SECTION = re.compile(r"\{\?input\}(.*?)\{/input\}", re.DOTALL)


class Template(Protocol):
    """Turns rows into text."""

    @property
    def has_special_tokens(self) -> bool:
        """Whether the prompt's text holds the tokenizer's special tokens (BOS …) already."""

    def prompt(self, row: Row) -> str:
        """The text that the model is given."""

    def answer(self, row: Row) -> str:
        """The text that should follow the prompt."""

    def conversation(self, messages: Sequence[Message]) -> str:
        """The prompt of a later turn, after messages up to the user's that is to be answered.

        Of one message, it is the prompt of a row with this instruction and no input.
        """


def load(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template called `name`.

    Args:
        name: `alpaca`, `alpaca-short`, `plain`, `chat` (the tokenizer's own), or a text file, which
            is taken as it stands, with the newline at its end.

    Raises:
        UserError: there is no such template, or it cannot be used.
    """
    if name == "chat":
        return ChatTemplate(tokenizer)
    if name in TEXTS:
        return TextTemplate(TEXTS[name], name)
    try:
        return TextTemplate(Path(name).read_text(encoding="utf-8-sig"), name)
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

    Raises:
        UserError: a placeholder is missing or unknown, or a section is not closed.
    """

    has_special_tokens = False

    def __init__(self, text: str, where: str) -> None:
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
        text = self.with_input if row.input.strip() else self.without_input
        if row.history:
            return self._opening(row.history) + _filled(self._turn(text), row)
        return _filled(text, row)

    def answer(self, row: Row) -> str:
        return row.output

    def conversation(self, messages: Sequence[Message]) -> str:
        """As `Template.conversation`, for a template that knows of one turn only.

        What comes before the instruction's own paragraph, as alpaca's introduction, stands once;
        what follows it is repeated for each turn. An empty line ends each answer, and a system's
        message, which stands in front.
        """
        *history, last = messages
        return self.prompt(Row(instruction=last.content, history=tuple(history)))

    @property
    def _introduction(self) -> str:
        before = self.without_input.partition("{instruction}")[0]
        return before[: before.rfind("\n\n") + 2] if "\n\n" in before else ""

    def _turn(self, text: str) -> str:
        """A turn of the template, without the introduction."""
        before = text.partition("{instruction}")[0]
        return text.removeprefix(before[: before.rfind("\n\n") + 2] if "\n\n" in before else "")

    def _opening(self, history: Sequence[Message]) -> str:
        """The introduction and the turns of a history."""
        turn = self._turn(self.without_input)
        system = "".join(f"{m.content}\n\n" for m in history if m.role == "system")
        turns = [
            _filled(turn, Row(message.content))
            if message.role == "user"
            else f"{message.content}\n\n"
            for message in history
            if message.role != "system"
        ]
        return system + _FIELD.sub("", self._introduction) + "".join(turns)


class ChatTemplate:
    """The tokenizer's own template: a user's message, which the assistant answers.

    Raises:
        UserError: the tokenizer has no template, or what it writes for an answered message does not
            begin with what it writes for the message alone.
    """

    has_special_tokens = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "`data.prompt`: the tokenizer has no chat template: choose another, as alpaca"
            )
        self.tokenizer = tokenizer
        self.message = TextTemplate(_USER_MESSAGE, "chat")
        # Now, rather than after minutes of reading and tokenising.
        self.answer(Row(instruction="question", output="reply"))

    def prompt(self, row: Row) -> str:
        return self._render(self._asked(row), add_generation_prompt=True)

    def answer(self, row: Row) -> str:
        reply = {"role": "assistant", "content": row.output}
        prompt, whole = self.prompt(row), self._render([*self._asked(row), reply])
        if not whole.startswith(prompt):
            raise UserError(
                "`data.prompt`: the tokenizer's chat template does not continue its own prompt "
                "with the answer, so the two cannot be told apart: choose another prompt"
            )
        answer = whole[len(prompt) :]
        eos = self.tokenizer.eos_token
        # Many templates add a newline after EOS, where generation has long stopped.
        return answer.rstrip() if eos and answer.rstrip().endswith(eos) else answer

    def conversation(self, messages: Sequence[Message]) -> str:
        *history, last = messages
        return self.prompt(Row(instruction=last.content, history=tuple(history)))

    def _asked(self, row: Row) -> list[dict[str, str]]:
        """The messages before the answer."""
        asked = self.message.prompt(replace(row, history=()))
        messages = [*row.history, Message(role="user", content=asked)]
        return [{"role": message.role, "content": message.content} for message in messages]

    def _render(self, messages: list[dict[str, str]], **options: Any) -> str:
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except jinja2.TemplateError as error:
            raise UserError(
                f"`data.prompt`: the tokenizer's chat template fails ({error}): choose another"
            ) from None
        assert isinstance(text, str)
        return text


def _filled(text: str, row: Row) -> str:
    """A template's text with a row's; what stands in the row is never read as a template."""
    values = {"instruction": row.instruction, "input": row.input}
    # In one pass: a value that holds "{input}" itself must stay as it is.
    return _FIELD.sub(lambda field: values[field[1]], text)
