"""A client's part in a round, the same in every engine."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from hedgerow import allocator
from hedgerow.errors import ClientFailed, Diverged, InvalidMessage
from hedgerow.lazy import torch
from hedgerow.privacy.example_level import ExampleLevel, GaussianSteps
from hedgerow.privacy.releases import RELEASES
from hedgerow.training.job import LOWER_RATE, Job, SealedExamples, TakesSteps, learning_rate
from hedgerow.wire import LARGEST_SENT, Update, check_numbers

if TYPE_CHECKING:
    from pathlib import Path

    from hedgerow.clock import Clock
    from hedgerow.data import Tokenized
    from hedgerow.experiment import Experiment
    from hedgerow.ledger import Ledger
    from hedgerow.methods.base import ClientRound
    from hedgerow.model import Model


def train_client(
    experiment: Experiment,
    model: Model,
    examples: Tokenized | SealedExamples,
    client_round: ClientRound,
    parent: str,
    clock: Clock,
    privacy: ExampleLevel | None = None,
    trainer: TakesSteps | None = None,
) -> Update:
    """Train from the global model, which is given back as it was; returns what travels up.

    Args:
        parent: hash of the entry that the model is at.
        privacy: the client's, where the experiment's level is its examples.
        trainer: takes the local steps in the place of what the experiment says.

    Raises:
        ClientFailed: training diverged, the device has too little memory, the method made what
            cannot be written, or the budget of privacy is spent.
        UserError: the method reads examples, or trains more often, than its account of privacy
            says.
    """
    if privacy is None:
        return _trained(experiment, model, examples, client_round, parent, clock, trainer=trainer)
    round = client_round.round
    try:
        update = _trained(
            experiment, model, examples, client_round, parent, clock, privacy.begin(round, parent)
        )
    except ClientFailed as error:
        # That it failed, and why, is said in the round's row, and tells of its steps, too.
        if privacy.log.has(round, parent):
            privacy.account_for(round, parent, hashlib.sha256(str(error).encode()).hexdigest())
        raise
    privacy.account_for(round, parent, update.digest())
    return replace(update, epsilon=privacy.epsilon())


def _trained(
    experiment: Experiment,
    model: Model,
    examples: Tokenized | SealedExamples,
    client_round: ClientRound,
    parent: str,
    clock: Clock,
    private: GaussianSteps | None = None,
    trainer: TakesSteps | None = None,
) -> Update:
    """Train as `train_client` does, without an account of privacy."""
    method, client = experiment.method, client_round.client
    job = job_of(experiment, model, examples, client_round, private)
    try:
        with clock("start"):
            parameters = method.start(model, client_round)
        with clock("train"):
            job = replace(
                job, start=model.snapshot, shared_state=model.shared_state, trainer=trainer
            )
            trained = method.train(job, client_round, parameters)
            allocator.give_back()
        with clock("update"):
            tensors, about = method.update(model, client_round, trained)
            update = Update(
                method=method.name,
                round=client_round.round,
                client=client.name,
                parent=parent,
                num_examples=client.num_examples,
                train_loss=trained.loss if experiment.says.losses else None,
                tensors=tensors,
                about=about,
            )
            update.check_writable()
            _check_numbers(update)
            if method.clients_remember or experiment.training.keep_optimizer:
                client_round.save()
    except InvalidMessage as error:
        raise ClientFailed(
            f"method {method.name} made what cannot be written: {error}",
            kind=f"method {method.name} made what cannot be written",
        ) from None
    except torch.OutOfMemoryError:
        text = "the device ran out of memory: a smaller training.batch_size may help"
        raise ClientFailed(text, kind=text) from None
    finally:
        with clock("start"):
            model.release()
            allocator.give_back()
    return update


def train_beside(
    experiment: Experiment,
    model: Model,
    examples: SealedExamples,
    client_round: ClientRound,
    trainer: TakesSteps,
) -> None:
    """Take a client's steps as `train_client` does, beside another process that makes the update.

    Raises:
        ClientFailed: training diverged, as it has in the other process.
    """
    method = experiment.method
    job = job_of(experiment, model, examples, client_round)
    try:
        parameters = method.start(model, client_round)
        job = replace(job, start=model.snapshot, shared_state=model.shared_state, trainer=trainer)
        method.train(job, client_round, parameters)
    finally:
        model.release()


def job_of(
    experiment: Experiment,
    model: Model,
    examples: Tokenized | SealedExamples,
    client_round: ClientRound,
    private: GaussianSteps | None = None,
) -> Job:
    """A client's job of a round, before its method has started.

    Args:
        private: hides the examples, where the experiment's level is those.
    """
    round, name, seeds = client_round.round, client_round.client.name, client_round.seeds
    return Job(
        network=model.network,
        data=examples if private is None else SealedExamples(examples),
        settings=experiment.training,
        learning_rate=learning_rate(experiment.training, round, experiment.federation.rounds),
        pad_id=model.pad_id,
        order=seeds.numpy("batches", round, name),
        dropout_seed=seeds.derive("dropout", round, name),
        private=private,
        tokenizer=model.tokenizer,
    )


def example_level(
    experiment: Experiment,
    client: str,
    num_examples: int,
    ledger: Ledger,
    key_file: Path,
    folder: Path,
) -> ExampleLevel | None:
    """Example-level privacy of a client; None where the experiment has another, or none.

    Args:
        client: its name.
        num_examples: number of its examples, whatever it says of it.
        ledger: the client's copy.
        key_file: file of the key that its noise derives from.
        folder: of what the client keeps for itself.

    Raises:
        UserError: as `ExampleLevel.of` says.
    """
    settings = experiment.privacy
    if settings is None or settings.level != "example":
        return None
    rounds = [r for r in range(1, len(ledger) + 1) if ledger.has(r)]
    known = [(r, ledger.parent(r)) for r in rounds if ledger.took_part(client, r)]
    return ExampleLevel.of(
        settings,
        experiment.training,
        rounds=experiment.federation.rounds,
        trainings=experiment.method.trainings,
        client=client,
        num_examples=num_examples,
        key_file=key_file,
        log_file=folder / RELEASES,
        known=known,
    )


def _check_numbers(update: Update) -> None:
    """Raise `Diverged` where the server would refuse the update's numbers."""
    try:
        check_numbers(update.tensors, LARGEST_SENT)
    except InvalidMessage as error:
        raise Diverged(f"its update has diverged ({error}): {LOWER_RATE}") from None
