"""The demo's generated instruction data."""

from collections import defaultdict
from random import Random
from string import ascii_lowercase

import pytest

from hedgerow.bundled import tasks
from hedgerow.bundled.tasks import KINDS, OPPOSITES, WORDS, Row

SEEDS = (0, 1, 2)


def subject(row: Row) -> str:
    """The row's subject, read back out of its text whatever the wording."""
    if row["input"]:
        return row["input"]
    for wording in KINDS[row["kind"]].wordings:
        before, placeholder, after = wording.partition("{}")
        text = row["instruction"]
        if placeholder and text.startswith(before) and text.endswith(after):
            return text[len(before) : len(text) - len(after)]
    raise AssertionError(f"no wording of {row['kind']} gives {row['instruction']!r}")


def solved(kind: str, given: str) -> str:
    """The right answer, worked out another way than the generator does."""
    letters = list(given)
    match kind:
        case "reverse":
            return "".join(letters.pop() for _ in given)
        case "upper":
            return "".join(chr(ord(c) - 32) for c in letters)
        case "shift":
            return given.translate(str.maketrans(ascii_lowercase, ascii_lowercase[1:] + "a"))
        case "spell":
            return "".join(f"-{c}" for c in letters)[1:]
        case "consonants":
            return given.translate(str.maketrans("", "", "aeiou"))
        case "ends":
            return given[:: len(given) - 1]
        case "swap":
            first, second = given.split(" ")
            return f"{second} {first}"
        case "add":
            left, right = given.split(" + ")
            return str(int(left) + int(right))
        case "next":
            first, second, third = (int(number) for number in given.split(" "))
            assert third - second == second - first
            return str(third + second - first)
        case "opposite":
            return OPPOSITES[given]
    raise AssertionError(f"unknown kind {kind}")


@pytest.mark.parametrize("seed", SEEDS)
def test_training_and_held_out_questions_are_disjoint(seed: int) -> None:
    held_out = {(row["kind"], subject(row)) for row in tasks.test_rows(seed)}
    trained = {(row["kind"], subject(row)) for rows in tasks.clients(seed).values() for row in rows}
    assert not held_out & trained


@pytest.mark.parametrize("seed", SEEDS)
def test_every_answer_is_right(seed: int) -> None:
    rows = [*tasks.test_rows(seed), *(r for rows in tasks.clients(seed).values() for r in rows)]
    for row in rows:
        assert row["output"] == solved(row["kind"], subject(row)), row


def test_kinds_are_spread_over_clients() -> None:
    holders = defaultdict(set)
    for client, rows in tasks.clients().items():
        kinds = {row["kind"] for row in rows}
        assert 2 <= len(kinds) <= 3
        for kind in kinds:
            holders[kind].add(client)
    assert len(KINDS) >= 8
    assert holders.keys() == KINDS.keys()
    assert all(len(clients) >= 2 for clients in holders.values())


def test_clients_differ_in_size() -> None:
    sizes = [len(rows) for rows in tasks.clients().values()]
    assert len(sizes) == 8
    assert len(set(sizes)) > 4


def test_held_out_questions_cover_every_kind_once_each() -> None:
    rows = tasks.test_rows(per_kind=7)
    assert len({(row["kind"], subject(row)) for row in rows}) == len(rows) == 7 * len(KINDS)


def test_some_opposites_must_be_left_to_train_on() -> None:
    with pytest.raises(ValueError, match="per_kind"):
        tasks.test_rows(per_kind=len(OPPOSITES))


def test_data_depends_on_the_seed_alone() -> None:
    assert tasks.clients(3) == tasks.clients(3)
    assert tasks.clients(3) != tasks.clients(4)
    assert tasks.test_rows(3) == tasks.test_rows(3)
    assert tasks.test_rows(3) != tasks.test_rows(4)


def test_words_can_take_every_task() -> None:
    assert len(WORDS) == len(set(WORDS))
    for word in WORDS:
        assert set(word) <= set(ascii_lowercase)
        assert KINDS["consonants"].solve(word)


def test_subjects_depend_on_the_generator_given() -> None:
    for kind in KINDS.values():
        assert kind.draw(Random(5), WORDS) == kind.draw(Random(5), WORDS)
