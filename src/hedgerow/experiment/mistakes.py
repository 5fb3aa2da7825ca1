"""Settings from plain values; a mistake is one sentence that names its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hedgerow.errors import UserError
from hedgerow.evaluation.metrics import metrics_of
from hedgerow.methods import METHODS
from hedgerow.methods.base import Method
from hedgerow.sentences import sentence
from hedgerow.settings import (
    COORDINATE_WISE,
    EvaluationSettings,
    FederationSettings,
    PrivacySettings,
    TrainingSettings,
)
from hedgerow.training.optimizers import SHORTHANDS, chosen, optimizer_of

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
        if not _hides_examples(method):
            raise UserError(
                f"privacy.level example: clients of {method.name} with these options tell of their "
                "examples otherwise than by first-order steps, whose gradients noise could hide "
                f"them in: with its defaults, take one of {_able(_hides_examples)}"
            )
        return method
    if not _hides_clients(method):
        raise UserError(
            f"privacy.level client: an entry of {method.name} with these options is made from more "
            f"than the sum of its clients' updates, on which noise could hide one of them: take "
            f"one of {_able(_hides_clients)}"
        )
    return method.made_private()


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
    if weights in COORDINATE_WISE and not _hides_clients(method):
        raise UserError(
            f"federation.weights {weights}: updates of {method.name} with these options have no "
            f"coordinates in common: take another rule, or one of {_able(_hides_clients)}"
        )
    if not _can_be_weighed(method):
        raise UserError(
            f"federation.weights: updates of {method.name} with these options cannot be compared "
            f"or weighed: leave it out, or take one of {_able(_can_be_weighed)}"
        )
    return method.made_weighed()


def check_secure(method: Method, federation: FederationSettings) -> None:
    """Raise a `UserError` where a method's updates cannot be summed unseen, as is asked for."""
    if federation.secure is None:
        return
    if not method.communicates or not _hides_clients(method):
        raise UserError(
            f"federation.secure: an entry of {method.name} with these options is made from more "
            "than the sum of its clients' updates, which is all that the server would see: leave "
            f"it out, or take one of {_able(_hides_clients)}"
        )
    if method.is_private:
        raise UserError(
            "federation.secure: under privacy.level client the server bounds each update before "
            "it adds noise, so that it has to see it: leave one of them out, or take level example"
        )


def _hides_examples(method: Method) -> bool:
    return method.learns_by_steps


def _hides_clients(method: Method) -> bool:
    return method.linear and not method.pools_data


def _can_be_weighed(method: Method) -> bool:
    return method.weighable and not method.pools_data


def _able(hides: Callable[[Method], bool]) -> str:
    """Names of the methods that with their defaults may promise something."""
    names = []
    for name, kind in METHODS.items():
        # A plug-in may have an option without a default.
        with suppress(UserError, ValidationError):
            if hides(kind.model_validate({})):
                names.append(name)
    return ", ".join(names)
