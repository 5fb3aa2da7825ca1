"""The ways in which hedgerow, or a client of a run, stops on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend: one sentence says what is wrong and what would be right.

    The command line prints the sentence, without a traceback, and exits with code 2.
    """


class NothingToLearn(UserError):
    """Data of which nothing is left to learn from: a client is left out where others have some."""


class NothingToScore(UserError):
    """Test rows of which none can be scored: a client has no score where others have some."""


class RunFailed(Exception):
    """A run that could not go on though its input is right (every client of a round failed, say).

    The command line prints the sentence and exits with code 1; the ledger stays valid.
    """


class ClientFailed(Exception):
    """A client has no update to send in this round; the text says why, and what may help.

    Args:
        text: for whoever may know all of it.
        kind: a sentence that is the same whatever data the client has, for everybody else.
    """

    def __init__(self, text: str, kind: str = "its own log says why") -> None:
        super().__init__(text)
        self.kind = kind


class Diverged(ClientFailed):
    """A client's loss or update is no longer a number; the text says when, and what may help."""

    def __init__(self, text: str) -> None:
        super().__init__(text, "its training diverged")


class InvalidMessage(ValueError):
    """What has arrived is not what was asked for, or cannot be read; the text says why.

    The text may hold what a stranger has said, so it is one line of bounded length, and nothing in
    it moves the cursor of a terminal that it is shown on.
    """

    def __init__(self, text: str) -> None:
        super().__init__(readable(text))


def readable(text: str) -> str:
    """At most 1,000 characters of a text, those that cannot be printed as spaces."""
    return "".join(c if c.isprintable() else " " for c in text[:1000])


def brief(value: object) -> str:
    """A value that somebody gave, as messages show it: at most 100 characters of its `repr`."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def reason_of(error: Exception) -> str:
    """What another library's error says, on one line: at most its first 300 characters."""
    return " ".join(str(error).split())[:300]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`, did you mean …` for the nearest of `known`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean `{close[0]}`?" if close else ""


def which_client(what: str, clients: Iterable[str]) -> UserError:
    """The mistake of asking for the model of a run that has one for each client.

    Args:
        what: name of the run or its method.
        clients: names of those that have a model.
    """
    known = ", ".join(clients) or "none before round 1"
    return UserError(f"{what} has a model for each client: name one with --client ({known})")
