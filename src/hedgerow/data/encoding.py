"""From text to tokens: an answer's are those that it has after its prompt, in the whole text.

Control tokens (`</s>`, `<|im_end|>` …) are those that a template writes. Where a row's own text
spells one, it is text like any other.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from hedgerow.data.rows import Message, Row, check_characters, texts_in
from hedgerow.data.templates import Template
from hedgerow.errors import UserError
from hedgerow.lazy import transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
_T = TypeVar("_T")

_ANCHORS = ("\n", ".", "a", "0")
"""Texts behind which an answer is tokenised where it stands behind nothing that it parts from."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of one row."""

    prompt: Ids
    answer: Ids
    """Begins where the prompt ends, and has its end (EOS, or the template's end of a turn)."""
    spelt: bool
    """Whether the row's text spells a control token, which is text here."""
    earlier: tuple[tuple[int, int], ...] = ()
    """From where to where in the prompt each earlier answer stands that is to be learnt."""

    @property
    def learnt(self) -> list[tuple[int, int]]:
        """From where to where in prompt and answer the answers stand that are to be learnt."""
        start = len(self.prompt)
        return [*self.earlier, (start, start + len(self.answer))]


@dataclass(frozen=True)
class Encoder:
    """A template and a tokenizer, which make tokens of rows.

    Training, evaluation, multiple choice and MT-bench share it, so that a prompt has the same
    tokens in all of them.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int | None = None
    """Number of the model's embeddings, which every token must have one of; None checks nothing."""
    writes_ends: bool = True
    """Whether answers end as the template ends them, or else with EOS, which is one token."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer in this template, beside the model's own."""
        return self.template.ends

    def examples(
        self, rows: Sequence[Row], where: str, *, every_turn: bool = False
    ) -> list[Encoded]:
        """Tokenise rows as prompt and answer with its end.

        The prompt's tokens are those that it has alone, as in generation, where nothing follows it.

        Args:
            where: the file or source that the rows are from, for messages.
            every_turn: whether the earlier answers of a conversation are to be learnt too.

        Raises:
            UserError: naming the row that the template cannot write, or that has a token which the
                model has no embedding for, or an earlier answer that cannot be told from what
                stands around it; or the tokenizer has no EOS.
        """
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UserError(
                "`model.path`: the tokenizer has no EOS token, so answers would have no end: set "
                "`eos_token` in its tokenizer_config.json"
            )
        found: list[Encoded | None] = [None] * len(rows)
        for reader, numbers, shown in self._readable(rows):
            earlier: list[tuple[tuple[int, int], ...]] = [()] * len(shown)
            if every_turn:
                written = _written(self.template.conversations, shown, where)
                examples = [(each.prompt, each.answer, each.end) for each in written]
                for place, (row, each) in enumerate(zip(shown, written, strict=True)):
                    if each.earlier:
                        with _named(row, where):
                            earlier[place] = self._within(reader, each.prompt, each.earlier)
            else:
                examples = _written(self.template.examples, shown, where)
            texts = [(prompt, self._ended(answer, end)) for prompt, answer, end in examples]
            # A call of tools may end with a token of its own, which no text ends with.
            ended = [
                bool(row.calls and end and self.writes_ends)
                for row, (_, _, end) in zip(shown, examples, strict=True)
            ]
            prompts, answers = self._pairs(reader, texts)
            for number, prompt, answer, spans, is_ended in zip(
                numbers, prompts, answers, earlier, ended, strict=True
            ):
                if not answer or not (is_ended or answer[-1] in (eos, *self.ends)):
                    answer.append(eos)
                found[number] = Encoded(prompt, answer, reader is not self._plain, spans)
        encoded = [each for each in found if each is not None]
        self._check(rows, [each.prompt + each.answer for each in encoded], where)
        return encoded

    def prompts(self, rows: Sequence[Row], where: str) -> list[Ids]:
        """Tokenise the prompts of rows, for an answer to follow; as `examples` has them.

        Raises:
            UserError: as `examples`.
        """
        found: list[Ids] = [[]] * len(rows)
        for reader, numbers, shown in self._readable(rows):
            texts = _written(self.template.prompts, shown, where)
            for number, prompt in zip(numbers, self._begun(reader.ids(texts)), strict=True):
                found[number] = prompt
        self._check(rows, found, where)
        return found

    def count_unknown(self, ids: Ids) -> int:
        """Number of tokens that stand for text which the tokenizer does not know."""
        unknown, eos = self.tokenizer.unk_token_id, self.tokenizer.eos_token_id
        # Some give all their special tokens one number.
        return 0 if unknown in (None, eos) else ids.count(unknown)

    def hidden(self, text: str) -> str:
        """A text whose control tokens `pair` reads as text, for the template to write.

        Raises:
            UserError: it spells one that this tokenizer cannot read as text.
        """
        if not self._control.search(text):
            return text
        return self._careful.hide(Row(text)).instruction

    def shown(self, text: str) -> str:
        """A text as it was before it, or parts of it, were `hidden`."""
        return self._careful.show(text) if self.is_hidden(text) else text

    def is_hidden(self, text: str) -> bool:
        """Whether `hidden` has hidden anything in a text."""
        # Nothing was hidden as long as nobody has needed the reader that does.
        return "_careful" in vars(self) and self._careful.is_hidden(text)

    def pair(self, prompt: str, answer: str) -> tuple[Ids, Ids]:
        """Tokenise a prompt that the template has written already, and the text after it.

        Raises:
            UserError: a token has no embedding.
        """
        reader = self._careful if self.is_hidden(prompt + answer) else self._plain
        [begun], [rest] = self._pairs(reader, [(prompt, answer)])
        self.check(begun + rest, "a prompt")
        return begun, rest

    def _readable(self, rows: Sequence[Row]) -> Iterator[tuple[_Reader, list[int], list[Row]]]:
        """Rows by who can read them, with their places: most by the tokenizer as it is."""
        find = self._control.search
        spelt = [any(find(text) for text in _texts(row)) for row in rows]
        plain = [number for number, it in enumerate(spelt) if not it]
        if plain:
            yield self._plain, plain, [rows[number] for number in plain]
        careful = [number for number, it in enumerate(spelt) if it]
        if careful:
            yield self._careful, careful, [self._careful.hide(rows[number]) for number in careful]

    def _ended(self, answer: str, end: str) -> str:
        return answer + end if self.writes_ends else answer

    def _within(
        self, reader: _Reader, prompt: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[tuple[int, int], ...]:
        """Which tokens of a prompt are parts of it: from where to where in its tokens.

        Args:
            spans: the parts, in order: from where to where in its characters.

        Raises:
            UserError: that cannot be told.
        """
        ids, places = reader.within(prompt, spans)
        before = len(self._begun([ids])[0]) - len(ids)
        return tuple((start + before, stop + before) for start, stop in places if start < stop)

    def _begun(self, prompts: list[Ids]) -> list[Ids]:
        """Prompts with what the tokenizer begins texts with, unless the template writes that."""
        begin = [] if self.template.has_special_tokens else self._begin
        return [_joined(begin, prompt) for prompt in prompts]

    def _pairs(
        self, reader: _Reader, texts: Sequence[tuple[str, str]]
    ) -> tuple[list[Ids], list[Ids]]:
        """The tokens of prompts, and of the answers after them."""
        prompts = reader.ids([prompt for prompt, _ in texts])
        wholes = reader.ids([prompt + answer for prompt, answer in texts])
        answers: list[Ids] = []
        parted: list[int] = []
        for number, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
            answers.append(whole[len(prompt) :])
            if whole[: len(prompt)] != prompt:
                parted.append(number)
        if parted:
            found = _behind(
                reader,
                [texts[number] for number in parted],
                [prompts[number] for number in parted],
                [wholes[number] for number in parted],
            )
            for number, answer in zip(parted, found, strict=True):
                answers[number] = answer
        return self._begun(prompts), answers

    def _check(self, rows: Sequence[Row], encoded: Sequence[Ids], where: str) -> None:
        """Raise a `UserError` for a token that the model has no embedding for."""
        for row, ids in zip(rows, encoded, strict=True):
            self.check(ids, row.place(where))

    def check(self, ids: Ids, whose: str) -> None:
        """Raise a `UserError` for a token that the model has no embedding for.

        Args:
            whose: what the tokens are of, for messages, for a verb to follow.
        """
        highest = max(ids, default=0)
        if self.vocabulary_size is not None and highest >= self.vocabulary_size:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise UserError(
                f"{whose} has the token {token!r} (number {highest}), which the model has no "
                f"embedding for (it has {self.vocabulary_size:,}): give the model the tokenizer "
                "that it was trained with, or a checkpoint whose embeddings were resized to the "
                "tokenizer (resize_token_embeddings)"
            )

    @cached_property
    def _begin(self) -> Ids:
        """The tokens that the tokenizer begins every text with, as BOS."""
        alone = _ids(self.tokenizer, ["a"])[0]
        dressed = _ids(self.tokenizer, ["a"], add_special_tokens=True)[0]
        for start in range(len(dressed)):
            if dressed[start : start + len(alone)] == alone:
                return dressed[:start]
        return []

    @cached_property
    def _tokens(self) -> list[str]:
        """The control tokens: the special ones, and others that the template puts around texts."""
        added = self.tokenizer.added_tokens_decoder.values()
        written = self.template.written
        found = {str(token) for token in added if token.special or str(token) in written}
        found.update(self.tokenizer.all_special_tokens)
        # One of whitespace alone is how a tokenizer reads text, whatever it calls it.
        return sorted((token for token in found if token.strip()), key=len, reverse=True)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._tokens)) or r"(?!)")

    @cached_property
    def _plain(self) -> _Reader:
        return _Reader(self.tokenizer)

    @cached_property
    def _careful(self) -> _Hiding:
        kind = _Renamed if self.tokenizer.is_fast else _Pieces
        return kind(self.tokenizer, self._tokens, self._control)


