"""What runs that follow one another on one model and the same data have in common, made once."""

from __future__ import annotations

import datetime
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from hedgerow.data import Canaries, ClientData, Held, Tokenized
from hedgerow.errors import NothingToLearn
from hedgerow.ledger import Base
from hedgerow.seeds import Seeds

if TYPE_CHECKING:
    from hedgerow.experiment import Experiment
    from hedgerow.model import Model

_MOST = 8
"""Number of ways to ask for examples, of which those that were used last are kept."""
NAMED = 10
"""Clients that are named where several are left out for one reason."""


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
    """Keeps tokens and digests from one run to the next, as those of a comparison.

    Tokens are on disk, and gone with this process; files that change meanwhile are not read again.
    """

    def __init__(self) -> None:
        self._bases: WeakKeyDictionary[Model, Base] = WeakKeyDictionary()
        self._examples: OrderedDict[str, tuple[Any, Held | None, Examples]] = OrderedDict()

    def base(self, model: Model) -> Base:
        """Description of a model that is as it was loaded."""
        if model not in self._bases:  # hashing all weights takes a while
            self._bases[model] = Base.of(model)
        return self._bases[model]

    def examples(self, experiment: Experiment, model: Model, held: Held | None) -> Examples:
        """Everybody's examples.

        Args:
            experiment: names the clients.
            model: has the tokenizer.
            held: the rows that the experiment calls `(memory)`.

        Raises:
            UserError: a file is missing, or the source or its division is wrong.
        """
        asked = _all_that_decides(experiment, experiment.data.template.date)
        tokenizer, known, found = self._examples.get(asked, (None, None, None))
        if found is None or tokenizer is not model.tokenizer or known is not held:
            seeds = Seeds(experiment.federation.seed)
            data = ClientData(
                experiment.data,
                model.tokenizer,
                seeds,
                held,
                vocabulary_size=model.vocabulary_size,
                canaries=Canaries.of(experiment.audit, seeds),
                learns=experiment.objective.learns,
            )
            found = Examples(data)
        # The next run is given the day that the template has written in this one.
        for date in (experiment.data.template.date, found.data.encoder.template.date):
            asked = _all_that_decides(experiment, date)
            self._examples[asked] = (model.tokenizer, held, found)
            self._examples.move_to_end(asked)
        while len(self._examples) > _MOST:
            self._examples.popitem(last=False)
        return found


def _all_that_decides(experiment: Experiment, date: datetime.date | None) -> str:
    """All that decides what examples become, but for tokenizer and rows in memory."""
    data, audit = experiment.data, experiment.audit
    by_chance = data.clients is None or isinstance(data.client_test, float) or audit is not None
    return json.dumps(
        [
            data.model_dump(mode="json", exclude={"template": {"date"}}),
            str(date),
            None if audit is None else audit.model_dump(mode="json"),
            experiment.federation.seed if by_chance else None,
            experiment.objective.learns,
        ]
    )
