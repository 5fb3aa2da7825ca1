"""An audit of a run: who sent what, and what its model tells of clients' rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from hedgerow.audit import lower_bound
from hedgerow.audit.exposure import exposure, highest
from hedgerow.audit.found import Audit, Left, Members, Planted, Promise, write
from hedgerow.audit.membership import Float64, separation
from hedgerow.data import (
    Canaries,
    ClientData,
    Encoder,
    Records,
    Row,
    Spool,
    Tokenized,
    load_template,
)
from hedgerow.errors import NothingToLearn, UserError
from hedgerow.evaluation.likelihood import losses
from hedgerow.experiment import Experiment
from hedgerow.experiment import load as load_experiment
from hedgerow.ledger import Ledger
from hedgerow.model import Model
from hedgerow.privacy.accounting import of_group
from hedgerow.runs import Loader, RunModels, model_at, opened
from hedgerow.runs.changes import another_run
from hedgerow.runs.directory import EXPERIMENT, examples_digest
from hedgerow.runs.preparation import test_rows
from hedgerow.runs.rows import ROWS_BY_CLIENT, SENT_BY_CLIENT, read_rows
from hedgerow.seeds import Seeds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 200
"""Largest number of rows of a client, and of others, that are examined by default."""
CONFIDENCE = 0.95
DELTA = 1e-5
"""δ that the bound is at where the run promises nothing."""

Progress = Callable[[int, int], None]
"""Is told how many rows have been read, of how many."""


@dataclass(eq=False)
class _Sample:
    """Rows whose losses are compared, before training and after it."""

    examples: Tokenized
    chosen: Sequence[int]
    """Places of the rows among the examples."""
    before: Float64 = field(default_factory=lambda: np.zeros(0))
    """Shape (rows,): mean loss of each by the base model, in nats per token."""
    after: Float64 = field(default_factory=lambda: np.zeros(0))
    """The same by the model that is examined."""

    @property
    def scores(self) -> Float64:
        """Shape (rows,): how far training has lowered each loss."""
        return self.before - self.after


@dataclass(eq=False)
class _Client:
    """One client's rows, and rows that nobody was trained on."""

    name: str
    own: _Sample
    others: _Sample
    has_own_tests: bool


def audit(
    path: Path,
    overrides: Sequence[str] = (),
    client: str | None = None,
    rows: int = ROWS,
    *,
    load: Loader = Model.load,
    held: Records | None = None,
    progress: Progress = lambda done, total: None,
) -> Audit:
    """Examine a run after its last round, and write what is found into its audit.json.

    Args:
        path: the run's directory.
        overrides: `key.path=value`, as where the data lie now; none may make it another run.
        client: whose rows are examined; None for all.
        rows: largest number of rows of a client, and of others, that are examined.
        load: gives the run's base model.
        held: the test rows, where `data.test` is `(memory)`.
        progress: told what is done.

    Raises:
        UserError: there is no such run or client, or it has no round yet; its base is not here; or
            the model has diverged.
    """
    if path.is_file():
        raise UserError(f"{path} is a packed ledger, of which there are no metrics: give a run")
    with opened(path, list(overrides)) as (experiment, ledger):
        if difference := another_run(load_experiment(path / EXPERIMENT), experiment):
            raise UserError(f"{path} was run with {difference}: leave that as it is")
        if not len(ledger):
            raise UserError(f"{path} has no round yet, so that there is nothing to audit")
        found = _Auditor(path, experiment, ledger, load, held).examine(client, rows, progress)
    write(path, found)
    return found


