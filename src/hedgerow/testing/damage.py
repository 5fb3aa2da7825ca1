"""Damage: updates and entries that are wrong in one way, or damaged anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

from hedgerow.errors import InvalidMessage
from hedgerow.testing.case import Case
from hedgerow.testing.files import File
from hedgerow.testing.wrong import Direction, a_float_tensor
from hedgerow.testing.wrong_contents import kinds_of_wrong
from hedgerow.wire import Entry, Update

SLOWEST = 5.0
"""Seconds of a core that a single input may take."""


def check_wrong(case: Case, direction: Direction, inputs: int) -> tuple[int, int]:
    """Have real files that are wrong in one way refused.

    Args:
        case: the method, and what is damaged: the first client's update, or the entry.
        direction: `up` damages the update at the server, `down` the entry at a participant.
        inputs: how many to try; ways take turns.

    Returns:
        The number of inputs, and the number of ways to be wrong.

    Raises:
        AssertionError: one was accepted, naming the way; or it took more than `SLOWEST` seconds.
    """
    whole = case.updates[0] if direction == "up" else case.entry
    rng, tried = Random(1), 0
    ways = kinds_of_wrong(case.method, direction, File.of(whole))
    for number in range(inputs):
        way, file = ways[number % len(ways)], File.of(whole)
        data = way(rng, file) or file.bytes()
        what = f"{_WHAT[direction]} wrong by `{way.__name__}` ({way.__doc__})"
        assert data != whole, f"{what} is as it was"
        assert isinstance(_received(case, direction, data, what), InvalidMessage), (
            f"{_CHECK[direction]} accepts {what}, which must be refused with InvalidMessage; it "
            f"begins {data[:300]!r}"
        )
        tried += 1
    return tried, len(ways)


def check_damaged(case: Case, direction: Direction, inputs: int) -> int:
    """Have real files that are damaged anywhere refused, or go on with them.

    Args:
        case: as in `check_wrong`.
        direction: as in `check_wrong`.
        inputs: how many to try.

    Returns:
        How many of them were accepted: what was damaged was no more wrong than another number.

    Raises:
        AssertionError: something else than a refusal has come of one.
    """
    whole = case.updates[0] if direction == "up" else case.entry
    rng, accepted = Random(2 if direction == "up" else 3), 0
    for _ in range(inputs):
        what = f"{_WHAT[direction]} damaged at random"
        found = _received(case, direction, damaged(rng, whole), what)
        if isinstance(found, Update):
            case.check_accepted_update(found)
        elif isinstance(found, Entry):
            case.check_accepted_entry(found)
        accepted += not isinstance(found, InvalidMessage)
    return accepted


_WHAT = {"up": "an update", "down": "an entry"}
_CHECK = {"up": "check_update", "down": "check_entry"}


def _received(
    case: Case, direction: Direction, data: bytes, what: str
) -> Update | Entry | InvalidMessage:
    """What the receiver makes of `data`, or the reason why it refuses it; within `SLOWEST`."""
    receive: Callable[[bytes], Update | Entry] = case.receive if direction == "up" else case.arrive
    began = time.process_time()
    try:
        return receive(data)
    except InvalidMessage as error:
        return error
    finally:
        seconds = time.process_time() - began
        assert seconds < SLOWEST, f"{_CHECK[direction]} takes {seconds:.0f} s for {what}"


def _flipped(rng: Random, data: bytes, first: int, last: int) -> bytes:
    """`data` with a few bits turned between two places."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damaged(rng: Random, data: bytes) -> bytes:
    """Damage that may leave the file right: mostly of its header, where most is decided."""
    begin = 8 + int.from_bytes(data[:8], "little")
    way = rng.random()
    if way < 0.6:
        return _flipped(rng, data, 0, begin)
    if way < 0.7:
        return _flipped(rng, data, begin, len(data))
    if way < 0.85:  # a piece of the file stands somewhere else, too
        length = rng.randint(1, 40)
        source, target = (rng.randrange(begin) for _ in range(2))
        return data[:target] + data[source : source + length] + data[target + length :]
    if way < 0.95:  # a digit of the header is another
        digits = [i for i in range(8, begin) if chr(data[i]).isdigit()]
        place = rng.choice(digits)
        return data[:place] + str(rng.randrange(10)).encode() + data[place + 1 :]
    file = File.of(data)  # other numbers that are possible
    if not any(dtype == "F32" for dtype, *_ in file.tensors.values()):
        return _flipped(rng, data, begin, len(data))
    name = a_float_tensor(rng, file)
    file.put(name, file.loaded()[name] * rng.choice([0, -1, 1e-30, 1e3, 1e9]))
    return file.bytes()
