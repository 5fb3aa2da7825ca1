"""Tokens on disk, so that memory stays flat however many clients and examples there are."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from hedgerow.data.encoding import Encoded, Encoder
from hedgerow.data.rows import Row
from hedgerow.errors import NothingToLearn, UserError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
LossOn = Literal["answer", "turns", "all"]

_CHUNK = 256
"""Rows tokenised at once: as fast as a thousand, and in less memory."""
_TOKEN = np.dtype(np.int32)


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised example: a prompt, then its answer; or a conversation."""

    tokens: Int32
    """Shape (length,), not to be written to."""
    prompt_length: int
    """`tokens[:prompt_length]` is what the model is given to generate the answer, or the first
    answer that is learnt of a conversation."""
    learnt: Bool
    """Shape (length,): whether each token carries loss."""


@dataclass(frozen=True, eq=False)
class Tokenized:
    """The examples of one client, or of several: `tokenized[i]` reads one from disk, in any thread.

    In memory there are 20 bytes an example.
    """

    spool: Spool
    starts: Int64
    """Shape (n,): where each example begins in the spool, in tokens."""
    lengths: Int32
    """Shape (n,): tokens of each example."""
    prompt_lengths: Int32
    """Shape (n,): tokens of each example's prompt."""
    rows: Int32
    """Shape (n,): which row of its client's data each example is, as some rows may be dropped."""
    loss_on: LossOn
    """The tokens that carry loss. With `turns`, a token t of the spool that carries none is ~t, so
    that no mask takes up any room."""
    truncated: int
    """Examples that are here, but were cut at `max_length`."""
    dropped: int
    """Examples that are not here: their prompts leave no room for any of the answer."""
    spelt: int = 0
    """Examples whose rows spell a control token, as `</s>`, which is text there."""
    unknown: int = 0
    """Tokens that stand for text which the tokenizer does not know."""
    other: Tokenized | None = None
    """Another answer to each prompt, as many examples in the same order: the rejected ones of
    pairs, say (`Row.other`)."""
    desirable: Bool | None = None
    """Shape (n,): whether each answer is a good one; None: all are."""
    source_digest: str = ""
    """SHA-256 of the rows and of how they became tokens; empty where it was not computed."""
    reference: Float32 | None = None
    """Shape (n,): log-likelihood of each answer under the model that an objective refers to, in
    nats; None: nobody has needed any."""

    @property
    def widths(self) -> Int32:
        """Shape (n,): tokens of the longer one of each example and the other beside it."""
        return self.lengths if self.other is None else np.maximum(self.lengths, self.other.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        tokens = self.spool.read(int(self.starts[index]), int(self.lengths[index]))
        prompt_length = int(self.prompt_lengths[index])
        if self.loss_on == "turns":
            return Example(np.maximum(tokens, ~tokens), prompt_length, learnt=tokens >= 0)
        loss_from = prompt_length if self.loss_on == "answer" else 0
        return Example(tokens, prompt_length, learnt=learnt_from(loss_from, len(tokens)))

    def digest(self) -> str:
        """SHA-256 of the tokens and of which carry loss: what training depends on."""
        digest = hashlib.sha256(self.loss_on.encode())
        for array in (self.lengths, self.prompt_lengths):
            digest.update(array.tobytes())
        for start, length in zip(self.starts, self.lengths, strict=True):
            digest.update(self.spool.read(int(start), int(length)).tobytes())
        if self.desirable is not None:
            digest.update(self.desirable.tobytes())
        if self.other is not None:
            digest.update(self.other.digest().encode())
        return digest.hexdigest()

    @staticmethod
    def concatenate(parts: Sequence[Tokenized]) -> Tokenized:
        """Concatenate the examples of `parts`, in order; no token is copied.

        Raises:
            ValueError: the parts are not of one spool, or differ in `loss_on`.
        """
        if len({(id(part.spool), part.loss_on) for part in parts}) != 1:
            raise ValueError("parts must share one spool and one `loss_on`")
        others = [part.other for part in parts if part.other is not None]
        if len(others) not in (0, len(parts)):
            raise ValueError("all parts must have another answer to each prompt, or none")
        labels = [
            np.ones(len(part), dtype=np.bool_) if part.desirable is None else part.desirable
            for part in parts
        ]
        return Tokenized(
            spool=parts[0].spool,
            starts=np.concatenate([part.starts for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            prompt_lengths=np.concatenate([part.prompt_lengths for part in parts]),
            rows=np.concatenate([part.rows for part in parts]),
            loss_on=parts[0].loss_on,
            truncated=sum(part.truncated for part in parts),
            dropped=sum(part.dropped for part in parts),
            spelt=sum(part.spelt for part in parts),
            unknown=sum(part.unknown for part in parts),
            other=Tokenized.concatenate(others) if others else None,
            desirable=unless_all(np.concatenate(labels)),
        )


class _Found:
    """Where the examples of an answer to each prompt are in the spool, as far as they are read."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.prompt_lengths: list[int] = []


class Spool:
    """One file that holds the tokens of all clients, four bytes a token.

    Args:
        file: the file, to read and to write, where there is one. Without, it has no name, lies in
            the system's temporary folder (`TMPDIR`), and is gone with its last user, however the
            process ends.
    """

    def __init__(self, file: io.FileIO | None = None) -> None:
        self._file = file or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, it stays open
        self._end = 0
        self._lock = threading.Lock()

    def tokenize(
        self,
        name: str,
        rows: Sequence[Row],
        encoder: Encoder,
        max_length: int,
        loss_on: LossOn,
        *,
        paired: bool = False,
    ) -> Tokenized:
        """Tokenise rows as prompt, answer and its end, and keep the tokens on disk.

        An example ends with a token that carries loss: what would follow changes no loss.

        Args:
            name: whose rows they are, for messages.
            encoder: makes tokens of them.
            max_length: tokens of prompt and answer together; what is longer is cut at the end.
            loss_on: the tokens that carry loss.
            paired: whether the answer beside each row's own (`Row.other`) is an example, too.

        Raises:
            UserError: there are no rows, no example has room for any of its answer, a row cannot be
                encoded, or the disk is full.
        """
        if not rows:
            raise NothingToLearn(f"{name}: has no examples: give it data, or leave it out")
        found = [_Found() for _ in range(1 + paired)]
        kept_rows: list[int] = []
        truncated = spelt = unknown = 0
        shortest_prompt = sys.maxsize
        every_turn = loss_on == "turns"
        for first in range(0, len(rows), _CHUNK):
            chunk = rows[first : first + _CHUNK]
            encoded = [encoder.examples(chunk, name, every_turn=every_turn)]
            if paired:
                others = [replace(row, output=row.other, calls=()) for row in chunk]
                encoded.append(encoder.examples(others, name))
            kept: list[list[list[int]]] = [[] for _ in found]
            for number, answers in enumerate(zip(*encoded, strict=True), start=first):
                spelt += answers[0].spelt
                shortest_prompt = min(shortest_prompt, *(each.learnt[0][0] for each in answers))
                tokens = [_cut(each, max_length, signed=every_turn) for each in answers]
                # Nothing predicts the very first token, so it cannot be all of the answer.
                if any(len(each) < 2 for each in tokens):
                    continue
                truncated += any(len(each.prompt + each.answer) > max_length for each in answers)
                kept_rows.append(number)
                for each, cut, place, texts in zip(answers, tokens, found, kept, strict=True):
                    place.prompt_lengths.append(each.learnt[0][0])
                    unknown += encoder.count_unknown((each.prompt + each.answer)[: len(cut)])
                    texts.append(cut)
            for place, texts in zip(found, kept, strict=True):
                place.starts += self._append(texts)
                place.lengths += map(len, texts)
        if not kept_rows:
            raise NothingToLearn(
                f"{name}: no label is left to learn from, since every prompt (the shortest has "
                f"{shortest_prompt} tokens) fills `data.max_length` ({max_length}): raise it"
            )
        numbers = np.array(kept_rows, dtype=np.int32)
        own, *others_found = (
            Tokenized(
                spool=self,
                starts=np.array(place.starts, dtype=np.int64),
                lengths=np.array(place.lengths, dtype=np.int32),
                prompt_lengths=np.array(place.prompt_lengths, dtype=np.int32),
                rows=numbers,
                loss_on=loss_on,
                truncated=truncated,
                dropped=len(rows) - len(numbers),
                spelt=spelt,
                unknown=unknown,
            )
            for place in found
        )
        desirable = unless_all(np.array([rows[number].desirable for number in kept_rows]))
        return replace(own, other=next(iter(others_found), None), desirable=desirable)

    def copy(self, tokenized: Tokenized) -> Tokenized:
        """Copy the examples of another spool into this one.

        Raises:
            UserError: the disk is full.
        """
        starts: list[int] = []
        for first in range(0, len(tokenized), _CHUNK):
            some = slice(first, first + _CHUNK)
            places = zip(tokenized.starts[some], tokenized.lengths[some], strict=True)
            starts += self._append([tokenized.spool.read(int(a), int(n)) for a, n in places])
        return replace(
            tokenized,
            spool=self,
            starts=np.array(starts, dtype=np.int64),
            other=None if tokenized.other is None else self.copy(tokenized.other),
        )

    def read(self, start: int, count: int) -> Int32:
        """`count` tokens from position `start`; any thread may call this at any time."""
        # Not a memory map, whose pages would count as this process's memory.
        size = _TOKEN.itemsize
        return np.frombuffer(os.pread(self._file.fileno(), count * size, start * size), _TOKEN)

    def _append(self, examples: Sequence[Sequence[int] | Int32]) -> list[int]:
        """Write examples one after another, and return where each begins."""
        if not examples:
            return []
        ends = np.cumsum([len(tokens) for tokens in examples], dtype=np.int64)
        tokens = np.concatenate([np.asarray(each, dtype=_TOKEN) for each in examples])
        with self._lock:
            start, self._end = self._end, self._end + len(tokens)
        unwritten = memoryview(tokens.tobytes())
        position = start * _TOKEN.itemsize
        try:
            while unwritten:
                written = os.pwrite(self._file.fileno(), unwritten, position)
                unwritten, position = unwritten[written:], position + written
        except OSError as error:
            where, hint = self._file.name, ""
            if isinstance(where, int):  # the file has no name
                where, hint = tempfile.gettempdir(), ", or set TMPDIR to a folder that has some"
            raise UserError(
                f"{where}: cannot hold the tokens ({error.strerror}): make room there{hint}"
            ) from None
        return [start, *(start + ends[:-1]).tolist()]


def learnt_from(start: int, length: int) -> Bool:
    """Whether each token of so many carries loss, if those from `start` on do."""
    return np.arange(length) >= start


def unless_all(flags: Bool) -> Bool | None:
    """Flags of which one at least is not set; None where all are."""
    return None if flags.all() else flags


def _cut(encoded: Encoded, max_length: int, *, signed: bool) -> list[int]:
    """Tokens of a row up to the last one that carries loss; none where none does.

    Args:
        signed: whether the tokens that carry none are marked (`_signed`).
    """
    tokens = encoded.prompt + encoded.answer
    learnt = [
        (start, min(stop, max_length)) for start, stop in encoded.learnt if start < max_length
    ]
    if not learnt:
        return []
    return _signed(tokens, learnt) if signed else tokens[: learnt[-1][1]]


def _signed(tokens: Sequence[int], learnt: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens up to the last that carries loss; each t of those that carry none is ~t."""
    signed = [~token for token in tokens[: learnt[-1][1]]]
    for start, stop in learnt:
        signed[start:stop] = tokens[start:stop]
    return signed
