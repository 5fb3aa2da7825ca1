"""Chat templates: what a tokenizer's own template makes of a conversation, once it is known.

A template is a program that somebody wrote. Before it is used it is asked to write conversations
whose texts are known, and what comes back says what it does: whether texts come back as they were
given, what it writes before and after an answer, whether it reads the clock. It runs in a process
of its own (`bounded`), which writes many rows at once.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hedgerow import bounded
from hedgerow.data.rows import Message, Record, Row, texts_in
from hedgerow.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hedgerow.settings import TemplateSettings

_T = TypeVar("_T")
_Messages = Sequence[Message]
_Asked = tuple[_Messages, bool | None]
"""Messages that the template is to write, and whether an answer is to follow (in generation); None
is for a text in which the parts are marked that it marks as generated."""
_Steps = Generator[_Asked, Any, _T]
"""Has one thing after another written, is sent the text, and returns what it makes of that."""

_QUESTION, _REPLY, _TURN = "Question8Wd3Xy", "Reply4Qm7Zk", "Turn6Jc1Vb"
"""Texts that no row holds; the last place where the reply stands is the answer's."""
_TOOL, _ARGUMENT = "tool5Hb2Nf", "Value6Rk9Xs"
_PLACES = re.compile(f"{_TURN}[0-9]+\\.")
_AWKWARD = " <b>&\"'{}$ é\n\n  - item\n" + "a long text goes on and on. " * 200
"""A text that is altered wherever texts are escaped, cut, or change their case or their spaces."""
_DAYS = (datetime.date(2001, 2, 3), datetime.date(2012, 11, 12))
"""Two days that are written differently in every form."""
_SAME = 8
"""Number of times that a template has to write the same."""
_RULE = Message("system", "You are asked to answer.")
_ASKED = [Message("user", _QUESTION), Message("assistant", _REPLY)]
_OTHER = "choose another `data.prompt`, as alpaca"
_NO_TOOLS = "leave tools out of the rows, or take a model whose template writes them"
_LAST = "set `data.loss_on` to answer, or choose another `data.prompt`, as alpaca"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOGETHER = (256, 1_000_000)
"""Largest number of rows, and of characters, that are written at once."""
_CLOCK = (
    "{%- macro strftime_now(format) %}{% set now = namespace(text=format) %}"
    "{% for directive, value in hedgerow_day.items() %}"
    "{% set now.text = now.text.replace(directive, value) %}"
    "{% endfor %}{{ now.text }}{% endmacro %}\n"
)
"""What stands before a template that is to be given a day: transformers hands on no functions.

The line's end is none of the text: transformers has Jinja trim it.
"""
_READ = "the clock is read"
_NO_CLOCK = (
    f"{{%- macro strftime_now(format) %}}{{{{ raise_exception('{_READ}') }}}}{{% endmacro %}}\n"
)
"""What stands before a template to find out whether it reads the clock."""
_DIRECTIVES = [
    f"%{flag}{letter}"
    for letter in "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZf"
    for flag in ("-", "")
]


class Conversation(NamedTuple):
    """The text of a row, all of whose answers are to be learnt."""

    prompt: str
    """What stands before the last answer."""
    answer: str
    """The last answer."""
    end: str
    """What ends it."""
    earlier: list[tuple[int, int]]
    """From where to where in the prompt each earlier answer stands, with what ends it."""


class _Fails(UserError):
    """The template fails for a conversation, as some do for some."""


