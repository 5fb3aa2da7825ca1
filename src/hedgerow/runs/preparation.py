"""Preparation of runs and evaluations: model, data and method, checked before anything is written.

There is one for all: local runs, comparisons, Flower's server, apps and sites, and `evaluate`.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hedgerow.data import (
    ClientData,
    Held,
    KeptTokens,
    Records,
    Rows,
    Spool,
    Template,
    Tokenized,
    check,
    good_answers,
    load_template,
    read,
)
from hedgerow.data.sources import share_of
from hedgerow.errors import NothingToScore, UserError, did_you_mean
from hedgerow.evaluation.answers import check_positions
from hedgerow.evaluation.metrics import metrics_of
from hedgerow.evaluation.metrics.base import LIKELIHOODS
from hedgerow.evaluation.scores import TestSet
from hedgerow.experiment import Experiment, check_libraries, load
from hedgerow.experiment.mistakes import check_base
from hedgerow.lazy import torch
from hedgerow.ledger import Base
from hedgerow.loading import check_adds, check_finite
from hedgerow.methods.base import Client, Method
from hedgerow.model import Model, max_positions
from hedgerow.names import MEMORY
from hedgerow.privacy.bands import groups_of
from hedgerow.privacy.example_level import check_example_level
from hedgerow.runs.directory import CLIENT_TESTS, EXPERIMENT, TEST_DATA, Digests
from hedgerow.runs.shelf import NAMED, Shelf
from hedgerow.seeds import Seeds
from hedgerow.settings import EvaluationSettings, FederationSettings, TextSettings
from hedgerow.training.checkpointing import check_checkpointing
from hedgerow.training.objectives.answers import referenced
from hedgerow.training.optimizers import optimizer_of
from hedgerow.training.routers import check_router_loss
from hedgerow.training.trainers import trainer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MUCH = 0.05
"""Share of unknown tokens that is worth a sentence."""


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs, checked before anything is written."""

    experiment: Experiment
    """The experiment, with what the run records at its beginning."""
    names: list[str]
    """Clients that the experiment names, in their order, also those that are left out."""
    model: Model
    base: Base
    trained: Mapping[str, Sequence[int]]
    """Shapes of what clients train (`Method.trained_shapes`)."""
    clients: list[Client]
    """Clients that have something to learn from, each with its place among all that are named."""
    shards: Mapping[str, Tokenized]
    """Examples that are trained on, by the name of who trains."""
    examples: Mapping[str, Tokenized]
    """Examples of each client that has some, by name, whoever trains on them."""
    test: TestSet | None
    tests: dict[str, TestSet]
    """Test rows of each client that has some of its own, by name."""
    notes: list[str]
    """Sentences for people: what there is, then what is left out of it, each with its count."""
    shelf: Shelf | None
    """What runs on the same model and data have in common; None of one by itself."""

    def referenced(self) -> Prepared:
        """The same with what objective and metrics compare with, while `model` is the base."""
        experiment, model = self.experiment, self.model
        test = None if self.test is None else scored_beside(self.test, experiment, model)
        shards = {name: referring(experiment, model, own) for name, own in self.shards.items()}
        tests = {name: scored_beside(own, experiment, model) for name, own in self.tests.items()}
        return replace(self, shards=shards, test=test, tests=tests)

    def digests(self) -> Digests:
        """Digest of each client's examples, of the test data, and of all clients' own together."""
        found: Digests = {name: shard.digest() for name, shard in self.shards.items()}
        if self.test is not None:
            found[TEST_DATA] = self.test.digest()
        if self.tests:
            own = [[name, *test.digest().split("+")] for name, test in sorted(self.tests.items())]
            # Of examples and of options apart, as each one's digest has them.
            parts = zip(*own, strict=True) if len({len(each) for each in own}) == 1 else [own]
            hashes = [
                hashlib.sha256(json.dumps(part).encode()).hexdigest() if any(part) else ""
                for part in parts
            ]
            found[CLIENT_TESTS] = "+".join(hashes)
        return found


