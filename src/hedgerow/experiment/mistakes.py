"""Settings from plain values; a mistake is one sentence that names its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hedgerow.errors import UserError
from hedgerow.evaluation.metrics import metrics_of
from hedgerow.methods import METHODS
from hedgerow.methods.abilities import (
    able,
    adds_unseen,
    correlates_noise,
    hides_clients,
    hides_examples,
    takes_given_weights,
    takes_quantized_base,
    takes_trainer,
)
from hedgerow.methods.base import Method
from hedgerow.sentences import sentence
from hedgerow.settings import (
    COORDINATE_WISE,
    AuditSettings,
    DataSettings,
    EvaluationSettings,
    FederationSettings,
    PrivacySettings,
    SaysSettings,
    TrainingSettings,
)
from hedgerow.training.objectives import chosen_objective, objective_of
from hedgerow.training.optimizers import SHORTHANDS, chosen, optimizer_of
from hedgerow.training.trainers import chosen_trainer

_Settings = TypeVar("_Settings", bound=BaseModel)


def validate(content: Mapping[str, Any], where: str, kind: type[_Settings]) -> _Settings:
    """Settings of a kind from plain values; a mistake is a `UserError` that begins with `where`."""
    try:
        settings = parsed(kind, content)
        evaluation = getattr(settings, "evaluation", None)
        if isinstance(evaluation, EvaluationSettings):
            metrics_of(evaluation.metrics)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return settings


def parsed(
    kind: type[_Settings],
    content: Mapping[str, Any],
    prefix: tuple[str, ...] = (),
) -> _Settings:
    """Settings whose keys stand below those of `prefix`; a mistake is a sentence."""
    keys = content if isinstance(content, Mapping) else ()
    if odd := [key for key in keys if not isinstance(key, str) or key == "self"]:
        key = ".".join([*prefix, str(odd[0])])
        raise UserError(f"`{key}` is not a known key; see `hedgerow explain`")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(sentence(error, kind, prefix)) from None


def method_of(options: Any) -> Method:
    """The method that `options` name; its own class knows the other keys."""
    options = {"name": options} if isinstance(options, str) else options
    name = options.get("name") if isinstance(options, dict) else None
    if not isinstance(name, str):
        raise UserError(
            "`method` needs a name, as in {name: flora, ranks: 16}; see `hedgerow methods`"
        )
    kind = METHODS.find(name, "method.name")
    return parsed(kind, options, kind.section)


def check_base(method: Method, quantization: str | None, where: str) -> None:
    """Raise a `UserError` where a method would change quantized weights.

    Args:
        quantization: number type of the base's weights; None where they are whole.
        where: what asks for it, for a sentence to follow.
    """
    if quantization is not None and not takes_quantized_base(method):
        raise UserError(
            f"{where}: {method.name} with these options changes all weights of its base, and "
            f"quantized ones ({quantization}) stay as they are: give a base that is not quantized, "
            f"or take one of {able(takes_quantized_base)}"
        )


def with_optimizer(training: TrainingSettings) -> TrainingSettings:
    """The settings with all options of the optimiser, where there are some, and its shorthands.

    So a resolved experiment says what holds, and means the same when it is read again.
    """
    kind, options = chosen(training)
    optimizer = parsed(kind, options, kind.section)
    complete = optimizer.model_dump(mode="json")
    content = training.model_dump() | {key: complete[key] for key in SHORTHANDS if key in complete}
    if not isinstance(training.optimizer, str):
        content["optimizer"] = complete
    return parsed(TrainingSettings, content, ("training",))


def with_objective(training: TrainingSettings) -> TrainingSettings:
    """The settings with all options of the objective, where there are some."""
    kind, options = chosen_objective(training)
    objective = parsed(kind, options, kind.section)
    if isinstance(training.objective, str):
        return training
    return training.model_copy(update={"objective": objective.model_dump(mode="json")})


def with_trainer(training: TrainingSettings, method: Method) -> TrainingSettings:
    """The settings with all options of the trainer, where there is one.

    Raises:
        UserError: as `check_trainer` says.
    """
    chosen = chosen_trainer(training)
    if chosen is None:
        return training
    kind, options = chosen
    trainer = parsed(kind, options, kind.section)
    check_trainer(f"training.trainer {trainer.name}", method, training)
    given = training.trainer
    complete = given if isinstance(given, str) else trainer.model_dump(mode="json")
    return training.model_copy(update={"keep_optimizer": False, "trainer": complete})


def check_trainer(
    trainer: str,
    method: Method,
    training: TrainingSettings,
    privacy: PrivacySettings | None = None,
) -> None:
    """Raise a `UserError` where a client's steps cannot be another library's.

    Args:
        trainer: whose steps they would be, for a sentence to begin with.
        method: the experiment's.
        training: the experiment's.
        privacy: the experiment's, where it is known.
    """
    if not takes_trainer(method):
        raise UserError(
            f"{trainer}: clients of {method.name} take local steps of its own: leave it out, or "
            f"take one of {able(takes_trainer)}"
        )
    if training.keep_optimizer:
        raise UserError(
            f"training.keep_optimizer: {trainer} begins each round with an optimiser of its own: "
            "leave it out"
        )
    if privacy is not None and privacy.level == "example":
        raise UserError(
            f"{trainer}: privacy.level example adds noise to the gradients of hedgerow's own "
            "steps: leave it out"
        )


def check_objective(
    training: TrainingSettings,
    data: DataSettings,
    privacy: PrivacySettings | None,
    audit: AuditSettings | None,
) -> None:
    """Raise a `UserError` where an objective cannot learn from such data, or as privately."""
    objective = objective_of(training)
    where = f"training.objective {objective.name}"
    if data.loss_on not in objective.loss_on:
        raise UserError(
            f"data.loss_on {data.loss_on}: {where} has its loss on {' or '.join(objective.loss_on)}"
            ": take that, or leave it out"
        )
    if not objective.separable and privacy is not None and privacy.level == "example":
        raise UserError(
            f"privacy.level example: the loss of an example in {where} depends on others beside "
            "it, so that noise on single gradients would not hide one: take level client, or "
            "another objective, as dpo"
        )
    if objective.learns == "answers":
        return
    if audit is not None:
        raise UserError(
            f"audit: canaries are answers without a worse one or a label, which {where} cannot "
            "learn from: leave it out, or take the objective supervised"
        )
    if data.fields.messages is not None:
        raise UserError(
            f"data.fields.messages: {where} learns from preferences: name the columns `chosen` and "
            "`rejected` instead, which may hold conversations"
        )
    if data.fields.label is not None and objective.learns == "pairs":
        raise UserError(
            f"data.fields.label: {where} learns from pairs of answers: name the columns `chosen` "
            "and `rejected`, or take the objective kto"
        )


def with_kept(training: TrainingSettings, method: Method) -> TrainingSettings:
    """The settings with `keep_optimizer` as it holds for a method.

    Raises:
        UserError: it is asked for where there is nothing to keep.
    """
    asked, kept = training.keep_optimizer, method.keeps_optimizer
    if kept is None and asked:
        raise UserError(
            f"training.keep_optimizer: {method.name} has no moments that its clients' next round "
            "could go on with: leave it out"
        )
    if optimizer_of(training).immediate_step(training.learning_rate) is not None:
        if asked:
            raise UserError(
                f"training.keep_optimizer: {training.optimizer} has no moments to keep: leave it "
                "out, or give another training.optimizer"
            )
        kept = False
    kept = bool(kept) if asked is None else asked
    return training.model_copy(update={"keep_optimizer": kept})


def with_privacy(method: Method, privacy: PrivacySettings) -> Method:
    """The method with the privacy that is asked for.

    Raises:
        UserError: it cannot promise that.
    """
    if privacy.level == "example":
        if not hides_examples(method):
            raise UserError(
                f"privacy.level example: clients of {method.name} with these options tell of their "
                "examples otherwise than by first-order steps, whose gradients noise could hide "
                f"them in: with its defaults, take one of {able(hides_examples)}"
            )
        return method
    wanted = hides_clients if privacy.bands is None else correlates_noise
    if not hides_clients(method):
        raise UserError(
            f"privacy.level client: an entry of {method.name} with these options is made from more "
            f"than the sum of its clients' updates, on which noise could hide one of them: take "
            f"one of {able(wanted)}"
        )
    if not wanted(method):
        raise UserError(
            f"privacy.bands: rounds of {method.name} with these options sum its clients' updates "
            "on other coordinates each, so that noise cannot make up for an earlier round's: "
            f"leave it out, or take one of {able(wanted)}"
        )
    return method.made_private()


def check_turns(privacy: PrivacySettings | None, federation: FederationSettings) -> None:
    """Raise a `UserError` where clients that take part in turns are to be drawn as well."""
    if privacy is None or privacy.bands is None or federation.clients_per_round is None:
        return
    raise UserError(
        "federation.clients_per_round: with privacy.bands clients take part in turns, one of "
        f"{privacy.bands} groups in each round, so that none is drawn: leave one of them out"
    )


def with_weights(method: Method, weights: str | None, largest_share: float | None) -> Method:
    """The method with weights that `federation.weights` and `largest_share` give.

    Raises:
        UserError: it cannot be weighed so.
    """
    if weights is None and largest_share is None:
        return method
    own = weights in (None, "size", "uniform")
    option = next((key for key in ("weights", "scaling") if hasattr(method, key)), None)
    if own and largest_share is None:
        if option is None and weights == "uniform":
            raise UserError(
                f"federation.weights: {method.name} weighs by size: leave it out, or take size"
            )
        return method if option is None else method.model_copy(update={option: weights})
    if method.is_private:
        key = "federation.largest_share" if own else f"federation.weights {weights}"
        raise UserError(
            f"{key}: under privacy.level client all clients weigh the same, and the server sees "
            "no more than it needs for that: leave it out"
        )
    if own and (weights or getattr(method, option or "", "size")) != "size":
        raise UserError(
            "federation.largest_share bounds what clients weigh by their numbers of examples, by "
            f"which {method.name} does not weigh here: leave it out, or have weights by size"
        )
    if weights in COORDINATE_WISE and not hides_clients(method):
        raise UserError(
            f"federation.weights {weights}: updates of {method.name} with these options have no "
            f"coordinates in common: take another rule, or one of {able(hides_clients)}"
        )
    if not takes_given_weights(method):
        raise UserError(
            f"federation.weights: updates of {method.name} with these options cannot be compared "
            f"or weighed: leave it out, or take one of {able(takes_given_weights)}"
        )
    return method.made_weighed()


def check_secure(method: Method, federation: FederationSettings) -> None:
    """Raise a `UserError` where a method's updates cannot be summed unseen, as is asked for."""
    if federation.secure is None:
        return
    if not adds_unseen(method):
        raise UserError(
            f"federation.secure: an entry of {method.name} with these options is made from more "
            "than the sum of its clients' updates, which is all that the server would see: leave "
            f"it out, or take one of {able(adds_unseen)}"
        )
    if method.is_private:
        raise UserError(
            "federation.secure: under privacy.level client the server bounds each update before "
            "it adds noise, so that it has to see it: leave one of them out, or take level example"
        )