class ChatTemplate:
    """The tokenizer's own template: a user's message, which the assistant answers.

    The prompt is what the template writes before an answer, in training as in generation.

    Attributes:
        ends: numbers of the tokens that end an answer: the first control token that the template
            writes after it, if there is one; what follows that is left out.
        notes: sentences that tell how its prompts differ from those of its generation.
        written: what it writes around a conversation's texts.

    Raises:
        UserError: the tokenizer has no template, or several and none is named; it fails, or takes
            more time or memory than it may; or what it writes does not hold the texts that it is
            given.
    """

    has_special_tokens = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: TemplateSettings,
        message: Callable[[Row], str],
        *,
        every_turn: bool = False,
    ) -> None:
        """Find out what the template does.

        Args:
            settings: which one it is, and the day and the variables that it is given.
            message: gives the user's message of a row.
            every_turn: whether earlier answers are to be learnt, so that it is told of them.
        """
        self._tokenizer, self._message = tokenizer, message
        self._source = _chosen(tokenizer, settings.name)
        self._given = settings.variables
        _check_read(self._source, self._given)
        file = _file_of(tokenizer, self._source)
        self._what = "the tokenizer's chat template" + (f" ({file})" if file else "")
        self._in_parts, self._arguments_as_text = False, False
        self._lead = ""
        self._opening: list[Message] = []
        self._forgets = False
        self._clock: datetime.datetime | None = None
        self._day: datetime.date | None = None
        self.notes: tuple[str, ...] = ()
        self.ends: tuple[int, ...] = ()
        added = (str(token) for token in tokenizer.added_tokens_decoder.values())
        names = sorted((name for name in added if name.strip()), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, names)) or "(?!)")
        try:
            self._probe_texts()
            self._probe_clock(settings.date)
            self._probe_chance()
            self._probe_answer()
            if every_turn:
                self._probe_turns()
            if settings.date is not None and self.date is None:
                self.notes += ("data.template.date: the chat template writes no date",)
        except UserError as error:
            raise UserError(f"`data.prompt`: {error}") from None

    @property
    def date(self) -> datetime.date | None:
        """Day that the template is given; None where it writes no date."""
        return self._day

    def prompt(self, row: Row) -> str:
        """The text that the model is given."""
        return next(self.prompts([row]))

    def prompts(self, rows: Iterable[Row]) -> Iterator[str]:
        """The text that the model is given, of each row."""
        return self._together(self._prompt, rows)

    def examples(self, rows: Iterable[Row]) -> Iterator[tuple[str, str, str]]:
        """Of each row the text that the model is given, what should follow, and what ends that."""
        return self._together(self._example, rows)

    def conversations(self, rows: Iterable[Row]) -> Iterator[Conversation]:
        """The texts of each row as `examples` has them, and where its earlier answers stand."""
        return self._together(self._conversation, rows)

    def _together(self, steps: Callable[[Row], _Steps[_T]], rows: Iterable[Row]) -> Iterator[_T]:
        """What comes of each row, in their order; many rows are written at once.

        Raises:
            UserError: in place of a row's, where it cannot be written.
        """
        for batch in _batches(rows):
            running = [steps(row) for row in batch]
            after = f", here or in the {len(batch) - 1} rows after it" if len(batch) > 1 else ""
            outcomes: dict[int, _T | UserError] = {}
            answers: dict[int, str | _Fails | None] = dict.fromkeys(range(len(running)))
            while answers:
                asked: dict[int, _Asked] = {}
                for number, answer in answers.items():
                    try:
                        if isinstance(answer, _Fails):
                            asked[number] = running[number].throw(answer)
                        else:
                            asked[number] = running[number].send(answer)
                    except StopIteration as end:
                        outcomes[number] = end.value
                    except UserError as error:
                        outcomes[number] = error
                tools = [batch[number].tools for number in asked]
                written = self._written_all(list(asked.values()), after=after, tools=tools)
                answers = dict(zip(asked, written, strict=True))
            for number in range(len(running)):
                outcome = outcomes[number]
                if isinstance(outcome, UserError):
                    raise outcome
                yield outcome

    def _prompt(self, row: Row) -> _Steps[str]:
        before, _, _ = yield from self._around(self._asked(row), row.tools)
        return before

    def _example(self, row: Row) -> _Steps[tuple[str, str, str]]:
        answer = Message("assistant", row.output, row.calls)
        before, said, end, _ = yield from self._answered(self._asked(row), answer, row.tools)
        return before, said, end

    def _answered(
        self, messages: _Messages, answer: Message, tools: Sequence[Record]
    ) -> _Steps[tuple[str, str, str, str]]:
        """What is written before an answer, the answer, what ends it, and what ends others."""
        before, end, after = yield from self._around(messages, tools)
        whole: str = yield [*messages, answer], False
        if answer.calls:
            if not whole.startswith(before):
                before = yield messages, True  # without the space, say, that texts begin with
            return before, *self._calling(before, whole, after, end, answer.calls), end
        said = _between(before, whole, after)
        if said is not None and _letters(said) == _letters(answer.content):
            return before, said, end, end
        # An answer with thoughts of its own, which take the place of empty ones, maybe in the form
        # that the generation prompt begins.
        begun: str = yield messages, True
        said = _between(begun, whole, after)
        if said is not None and _letters(answer.content).endswith(_letters(said)):
            thought = _letters(answer.content).removesuffix(_letters(said))
            if _letters(begun).endswith(thought):
                return begun, said, end, end
        # Some leave out thoughts, or read them wrongly: the answer is learnt as it stands.
        return before, self._lead + answer.content, end, end

    def _calling(
        self, before: str, whole: str, after: str, end: str, calls: Sequence[Record]
    ) -> tuple[str, str]:
        """An answer that calls tools, as it stands in a conversation, and what ends it.

        It may end otherwise than others do: with the last control token that is written.

        Args:
            before: what is written before an answer.
            whole: what is written of the conversation with this one.
            after: what is written after an answer that calls none.
            end: of that, what ends it.

        Raises:
            UserError: it does not begin as answers do, or has lost a call.
        """
        if not whole.startswith(before):
            raise UserError(
                f"{self._what} writes calls of tools otherwise than answers begin: {_NO_TOOLS}"
            )
        said = whole[len(before) :]
        for call in calls:
            _check_written(self._what, "calls", call["function"]["name"], said)
        if said.endswith(after):
            return said[: len(said) - len(after)], end
        found = list(self._token.finditer(said))
        if not found or said[found[-1].end() :].strip():
            return said.rstrip(), ""
        return said[: found[-1].start()], found[-1][0]

    def _conversation(self, row: Row) -> _Steps[Conversation]:
        messages, last = self._asked(row), Message("assistant", row.output, row.calls)
        prompt, answer, own_end, end = yield from self._answered(messages, last, row.tools)
        said: list[tuple[int, int]] = []
        if any(message.role == "assistant" for message in messages):
            if _MARKS.search(self._source):
                said = yield from self._marked([*messages, last], prompt)
            elif any(message.calls for message in messages):
                said = yield from self._told_one_by_one(messages, prompt, row.tools)
            else:
                said = yield from self._told_apart(messages, prompt)
        # What an answer begins with in generation, and what ends it, is learnt with it, as the last
        # one's is.
        earlier = [
            (
                start - len(self._lead) * prompt.endswith(self._lead, 0, start),
                stop + len(end) * prompt.startswith(end, stop),
            )
            for start, stop in said
            if self._token.sub("", prompt[start:stop]).strip()
        ]
        return Conversation(prompt, answer, own_end, earlier)

    def _marked(self, messages: _Messages, prompt: str) -> _Steps[list[tuple[int, int]]]:
        """Where in a prompt the template's own marks say that the assistant speaks.

        Raises:
            UserError: it writes another text with an answer after the prompt.
        """
        whole: bounded.Marked = yield messages, None
        parts = [(start, min(stop, len(prompt))) for start, stop in whole.parts]
        parts = [(start, stop) for start, stop in parts if start < stop]
        if parts and not prompt.startswith(whole[: parts[-1][1]]):
            raise UserError(f"{self._what} writes earlier answers in two ways: {_LAST}")
        return parts

    def _told_apart(self, messages: _Messages, prompt: str) -> _Steps[list[tuple[int, int]]]:
        """Where in a prompt its answers stand, by what the template writes around others.

        They are found as they stand there: without thoughts, say, as many templates write all
        answers but the last.

        Raises:
            UserError: what the template writes around an answer depends on it, or it writes the
                answer otherwise than it is given.
        """
        others = [
            Message("assistant", f"{_TURN}{n}.") if message.role == "assistant" else message
            for n, message in enumerate(messages)
        ]
        written: str = yield [*others, Message("assistant", _REPLY)], False
        found = _answers(prompt, written.rpartition(_REPLY)[0].removesuffix(self._lead), messages)
        if found is None:
            # As where the prompt is what the template writes in generation.
            written = yield others, True
            found = _answers(prompt, written, messages)
        if found is None:
            raise UserError(
                f"{self._what} writes earlier answers so that they cannot be told from what stands "
                f"around them: {_LAST}"
            )
        return found

    def _told_one_by_one(
        self, messages: _Messages, prompt: str, tools: Sequence[Record]
    ) -> _Steps[list[tuple[int, int]]]:
        """Where in a prompt its answers stand, some of which call tools, as `_told_apart`.

        What is written around calls may differ from what is around texts, so that they are found
        by the conversation up to each, where the prompt begins with that; or else apart.
        """
        found = []
        for place, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before, said, end, _ = yield from self._answered(messages[:place], message, tools)
            if not prompt.startswith(before + said):
                return (yield from self._told_apart(messages, prompt))
            end = end if prompt.startswith(before + said + end) else ""
            found.append((len(before), len(before + said + end)))
        return found

    def _asked(self, row: Row) -> list[Message]:
        """The messages of a row, up to the one that is to be answered."""
        return [*row.history, Message("user", self._message(row)), *row.between]

    def _around(
        self, messages: _Messages, tools: Sequence[Record] = ()
    ) -> _Steps[tuple[str, str, str]]:
        """What is written before an answer, what ends it, and all that is written after it.

        Raises:
            UserError: the template fails, or leaves out what it is given.
        """
        if self._forgets and any(message.role == "assistant" for message in messages):
            raise UserError(f"{self._what} leaves out earlier answers: {_OTHER}")
        written: str = yield [*messages, Message("assistant", _REPLY)], False
        before, found, after = written.rpartition(_REPLY)
        if not found:
            raise UserError(f"{self._what} leaves out the answer: {_OTHER}")
        before = before.removesuffix(self._lead)
        if left_out := _left_out(messages, before):
            # Some put the system's text before the last message, where that is the user's.
            before = yield messages, True
            if _left_out(messages, before):
                raise UserError(
                    f"{self._what} leaves out or alters what the {left_out.role} says "
                    f"({_shown(left_out.content)}): {_OTHER}"
                )
        for tool in tools:
            _check_written(self._what, "the tool", tool["function"]["name"], before)
        for call in (call for message in messages for call in message.calls):
            _check_written(self._what, "a call of", call["function"]["name"], before)
        said, token = self._to_token(after)
        # Letters are none of the answer, nor a token that generation stops at.
        end = said + token if token and not said.strip() else token
        return before, end, after

    def _to_token(self, after: str) -> tuple[str, str]:
        """Of what is written after an answer, the first control token and what is before that.

        Where there is none, it is empty.
        """
        found = self._token.search(after)
        return (after, "") if found is None else (after[: found.start()], found[0])

    def _write(
        self, messages: _Messages, *, generation: bool = False, before: str | None = None
    ) -> str:
        """What the template makes of messages.

        Args:
            generation: whether an answer is to follow.
            before: source that stands before the template's; None is what gives it its day.

        Raises:
            UserError: it fails, or takes more than it may.
        """
        [written] = self._written_all([(messages, generation)], before)
        if isinstance(written, _Fails):
            raise written
        return written

    def _written_all(
        self,
        asked: Sequence[_Asked],
        before: str | None = None,
        *,
        after: str = "",
        tools: Sequence[Sequence[Record]] | None = None,
    ) -> list[str | _Fails]:
        """What the template makes of each of several conversations, as `_write`.

        Args:
            after: where it may have taken more than it may, beside where the sentence says.
            tools: what may be called in each of them; None is nothing in all.

        Raises:
            UserError: it takes more than it may.
        """
        if not asked:
            return []
        if before is None:
            before = "" if self._clock is None else _CLOCK
        try:
            written = bounded.render(
                before + self._source,
                [
                    (self._content(messages), generation, offered or None)
                    for (messages, generation), offered in zip(
                        asked, tools or [()] * len(asked), strict=True
                    )
                ],
                self._tokenizer.special_tokens_map | self._variables,
            )
        except bounded.Exceeded as error:
            raise UserError(f"{self._what} {error}{after}: {_OTHER}") from None
        return [
            _Fails(f"{self._what} fails ({text}): {_OTHER}")
            if isinstance(text, bounded.Failure)
            else text
            for text in written
        ]

    def _content(self, messages: _Messages) -> list[dict[str, Any]]:
        """Messages as a template is given them."""
        return [self._turn(message) for message in messages]

    def _turn(self, message: Message) -> dict[str, Any]:
        text = message.content
        turn = {
            "role": message.role,
            "content": [{"type": "text", "text": text}] if self._in_parts else text,
            **message.told,
        }
        if message.calls:
            turn["tool_calls"] = [self._call(call) for call in message.calls]
        return turn

    def _call(self, call: Record) -> Record:
        """A call of a tool, whose arguments some templates want as text."""
        if not self._arguments_as_text:
            return call
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    @property
    def _variables(self) -> dict[str, Any]:
        """What the template is told beside the messages."""
        told = dict(self._given)
        if self._clock is not None:
            told["hedgerow_day"] = _written_as(self._clock)
        if self._day is not None:
            told["date_string"] = self._day.strftime("%d %b %Y")
        return told

    def _probe_texts(self) -> None:
        """Find the form in which texts come back as they are given.

        Raises:
            UserError: there is none.
        """
        asked = [
            Message("user", f"{_QUESTION}{_AWKWARD}{_QUESTION}"),
            Message("assistant", f"{_REPLY}{_AWKWARD}{_REPLY}"),
        ]
        problems: list[str] = []
        # Some insist on a system's message, and fail for rows that have none.
        for self._opening, self._in_parts in itertools.product(([], [_RULE]), (False, True)):
            try:
                written = self._write([*self._opening, *asked])
            except _Fails as error:
                problems.append(str(error))
                continue
            problem = _difference(asked, written)
            if problem is None:
                break
            problems.append(f"{self._what} {problem}: {_OTHER}")
        else:
            raise UserError(problems[0])
        turns = [
            *(Message("user", "first"), Message("assistant", _REPLY)),
            *(Message("user", "last"), Message("assistant", "end")),
        ]
        # Where it fails, so do rows with several turns.
        self._forgets = _REPLY not in (self._attempt([*self._opening, *turns]) or _REPLY)

    def _probe_clock(self, chosen: datetime.date | None) -> None:
        """Find out whether the template writes the date, and give it one.

        Args:
            chosen: the day that it is given; None is today, and leaves it a date of its own.
        """
        reads = False
        by_name = set()
        for messages in ([*self._opening, *_ASKED], [_RULE, *_ASKED]):
            try:
                self._write(messages, before=_NO_CLOCK)
            except _Fails as error:
                reads = reads or _READ in str(error)
        for self._day in _DAYS:
            by_name.add(self._attempt([*self._opening, *_ASKED]))
        self._day = None
        if reads:
            self._day = chosen or datetime.date.today()
            self._clock = datetime.datetime.combine(self._day, datetime.time(12))
        elif len(by_name) > 1:
            self._day = chosen

    def _probe_chance(self) -> None:
        """Raise a `UserError` where the template writes something else each time."""
        asked = [*self._opening, *_ASKED]
        if len({str(each) for each in self._written_all([(asked, False)] * _SAME)}) > 1:
            raise UserError(f"{self._what} writes something else each time: {_OTHER}")

    def _probe_answer(self) -> None:
        """Find out what the template writes before and after an answer, and in generation."""
        asked = [*self._opening, Message("user", _QUESTION)]
        answered = [*asked, Message("assistant", _REPLY)]
        before, _, after = self._write(answered).rpartition(_REPLY)
        bare, begun = self._attempt(asked), self._attempt(asked, generation=True)
        self.written = (before if bare is None else bare) + after
        said, token = self._to_token(after)
        if token:
            self.ends = (self._tokenizer.convert_tokens_to_ids(token),)
        notes = []
        if said.strip():
            why = "" if token else ", which is no token"
            notes.append(
                f"the chat template writes {said.strip()!r} after answers{why}: they end without it"
            )
        same = 0 if begun is None else _same(before, begun)
        opened, put = (begun or "")[same:], before[same:]
        if begun is None or (begun == bare and put.strip()):
            pass  # it knows of no generation
        elif not opened and not put.strip():
            self._lead = put  # which generation begins with by itself
        elif not opened:
            notes.append(f"the chat template writes {put!r} before answers: so do prompts")
        else:
            instead = f"have {put!r} instead" if put else "leave it out, as before answers"
            notes.append(f"the chat template opens {opened!r} in generation: prompts {instead}")
        self.notes = tuple(notes)

    def _probe_turns(self) -> None:
        """Find out whether earlier answers are learnt as the last one is.

        A template that cannot write several turns, or not so that they can be told apart, is
        refused for the first row that has some.
        """
        opening = tuple(self._opening)
        asked, said = "first", "an earlier answer"
        history = (*opening, Message("user", asked), Message("assistant", said))
        alone = Row(asked, output=said, history=opening)
        try:
            [(before, _, _)] = self.examples([alone])
            [whole] = self.conversations([Row("last", output=_REPLY, history=history)])
        except UserError:
            return
        if not whole.earlier:
            self.notes += ("the chat template marks no earlier answers: the last is learnt alone",)
            return
        start, stop = whole.earlier[0]
        if whole.prompt[:start] != before:
            self.notes += (
                "the chat template writes other text before earlier answers than before the last: "
                "they are learnt as they stand there",
            )
        if not whole.end or not whole.prompt[start:stop].rstrip().endswith(whole.end.strip()):
            self.notes += (
                "the chat template does not end earlier answers as it ends the last: they are "
                "learnt without an end",
            )

    @functools.cached_property
    def writes_tools(self) -> bool:
        """Whether it writes tools, calls of them, and what they return.

        It is asked with arguments as mappings, as transformers has them, and then as text.
        """
        if not {"tools", "tool_calls"} <= set(re.findall(r"\w+", self._source)):
            return False
        function = {"name": _TOOL, "arguments": {"key": _ARGUMENT}}
        call = {"id": "call00001", "type": "function", "function": function}
        parameters = {"type": "object", "properties": {"key": {"type": "string"}}}
        tool = {"name": _TOOL, "description": _QUESTION, "parameters": parameters}
        asked = [
            *self._opening,
            Message("user", "first"),
            Message("assistant", "", (call,)),
            Message("tool", _TURN, told={"name": _TOOL, "tool_call_id": "call00001"}),
            Message("assistant", "end"),
        ]
        for self._arguments_as_text in (False, True):
            offered = [[{"type": "function", "function": tool}]]
            [written] = self._written_all([(asked, False)], tools=offered)
            if isinstance(written, _Fails):
                continue
            _, described, rest = written.partition(_QUESTION)
            _, called, rest = rest.partition(_TOOL)
            if described and called and f'"{_ARGUMENT}"' in rest and _TURN in rest:
                return True
        return False

    def _attempt(self, messages: _Messages, *, generation: bool = False) -> str | None:
        """What the template makes of messages; None where it fails."""
        try:
            return self._write(messages, generation=generation)
        except _Fails:
            return None