def prepare(
    experiment: Experiment,
    model: Model | None = None,
    held: Held | None = None,
    shelf: Shelf | None = None,
    kept: KeptTokens | None = None,
) -> Prepared:
    """Load the model and tokenise everybody's data.

    Args:
        experiment: names them.
        model: the base model where it is loaded already.
        held: the rows that the experiment calls `(memory)`.
        shelf: has what other runs have made of the same.
        kept: tokens of an earlier process, where the shelf has none.

    Raises:
        UserError: naming what in the experiment does not fit.
    """
    check_libraries(experiment)
    model = model or Model.load(experiment.model)
    made = shelf or Shelf()
    examples_of_all = made.examples(experiment, model, held, kept)
    data = examples_of_all.data
    check_audit(experiment, data.names)
    experiment = with_date(experiment, data.encoder.template.date)
    base = made.base(model)  # before any forward pass, of which RWKV's first rescales its weights
    check_fits(experiment, model, len(data.names))
    shards, left_out = examples_of_all.tokenized
    clients = [
        Client(index, name, experiment.says.count(len(shards[name])))
        for index, name in enumerate(data.names)
        if name in shards
    ]
    check_audit(experiment, list(shards))
    notes = notes_on_model(model, data.encoder.template, experiment.method)
    notes += [*left_out, *data.remarks.sentences(), *notes_on_data(shards)]
    tests, untested = made.scored(
        "client_test",
        experiment,
        model,
        held,
        partial(client_tests, experiment, model, data, list(shards)),
    )
    notes += untested
    if experiment.method.pools_data:
        shards = {"pooled": Tokenized.concatenate(list(shards.values()))}
        clients = [
            Client(0, name, experiment.says.count(len(shard))) for name, shard in shards.items()
        ]
    else:
        _check_counts(experiment, len(data.names), len(clients))
        check_groups(experiment, data.names, shards)
        check_trusted(experiment, list(shards))
    for name, shard in shards.items():
        check_privacy(experiment, name, len(shard))
    test = None
    if experiment.data.test is not None:
        rows = None if held is None else held.test
        test = made.scored(
            "test",
            experiment,
            model,
            held,
            partial(load_test, experiment.data, experiment.evaluation, model, rows),
        )
        notes += notes_on_test(test, experiment.evaluation)
    examples = sum(len(shard) for shard in shards.values())
    there_is = f"{base.name}, {len(clients)} clients, {examples:,} examples"
    return Prepared(
        experiment=experiment,
        names=data.names,
        model=model,
        base=base,
        trained=experiment.method.trained_shapes(model),
        clients=clients,
        shards=shards,
        examples=examples_of_all.tokenized[0],
        test=test,
        tests=tests,
        notes=[there_is, *notes],
        shelf=shelf,
    )


def referring(experiment: Experiment, base: Model, examples: Tokenized) -> Tokenized:
    """A client's examples with how likely the base finds them, where the objective needs that.

    Args:
        base: the model that the run began with, to which no entry has been applied.
    """
    if experiment.objective.refers_to != "base":
        return examples
    batch_size = experiment.training.batch_size
    return referenced(base.network, examples, base.pad_id, batch_size)


def scored_beside(test: TestSet, experiment: Experiment, base: Model) -> TestSet:
    """Test rows with what rewards of pairs are beside, where metrics need that.

    Args:
        base: the model that the run began with, to which no entry has been applied.
    """
    scale = experiment.objective.reward_scale
    return test.referenced(base, experiment.evaluation.batch_size, scale)


def with_date(experiment: Experiment, date: datetime.date | None) -> Experiment:
    """The experiment with the day that its chat template writes; None is no day."""
    if date is None:
        return experiment
    template = experiment.data.template.model_copy(update={"date": date})
    data = experiment.data.model_copy(update={"template": template})
    return experiment.model_copy(update={"data": data})


def with_date_of(experiment: Experiment, run: Path, *, is_set: bool = True) -> Experiment:
    """The experiment with the day that a run has on record, if it has one and this has none.

    Args:
        run: directory of a run with the same chat template, which need not have begun.
        is_set: whether a day that the experiment has was set by somebody, and so stays.
    """
    own = experiment.data
    has_own = is_set and own.template.date is not None
    if own.prompt != "chat" or has_own or not (run / EXPERIMENT).is_file():
        return experiment
    before = load(run / EXPERIMENT).data
    same = (before.prompt, before.template.name) == (own.prompt, own.template.name)
    return with_date(experiment, before.template.date) if same else experiment


