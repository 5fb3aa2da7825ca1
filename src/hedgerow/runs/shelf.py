"""What runs that follow one another on one model and the same data have in common, made once."""

from __future__ import annotations

import datetime
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from hedgerow.data import Canaries, ClientData, Held, KeptTokens, Tokenized
from hedgerow.errors import NothingToLearn
from hedgerow.ledger import Base
from hedgerow.seeds import Seeds

if TYPE_CHECKING:
    from hedgerow.evaluation.scores import TestSet
    from hedgerow.experiment import Experiment
    from hedgerow.model import Model

_MOST = 16
"""Number of things that are kept, of those that were used last."""
NAMED = 10
"""Clients that are named where several are left out for one reason."""

_T = TypeVar("_T")


class Examples:
    """Everybody's examples, tokenised when they are first asked for."""

    def __init__(self, data: ClientData) -> None:
        self.data = data

    @cached_property
    def tokenized(self) -> tuple[Mapping[str, Tokenized], Sequence[str]]:
        """Examples of each client that has some, by name, and sentences on those that have none.

        Raises:
            NothingToLearn: no client has any.
        """
        shards: dict[str, Tokenized] = {}
        empty: dict[str, NothingToLearn] = {}
        for name in self.data.names:
            try:
                shards[name] = self.data.tokenize(name)
            except NothingToLearn as error:
                empty[name] = error
        if not shards:
            raise next(iter(empty.values()))
        reasons: dict[str, list[str]] = {}
        for name, reason in empty.items():
            reasons.setdefault(str(reason).removeprefix(f"{name}: "), []).append(name)
        return shards, [_left_out(names, why) for why, names in reasons.items()]


def _left_out(names: Sequence[str], why: str) -> str:
    """A sentence on clients that are left out for one reason."""
    if len(names) == 1:
        return f"client {names[0]} is left out: {why}"
    named = ", ".join(names[:NAMED]) + (" …" if len(names) > NAMED else "")
    return f"{len(names)} clients are left out ({named}): {why}"


class Shelf:
    """Keeps tokens, digests and scores of bases between runs, as those of a comparison.

    Tokens are on disk, and gone with this process; files that change meanwhile are not read again.
    """

    def __init__(self) -> None:
        self._bases: WeakKeyDictionary[Model, Base] = WeakKeyDictionary()
        self._kept: OrderedDict[str, tuple[Any, Held | None, Any]] = OrderedDict()
        self._scores: WeakKeyDictionary[TestSet, dict[str, dict[str, Any]]] = WeakKeyDictionary()

    def base(self, model: Model) -> Base:
        """Description of a model that is as it was loaded."""
        if model not in self._bases:  # hashing all weights takes a while
            self._bases[model] = Base.of(model)
        return self._bases[model]

    def examples(
        self,
        experiment: Experiment,
        model: Model,
        held: Held | None,
        kept: KeptTokens | None = None,
    ) -> Examples:
        """Everybody's examples.

        Args:
            experiment: names the clients.
            model: has the tokenizer.
            held: the rows that the experiment calls `(memory)`.
            kept: tokens of an earlier process, where they are not made already.

        Raises:
            UserError: a file is missing, or the source or its division is wrong.
        """

        def make() -> Examples:
            seeds = Seeds(experiment.federation.seed)
            data = ClientData(
                experiment.data,
                model.tokenizer,
                seeds,
                held,
                vocabulary_size=model.vocabulary_size,
                canaries=Canaries.of(experiment.audit, seeds),
                learns=experiment.objective.learns,
                kept=kept,
            )
            return Examples(data)

        date = experiment.data.template.date
        found = self._found(_asked("examples", experiment, date), model, held, make)
        # The next run is given the day that the template has written in this one.
        written = found.data.encoder.template.date
        return self._found(_asked("examples", experiment, written), model, held, lambda: found)

    def scored(
        self,
        what: str,
        experiment: Experiment,
        model: Model,
        held: Held | None,
        make: Callable[[], _T],
    ) -> _T:
        """What an experiment is scored on, which `make` makes where there is none.

        Args:
            what: name of it.
            experiment: says what is scored, with the day that its template writes.
            model: has the tokenizer.
            held: the rows that the experiment calls `(memory)`.
            make: reads and tokenises it.
        """
        measured = experiment.evaluation.measured
        asked = _asked(f"{what} {measured}", experiment, experiment.data.template.date)
        return self._found(asked, model, held, make)

    def scores_of_base(
        self, test: TestSet, asked: str, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Scores of a base on test data, which `make` computes where they are not known.

        Args:
            test: the data, in memory; pairs are others in each run, which prepares them with what
                they are compared with.
            asked: which base it is, and all else that decides its scores.
        """
        known = self._scores.setdefault(test, {})
        if asked not in known:
            known[asked] = make()
        return deepcopy(known[asked])

    def _found(self, asked: str, model: Model, held: Held | None, make: Callable[[], _T]) -> _T:
        """What was asked for before of the same tokenizer and rows, or is made now."""
        tokenizer, rows, found = self._kept.get(asked, (None, None, None))
        if tokenizer is not model.tokenizer or rows is not held:
            found = make()
        self._kept[asked] = (model.tokenizer, held, found)
        self._kept.move_to_end(asked)
        if len(self._kept) > _MOST:
            self._kept.popitem(last=False)
        made: _T = found
        return made


def _asked(what: str, experiment: Experiment, date: datetime.date | None) -> str:
    """All that decides what rows become, but for the tokenizer and rows in memory."""
    data, audit = experiment.data, experiment.audit
    by_chance = data.clients is None or isinstance(data.client_test, float) or audit is not None
    return json.dumps(
        [
            what,
            data.model_dump(mode="json", exclude={"template": {"date"}}),
            str(date),
            None if audit is None else audit.model_dump(mode="json"),
            experiment.federation.seed if by_chance else None,
            experiment.objective.learns,
        ]
    )
