"""What a method promises of its sums, its runs and its models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hedgerow.adapters import adapter_pairs
from hedgerow.errors import UserError
from hedgerow.ledger import Ledger
from hedgerow.methods.base import ClientRound, Method, Trained
from hedgerow.runs import RunModels, check_client
from hedgerow.testing.bench import ROUNDS, Bench, LastFirst
from hedgerow.testing.case import TRAINING, Case
from hedgerow.testing.models import effective_weights
from hedgerow.training.job import Job

if TYPE_CHECKING:
    from torch import Tensor, nn

EXACT = 1e-4
"""How far sums in float32 may be from those in float64, relative to them."""
CLOSE = 1e-5
"""How far two ways to the same weights may be from each other."""

Weights = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Round:
    """A first round: what clients trained, and what became of it."""

    case: Case
    before: Weights
    """The base."""
    trained: Mapping[str, Weights]
    """What each client trained."""
    after: Mapping[str | None, Weights]
    """The global model, under None; or each client's where there is no global one."""


def train(bench: Bench) -> Round:
    """Have all clients train in a first round, and advance the model by its entry.

    Raises:
        AssertionError: a client does not give the model back.
        InvalidMessage: what was sent in earnest is refused.
    """
    model, trained = bench.model, {}

    def local_steps(
        method: Method, client_round: ClientRound, parameters: Mapping[str, nn.Parameter]
    ) -> Trained:
        job = Job(
            network=model.network,
            data=bench.prepared.shards[client_round.client.name],
            settings=TRAINING,
            learning_rate=TRAINING.learning_rate,
            pad_id=model.pad_id,
            order=client_round.seeds.numpy("batches", client_round.round, client_round.client.name),
            dropout_seed=client_round.seeds.derive(
                "dropout", client_round.round, client_round.client.name
            ),
            start=model.snapshot,
        )
        done = method.train(job, client_round, parameters)
        trained[client_round.client.name] = effective_weights(model)
        return done

    before = effective_weights(model)
    case = Case(bench.method, model, bench.folder, round=1, train=local_steps)
    case.check_accepted_update(case.receive(case.updates[0]))
    entry = case.arrive(case.entry)
    bench.method.apply(model, entry)
    clients = [] if bench.method.has_global_model else list(trained)
    after = {name: effective_weights(model) for name in bench.method.models(model, clients)}
    case.restore()
    return Round(case, before, trained, after)


def check_mean(round: Round) -> None:
    """Compare the global model with the mean of the clients' models, in float64.

    Raises:
        AssertionError: it is another, or `aggregation_error` is.
    """
    method, entry = round.case.method, round.case.arrive(round.case.entry)
    if not method.is_mean:
        return
    if not method.has_global_model:
        for name, weights in round.trained.items():
            found = _distance(round.after[name], weights)
            size = _distance(weights, round.before)
            assert found <= EXACT * size, (
                f"the model of {name} is not what it has trained: it is off by {found / size:.2g} "
                "of its change"
            )
        return
    shares = {p.client: p.weight for p in entry.participants}
    mean = {name: before.clone() for name, before in round.before.items()}
    for client, own in round.trained.items():
        for name, before in round.before.items():
            mean[name] += shares[client] * (own[name] - before)
    size = _distance(mean, round.before)
    assert size > 0, "clients train nothing: the mean of their models is the base"
    error = _distance(round.after[None], mean) / size
    stated = entry.metrics.get("aggregation_error", 0.0)
    # A server doesn't know what clients have rounded away; each says how much it was.
    rounded = 3 * entry.metrics.get("upload_error", 0.0)
    said = ", ".join(f"{client} {weight:.3g}" for client, weight in shares.items())
    assert math.isclose(error, stated, rel_tol=0.01, abs_tol=EXACT + rounded), (
        f"the global model is not the mean of the clients' models, Σ p_k w_k: with weights {said} "
        f"it is off by {error:.3g} of the mean change, where the round's metrics say {stated:.3g} "
        "(`aggregation_error`); a method that does something else says "
        "`averages: ClassVar[bool] = False`"
    )
    assert not method.is_exact or error <= EXACT, (
        f"the method says that it `is_exact`, and the global model is off by {error:.3g} of the "
        "clients' mean change"
    )