def check_fits(experiment: Experiment, model: Model, num_clients: int) -> None:
    """Raise a `UserError` where a run cannot train the model, with its data, method and clients.

    It has the model compute something, after which RWKV's weights are scaled otherwise.
    """
    where = f"model.path: {experiment.model.path}"
    if model.origin.quantized is not None:
        raise UserError(f"{where} {model.origin.quantized}")
    if experiment.model.quantization not in (None, model.quantization):
        raise UserError(
            "model.quantization: a base that is in memory is as it was given: load it from a folder"
        )
    if experiment.model.merged_rank is not None and model.quantization is None:
        raise UserError(
            "model.merged_rank bounds what is kept beside quantized weights, and there are none: "
            "give model.quantization, or leave it out"
        )
    check_base(experiment.method, model.quantization, where)
    (check_adds if model.quantization is None else check_finite)(model.network, where)
    check_causal(model)
    check_max_length(model, experiment.data.max_length)
    optimizer_of(experiment.training).check(model.device)
    if (trainer := trainer_of(experiment.training)) is not None:
        trainer.check(experiment.training, model.device)
    if experiment.training.gradient_checkpointing:
        check_checkpointing(model.network)
    if experiment.training.router_aux_loss_coef:
        check_router_loss(model.network)
    experiment.method.check(model, num_clients, experiment.training)
    _check_secure(experiment.federation, num_clients)
    _check_sampling(experiment, num_clients)


def _check_secure(federation: FederationSettings, num_clients: int) -> None:
    """Raise a `UserError` where a round has fewer clients than a secure sum takes, or twice them.

    A server that lies could have either half help with another set of clients, and take away all
    masks.
    """
    secure = federation.secure
    asked = federation.drawn_of(num_clients) or num_clients
    if secure is None or asked / 2 < secure.needed(asked) <= asked:
        return
    if asked == 1:
        raise UserError(
            "federation.secure: a round has one client, and a sum of one is its update: have more "
            "take part"
        )
    beside = "above the" if secure.needed(asked) > asked else "not more than half of the"
    raise UserError(
        f"federation.secure.threshold: {secure.needed(asked)} is {beside} {asked} clients of a "
        f"round: take from {asked // 2 + 1} to {asked}, or leave it out"
    )


def _check_sampling(experiment: Experiment, num_clients: int) -> None:
    """Raise a `UserError` where clients count on knowing who took part, and nobody may know."""
    method, drawn = experiment.method, experiment.federation.drawn_of(num_clients)
    counts = method.clients_remember and not method.clients_may_forget
    if method.is_private and counts and drawn is not None:
        raise UserError(
            "federation.clients_per_round: under privacy.level client nobody is told who was drawn "
            f"for a round, which clients of {method.name} need to know: leave it out, so that all "
            "take part"
        )


def check_audit(experiment: Experiment, clients: Sequence[str]) -> None:
    """Raise a `UserError` where canaries are for none of the clients that there are."""
    if experiment.audit is not None and experiment.audit.client not in clients:
        name, known = experiment.audit.client, ", ".join(clients[:NAMED])
        raise UserError(
            f"`audit.client`: there is no client {name!r} with examples"
            f"{did_you_mean(name, clients)}: name one of {known}{' …' * (len(clients) > NAMED)}"
        )


def check_privacy(experiment: Experiment, client: str, num_examples: int) -> None:
    """Raise a `UserError` where a client with so many examples cannot have example-level privacy.

    The noise that a budget asks for is found here, and remembered.
    """
    settings = experiment.privacy
    if settings is not None and settings.level == "example":
        check_example_level(
            settings,
            experiment.training,
            rounds=experiment.federation.rounds,
            trainings=experiment.method.trainings,
            client=client,
            num_examples=num_examples,
        )


@torch.no_grad()
def check_causal(model: Model) -> None:
    """Raise a `UserError` where what the model says of a text depends on what follows it.

    Such a model sees the answer that it is to predict, and the padding after it.
    """
    input_ids = torch.tensor([[0, 1, 1], [0, 2, 2]], device=model.device)
    try:
        first, second = model.network(input_ids=input_ids, use_cache=False).logits[:, 0].float()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.network.parameters()})
        mend = "give a causal language model whose config.json fits its architecture"
        if len(dtypes) > 1:
            mend = f"its weights are {' and '.join(dtypes)}, give it in one (model.float(), say)"
        raise UserError(
            f"model.path: {model.architecture} cannot compute anything of a text "
            f"({' '.join(str(error).split())[:200]}): {mend}"
        ) from None
    rounding = 2e-3 if model.network.dtype == torch.float32 else 0.02
    if (first - second).abs().max() > rounding * first.std():
        raise UserError(
            f"model.path: {model.architecture} predicts a token from those that follow it too, so "
            "that it could neither be trained nor scored on answers: give a causal language model "
            "(one of BERT's kind is if its config.json has `is_decoder: true`)"
        )


def check_max_length(model: Model, max_length: int) -> None:
    """Raise a `UserError` where `data.max_length` is more than the model was made for."""
    positions = max_positions(model.network)
    if max_length > positions:
        raise UserError(
            f"data.max_length: {max_length} is above the {positions} positions of {model.name}: "
            f"give at most {positions}"
        )


