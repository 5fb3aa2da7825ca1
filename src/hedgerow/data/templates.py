"""Prompt templates: how a row becomes the text that the model continues, and the text it should.

A template is a text with `{instruction}` and `{input}`; what stands between `{?input}` and
`{/input}` is there only for rows whose input is not empty. `chat` is the tokenizer's own template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hedgerow.data.sources import Row
from hedgerow.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hedgerow.settings import Fields

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

    def conversation(self, texts: Sequence[str]) -> str:
        """The prompt of a later turn, after the texts of user, assistant, user … up to the user's.

        Of one text, it is the prompt of a row with this instruction and no input.
        """


def load(name: str, tokenizer: PreTrainedTokenizerBase, fields: Fields) -> Template:
    """The template called `name`.

    Args:
        name: `alpaca`, `alpaca-short`, `plain`, `chat` (the tokenizer's own), or a text file, which
            is taken as it stands, with the newline at its end.
        fields: the columns that hold instruction, input and output.

    Raises:
        UserError: there is no such template, or it cannot be used.
    """
    if name == "chat":
        return ChatTemplate(tokenizer, fields)
    if name in TEXTS:
        return TextTemplate(TEXTS[name], fields, name)
    try:
        return TextTemplate(Path(name).read_text(encoding="utf-8"), fields, name)
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
        fields: the columns that hold instruction, input and output.
        where: the template's name or file, for messages.

    Raises:
        UserError: a placeholder is missing or unknown, or a section is not closed.
    """

    has_special_tokens = False

    def __init__(self, text: str, fields: Fields, where: str) -> None:
        self.fields = fields
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
        values = {
            "instruction": _text(row, self.fields.instruction),
            "input": _text(row, self.fields.input),
        }
        text = self.with_input if values["input"].strip() else self.without_input
        # In one pass: a value that holds "{input}" itself must stay as it is.
        return _FIELD.sub(lambda field: values[field[1]], text)

    def answer(self, row: Row) -> str:
        return _text(row, self.fields.output)

    def conversation(self, texts: Sequence[str]) -> str:
        """As `Template.conversation`, for a template that knows of one turn only.

        What comes before the instruction's own paragraph, as alpaca's introduction, stands once;
        what follows it is repeated for each turn. An empty line ends each answer.
        """
        before = self.without_input.partition("{instruction}")[0]
        introduction = before[: before.rfind("\n\n") + 2] if "\n\n" in before else ""
        turn = self.without_input.removeprefix(introduction)

        def asked(text: str) -> str:
            return _FIELD.sub(lambda f: {"instruction": text, "input": ""}[f[1]], turn)

        parts = [f"{text}\n\n" if n % 2 else asked(text) for n, text in enumerate(texts)]
        return _FIELD.sub("", introduction) + "".join(parts)


class ChatTemplate:
    """The tokenizer's own template: a user's message, which the assistant answers.

    Raises:
        UserError: the tokenizer has no template, or what it writes for an answered message does not
            begin with what it writes for the message alone.
    """

    has_special_tokens = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, fields: Fields) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "`data.prompt`: the tokenizer has no chat template: choose another, as alpaca"
            )
        self.tokenizer = tokenizer
        self.fields = fields
        self.message = TextTemplate(_USER_MESSAGE, fields, "chat")
        # Now, rather than after minutes of reading and tokenising.
        self.answer({fields.instruction: "question", fields.output: "reply"})

    def prompt(self, row: Row) -> str:
        return self._render(self._user(row), add_generation_prompt=True)

    def answer(self, row: Row) -> str:
        reply = {"role": "assistant", "content": _text(row, self.fields.output)}
        prompt, whole = self.prompt(row), self._render([*self._user(row), reply])
        if not whole.startswith(prompt):
            raise UserError(
                "`data.prompt`: the tokenizer's chat template does not continue its own prompt "
                "with the answer, so the two cannot be told apart: choose another prompt"
            )
        answer = whole[len(prompt) :]
        eos = self.tokenizer.eos_token
        # Many templates add a newline after EOS, where generation has long stopped.
        return answer.rstrip() if eos and answer.rstrip().endswith(eos) else answer

    def conversation(self, texts: Sequence[str]) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
        return self._render(messages, add_generation_prompt=True)

    def _user(self, row: Row) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.message.prompt(row)}]

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


def _text(row: Row, column: str | None) -> str:
    value = None if column is None else row.get(column)
    return "" if value is None else str(value)