class _Reader:
    """Reads text as its tokenizer does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of texts, without any at their beginning or end that they do not hold."""
        return _ids(self.tokenizer, texts)

    def within(
        self, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[Ids, list[tuple[int, int]]]:
        """The tokens of a text, and from where to where in them each of its parts stands.

        A token that reaches over the edge of a part is none of it, but for spaces before it.

        Args:
            spans: the parts, in order: from where to where in the text's characters.

        Raises:
            UserError: a slow tokenizer joins a part with what stands around it.
        """
        if not self.tokenizer.is_fast:
            ids = self.ids([text])[0]
            until = {place: self._until(text, place, ids) for span in spans for place in span}
            return ids, [(until[start], until[stop]) for start, stop in spans]
        read = self._read(text)
        found = _call(self.tokenizer, [read], return_offsets_mapping=True)
        offsets: list[tuple[int, int]] = found["offset_mapping"][0]
        places = []
        first = 0
        for start, stop in spans:
            begin, end = len(self._read(text[:start])), len(self._read(text[:stop]))
            while first < len(offsets) and offsets[first][0] < begin:
                before, after = offsets[first]
                if after > begin and not read[before:begin].strip():
                    break
                first += 1
            last = first
            while last < len(offsets) and offsets[last][0] < end and offsets[last][1] <= end:
                last += 1
            places.append((first, last))
            first = last
        return found["input_ids"][0], places

    def _until(self, text: str, place: int, ids: Ids) -> int:
        """Number of a text's tokens up to a place in it, where they are those of what is before."""
        before = self.ids([text[:place]])[0]
        if ids[: len(before)] != before:
            raise UserError(
                "the tokenizer joins an earlier answer with the text around it, so that its tokens "
                "cannot be told: take another `data.prompt`, or `data.loss_on: answer`"
            )
        return len(before)

    def _read(self, text: str) -> str:
        """A text as its tokenizer is given it."""
        return text

    def offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Where each token of texts begins and ends; of slow tokenizers, nothing."""
        if not self.tokenizer.is_fast:
            return [[] for _ in texts]
        found: list[list[tuple[int, int]]] = _call(
            self.tokenizer, texts, return_offsets_mapping=True
        )["offset_mapping"]
        return found


class _Hiding(_Reader):
    """Reads as control tokens those alone that a template wrote, not those of its row.

    A row's are under other names while the template writes: names that no row can know.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], control: re.Pattern[str]
    ) -> None:
        super().__init__(tokenizer)
        self._control = control
        key = secrets.token_hex(8)
        self._hidden = {token: f"{key}x{number}x" for number, token in enumerate(tokens)}
        self._shown = {hidden: token for token, hidden in self._hidden.items()}
        self._any_hidden = re.compile(f"{key}x\\d+x")
        self._either = re.compile(f"{key}x\\d+x|{control.pattern}")

    def hide(self, row: Row) -> Row:
        """The row as a template is given it."""
        return _mapped(row, lambda text: self._control.sub(self._hide_one, text))

    def _hide_one(self, found: re.Match[str]) -> str:
        return self._hidden[found[0]]

    def is_hidden(self, text: str) -> bool:
        """Whether anything in a text is hidden."""
        return self._any_hidden.search(text) is not None

    def show(self, text: str) -> str:
        """A text as it was before it was hidden."""
        return self._any_hidden.sub(lambda found: self._shown[found[0]], text)