def says_of(federation: FederationSettings, privacy: PrivacySettings | None) -> SaysSettings:
    """What clients say beside their updates, with what `privacy` makes of null."""
    says, level = federation.says, None if privacy is None else privacy.level
    asked = says.model_dump(exclude_none=True)
    by_default = {
        "losses": privacy is None,
        "examples": "withheld" if level == "client" else "exact",
        "failures": "kind" if level == "example" else "full",
    }
    return SaysSettings(**(by_default | asked))


def check_says(
    method: Method,
    training: TrainingSettings,
    federation: FederationSettings,
    privacy: PrivacySettings | None,
) -> None:
    """Raise a `UserError` where what is to be withheld would be said all the same, or needed."""
    says = says_of(federation, privacy)
    if says.losses and privacy is not None:
        raise UserError(
            "federation.says.losses: a training loss would leave a client without noise, whatever "
            "`privacy` promises: leave it out"
        )
    if not says.losses and method.states_losses:
        raise UserError(
            f"federation.says.losses: updates of {method.name} with these options state losses, "
            "which its weights need: leave it out, or give other weights (method.scaling)"
        )
    if federation.says.examples == "withheld" and federation.weights == "size":
        raise UserError(
            "federation.says.examples: weights by size need numbers of examples: give "
            "federation.weights: uniform, or leave it out"
        )
    if says.examples != "exact" and training.epochs is not None and method.tells_steps:
        raise UserError(
            f"federation.says.examples: with training.epochs, an update of {method.name} tells by "
            "its number of steps how many examples there are: give training.steps instead"
        )
