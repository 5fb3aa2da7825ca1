"""Instruction data for the demo: ten kinds of small task, dealt unevenly to eight clients.

Everything is generated from a seed with the standard library alone. A *question* is a kind and
its subject (the word, the numbers); the wording around it varies. Training and held-out
questions never share a subject, whatever the wording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

Row = dict[str, str]
"""One example: ``instruction``, ``input``, ``output`` and the ``kind`` of task."""

_WORDS = """
acorn actor amber angle ankle apple apron arrow atlas autumn badge baker bamboo banjo barley
barn basin basket beach beaver bench berry blanket boat bottle branch bread breeze brick bridge
brook brush bucket button cabin cable cactus camel candle canoe carbon cargo carpet carrot
castle cedar cellar chain chalk cherry chess circle clay cliff clock cloud clover coast cobalt
comet copper coral cotton cousin cradle crane crayon creek cricket crown curtain daisy dance
desert diary dinner doctor dolphin donkey dragon drawer dream drum eagle earth elbow ember
engine fabric falcon farmer feather fence fern ferry fiddle field finger flame flint flour flute
forest fork fossil fountain fox frost fruit galaxy garden garlic gate ginger glacier glass globe
glove goat grape grass gravel guitar hammer harbor harvest hazel heron hill honey horse house
island ivory jacket jaguar jelly jewel jungle juniper kettle kitchen kite ladder lake lamp
lantern leaf lemon lentil letter lily linen lizard lobster locket lotus magnet mango maple
marble market meadow melon metal mint mirror monkey moon moss motor muffin museum napkin nectar
needle nest nickel noodle oasis ocean olive onion orange orbit orchid otter oven owl paddle
palace panda paper parade parrot pasta peach pearl pebble pencil pepper piano picnic pigeon
pillow pilot planet plum pocket pony potato prairie prism pumpkin puppet quartz quilt rabbit
radio raft rain raven ribbon river robin rocket rope rose saddle sailor salmon sand scarf school
seal shadow sheep shell shore silk silver skate slate snail snow soap spark spider spoon spruce
squid stable star statue stone storm straw stream sugar summer sunset swan table tailor teapot
temple thimble thread throne ticket tiger timber toast tomato tower trail train tulip tunnel
turtle valley vase velvet violin wagon walnut water whale wheat wheel willow window winter wolf
wood yarn zebra
"""
WORDS = tuple(_WORDS.split())
"""The nouns that the questions on words are about."""

_OPPOSITES = """
hot/cold big/small fast/slow high/low open/shut wet/dry old/new day/night left/right front/back
early/late full/empty hard/soft rich/poor long/short thick/thin loud/quiet heavy/light happy/sad
sweet/sour near/far first/last push/pull win/lose buy/sell give/take north/south east/west
love/hate young/aged deep/shallow rough/smooth sharp/blunt tight/loose wide/narrow wild/tame
brave/timid clean/dirty cheap/costly safe/risky true/false begin/end rise/fall laugh/cry
build/destroy enter/exit arrive/depart accept/refuse attack/defend freeze/melt inside/outside
above/below always/never friend/enemy giant/dwarf victory/defeat
"""
OPPOSITES = dict(pair.split("/") for pair in _OPPOSITES.split())
"""Words and their opposites, one way only: no answer is the subject of another question."""


@dataclass(frozen=True)
class Kind:
    """A kind of task: its wordings, how to draw a subject, how to solve it, and how not to.

    A wording with ``{}`` takes the subject into the instruction and leaves the input empty.
    """

    wordings: tuple[str, ...]
    draw: Callable[[Random, Sequence[str]], str]
    solve: Callable[[str], str]
    err: Callable[[str], str]
    """A wrong answer that is like right ones, for preferences."""


def _word(rng: Random, words: Sequence[str]) -> str:
    return rng.choice(words)


def _two_words(rng: Random, words: Sequence[str]) -> str:
    return " ".join(rng.sample(words, 2))


def _sum(rng: Random, words: Sequence[str]) -> str:
    return f"{rng.randint(2, 19)} + {rng.randint(2, 19)}"


def _sequence(rng: Random, words: Sequence[str]) -> str:
    start, step = rng.randint(1, 80), rng.randint(1, 5)
    return " ".join(str(start + i * step) for i in range(3))


def _opposite(rng: Random, words: Sequence[str]) -> str:
    return rng.choice(tuple(OPPOSITES))


def _shift(subject: str) -> str:
    return "".join(chr((ord(c) - ord("a") + 1) % 26 + ord("a")) for c in subject)


def _next(subject: str) -> str:
    *_, before, last = map(int, subject.split())
    return str(2 * last - before)


def _add(subject: str) -> str:
    return str(sum(map(int, subject.split(" + "))))


KINDS: dict[str, Kind] = {
    "reverse": Kind(
        ("Spell this word backwards.", "Reverse the letters.", "Write {} from right to left."),
        _word,
        lambda s: s[::-1],
        lambda s: s,
    ),
    "upper": Kind(
        ("Write this in capitals.", "Make every letter a capital.", "Put {} in upper case."),
        _word,
        str.upper,
        str.capitalize,
    ),
    "shift": Kind(
        ("Move each letter one on in the alphabet.", "Shift {} by one letter.", "Encode by one."),
        _word,
        _shift,
        lambda s: s[1:] + s[0],
    ),
    "spell": Kind(
        ("Put dashes between the letters.", "Spell out the word.", "Spell {} with dashes."),
        _word,
        "-".join,
        " ".join,
    ),
    "consonants": Kind(
        ("Remove the vowels.", "Leave out every vowel.", "Write {} without vowels."),
        _word,
        lambda s: "".join(c for c in s if c not in "aeiou"),
        lambda s: "".join(c for c in s if c in "aeiou"),
    ),
    "ends": Kind(
        ("Give the first and last letter.", "Which letters are at the ends?", "Take {}'s ends."),
        _word,
        lambda s: s[0] + s[-1],
        lambda s: s[:2],
    ),
    "swap": Kind(
        ("Swap the two words.", "Change the order of the words.", "Say {} the other way round."),
        _two_words,
        lambda s: " ".join(reversed(s.split())),
        lambda s: s,
    ),
    "add": Kind(
        ("Add the numbers.", "What is {}?", "Work out the sum."),
        _sum,
        _add,
        lambda s: s.replace(" + ", ""),
    ),
    "next": Kind(
        ("Continue the sequence.", "Which number is next?", "What follows {}?"),
        _sequence,
        _next,
        lambda s: s.split()[-1],
    ),
    "opposite": Kind(
        ("Give the opposite.", "What is the opposite of {}?", "Name the contrary."),
        _opposite,
        OPPOSITES.__getitem__,
        lambda s: f"not {s}",
    ),
}
"""Every kind of task by name."""


@dataclass(frozen=True)
class Client:
    """What one client holds: its kinds and how many rows of each."""

    kinds: tuple[str, ...]
    rows_per_kind: int


CLIENTS: dict[str, Client] = {
    "ash": Client(("reverse", "add", "upper"), 50),
    "birch": Client(("shift", "opposite", "swap"), 60),
    "cedar": Client(("consonants", "next"), 60),
    "elm": Client(("spell", "ends", "reverse"), 55),
    "hazel": Client(("upper", "next"), 30),
    "maple": Client(("add", "ends"), 40),
    "rowan": Client(("opposite", "consonants"), 55),
    "yew": Client(("shift", "swap", "spell"), 45),
}
"""Every client by name: none has all kinds, every kind is with two clients."""


def _ask(rng: Random, name: str, subject: str) -> Row:
    kind = KINDS[name]
    wording = rng.choice(kind.wordings)
    instruction, given = (wording.format(subject), "") if "{}" in wording else (wording, subject)
    return {
        "instruction": instruction,
        "input": given,
        "output": kind.solve(subject),
        "kind": name,
    }


def _held_out(seed: int, per_kind: int) -> dict[str, list[str]]:
    if per_kind >= len(OPPOSITES):
        raise ValueError(f"per_kind must be below {len(OPPOSITES)}, the number of opposites")
    rng = Random(f"held-out {seed}")
    subjects: dict[str, list[str]] = {}
    for name, kind in KINDS.items():
        chosen: dict[str, None] = {}
        while len(chosen) < per_kind:
            chosen[kind.draw(rng, WORDS)] = None
        subjects[name] = list(chosen)
    return subjects


def test_rows(seed: int = 0, per_kind: int = 20) -> list[Row]:
    """Held-out questions, ``per_kind`` of every kind."""
    rng = Random(f"test {seed}")
    return [
        _ask(rng, name, subject)
        for name, subjects in _held_out(seed, per_kind).items()
        for subject in subjects
    ]


def clients(seed: int = 0, per_kind: int = 20) -> dict[str, list[Row]]:
    """Every client's training rows; none asks what ``test_rows(seed, per_kind)`` asks."""
    held_out = _held_out(seed, per_kind)
    data: dict[str, list[Row]] = {}
    for client, share in CLIENTS.items():
        rng = Random(f"{client} {seed}")
        rows = data[client] = []
        for name in share.kinds:
            for _ in range(share.rows_per_kind):
                while (subject := KINDS[name].draw(rng, WORDS)) in held_out[name]:
                    pass
                rows.append(_ask(rng, name, subject))
        rng.shuffle(rows)
    return data


def with_wrong(rows: Sequence[Row]) -> list[Row]:
    """Rows of these tasks with an answer beside the right one that is ``wrong``.

    A few of the wrong ones happen to be right.
    """
    return [{**row, "wrong": KINDS[row["kind"]].err(_subject(row))} for row in rows]


def _subject(row: Row) -> str:
    """What a row's question is about."""
    if row["input"]:
        return row["input"]
    for wording in KINDS[row["kind"]].wordings:
        before, placeholder, after = wording.partition("{}")
        asked = row["instruction"]
        if placeholder and asked.startswith(before) and asked.endswith(after):
            return asked.removeprefix(before).removesuffix(after)
    raise ValueError(f"{row['instruction']!r} is no question of the kind {row['kind']}")