class _Renamed(_Hiding):
    """Reads with a copy of a fast tokenizer whose control tokens have other names.

    So the template's have their numbers, and a row's are read as the letters that they are, each
    in the context of the whole text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], control: re.Pattern[str]
    ) -> None:
        super().__init__(tokenizer, tokens, control)
        from tokenizers import Tokenizer

        content = json.loads(tokenizer.backend_tokenizer.to_str())
        _rename(content, self._hidden)
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(content))
        )
        self._unreadable = {
            token
            for token, hidden in self._hidden.items()
            if _ids(self.tokenizer, [hidden]) != _ids(tokenizer, [token])
        }

    def hide(self, row: Row) -> Row:
        spelt = {found for text in _texts(row) for found in self._control.findall(text)}
        if unreadable := sorted(spelt & self._unreadable):
            whose = f"row {row.number}" if row.number else "a prompt"
            raise UserError(
                f"{whose} spells {unreadable[0]}, which this tokenizer cannot read but as "
                "a control token: take it out"
            )
        return super().hide(row)

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        return super().ids([self._read(text) for text in texts])

    def offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        # Names have other lengths, so that offsets are of another text.
        return [[] for _ in texts]

    def _read(self, text: str) -> str:
        names = self._hidden | self._shown
        return self._either.sub(lambda found: names[found[0]], text)


class _Pieces(_Hiding):
    """Reads with a slow tokenizer, which splits texts at control tokens itself, piece by piece."""

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        found: list[Ids] = []
        for text in texts:
            ids: Ids = []
            for number, piece in enumerate(re.split(f"({self._control.pattern})", text)):
                if number % 2:
                    ids.append(self.tokenizer.convert_tokens_to_ids(piece))
                elif piece:
                    ids += _ids(self.tokenizer, [self.show(piece)], split_special_tokens=True)[0]
            found.append(ids)
        return found


def _behind(
    reader: _Reader, texts: Sequence[tuple[str, str]], prompts: Sequence[Ids], wholes: Sequence[Ids]
) -> list[Ids]:
    """The tokens of answers whose first letters the whole text would join with their prompts.

    A model that has read the prompt's own tokens cannot take any back, so the answer goes on after
    them: as in the whole text from where a token begins with it, or alone, or behind another text.
    The first reading is taken that gives the same text.
    """
    offsets = reader.offsets([prompt + answer for prompt, answer in texts])
    readings: list[list[Ids | None]] = [
        [
            _from(whole, spans, len(prompt))
            for whole, spans, (prompt, _) in zip(wholes, offsets, texts, strict=True)
        ]
    ]
    answers = [answer for _, answer in texts]
    alone = reader.ids(answers)
    readings.append(list(alone))
    for anchor in _ANCHORS:
        before = reader.ids([anchor])[0]
        readings.append(
            [
                ids[len(before) :] if ids[: len(before)] == before else None
                for ids in reader.ids([anchor + answer for answer in answers])
            ]
        )
    right = _decoded(reader.tokenizer, wholes)
    found: list[Ids | None] = [None] * len(texts)
    for reading in readings:
        open_ones = [n for n, ids in enumerate(reading) if found[n] is None and ids is not None]
        joined = _decoded(reader.tokenizer, [prompts[n] + (reading[n] or []) for n in open_ones])
        for number, text in zip(open_ones, joined, strict=True):
            if text == right[number]:
                found[number] = reading[number]
    return [alone[n] if ids is None else ids for n, ids in enumerate(found)]


def _from(ids: Ids, spans: Sequence[tuple[int, int]], boundary: int) -> Ids | None:
    """The tokens from a boundary in the text; None where a token reaches over it."""
    for number, (start, end) in enumerate(spans):
        if start >= boundary:
            return ids[number:]
        if end > boundary:
            return None
    return None


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Ids]) -> list[str]:
    if not ids:
        return []
    texts: list[str] = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    return texts


def _rename(content: dict[str, Any], names: dict[str, str]) -> None:
    """Give tokens other names in the content of a tokenizer.json; their numbers stay."""
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = content["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    # Letters must not be merged into a control token, nor further.
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [pair for pair in pairs if not {"".join(pair), *pair} & names.keys()]


def _joined(begin: Ids, ids: Ids) -> Ids:
    """Tokens behind those that begin a text, as many of which as they begin with themselves."""
    same = next(n for n in range(len(begin), -1, -1) if begin[len(begin) - n :] == ids[:n])
    return begin[: len(begin) - same] + ids


def _written(
    write: Callable[[Sequence[Row]], Iterator[_T]], rows: Sequence[Row], where: str
) -> list[_T]:
    """What a template makes of rows; a `UserError` names the row, whoever made it."""
    for row in rows:
        with _named(row, where):
            for text in _texts(row):
                check_characters(text, "its text")
    written = write(rows)
    found = []
    for row in rows:
        with _named(row, where):
            found.append(next(written))
    return found


@contextmanager
def _named(row: Row, where: str) -> Iterator[None]:
    """Have a `UserError` of the block name the row that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{row.place(where)}: {error}") from None