def load_test(
    text: TextSettings,
    settings: EvaluationSettings,
    model: Model,
    held: Records | None = None,
) -> TestSet:
    """The test data of an experiment, ready to be scored.

    Args:
        text: names them, and how they become text.
        settings: what is scored.
        model: whose tokenizer and positions count.
        held: the rows, where `data.test` is `(memory)`.

    Raises:
        UserError: there is none, or it cannot be scored as `settings` ask.
    """
    rows = test_rows(text, settings, model.tokenizer, held)
    if any(metric.needs in LIKELIHOODS for metric in metrics_of(settings.metrics)):
        check_max_length(model, text.max_length)
    check_positions(model, settings)
    test = TestSet.prepare(rows, text, settings, model.tokenizer, model.vocabulary_size)
    return replace(test, remarks=rows.remarks.sentences())


def client_tests(
    experiment: Experiment, model: Model, data: ClientData, names: Sequence[str]
) -> tuple[dict[str, TestSet], list[str]]:
    """Clients' own test rows (`data.client_test`), ready to be scored.

    Args:
        experiment: says what is scored, but for `evaluation.by`, which is of `data.test`.
        model: whose tokenizer and positions count.
        data: has the rows.
        names: clients that are asked for.

    Returns:
        The test rows of each client that has some, and sentences on those that have none.

    Raises:
        UserError: they cannot be read, or not be scored as `evaluation` asks.
    """
    if experiment.data.client_test is None:
        return {}, []
    settings = experiment.evaluation.model_copy(update={"by": None})
    if any(metric.needs in LIKELIHOODS for metric in metrics_of(settings.metrics)):
        check_max_length(model, experiment.data.max_length)
    check_positions(model, settings)
    spool, tests, without = Spool(), {}, []
    for name in names:
        rows = data.test_rows(name)
        if not rows:
            without.append(f"client {name} has no test rows of its own, and so no score")
            continue
        try:
            tests[name] = TestSet.prepare(
                rows,
                experiment.data,
                settings,
                model.tokenizer,
                model.vocabulary_size,
                client=name,
                spool=spool,
            )
        except NothingToScore as error:
            without.append(f"client {name} has no score: {error}")
    return tests, without


def test_rows(
    text: TextSettings,
    settings: EvaluationSettings,
    tokenizer: PreTrainedTokenizerBase,
    held: Records | None = None,
) -> Rows:
    """The rows to evaluate on; `held` has them where `data.test` is `(memory)`.

    The tokenizer's chat template, where `data.prompt` is that, says whether rows may have tools.

    Raises:
        UserError: there are none, or they cannot be scored.
    """
    if text.test is None:
        raise UserError("`data.test` is missing: name the file to evaluate on")
    if text.test == MEMORY and held is not None:
        records = share_of(held, text.test_share, text.test_rows)
    else:
        records = read(
            text.test, text.test_split, text.test_subset, text.test_share, text.test_rows
        )
    # Multiple choice alone needs no output: a question may name its answer otherwise.
    answered = any(metric.needs != "choices" for metric in metrics_of(settings.metrics))
    rows = check(
        records,
        text.fields_of_test,
        answered=answered,
        every_turn=text.loss_on == "turns",
        tools=load_template(text, tokenizer).writes_tools,
    )
    return Rows(good_answers(rows), rows.remarks)


def notes_on_model(
    model: Model, template: Template | None, method: Method | None = None
) -> list[str]:
    """Sentences on what of a model is left out or not trained, and on its prompts.

    Args:
        template: what writes its prompts; None where that is not hedgerow's.
        method: what trains it; None where nothing does.
    """
    notes = []
    if unused := model.origin.unused:
        some = ", ".join(unused[:3]) + ", …" * (len(unused) > 3)
        notes.append(
            f"left out, since {model.architecture} has no place for them: {len(unused):,} of the "
            f"checkpoint's weights ({some})"
        )
    if method is not None:
        notes += method.left_out(model)
    if template is not None:
        notes += template.notes
        if template.date is not None:
            notes.append(f"the chat template writes the date: {template.date}")
    return notes


