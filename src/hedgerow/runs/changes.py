"""What a run that goes on does otherwise than before: what must not be, and what is said."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hedgerow.experiment import Experiment


def flat(content: Any, key: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested mappings as one, whose keys are the ways to the values."""
    if not isinstance(content, dict):
        return {key: content}
    found: dict[tuple[str, ...], Any] = {}
    for name, value in content.items():
        found |= flat(value, (*key, str(name)))
    return found


def another_run(before: Experiment, now: Experiment) -> str | None:
    """First key that makes an experiment another, with both its values; None where there is none.

    Of base model and data, fingerprint and digests decide instead.
    """
    for key, old, new in _differences(before.deciding(), now.deciding()):
        return f"{key}={_shown(old)}, not {_shown(new)}"
    return None


def changes(
    before: Experiment,
    now: Experiment,
    round: int,
    *,
    same_examples: bool | None,
    same_test: bool | None,
    same_client_tests: bool | None,
) -> list[str]:
    """Sentences on what a run does otherwise from a round on, whose base is the same.

    Args:
        same_examples: whether the clients' examples are as before; None where that is not known.
        same_test: the same of the test data.
        same_client_tests: the same of the clients' own test rows.
    """
    return [
        *_of_model(before, now, round),
        *_of_data(before, now, round, same_examples=same_examples, same_test=same_test),
        *_of_client_tests(before, now, round, same_client_tests),
        *_of_settings(before, now, round),
    ]


def _of_model(before: Experiment, now: Experiment, round: int) -> Iterator[str]:
    for key, old, new in _differences(before.model.model_dump(), now.model.model_dump()):
        if key == "device":
            yield f"model.device was {_shown(old)}, now {_shown(new)}: rounds from {round} on"
        else:
            yield f"model.{key} was {_shown(old)}, now {_shown(new)}: another copy of the same base"


def _of_data(
    before: Experiment,
    now: Experiment,
    round: int,
    *,
    same_examples: bool | None,
    same_test: bool | None,
) -> Iterator[str]:
    old_data, new_data = (each.data.model_dump(mode="json") for each in (before, now))
    differing = {key for key in new_data if old_data[key] != new_data[key]}
    if not any(isinstance(each.data.client_test, float) for each in (before, now)):
        differing.discard("client_test")  # which leaves the clients' examples alone
    of_test = {key for key in differing if key.startswith("test")}
    if differing - of_test:
        keys = [key for key in new_data if key in differing - of_test]
        yield _compared(keys, "the clients' examples", same_examples)
    tested = [each.data.test for each in (before, now)]
    if None in tested:
        if tested[0] != tested[1]:
            since = "not scored" if tested[1] is None else "scored"
            was, is_now = map(_shown, tested)
            yield f"data.test was {was}, now {is_now}: rounds from {round} on are {since}"
    elif same_test is False:
        yield (
            f"the test data are others than before: scores of rounds from {round} on are not "
            "comparable with earlier ones"
        )
    else:
        if of_test:
            keys = [key for key in new_data if key in of_test]
            yield _compared(keys, "the test data", same_test)
        if "max_length" in differing:
            yield (
                f"data.max_length was {before.data.max_length}, now {now.data.max_length}: test "
                f"rows are scored up to so many tokens in rounds from {round} on"
            )


def _of_client_tests(
    before: Experiment, now: Experiment, round: int, same: bool | None
) -> Iterator[str]:
    was, is_now = before.data.client_test, now.data.client_test
    if (was is None) != (is_now is None):
        since = "not scored" if is_now is None else "scored"
        yield (
            f"data.client_test was {_shown(was)}, now {_shown(is_now)}: clients are {since} on "
            f"rows of their own from round {round} on"
        )
    elif same is False:
        yield (
            "the clients' own test rows are others than before: scores of rounds from "
            f"{round} on are not comparable with earlier ones"
        )
    elif was != is_now:
        yield _compared(["client_test"], "the clients' own test rows", same)


def _compared(keys: Sequence[str], what: str, same: bool | None) -> str:
    """Sentence on keys that differ, and whether what they name does, if that is known."""
    named = ", ".join(f"data.{key}" for key in keys)
    result = f", and {what} are the same" if same else f"; whether {what} are the same is not known"
    return f"{named}: other than before{result}"


def _of_settings(before: Experiment, now: Experiment, round: int) -> Iterator[str]:
    """Of what decides nothing; raising the number of rounds is why a run goes on."""
    kept = {"evaluation", "federation", "tracking"}
    old, new = (each.model_dump(mode="json", include=kept) for each in (before, now))
    for key, was, is_now in _differences(old, new):
        if key != "federation.rounds":
            yield f"{key} was {_shown(was)}, now {_shown(is_now)}: rounds from {round} on"


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of each that differs, in the order of the new ones."""
    old, new = flat(dict(before)), flat(dict(now))
    for key in dict.fromkeys([*new, *old]):
        if old.get(key) != new.get(key):
            yield ".".join(key), old.get(key), new.get(key)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
