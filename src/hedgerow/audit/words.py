"""An audit in sentences and tables, for people who are no engineers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from hedgerow import console
from hedgerow.audit.found import Audit, Left, Members, Planted, Promise

TITLE = "What left each client, and what could be guessed from the model"


class Table(NamedTuple):
    """A table; its first column names the rows."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Words(NamedTuple):
    """A part of an audit."""

    sentences: Sequence[str]
    table: Table | None


def told(audit: Audit) -> list[Words]:
    """An audit, part by part."""
    parts = [_left(audit)]
    if audit.members:
        parts.append(_members(audit.members))
    if audit.planted is not None:
        parts.append(Words(_planted(audit.planted, audit.private), None))
    elif audit.private is not None:
        parts.append(Words([_promise(audit.private)], None))
    if audit.notes:
        parts.append(Words([f"Not examined: {note}." for note in audit.notes], None))
    return parts


def _left(audit: Audit) -> Words:
    if audit.sends == "rows":
        said = (
            "This run is a baseline that puts all clients' rows together in one place: every row "
            "left its client."
        )
        return Words([said], None)
    if audit.sends == "nothing":
        said = "Nothing left the clients: each has trained by itself."
        return Words([said], None)
    sentences = [
        f"In {_count(audit.round, 'round')} no row of data left a client. What left it is what its "
        "training has made of its rows: tables of numbers (tensors), whose sizes and names are "
        "here, and the few words beside them. Its name, and when it answers, can be seen too.",
    ]
    if audit.masked:
        sentences.append(
            "All these numbers were masked before they left (federation.secure): to each, its "
            "client added a random one, and these cancel only where the numbers of all clients are "
            "added up, so that the server could read the sum, and of one client alone no more "
            "than sizes and names."
        )
    if any(each.bytes is None for each in audit.left):
        sentences.append("Sizes are not known of every round, as where the run was killed.")
    failed = sum(each.failures for each in audit.left)
    if failed:
        sentences.append(
            "Rounds that failed may have sent something as well, which was not used and is not "
            "counted, and the reason, in words."
        )
    header = ["client", "rounds", "failed", "bytes in all", "numbers in a round", "beside them"]
    rows = [
        [
            each.client,
            str(each.rounds),
            str(each.failures),
            "not known" if each.bytes is None else console.size(each.bytes),
            "not known" if each.numbers is None else f"{each.numbers:,}",
            ", ".join(each.said),
        ]
        for each in audit.left
    ]
    sentences += _kinds(audit.left)
    return Words(sentences, Table("What left each client", header, rows))


_NAMED = 8
"""Kinds of tensors that are named in a sentence."""


def _kinds(left: Sequence[Left]) -> list[str]:
    """Sentences on the kinds of tensors, one for all clients that send the same."""
    groups: dict[str, list[str]] = {}
    for each in left:
        if each.kinds:
            named = [f"{count} × {kind}" for kind, count in each.kinds.items()]
            more = f" and {len(named) - _NAMED} more kinds" if len(named) > _NAMED else ""
            groups.setdefault(", ".join(named[:_NAMED]) + more, []).append(each.client)
    return [
        f"Tensors of {'every client' if len(groups) == 1 else ', '.join(clients)}: {kinds}."
        for kinds, clients in groups.items()
    ]


def _members(members: Sequence[Members]) -> Words:
    sentences = [
        "Could somebody who has the base model and the trained model tell that a row was trained "
        "on? Rows that training has helped most were guessed to be the client's own. Of a row of "
        "the client's and one that nobody was trained on, the share of pairs in which the guess is "
        "right stands here: 50% is as good as a coin, 100% is always right.",
    ]
    if any(each.of == "the test data" for each in members):
        sentences.append(
            "Where the others are rows of common test data, some of what is guessed may only be "
            "that the client writes of other things; test rows of its own (data.client_test) "
            "compare like with like."
        )
    header = ["client", "right", "95% interval", "told at 1% false alarms", "rows", "others"]
    rows = [
        [
            each.client,
            f"{each.auc:.1%}",
            f"{each.auc_low:.1%} to {each.auc_high:.1%}",
            f"{each.true_positives:.1%}",
            str(each.rows),
            f"{each.others}, {each.of}",
        ]
        for each in members
    ]
    return Words(sentences, Table("Guesses on who was trained on", header, rows))


def _planted(found: Planted, promise: Promise | None) -> list[str]:
    times = "" if found.repeat == 1 else f" {found.repeat} times"
    sentences = [
        f"{found.canaries} made-up rows (canaries) were offered to {found.client}, and a coin "
        f"decided on each: {found.planted} were trained on{times}, "
        f"{found.canaries - found.planted} were left out. By the two models alone, "
        f"{found.correct} of {found.guesses} guesses on them were right, where a coin would have "
        f"{found.guesses // 2}; of pairs, {found.auc:.1%} ({found.auc_low:.1%} to "
        f"{found.auc_high:.1%}).",
    ]
    at = f"at δ = {found.delta:.3g}, with {found.confidence:.0%} confidence"
    if found.epsilon > 0:
        sentences.append(
            f"So no promise below ε = {found.epsilon:.3g} would be true of a canary ({at}): a "
            f"guess on one can be right {_right(found.epsilon)} of the time or more."
        )
    else:
        sentences.append(
            f"So the canaries show no leak ({at}): the bound on ε from below is 0. That is no "
            "proof that there is none, since a better guesser may do better."
        )
    sentences.append(_compared(found, promise))
    if found.exposure_median is not None:
        sentences.append(
            "Exposure says how far the model prefers the answer of a canary that it was trained on "
            "to those of all that were left out: in the median "
            f"{found.exposure_median:.2f} bits, at most {found.exposure_largest:.2f}, of "
            f"{found.exposure_possible:.2f} that could be seen. A model that remembers none has a "
            "median of about 1."
        )
    return sentences


def _compared(found: Planted, promise: Promise | None) -> str:
    """The bound beside what is promised."""
    if promise is None or found.promised is None:
        return "The run promises nothing (it has no `privacy`), so ε may be as large as it likes."
    text = f"{_promise(promise)} Of a canary that is ε = {found.promised:.4g}"
    if promise.level == "client":
        text += (
            ", twice that, since between a client's update with the canary and the one without it "
            "lies a client that sends nothing; it is a promise on all that a client has, of which "
            "one row is the smallest part"
        )
    elif found.repeat > 1:
        text += f", since it is {found.repeat} rows"
    if found.delta >= 1:
        return f"{text}, with a δ of 1: nothing."
    if found.epsilon > found.promised:
        return (
            f"{text}, and the bound is above it: by this audit the promise is broken. Either it is "
            f"one of the {1 - found.confidence:.0%} of audits that are wrong, or noise is missing."
        )
    return f"{text}: the bound is below it, as it has to be."


def _promise(promise: Promise) -> str:
    what = "one row of a client" if promise.level == "example" else "one client with all its rows"
    text = (
        f"The run promises ε = {promise.epsilon:.4g} at δ = {promise.delta:.3g} of {what}: whether "
        f"it was there can be guessed right {_right(promise.epsilon)} of the time at most, but for "
        "a probability of about δ."
    )
    if promise.seeded:
        text += (
            " But its noise has a seed that stands in the experiment (privacy.seed): who knows it "
            "can take the noise away, so that nobody is protected."
        )
    return text


def _right(epsilon: float) -> str:
    """Share of right guesses at ε, of somebody who thought both as likely."""
    share = 1 / (1 + math.exp(-epsilon))
    return f"{share:.1%}" if share < 0.9995 else "nearly 100%"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