def notes_on_data(shards: Mapping[str, Tokenized]) -> list[str]:
    """Sentences on what is left out of clients' examples; of each that loses more than half."""
    notes = []
    total = sum(len(shard) + shard.dropped for shard in shards.values())
    if truncated := sum(shard.truncated for shard in shards.values()):
        notes.append(f"{truncated:,} of {total:,} examples are cut at max_length")
    if dropped := sum(shard.dropped for shard in shards.values()):
        notes.append(
            f"{dropped:,} of {total:,} examples are left out, since their prompts fill max_length"
        )
        for name, shard in shards.items():
            if shard.dropped > len(shard):
                own = len(shard) + shard.dropped
                notes.append(f"{name} keeps {len(shard):,} of {own:,} examples")
    return [*notes, *_notes_on_text(shards.values())]


def _notes_on_text(shards: Iterable[Tokenized]) -> list[str]:
    """Sentences on what the tokenizer makes of texts, other than people may expect."""
    notes = []
    shards = list(shards)
    if spelt := sum(shard.spelt for shard in shards):
        total = sum(len(shard) + shard.dropped for shard in shards)
        notes.append(
            f"{spelt:,} of {total:,} examples spell control tokens, as </s>, which are text there"
        )
    unknown = sum(shard.unknown for shard in shards)
    tokens = sum(int(shard.lengths.sum()) for shard in shards)
    if unknown > _MUCH * tokens:
        notes.append(
            f"{unknown / tokens:.0%} of the tokens stand for text that the tokenizer lacks"
        )
    return notes


def notes_on_scoring(model: Model, test: TestSet, settings: EvaluationSettings) -> list[str]:
    """Sentences on a model that is scored, on its prompts, and on the test rows."""
    return [*notes_on_model(model, test.template), *notes_on_test(test, settings)]


def notes_on_test(test: TestSet, settings: EvaluationSettings) -> list[str]:
    """Sentences on test rows that are cut, or do not count."""
    needs = {metric.needs for metric in metrics_of(settings.metrics)}
    counts = {}
    if needs & LIKELIHOODS:
        counts["have no loss, since their prompts fill max_length"] = test.dropped
        counts["are cut at max_length for the loss"] = test.truncated
    if "answers" in needs:
        counts["call tools, which the loss alone scores"] = len(test) - len(test.texts)
    if "choices" in needs:
        counts["do not count for multiple choice, since their options cannot be told"] = (
            test.skipped
        )
    return [
        *(f"the test data: {remark}" for remark in test.remarks),
        *(
            f"the test data: {count:,} of {len(test):,} rows {why}"
            for why, count in counts.items()
            if count
        ),
        *(f"the test data: {note}" for note in _notes_on_text([test.examples])),
    ]


def check_trusted(experiment: Experiment, names: Sequence[str]) -> None:
    """Raise a `UserError` where the client that is trusted is none of these, or not in a round."""
    trusted, per_round = experiment.federation.trusted, experiment.federation.clients_per_round
    if trusted is not None and trusted not in names:
        known = ", ".join(names[:NAMED]) + (" …" if len(names) > NAMED else "")
        raise UserError(
            f"federation.trusted: there is no client {trusted!r} (the clients: {known})"
        )
    if trusted is not None and per_round is not None and per_round < len(names):
        raise UserError(
            f"federation.clients_per_round: {trusted}, which others are weighed by, has to take "
            "part in every round: leave clients_per_round out"
        )


def _check_counts(experiment: Experiment, named: int, there: int) -> None:
    """Raise a `UserError` where a round cannot have as many clients as it is to have."""
    wanted, needed = experiment.federation.clients_per_round, experiment.federation.min_clients
    if wanted is not None and wanted > named:
        raise UserError(
            f"federation.clients_per_round: {wanted} is above the {named} clients there are"
        )
    if needed > there:
        raise UserError(
            f"federation.min_clients: {needed} is above the {there} clients that have examples"
        )


def check_groups(experiment: Experiment, names: Sequence[str], there: Collection[str]) -> None:
    """Raise a `UserError` where clients are too few to take part in turns (`privacy.bands`).

    Args:
        experiment: says in how many groups.
        names: of all clients that it has.
        there: names of those that have something to learn from.
    """
    bands = None if experiment.privacy is None else experiment.privacy.bands
    if bands is None:
        return
    if len(names) < bands:
        raise UserError(
            f"privacy.bands: {len(names)} clients cannot take part in {bands} groups, one after "
            "another: give a smaller number"
        )
    needed = experiment.federation.min_clients
    groups = groups_of(names, bands, Seeds(experiment.federation.seed))
    sizes = Counter(groups[name] for name in there)
    smallest = min(sizes[group] for group in range(bands))
    if needed > smallest:
        raise UserError(
            f"federation.min_clients: {needed} is above the {smallest} clients with examples of "
            f"the smallest of the {bands} groups that take part in turns: give fewer "
            "privacy.bands, or fewer of the other"
        )