def _texts(row: Row) -> list[str]:
    """All that a row brings into a text."""
    texts = [row.instruction, row.input, row.output, row.other]
    for message in (*row.history, *row.between):
        texts.append(message.content)
        if message.calls or message.told:
            texts += texts_in([message.calls, message.told])
    return texts + list(texts_in([row.calls, row.tools])) if row.calls or row.tools else texts


def _mapped(row: Row, change: Callable[[str], str]) -> Row:
    """A row with all its texts changed."""

    def mapped(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, Mapping):
            return {change(key): mapped(own) for key, own in value.items()}
        return type(value)(map(mapped, value)) if isinstance(value, list | tuple) else value

    def turns(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(
            replace(
                each,
                content=change(each.content),
                calls=mapped(each.calls),
                told=mapped(each.told),
            )
            for each in messages
        )

    return replace(
        row,
        instruction=change(row.instruction),
        input=change(row.input),
        output=change(row.output),
        other=change(row.other),
        history=turns(row.history),
        between=turns(row.between),
        calls=mapped(row.calls),
        tools=mapped(row.tools),
    )


def _ids(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    add_special_tokens: bool = False,
    **options: Any,
) -> list[Ids]:
    found: list[Ids] = _call(tokenizer, texts, add_special_tokens, **options)["input_ids"]
    return found


def _call(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    add_special_tokens: bool = False,
    **options: Any,
) -> Any:
    if not texts:
        return {"input_ids": [], "offset_mapping": []}
    return tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # It would warn of texts above its own limit, which are cut later.
        **options,
    )
