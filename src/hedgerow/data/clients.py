"""Who holds what: each client's examples, read and tokenised when they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING

from hedgerow.data.canaries import Canaries
from hedgerow.data.encoding import Encoder
from hedgerow.data.in_memory import Held
from hedgerow.data.kept import KeptTokens
from hedgerow.data.partition import partition
from hedgerow.data.preferences import Learns, good_answers, learnt_rows
from hedgerow.data.rows import Records, Remarks, Row, Rows, check
from hedgerow.data.sources import client_files, client_test_files, read, share_of
from hedgerow.data.templates import load as load_template
from hedgerow.data.tokens import Spool, Tokenized
from hedgerow.errors import NothingToLearn
from hedgerow.loading import tokenization
from hedgerow.names import MEMORY
from hedgerow.seeds import Seeds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hedgerow.settings import DataSettings


class ClientData:
    """The clients of an experiment, in their order, and their tokenised examples.

    Files are read one at a time; one source for all is read once.

    Attributes:
        names: all clients, in their order, whether their data can be used or not.
        remarks: what is to be said of the rows that have been read.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        seeds: Seeds,
        held: Held | None = None,
        vocabulary_size: int | None = None,
        canaries: Canaries | None = None,
        learns: Learns = "answers",
        kept: KeptTokens | None = None,
    ) -> None:
        """Find out who the clients are.

        Args:
            settings: what says so.
            tokenizer: the base model's.
            seeds: the run's, which decide how a source is divided.
            held: the rows that the settings call `(memory)`.
            vocabulary_size: number of the base model's embeddings; None compares no tokens.
            canaries: made-up rows that are added to the training rows of one of them; None: none.
            learns: what is learnt from: answers, pairs of them, or labelled ones.
            kept: tokens of an earlier process, of which those are taken that were made of the same
                rows in the same way; those of a slow tokenizer are not kept.

        Raises:
            UserError: a file is missing, or the source or its division is wrong.
        """
        self._settings, self._spool = settings, Spool()
        self._held = held or Held()
        self._canaries, self._learns = canaries, learns
        # Not all that decides a slow tokenizer's output is known here.
        self._kept = kept if tokenizer.is_fast else None
        template = load_template(settings, tokenizer)
        self.encoder = Encoder(template, tokenizer, vocabulary_size)
        self.remarks = Remarks()
        self._rows: Sequence[Row] = ()
        self._parts: Mapping[str, Sequence[int]] = {}
        self._seeds = seeds
        if settings.clients is not None:
            self._files = client_files(settings.clients)
            self.names = list(self._files)
        else:
            assert settings.source is not None
            assert settings.partition is not None
            self._rows = self._read([settings.source], self._held.source)
            self._parts = partition(self._rows, settings.partition, seeds.derive("clients"))
            self.names = list(self._parts)
        tests, self._test_files = settings.client_test, {}
        if tests is not None and not isinstance(tests, float):
            self._test_files = client_test_files(tests, self.names)

    def tokenize(self, name: str) -> Tokenized:
        """Tokenise one client's examples, its canaries last.

        Raises:
            UserError: they cannot be read, or a canary does not fit `data.max_length`.
            NothingToLearn: nothing of them is left to learn from.
        """
        rows, _ = self._divided(name, self._own_rows(name))
        settings, canaries = self._settings, self._canaries
        if canaries is not None and canaries.client == name:
            canaries.check_length(self.encoder, settings.max_length)
            rows = [*rows, *canaries.planted()]
        rows = learnt_rows(rows, self._learns, name)
        if self._kept is None:
            return self._tokenized(name, rows)
        source_digest = self._source_digest(rows)
        if (kept := self._kept.find(name, source_digest, self._spool)) is not None:
            return kept
        return replace(self._tokenized(name, rows), source_digest=source_digest)

    def _tokenized(self, name: str, rows: Sequence[Row]) -> Tokenized:
        return self._spool.tokenize(
            name,
            rows,
            encoder=self.encoder,
            max_length=self._settings.max_length,
            loss_on=self._settings.loss_on,
            paired=self._learns != "answers",
        )

    def _source_digest(self, rows: Sequence[Row]) -> str:
        """SHA-256 of all that decides the tokens of rows."""
        digest = hashlib.sha256(self._encoding_digest)
        for row in rows:
            texts = (row.instruction, row.input, row.output, row.other, row.desirable)
            calls = (row.history, row.between, row.calls, row.tools)
            digest.update(repr((texts, calls)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @cached_property
    def _encoding_digest(self) -> bytes:
        """SHA-256 of all that decides how rows become tokens."""
        tokenizer, template = self.encoder.tokenizer, self.encoder.template
        # A day that is not set is today's, which the template says.
        settings, chosen = self._settings, self._settings.template.model_dump(exclude={"date"})
        decides = {
            "versions": [version(name) for name in ("tokenizers", "transformers", "jinja2")],
            "tokenizer": [type(tokenizer).__name__, tokenization(tokenizer)],
            "special": [tokenizer.special_tokens_map, tokenizer.chat_template],
            "vocabulary": self.encoder.vocabulary_size,
            "template": [template.written, template.ends, template.date],
            "settings": [settings.loss_on, settings.max_length, settings.prompt, chosen],
            "learns": self._learns,
        }
        text = json.dumps(decides, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).digest()

    def test_rows(self, name: str) -> Sequence[Row]:
        """Rows that a client alone is scored on (`data.client_test`); none where it has none.

        Raises:
            UserError: they cannot be read.
        """
        if name in self._test_files:
            files = list(map(str, self._test_files[name]))
            return good_answers(self._checked(files, self._held.client_tests.get(name), 1.0))
        if not isinstance(self._settings.client_test, float):
            return []
        # What is to be said of the rows is said when the others of them are tokenised.
        _, held_out = self._divided(name, self._own_rows(name, remark=False))
        return good_answers(held_out)

    def _own_rows(self, name: str, *, remark: bool = True) -> Sequence[Row]:
        """All rows of a client."""
        if name in self._parts:
            rows = [self._rows[index] for index in self._parts[name]]
            if not rows:
                raise NothingToLearn(f"{name}: `data.partition` gives it no row")
            return rows
        files, own = list(map(str, self._files[name])), self._held.clients.get(name)
        return self._read(files, own, remark=remark)

    def _divided(self, name: str, rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
        """A client's rows to learn from, of which one is left at least, and those to be scored."""
        share = self._settings.client_test
        if not isinstance(share, float) or len(rows) < 2:
            return rows, []
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        order = self._seeds.numpy("client_test", name).permutation(len(rows))
        held_out = set(order[:count].tolist())
        return (
            [row for index, row in enumerate(rows) if index not in held_out],
            [row for index, row in enumerate(rows) if index in held_out],
        )

    def _read(
        self, sources: Sequence[str], held: Records | None, *, remark: bool = True
    ) -> Sequence[Row]:
        """The rows of sources, or of what is held in memory."""
        settings = self._settings
        rows = self._checked(sources, held, settings.share, settings.rows)
        if remark:
            self.remarks.update(rows.remarks)
        return rows

    def _checked(
        self,
        sources: Sequence[str],
        held: Records | None,
        share: float,
        first: int | None = None,
    ) -> Rows:
        """A share of the rows of each of some sources, or of what is held in memory."""
        settings = self._settings
        rows: list[Row] = []
        remarks = Remarks()
        for source in sources:
            if source == MEMORY and held is not None:
                records = share_of(held, share, first)
            else:
                records = read(source, settings.split, settings.subset, share, first)
            found = check(
                records,
                settings.fields,
                every_turn=settings.loss_on == "turns",
                tools=self.encoder.template.writes_tools,
            )
            rows += found.rows
            remarks.update(found.remarks)
        return Rows(rows, remarks)
