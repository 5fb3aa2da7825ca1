"""Tokens on disk, so that memory stays flat however many clients and examples there are."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from hedgerow.data.rows import NothingUsable, Row
from hedgerow.data.templates import Template
from hedgerow.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

_CHUNK = 256
"""Rows tokenised at once: as fast as a thousand, and in less memory."""
_TOKEN = np.dtype(np.int32)


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised example: a prompt, then its answer."""

    tokens: Int32
    """Shape (length,), read-only."""
    prompt_length: int
    """`tokens[:prompt_length]` is what the model is given to generate the answer."""
    loss_from: int
    """`tokens[loss_from:]` carry loss."""


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
    loss_on: Literal["answer", "all"]
    truncated: int
    """Examples that are here, but were cut at `max_length`."""
    dropped: int
    """Examples that are not here: their prompts leave no room for any of the answer."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        prompt_length = int(self.prompt_lengths[index])
        return Example(
            tokens=self.spool.read(int(self.starts[index]), int(self.lengths[index])),
            prompt_length=prompt_length,
            loss_from=prompt_length if self.loss_on == "answer" else 0,
        )

    def digest(self) -> str:
        """SHA-256 of the tokens and of where the answers begin: what training depends on."""
        digest = hashlib.sha256(self.loss_on.encode())
        for array in (self.lengths, self.prompt_lengths):
            digest.update(array.tobytes())
        for start, length in zip(self.starts, self.lengths, strict=True):
            digest.update(self.spool.read(int(start), int(length)).tobytes())
        return digest.hexdigest()

    @staticmethod
    def concatenate(parts: Sequence[Tokenized]) -> Tokenized:
        """Concatenate the examples of `parts`, in order; no token is copied.

        Raises:
            ValueError: the parts are not of one spool, or differ in `loss_on`.
        """
        if len({(id(part.spool), part.loss_on) for part in parts}) != 1:
            raise ValueError("parts must share one spool and one `loss_on`")
        return Tokenized(
            spool=parts[0].spool,
            starts=np.concatenate([part.starts for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            prompt_lengths=np.concatenate([part.prompt_lengths for part in parts]),
            rows=np.concatenate([part.rows for part in parts]),
            loss_on=parts[0].loss_on,
            truncated=sum(part.truncated for part in parts),
            dropped=sum(part.dropped for part in parts),
        )


class Spool:
    """One anonymous temporary file that holds the tokens of all clients.

    The file has no name and is gone with its last user, however the process ends. It lies in the
    system's temporary folder (`TMPDIR`), four bytes a token.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, it lives as long as self
        self._end = 0
        self._lock = threading.Lock()

    def tokenize(
        self,
        name: str,
        rows: Sequence[Row],
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        loss_on: Literal["answer", "all"],
    ) -> Tokenized:
        """Tokenise rows as prompt, answer and EOS, and keep the tokens on disk.

        Args:
            name: whose rows they are, for messages.
            max_length: tokens of prompt and answer together; what is longer is cut at the end.
            loss_on: the tokens that carry loss.

        Raises:
            NothingUsable: there are no rows, or no example has room for any of its answer.
            UserError: the tokenizer has no EOS, or the disk is full.
        """
        if not rows:
            raise NothingUsable(f"{name}: has no examples: give it data, or leave it out")
        if tokenizer.eos_token_id is None:
            raise UserError(
                "`model.path`: the tokenizer has no EOS token, so answers would have no end: set "
                "`eos_token` in its tokenizer_config.json"
            )
        starts: list[int] = []
        lengths: list[int] = []
        prompt_lengths: list[int] = []
        kept_rows: list[int] = []
        truncated = 0
        shortest_prompt = sys.maxsize
        for first in range(0, len(rows), _CHUNK):
            kept: list[list[int]] = []
            pairs = _prompts_and_answers(rows[first : first + _CHUNK], template, tokenizer)
            for number, (prompt, answer) in enumerate(pairs, start=first):
                shortest_prompt = min(shortest_prompt, len(prompt))
                tokens = (prompt + answer)[:max_length]
                # Nothing predicts the very first token, so it cannot be all of the answer.
                if len(tokens) > max(len(prompt), 1):
                    truncated += len(prompt) + len(answer) > max_length
                    prompt_lengths.append(len(prompt))
                    kept_rows.append(number)
                    kept.append(tokens)
            starts += self._append(kept)
            lengths += map(len, kept)
        if not lengths:
            raise NothingUsable(
                f"{name}: no label is left to learn from, since every prompt (the shortest has "
                f"{shortest_prompt} tokens) fills `data.max_length` ({max_length}): raise it"
            )
        return Tokenized(
            spool=self,
            starts=np.array(starts, dtype=np.int64),
            lengths=np.array(lengths, dtype=np.int32),
            prompt_lengths=np.array(prompt_lengths, dtype=np.int32),
            rows=np.array(kept_rows, dtype=np.int32),
            loss_on=loss_on,
            truncated=truncated,
            dropped=len(rows) - len(lengths),
        )

    def read(self, start: int, count: int) -> Int32:
        """`count` tokens from position `start`; any thread may call this at any time."""
        # Not a memory map, whose pages would count as this process's memory.
        size = _TOKEN.itemsize
        return np.frombuffer(os.pread(self._file.fileno(), count * size, start * size), _TOKEN)

    def _append(self, examples: Sequence[Sequence[int]]) -> list[int]:
        """Write examples one after another, and return where each begins."""
        ends = np.cumsum([len(tokens) for tokens in examples], dtype=np.int64)
        tokens = np.fromiter(itertools.chain.from_iterable(examples), _TOKEN)
        with self._lock:
            start, self._end = self._end, self._end + len(tokens)
        unwritten = memoryview(tokens.tobytes())
        position = start * _TOKEN.itemsize
        try:
            while unwritten:
                written = os.pwrite(self._file.fileno(), unwritten, position)
                unwritten, position = unwritten[written:], position + written
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: cannot hold the tokens ({error.strerror}): make room "
                "there, or set TMPDIR to a folder that has some"
            ) from None
        return [start, *(start + ends[:-1]).tolist()] if examples else []


def _prompts_and_answers(
    rows: Sequence[Row], template: Template, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    """Each row's prompt and answer, with EOS at the end of the answer.

    The two are tokenised separately, so that a prompt has the same ids in training, where its
    answer follows, as in generation, where nothing does.
    """
    eos = tokenizer.eos_token_id
    prompts = tokenize_prompts([template.prompt(row) for row in rows], template, tokenizer)
    answers = _ids(tokenizer, [template.answer(row) for row in rows], False)
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer[-1:] != [eos]:
            answer.append(eos)
        yield prompt, answer


def tokenize_prompts(
    texts: Sequence[str], template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Tokenise prompts that `template` has made, for an answer to follow."""
    own_tokens = not template.has_special_tokens
    prompts = _ids(tokenizer, texts, own_tokens)
    for prompt in prompts:
        # Some tokenizers end whatever they are given with EOS.
        if own_tokens and prompt[-1:] == [tokenizer.eos_token_id]:
            prompt.pop()
    return prompts


def _ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool
) -> list[list[int]]:
    tokenized = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # It would warn of texts above its own limit, which are cut here.
    )
    ids: list[list[int]] = tokenized["input_ids"]
    return ids