@functools.cache
def _written_as(time: datetime.datetime) -> dict[str, str]:
    """What each of `strftime`'s directives makes of a time."""
    return {each: time.strftime(each) for each in _DIRECTIVES}


def _chosen(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """The template that is meant, of those that a tokenizer has.

    Raises:
        UserError: it has none, or none of that name, or several of which none is the default.
    """
    templates: str | dict[str, str] | None = tokenizer.chat_template
    if not templates:
        raise UserError("`data.prompt`: the tokenizer has no chat template: choose another")
    if isinstance(templates, str):
        if name is not None:
            raise UserError(
                f"`data.template.name`: {name!r}: the tokenizer has one chat template, which has "
                "no name: leave it out"
            )
        return templates
    known = ", ".join(sorted(templates))
    if name is None and len(templates) == 1:
        return next(iter(templates.values()))
    if name is None and "default" not in templates:
        raise UserError(
            f"`data.template.name`: the tokenizer has several chat templates ({known}), and none "
            "is the default: name one"
        )
    if name is not None and name not in templates:
        close = did_you_mean(name, list(templates))
        raise UserError(
            f"`data.template.name`: the tokenizer has no chat template {name!r}{close}: name one "
            f"of {known}"
        )
    return templates[name or "default"]


def _check_read(source: str, variables: Iterable[str]) -> None:
    """Raise a `UserError` for a variable that a template does not mention, and so cannot read."""
    known = set(re.findall(r"[^\W\d]\w*", source))
    for name in variables:
        if name not in known:
            raise UserError(
                f"`data.template.{name}`: the chat template reads no {name!r}"
                f"{did_you_mean(name, [*known, 'name', 'date'])}: leave it out"
            )


def _file_of(tokenizer: PreTrainedTokenizerBase, source: str) -> Path | None:
    """The file that a tokenizer's template is in; None where no file of its folder has it."""
    folder = Path(tokenizer.name_or_path)
    if not tokenizer.name_or_path or not folder.is_dir():
        return None
    for pattern in ("chat_template.jinja", "additional_chat_templates/*.jinja"):
        for file in sorted(folder.glob(pattern)):
            with contextlib.suppress(OSError, ValueError):
                if file.read_text(encoding="utf-8") == source:
                    return file
    for name in ("tokenizer_config.json", "chat_template.json"):
        with contextlib.suppress(OSError, ValueError):
            if json.dumps(source) in json.dumps(
                json.loads((folder / name).read_text(encoding="utf-8"))
            ):
                return folder / name
    return None


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows that are written at once: some of them, or one that is long."""
    most, characters = _TOGETHER
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.instruction) + len(row.input) + len(row.output)
        size += sum(len(message.content) for message in (*row.history, *row.between))
        if row.tools:
            size += sum(map(len, texts_in(row.tools)))
        if len(batch) == most or size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _difference(asked: _Messages, written: str) -> str | None:
    """What is wrong with what was written of messages; None if each is there once, in order."""
    place = 0
    for role, text in ((message.role, message.content) for message in asked):
        mark = text[:10]
        found = written.find(text, place)
        if written.count(mark) > text.count(mark):
            return f"writes what the {role} says more than once"
        if found < 0:
            problem = "alters" if mark in written else "leaves out"
            return f"{problem} what the {role} says"
        place = found + len(text)
    return None


def _left_out(messages: _Messages, written: str) -> Message | None:
    """The first message that was not written; earlier answers may be without their thoughts.

    What a tool has returned may stand there as a text in JSON.
    """
    for message in messages:
        text = message.content.strip()
        if message.role == "assistant" or text in written:
            continue
        if message.role != "tool" or json.dumps(text, ensure_ascii=False)[1:-1] not in written:
            return message
    return None


def _check_written(what: str, whose: str, name: str, written: str) -> None:
    """Raise a `UserError` where a template has left out a tool, or a call of one."""
    if name not in written:
        raise UserError(f"{what} leaves out {whose} {_shown(name)}: {_NO_TOOLS}")


def _between(before: str, whole: str, after: str) -> str | None:
    """What stands between two texts in a whole one; None where they are not its ends."""
    if len(whole) < len(before) + len(after):
        return None
    if not (whole.startswith(before) and whole.endswith(after)):
        return None
    return whole[len(before) : len(whole) - len(after)]


def _answers(prompt: str, written: str, messages: _Messages) -> list[tuple[int, int]] | None:
    """Where the answers among messages stand in a prompt; None where that cannot be told.

    Args:
        written: the same prompt, with other texts in the answers' places.
    """
    gaps = _PLACES.split(written)
    answers = [message for message in messages if message.role == "assistant"]
    if len(gaps) != len(answers) + 1 or not prompt.startswith(gaps[0]):
        return None
    place, found = len(gaps[0]), []
    for answer, gap in zip(answers, gaps[1:], strict=True):
        if answer.calls:
            # How they are written is not known, but what follows them is, with its control tokens.
            end = prompt.find(gap, place)
            stop = end if end >= 0 and gap.strip() else None
        else:
            stop = _end_of(answer.content, prompt, place, gap)
        if stop is None:
            return None
        found.append((place, stop))
        place = stop + len(gap)
    return found


def _end_of(answer: str, prompt: str, start: int, gap: str) -> int | None:
    """Where an answer ends that begins somewhere in a prompt, before a gap; None if nowhere.

    Its spaces may be others, and its thoughts may be missing. Where an answer holds what stands
    after it as well, the longest reading is right.
    """
    if prompt.startswith(answer + gap, start):
        return start + len(answer)
    letters, last = _letters(answer), None
    stop = prompt.find(gap, start)
    while stop >= 0:
        said = _letters(prompt[start:stop])
        if len(said) > len(letters):
            break
        if letters.endswith(said):
            last = stop
        stop = prompt.find(gap, stop + 1)
    return last


def _same(one: str, other: str) -> int:
    """Number of characters with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _letters(text: str) -> str:
    """A text without its spaces, which templates may add and trim."""
    return "".join(text.split())


def _shown(text: str) -> str:
    return repr(text if len(text) < 40 else f"{text[:40]}…")
