"""What methods allow, each a question to what a method declares of itself and of its parts.

No method is asked by its name, so that a plug-in has the abilities that its own declarations give
it. Whether an experiment may ask for something is decided by the same questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from pydantic import ValidationError

from hedgerow.errors import UserError
from hedgerow.methods import METHODS
from hedgerow.methods.base import Method

Answer = bool | None
"""Answer of a method with its options; None: the question does not arise."""


def aggregates_exactly(method: Method) -> Answer:
    """Whether the global model becomes the weighted mean of the clients', but for rounding."""
    return method.is_exact if method.communicates else None


def takes_different_ranks(method: Method) -> Answer:
    """Whether clients' adapters may have different ranks."""
    return method.takes_different_ranks


def hides_examples(method: Method) -> Answer:
    """Whether noise on gradients hides all that leaves a client (`privacy.level: example`)."""
    return method.learns_by_steps


def hides_clients(method: Method) -> Answer:
    """Whether noise on the sum of updates hides a client (`privacy.level: client`)."""
    return method.linear and not method.pools_data


def correlates_noise(method: Method) -> Answer:
    """Whether noise may be correlated from round to round (`privacy.bands`)."""
    return bool(hides_clients(method)) and method.keeps_coordinates


def adds_unseen(method: Method) -> Answer:
    """Whether the server may add updates of which it sees none (`federation.secure`)."""
    return method.linear if method.communicates else None


def takes_given_weights(method: Method) -> Answer:
    """Whether updates can be weighed by how they agree (`federation.weights: krum` …)."""
    return method.weighable and not method.pools_data


def takes_quantized_base(method: Method) -> Answer:
    """Whether what is learnt can be kept beside quantized weights (`model.quantization`)."""
    return method.keeps_weights


def takes_trainer(method: Method) -> Answer:
    """Whether clients' steps may be another library's (`training.trainer`)."""
    return not (method.own_steps or type(method).after_backward is not Method.after_backward)


def compresses_broadcast(method: Method) -> Answer:
    """Whether the broadcast is smaller than what is trained, or an option makes it so."""
    return method.compresses_broadcast if method.communicates else None


@dataclass(frozen=True)
class Ability:
    """Something that methods allow, or do not."""

    title: str
    """Name in a table, and in a list."""
    of: Callable[[Method], Answer]
    """Whether a method with these options allows it."""


ABILITIES: Mapping[str, Ability] = {
    "exact": Ability("exact aggregate", aggregates_exactly),
    "ranks": Ability("different ranks", takes_different_ranks),
    "example_privacy": Ability("DP of examples", hides_examples),
    "client_privacy": Ability("DP of clients", hides_clients),
    "client_bands": Ability("correlated noise", correlates_noise),
    "secure": Ability("secure sums", adds_unseen),
    "weights": Ability("robust weights", takes_given_weights),
    "broadcast": Ability("compressed broadcast", compresses_broadcast),
    "quantized": Ability("quantized base", takes_quantized_base),
    "trainer": Ability("other trainers", takes_trainer),
}
"""Everything that may be asked of a method, by a short name, in the order of tables."""


def abilities(method: Method) -> dict[str, Answer]:
    """Answers of a method, by the names of `ABILITIES`."""
    return {name: ability.of(method) for name, ability in ABILITIES.items()}


def with_defaults() -> Iterator[tuple[str, Method]]:
    """Every listed method with its default options, by name; without those that have none."""
    for name, kind in METHODS.items():
        # A plug-in may have an option without a default.
        with suppress(UserError, ValidationError):
            yield name, kind.model_validate({})


def able(question: Callable[[Method], Answer]) -> str:
    """Names of the methods whose answer is yes, with their default options, for a sentence."""
    return ", ".join(name for name, method in with_defaults() if question(method))


def table() -> str:
    """Table of all listed methods with their default options, in Markdown."""
    head = ["method", *(ability.title for ability in ABILITIES.values())]
    rows = [[f"`{name}`", *map(_word, abilities(each).values())] for name, each in with_defaults()]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _word(answer: Answer) -> str:
    return {True: "yes", False: "no", None: "–"}[answer]
