"""What every method is tested with: hedgerow's own pass, and what is wrong with others is found."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import pytest
import torch
from pydantic import AfterValidator, PrivateAttr
from support.configurations import METHOD_OPTIONS, MORE_OPTIONS, method_of

from hedgerow.methods import METHODS, FedAvg, FedIT
from hedgerow.methods.base import Aggregate
from hedgerow.testing import check_method


def keeps_its_promises(name):
    options = method_of(name)
    check_method(METHODS[options["name"]].model_validate(options))


TWICE = ["ferret of the largest, both ways", "ferret of the paper", "ditto", "fedsa_lora", "rolora"]
"""Configurations whose parts others have, too, and that take seconds each."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in TWICE else [])
        for name in METHOD_OPTIONS
    ],
)
def test_every_configuration_keeps_its_promises(name):
    keeps_its_promises(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_OPTIONS)
def test_more_configurations_keep_their_promises(name):
    """More of the same parts; where their bytes are pinned, a plain `make test` compares those."""
    keeps_its_promises(name)


# --- methods that break a promise -----------------------------------------------------------------


class Unweighted(FedAvg):
    """Averages updates as if all clients had as many examples."""

    def aggregate(self, updates, turn):
        same = (dataclasses.replace(update, num_examples=1) for update in updates)
        return super().aggregate(same, turn)


class Secretive(FedIT):
    """Averages factors, and does not say how noisy that is."""

    ranks: int = 2

    def aggregate(self, updates, turn):
        return Aggregate(super().aggregate(updates, turn).tensors, {})


class Boastful(FedIT):
    """Averages factors, and says half of how noisy that is."""

    ranks: int = 2

    def aggregate(self, updates, turn):
        made = super().aggregate(updates, turn)
        return Aggregate(made.tensors, {"aggregation_error": made.metrics["aggregation_error"] / 2})


class TrustingServer(FedAvg):
    """Takes any update."""

    def check_update(self, client, update, expected):
        pass


class TrustingClient(FedAvg):
    """Takes any entry."""

    def check_entry(self, entry, shapes):
        pass


class Clumsy(FedAvg):
    """Stumbles over an update that lacks a tensor."""

    def check_update(self, client, update, expected):
        for name in expected.shapes:
            update.tensors[name].shape  # noqa: B018
        super().check_update(client, update, expected)


class Momentum(FedAvg):
    """Keeps the server's momentum in the object, not in `turn.memory`."""

    _last: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)

    def aggregate(self, updates, turn):
        tensors, metrics, _ = super().aggregate(updates, turn)
        for name, step in tensors.items():
            step += 0.5 * self._last.get(name, torch.zeros(()))
            self._last[name] = step.clone()
        return Aggregate(tensors, metrics)


class Eternal(FedAvg):
    """Keeps momentum where even another run finds it."""

    last: ClassVar[dict[str, torch.Tensor]] = {}

    def train(self, job, turn, parameters):
        trained = super().train(job, turn, parameters)
        with torch.no_grad():
            for name, weight in parameters.items():
                weight += 1e-3 * self.last.get(name, torch.zeros(()))
                self.last[name] = weight.clone()
        return trained


class Relay(FedAvg):
    """Has a client go on from where the one before it in the round has ended."""

    _baton: list[int] = PrivateAttr(default_factory=list)

    def train(self, job, turn, parameters):
        before = self._baton.count(turn.round)
        self._baton.append(turn.round)
        with torch.no_grad():
            next(iter(parameters.values())).add_(1e-3 * before)
        return super().train(job, turn, parameters)


class Hoarder(FedAvg):
    """Collects all updates before it adds them up."""

    def aggregate(self, updates, turn):
        return super().aggregate(list(updates), turn)


class Vandal(FedAvg):
    """Changes the base before the snapshot is taken."""

    def start(self, model, turn):
        with torch.no_grad():
            model.network.model.norm.weight.add_(0.1)
        return super().start(model, turn)


class Forgetting(FedAvg):
    """Says that the last entry is all that anybody needs."""

    entries_accumulate: ClassVar[bool] = False


class Unmerged(FedIT):
    """Exports the base."""

    ranks: int = 2

    def merge(self, model, client):
        pass


class Eager(FedIT):
    """Has another model than the base before the first entry."""

    ranks: int = 2

    def models(self, model, clients):
        if model.factors:
            yield from super().models(model, clients)
            return
        name, weight = next(iter(model.network.named_parameters()))
        model.add(name, torch.full_like(weight, 0.01))
        yield None
        model.add(name, torch.full_like(weight, -0.01))


class Doubling(FedAvg):
    """Has an option that is another each time it is read."""

    rate: Annotated[float, AfterValidator(lambda rate: 2 * rate)] = 1.0


BROKEN = {
    Unweighted: r"is not the mean .* with weights client-000 0.179, .* say 0 ",
    Secretive: r"is not the mean .* off by .* say 0 ",
    Boastful: r"is not the mean .* off by ",
    TrustingServer: "check_update accepts an update wrong by `",
    TrustingClient: "check_entry accepts an entry wrong by `",
    Clumsy: "not so that whatever arrives is refused, or is of use: KeyError: ",
    Momentum: "interrupted after round 1 and resumed, it gives other bytes: the entry of round 2",
    Eternal: "run again, it gives other bytes: the entry of round 1",
    Relay: "run with the last client first, it gives other bytes: the entry of round 1",
    Hoarder: "the server keeps updates: with 16 of them there are .* more than with 4",
    Vandal: "not given back as it was: after the training of client-000 model.norm.weight",
    Forgetting: "replayed on the base, makes another model",
    Eager: "before the first entry, `models` gives another model than the base",
    Unmerged: r"exported \(--to merged\), it is another model",
    Doubling: "options do not survive an experiment file: Doubling with .*'rate': 1.0",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_method_that_breaks_a_promise_is_told_which(kind):
    with pytest.raises(AssertionError, match=BROKEN[kind]) as broken:
        check_method(kind())
    assert str(broken.value).startswith(f"{__name__}:{kind.__name__}: ")


class Frank(Unweighted):
    """Says that its global model is not the mean by size."""

    averages: ClassVar[bool] = False


def test_a_method_that_says_so_need_not_average():
    check_method(Frank())


def test_options_that_do_not_fit_three_clients_are_named():
    with pytest.raises(AssertionError, match=r"fedit: it is not so that .* method.ranks: rank 99"):
        check_method(FedIT(ranks=99))