class _Auditor:
    """Audits one run."""

    def __init__(
        self,
        path: Path,
        experiment: Experiment,
        ledger: Ledger,
        load: Loader,
        held: Records | None,
    ) -> None:
        self._path, self._experiment, self._ledger = path, experiment, ledger
        self._load, self._held = load, held
        self._seeds = Seeds(experiment.federation.seed)
        self._canaries = Canaries.of(experiment.audit, self._seeds)
        self._notes: dict[str, None] = {}
        self._tests: Tokenized | None = None

    def examine(self, client: str | None, rows: int, progress: Progress) -> Audit:
        """Examine one client's rows, or all clients', and the canaries, if there are any."""
        experiment, ledger = self._experiment, self._ledger
        model = model_at(experiment, ledger, 0, self._load)
        clients = self._clients(model, client, rows)
        canaries = self._sample_of_canaries(model)
        samples = {each.name: [each.own, each.others] for each in clients}
        if canaries is not None:
            assert self._canaries is not None
            samples.setdefault(self._canaries.client, []).append(canaries)
        self._measure(model, samples, progress)
        method = experiment.method
        sends: Literal["updates", "nothing", "rows"] = "updates"
        if not method.communicates:
            sends = "rows" if method.pools_data else "nothing"
        promise, secure = self._promise(), experiment.federation.secure
        return Audit(
            round=len(ledger),
            head=ledger.head,
            sends=sends,
            masked=secure is not None and secure.masks,
            private=promise,
            left=self._left(),
            members=[_members(each) for each in clients],
            planted=None if canaries is None else self._planted(canaries, promise),
            notes=list(self._notes),
        )

    def _clients(self, model: Model, client: str | None, rows: int) -> list[_Client]:
        """Rows of clients whose data are here, and of others."""
        try:
            data = ClientData(
                self._experiment.data,
                model.tokenizer,
                self._seeds,
                vocabulary_size=model.vocabulary_size,
                canaries=self._canaries,
                learns=self._experiment.objective.learns,
            )
        except UserError as error:
            return self._without(client, error)
        if client is not None and client not in data.names:
            raise UserError(f"client {client}: there is none; name one of {', '.join(data.names)}")
        found = []
        for name in data.names if client is None else [client]:
            try:
                found.append(self._client(data, name, rows))
            except NothingToLearn:
                continue  # who was left out of the run
            except UserError as error:
                found += self._without(client, error)
        return found

    def _without(self, client: str | None, error: UserError) -> list[_Client]:
        """Note why rows cannot be examined; where one client was asked for, that is a mistake."""
        if client is not None:
            raise error
        self._notes[f"training rows were not compared with others: {error}"] = None
        return []

    def _client(self, data: ClientData, name: str, rows: int) -> _Client:
        examples = data.tokenize(name)
        before = examples_digest(self._path, name)
        if before is not None and examples.digest() != before:
            raise UserError(f"the data of {name} have changed since {self._path} began")
        planted = 0
        if self._canaries is not None and self._canaries.client == name:
            planted = len(self._canaries.planted())
        if len(examples) == planted:
            raise NothingToLearn(f"{name}: has no rows but canaries")
        tests = data.test_rows(name)
        beside = self._tokenized(data, tests, f"the test data of {name}") if tests else None
        if beside is None:
            beside = self._tests = self._tests or self._tokenized(
                data, self._test_rows(data.encoder.tokenizer), "the test data"
            )
        return _Client(
            name=name,
            own=self._drawn(examples, len(examples) - planted, rows, name, "own"),
            others=self._drawn(beside, len(beside), rows, name, "others"),
            has_own_tests=bool(tests),
        )

    def _test_rows(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Row]:
        """The rows of `data.test`, which have to have answers.

        Raises:
            UserError: there are none.
        """
        evaluation = self._experiment.evaluation.model_copy(update={"metrics": ["loss"]})
        return test_rows(self._experiment.data, evaluation, tokenizer, self._held)

    def _tokenized(self, data: ClientData, rows: Sequence[Row], name: str) -> Tokenized:
        """Rows in the tokens that they would be trained on in."""
        settings = self._experiment.data
        return Spool().tokenize(name, rows, data.encoder, settings.max_length, settings.loss_on)

    def _drawn(self, examples: Tokenized, count: int, most: int, *use: str) -> _Sample:
        """At most so many of the first `count` examples, drawn by the run's seed.

        Not of answers that are labelled as bad ones, whose loss training raises.
        """
        generator = self._seeds.numpy("audit", "rows", *use)
        own = np.arange(count)
        if examples.desirable is not None:
            own = np.flatnonzero(examples.desirable[:count])
        chosen = generator.choice(own, min(len(own), most), replace=False)
        return _Sample(examples, sorted(chosen.tolist()))

    def _sample_of_canaries(self, model: Model) -> _Sample | None:
        """All canaries, each once, whether it was trained on or not."""
        if self._canaries is None:
            return None
        settings = self._experiment.data
        template = load_template(settings, model.tokenizer)
        encoder = Encoder(template, model.tokenizer, model.vocabulary_size)
        self._canaries.check_length(encoder, settings.max_length)
        examples = Spool().tokenize(
            "the canaries", self._canaries.rows, encoder, settings.max_length, settings.loss_on
        )
        return _Sample(examples, range(len(examples)))

    def _measure(self, model: Model, samples: dict[str, list[_Sample]], progress: Progress) -> None:
        """Measure all losses, of the base, which `model` is, and of the run's models.

        Raises:
            UserError: a model has diverged; or a client's own is not here.
        """
        method, ledger = self._experiment.method, self._ledger
        total = 2 * sum(len(each.chosen) for own in samples.values() for each in own)
        done = 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        if not total:
            return
        model.network.eval()
        for each in (sample for own in samples.values() for sample in own):
            each.before = self._losses(model, each, tick)
        expected = self._experiment.expected(ledger.trained)
        ledger.replay(method, model, expected=expected)
        models = RunModels(method, ledger, len(ledger))
        names = [] if method.has_global_model else list(samples)
        for name in models.models(model, names):
            model.network.eval()
            for each in (
                [s for own in samples.values() for s in own] if name is None else samples[name]
            ):
                each.after = self._losses(model, each, tick)

    @torch.inference_mode()
    def _losses(self, model: Model, sample: _Sample, tick: Callable[[int], None]) -> Float64:
        """Mean loss of each row, in nats per token.

        Raises:
            UserError: one is no number.
        """
        lengths = sample.examples.lengths[list(sample.chosen)]
        size = self._experiment.evaluation.batch_size

        def read(index: int) -> Any:
            return sample.examples[sample.chosen[index]]

        sums, tokens = losses(model.network, lengths, read, size, tick)
        means = sums / tokens
        if not np.isfinite(means).all():
            raise UserError(
                f"{self._path}: the loss of its model is no number, as where training has "
                "diverged: there is nothing to guess from"
            )
        return means

    def _promise(self) -> Promise | None:
        settings = self._experiment.privacy
        if settings is None:
            return None
        epsilon = self._ledger.read(len(self._ledger)).metrics.get("epsilon")
        if epsilon is None:
            raise UserError(f"{self._path}: its last entry does not say what privacy was spent")
        return Promise(
            level=settings.level,
            epsilon=epsilon,
            delta=settings.delta,
            seeded=settings.seed is not None,
        )

    def _planted(self, sample: _Sample, promise: Promise | None) -> Planted:
        assert self._canaries is not None
        is_in, repeat = self._canaries.is_in, self._canaries.repeat
        promised, delta = None, DELTA
        if promise is not None:
            # Of a client's two updates, with a canary and without it, each hides beside none.
            size = repeat if promise.level == "example" else 2
            promised, delta = of_group(promise.epsilon, promise.delta, size)
        guesses = lower_bound.guess(sample.scores, is_in, delta, CONFIDENCE)
        told: dict[str, float] = {"auc": 0.5, "auc_low": 0.0, "auc_high": 1.0}
        bits: list[float] = []
        if is_in.any() and not is_in.all():
            found = separation(sample.scores[is_in], sample.scores[~is_in])
            told = {"auc": found.auc, "auc_low": found.low, "auc_high": found.high}
            bits = exposure(sample.after[is_in], sample.after[~is_in]).tolist()
        return Planted(
            client=self._canaries.client,
            canaries=len(is_in),
            planted=int(is_in.sum()),
            repeat=repeat,
            guesses=guesses.guesses,
            correct=guesses.correct,
            epsilon=guesses.epsilon,
            delta=delta,
            confidence=CONFIDENCE,
            promised=promised,
            exposure_median=median(bits) if bits else None,
            exposure_largest=max(bits) if bits else None,
            exposure_possible=highest(int((~is_in).sum())) if bits else None,
            **told,
        )

    def _left(self) -> list[Left]:
        """What left each client, by the ledger and the rows of metrics."""
        rows = read_rows(self._path)
        rounds, failures = Counter[str](), Counter[str]()
        unknown: set[str] = set()  # who may have sent something that is not known
        for round in range(1, len(self._ledger) + 1):
            row = rows[round] if round < len(rows) else {}
            names, failed = self._ledger.participants(round), row.get("failures", {})
            if self._ledger.names_all(round):  # then the server's own rows alone know
                if not row or (SENT_BY_CLIENT not in row and failed):  # and this was written again
                    unknown.update(failed if row else names)
                    failed = {}
                names = row.get("participants", [])
            rounds.update(names)
            failures.update(list(failed))
        return [
            self._left_of(name, rounds[name], failures[name], rows, known=name not in unknown)
            for name in sorted({*rounds, *failures, *unknown})
        ]

    def _left_of(
        self, name: str, rounds: int, failures: int, rows: Sequence[dict[str, Any]], *, known: bool
    ) -> Left:
        sent = [own for row in rows if (own := row.get(SENT_BY_CLIENT, {}).get(name)) is not None]
        complete = (known and len(sent) == rounds) or not self._experiment.method.communicates
        last = sent[-1] if sent else {}
        said = dict.fromkeys(word for own in sent for word in own["said"])
        if any(name in row.get(ROWS_BY_CLIENT, {}) for row in rows):
            said["scores on its own test rows"] = None
        return Left(
            client=name,
            rounds=rounds,
            failures=failures,
            bytes=sum(own["bytes"] for own in sent) if complete else None,
            tensors=last.get("tensors"),
            numbers=last.get("numbers"),
            kinds=last.get("kinds", {}),
            said=list(said),
        )


def _members(client: _Client) -> Members:
    found = separation(client.own.scores, client.others.scores)
    return Members(
        client=client.name,
        rows=len(client.own.chosen),
        others=len(client.others.chosen),
        of="its own test rows" if client.has_own_tests else "the test data",
        auc=found.auc,
        auc_low=found.low,
        auc_high=found.high,
        true_positives=found.true_positives,
    )