def check_runs(bench: Bench) -> None:
    """Run the method as a whole, in another order, and in two parts.

    Raises:
        AssertionError: the ledgers have other bytes; or an entry that is replayed makes another
            model than it made in the run.
    """
    base = bench.model.state()
    whole = _bytes(bench.run("whole", ROUNDS))
    _check_replay(bench, base)
    again = _bytes(bench.run("again", 1))
    bench.model.reset(base)
    _check_equal(again, whole, "run again")
    other = _bytes(bench.run("last-first", 2, fleet=LastFirst))
    bench.model.reset(base)
    _check_equal(other, whole, "run with the last client first")
    bench.run("resumed", 1)
    bench.model.reset(base)
    resumed = _bytes(bench.run("resumed", ROUNDS, resume=True))
    bench.model.reset(base)
    _check_equal(resumed, whole, "interrupted after round 1 and resumed")


def _check_replay(bench: Bench, base: Mapping[str, Tensor]) -> None:
    """Compare the run's model with what its ledger makes of the base, which is left."""
    model = bench.model
    state, factors = model.state(), dict(model.factors or {})
    model.reset(base)
    Ledger.open(bench.folder / "whole" / "ledger").replay(bench.experiment.method, model)
    held = dict(model.factors or {})
    same = held.keys() == factors.keys()
    same = same and all(torch.equal(held[name], factors[name]) for name in held)
    same = same and all(torch.equal(weight, state[name]) for name, weight in model.state().items())
    model.reset(base)
    assert same, (
        f"a ledger of {ROUNDS} rounds, replayed on the base, makes another model than the run had; "
        "`apply` must depend on the model and the entry alone, and if the last entry is not the "
        "whole step, `entries_accumulate` is True"
    )


def _check_equal(ledger: list[bytes], whole: list[bytes], what: str) -> None:
    for round, (entry, expected) in enumerate(zip(ledger, whole, strict=False), start=1):
        assert entry == expected, (
            f"{what}, it gives other bytes: the entry of round {round} is another; a method keeps "
            "no state but what `client_round.memory` is given, and draws from `client_round.seeds`"
        )


def check_models(bench: Bench) -> None:
    """Compare what is evaluated with the base, and with what is exported, merged and as an adapter.

    Raises:
        AssertionError: they are different models.
    """
    experiment, model, base = bench.experiment, bench.model, bench.model.state()
    ledger, method = Ledger.open(bench.folder / "whole" / "ledger"), bench.experiment.method
    own, before = RunModels(method, ledger, len(ledger)), effective_weights(model)
    clients: list[str | None] = [next(iter(check_client(experiment, ledger, None)), None)]
    if method.personal and method.has_global_model:
        clients.append(ledger.clients()[0])

    def replayed() -> None:
        model.reset(base)
        ledger.replay(method, model)

    for client in clients:
        named = [] if client is None else [client]
        for _ in RunModels(method, ledger, 0).models(model, named):
            far = _farthest(effective_weights(model), before)
            assert far <= CLOSE, (
                "before the first entry, `models` gives another model than the base, which is what "
                f"is scored then: weights differ by up to {far:.2g}"
            )
        replayed()
        evaluated = [effective_weights(model) for _ in own.models(model, named)]
        assert len(evaluated) == 1, f"`models` yields {len(evaluated)} models for one"
        try:
            replayed()
            own.merge(model, client)
            _check_same(effective_weights(model), evaluated[0], "merged")
        except UserError:
            pass  # a sentence will do
        try:
            replayed()
            pairs = dict(adapter_pairs(own.adapter(client, lambda: model)))
            added = {module: pair.product().double().cpu() for module, pair in pairs.items()}
            exported = {n: w + added[n] if n in added else w for n, w in before.items()}
            _check_same(exported, evaluated[0], "adapter")
        except UserError:
            pass
        model.reset(base)


def _check_same(exported: Weights, evaluated: Weights, what: str) -> None:
    worst = _farthest(exported, evaluated)
    assert worst <= CLOSE, (
        f"exported (--to {what}), it is another model than the one that is evaluated: weights "
        f"differ by up to {worst:.2g}"
    )


def _farthest(one: Weights, other: Weights) -> float:
    """Largest difference of any weight."""
    return max(float((one[name] - other[name]).abs().max()) for name in other)


def _bytes(run: Path) -> list[bytes]:
    """The entries of a run, oldest first."""
    return [file.read_bytes() for file in sorted((run / "ledger").glob("*.safetensors"))]


def _distance(one: Weights, other: Weights) -> float:
    """‖one - other‖ over all weights."""
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in other))
