"""Secure sums: masks that cancel, shares that take them away, and codes that add exactly."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from Crypto.Protocol.SecretSharing import Shamir
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.runs import ledger_bytes, rows_of

from hedgerow.engines import local
from hedgerow.engines.local import LocalFleet
from hedgerow.errors import InvalidMessage, RunFailed
from hedgerow.experiment import load
from hedgerow.federation.fleet import ClientResult, Unwatched
from hedgerow.federation.secure import UNMASKED
from hedgerow.ledger import Ledger
from hedgerow.privacy.secure import masks
from hedgerow.privacy.secure.coordinator import Coordinator
from hedgerow.privacy.secure.fixed_point import PIECE, FixedPoint
from hedgerow.privacy.secure.letters import (
    AskKeys,
    AskUnmasking,
    Shares,
    Unmasking,
    Unopened,
)
from hedgerow.privacy.secure.party import Party
from hedgerow.privacy.secure.shares import combine, split

SESSION = "0" * 32
STAGES = ["keys", "shares", "masked", "unmasking"]
"""Of a sum; of a client, the last that it has answered."""


# --- codes ----------------------------------------------------------------------------------------


@given(
    bits=st.sampled_from([16, 32, 64]),
    numbers=st.lists(st.lists(st.floats(-2, 2), min_size=3, max_size=3), min_size=1, max_size=9),
)
def test_sums_of_codes_are_off_by_half_a_step_a_number(bits, numbers):
    point = FixedPoint(bits=bits, largest=2.0, count=9)
    with np.errstate(over="ignore"):
        total = sum(point.encode(np.array(each)) for each in numbers)
    off = np.abs(point.decode(np.asarray(total, point.unsigned)) - np.sum(numbers, axis=0))
    assert np.all(off <= len(numbers) * point.step * 0.500001 + 1e-12)


def test_large_numbers_of_codes_are_made_in_pieces():
    """As those of each number alone, in whatever order memory has them."""
    numbers = np.random.default_rng(0).uniform(-2, 2, (3, PIECE + 1)).astype(np.float32)
    point = FixedPoint(bits=32, largest=2.0, count=3)
    found = point.encode(numbers.T, 0.3)
    assert found.shape == numbers.T.shape
    expected = np.rint(numbers.T.astype(np.float64) * 0.3 * point.scale).astype(np.int64)
    np.testing.assert_array_equal(found, expected.astype(np.int32).view(np.uint32))
    back = point.decode(found, 0.3, np.float32)
    np.testing.assert_allclose(back, numbers.T, atol=2 * point.step / 0.3)
    assert back.dtype == np.float32
    masked = found.copy()
    masks.add_mask([masked[:7], masked[7:]], b"7" * 32, sign=1)
    assert not np.any(np.isclose(masked[-1], found[-1]))
    masks.add_mask([masked[:7], masked[7:]], b"7" * 32, sign=-1)
    np.testing.assert_array_equal(masked, found)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_as_many_of_the_largest_as_are_counted_do_not_wrap(bits):
    point = FixedPoint(bits=bits, largest=1.0, count=7)
    for sign in (1, -1):
        total = sum(point.encode(np.array([sign * 1.0])) for _ in range(7))
        assert point.decode(np.asarray(total, point.unsigned)) == pytest.approx([7 * sign])


@pytest.mark.parametrize("number", [1.001, -1.001, np.inf, np.nan])
def test_what_is_too_large_has_no_code(number):
    with pytest.raises(ValueError, match="codes go up to 1"):
        FixedPoint(bits=32, largest=1.0, count=2).encode(np.array([0.0, number]))


@pytest.mark.parametrize("order", ["C", "F"])
def test_codes_are_masked_whatever_order_their_numbers_were_in(order):
    """A mask on a copy would leave them bare, and take from the sum what is not in it."""
    numbers = np.asarray(np.arange(12.0).reshape(4, 3) / 12, order=order)
    point = FixedPoint(bits=32, largest=1.0, count=2)
    codes = point.encode(numbers)
    masks.add_mask([codes], b"s" * 32, sign=1)
    assert not np.allclose(point.decode(codes), numbers, atol=0.01)
    masks.add_mask([codes], b"s" * 32, sign=-1)
    np.testing.assert_allclose(point.decode(codes), numbers, atol=2 * point.step)
    with pytest.raises(ValueError, match="must be contiguous"):
        masks.add_mask([codes.T], b"s" * 32, sign=1)


# --- shares ---------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32), st.integers(2, 6), st.data())
@settings(max_examples=20, deadline=None)
def test_any_shares_of_the_threshold_restore_a_secret(secret, threshold, data):
    count = data.draw(st.integers(threshold, 8))
    shares = dict(enumerate(split(secret, threshold, count), start=1))
    chosen = data.draw(st.permutations(sorted(shares)))
    assert combine({number: shares[number] for number in chosen[:threshold]}) == secret
    assert combine({number: shares[number] for number in chosen[: threshold - 1]}) != secret


@given(
    st.dictionaries(st.integers(1, 1000), st.binary(min_size=32, max_size=32), min_size=1),
)
@settings(deadline=None)
def test_shares_are_put_together_as_pycryptodome_does(shares):
    """Whatever they are, and whichever clients they are from."""
    expected = b"".join(
        Shamir.combine([(number, share[part]) for number, share in shares.items()])
        for part in (slice(16), slice(16, 32))
    )
    assert combine(shares) == expected


def test_a_share_of_another_length_is_none():
    with pytest.raises(ValueError, match="a share has 32 bytes"):
        combine({1: bytes(32), 2: bytes(31)})


# --- the protocol ---------------------------------------------------------------------------------


def parties(count, threshold):
    return {f"client-{i}": Party(f"client-{i}", threshold, "run 1 parent") for i in range(count)}


def masked(count=5, threshold=3, gone_before_shares=(), gone_before_numbers=(), bits=32):
    """Clients' codes, what arrived of each, and the server before it unmasks the sum."""
    people = parties(count, threshold)
    server = Coordinator(threshold, "run 1 parent", SESSION, most_examples=9)
    point = FixedPoint(bits=bits, largest=1.0, count=count)
    for name, party in people.items():
        server.add_keys(name, party.keys(AskKeys(session=SESSION)))
    for name, party in people.items():
        if name not in gone_before_shares:
            server.add_shares(name, party.shares(server.asks_shares))
    plain, arrived = {}, {}
    for number, (name, party) in enumerate(people.items()):
        if name in (*gone_before_shares, *gone_before_numbers):
            continue
        generator = np.random.default_rng(number)
        codes = {
            "a": point.encode(generator.uniform(-1, 1, (4, 3))),
            "b": point.encode(generator.uniform(-1, 1, 70_000)),
        }
        plain[name] = {key: each.copy() for key, each in codes.items()}
        party.mask(server.asks_masked(name), list(codes.values()))
        arrived[name] = {key: each.copy() for key, each in codes.items()}
        server.add(name, codes.items())
    return people, plain, arrived, server


def unmask(people, server, without=()):
    answers = {
        name: people[name].unmasking(server.asks_unmasking)
        for name in server.arrived
        if name not in without
    }
    server.unmask(answers)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize(
    ("before_shares", "before_numbers", "before_unmasking"),
    [
        ((), (), ()),
        (("client-1",), (), ()),
        ((), ("client-0", "client-4"), ()),
        (("client-2",), ("client-0",), ()),
        ((), ("client-3",), ("client-1",)),
    ],
)
def test_the_sum_is_that_of_the_plain_codes_whoever_is_gone(
    bits, before_shares, before_numbers, before_unmasking
):
    people, plain, _, server = masked(
        gone_before_shares=before_shares, gone_before_numbers=before_numbers, bits=bits
    )
    unmask(people, server, before_unmasking)
    for key in ("a", "b"):
        expected = sum(each[key] for each in plain.values())
        np.testing.assert_array_equal(server.total[key], expected)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_what_the_server_has_of_one_client_is_uniform(bits):
    """And has nothing to do with the client's own numbers; also beside all that it may unmask."""
    people, plain, arrived, server = masked(bits=bits)
    for name in arrived:
        codes = arrived[name]["b"].astype(np.float64) / 2.0**bits
        assert stats.kstest(codes, "uniform").pvalue > 1e-4
        own = plain[name]["b"].astype(np.float64)
        assert abs(np.corrcoef(codes, own)[0, 1]) < 5 / np.sqrt(len(own))
    unmask(people, server)
    for name in arrived:  # with its own mask taken off, those of pairs are left
        seed = people[name]._own
        bare = arrived[name]["b"].copy()
        masks.add_mask([arrived[name]["a"].copy(), bare], seed, sign=-1)
        assert stats.kstest(bare.astype(np.float64) / 2.0**bits, "uniform").pvalue > 1e-4


def test_fewer_than_the_threshold_unmask_nothing():
    people, _, _, server = masked()
    before = {key: each.copy() for key, each in server.total.items()}
    with pytest.raises(InvalidMessage, match="2 of the 3 clients that it takes have helped"):
        unmask(people, server, without=("client-0", "client-1", "client-2"))
    np.testing.assert_array_equal(server.total["b"], before["b"])


def test_clients_refuse_what_would_tell_of_one_of_them():
    people, _, _, server = masked(gone_before_numbers=("client-4",))
    ask = server.asks_unmasking
    alone = ask.model_copy(update={"arrived": ["client-0"]})
    with pytest.raises(InvalidMessage, match="a sum needs 3"):
        people["client-0"].unmasking(alone)
    people["client-0"].unmasking(ask)
    other = ask.model_copy(update={"arrived": ["client-0", "client-1", "client-2"]})
    for again in (ask, other):  # a second set would tell of who is in one of them alone
        with pytest.raises(InvalidMessage, match="has had it already"):
            people["client-0"].unmasking(again)
    with pytest.raises(InvalidMessage, match="has had it already"):
        people["client-0"].mask(server.asks_masked("client-0"), [])
    fresh = parties(2, 3)
    for party in fresh.values():
        party.keys(AskKeys(session=SESSION))
    with pytest.raises(InvalidMessage, match="a sum needs 3 clients"):
        fresh["client-0"].shares(server.asks_shares)


def tampered(shares, names, part="sealed"):
    """A client's shares, with those for some spoilt."""
    spoilt = {
        name: ("0" if v[0] != "0" else "1") + v[1:] for name, v in getattr(shares, part).items()
    }
    return shares.model_copy(
        update={part: getattr(shares, part) | {name: spoilt[name] for name in names}}
    )


def begun(count, threshold, spoil=lambda name, shares: shares):
    """Clients and their server, when all have sent shares, some of which may be spoilt."""
    people = parties(count, threshold)
    server = Coordinator(threshold, "run 1 parent", SESSION, most_examples=9)
    for name, party in people.items():
        server.add_keys(name, party.keys(AskKeys(session=SESSION)))
    for name, party in people.items():
        server.add_shares(name, spoil(name, party.shares(server.asks_shares)))
    return people, server


def send(people, server, without=()):
    """Have clients send ones, masked, and complaints."""
    for name, party in people.items():
        if name not in without:
            codes = {"a": np.ones(5, np.uint32)}
            party.mask(server.asks_masked(name), list(codes.values()))
            server.add(name, codes.items())
            if party.unopened:
                server.add_unopened(name, party.unopened)


@pytest.mark.parametrize("part", ["sealed", "digests"])
@pytest.mark.parametrize("gone", [(), ("client-1",)])
def test_shares_that_cannot_be_used_are_done_without(part, gone):
    """Where enough others have theirs, whether their sender stays or not."""
    spoilt = ["client-0", "client-4"]
    people, server = begun(
        9, 4, lambda name, shares: tampered(shares, spoilt, part) if name == "client-1" else shares
    )
    send(people, server, gone)
    assert people["client-0"].unopened.senders == ["client-1"]
    assert people["client-2"].unopened is None
    assert server.at_odds() == {}
    unmask(people, server)
    np.testing.assert_array_equal(server.total["a"], np.full(5, 9 - len(gone), np.uint32))
    assert server.faults == {}


def test_who_deals_too_few_shares_that_can_be_opened_is_left_out():
    people, server = begun(
        6,
        4,
        lambda name, shares: (
            tampered(shares, shares.sealed.keys()) if name == "client-1" else shares
        ),
    )
    send(people, server)
    (why,) = server.at_odds().values()
    assert list(server.at_odds()) == ["client-1"]
    assert "for client-0, client-2, client-3 and 2 more, or theirs for it, could not be" in why
    with pytest.raises(InvalidMessage, match="1 of the 4 shares that it takes are there of what"):
        unmask(people, server)
    assert server.faults == {}


def test_a_complaint_is_of_shares_that_were_sent():
    people, server = begun(4, 3)
    send(people, server)
    for senders in (["client-0"], ["client-9"]):
        with pytest.raises(InvalidMessage, match="it cannot open shares that it was not sent"):
            server.add_unopened("client-0", Unopened(senders=senders))


@given(st.data())
@settings(deadline=None)
def test_few_who_are_hostile_neither_end_a_sum_nor_have_others_left_out(data):
    """In whatever way they deal, complain, go and help."""
    count = data.draw(st.integers(3, 10), "clients")
    threshold = data.draw(st.integers(2, count), "threshold")
    names = [f"client-{i}" for i in range(count)]
    few = st.lists(st.sampled_from(names), max_size=(count - threshold) // 2, unique=True)
    bad = set(data.draw(few, "hostile or away"))
    away = {name for name in sorted(bad) if data.draw(st.booleans(), f"{name} is away")}
    pairs = [(u, v) for u in names for v in names if u != v and bad & {u, v} and u not in away]
    some = st.lists(st.sampled_from(pairs)) if pairs else st.just([])
    complaints = set(data.draw(some, "who complains of whom"))
    left = set(names)
    while True:
        server = Coordinator(threshold, "run 1 parent", SESSION, most_examples=9)
        server.arrived = sorted(left - away)
        none = Shares(sealed={}, digests={}, commitment="0" * 64)
        server._shares = dict.fromkeys(sorted(left), none)
        for name in server.arrived:
            if senders := sorted(v for u, v in complaints if u == name and v in left):
                server.add_unopened(name, Unopened(senders=senders))
        found = server.at_odds().keys()
        assert found <= bad
        left -= found
        if not found:
            break
    for owner in left:
        assert sum((name, owner) not in complaints for name in left - bad) >= threshold


def test_who_complains_of_all_is_left_out_itself():
    server = Coordinator(3, "run 1 parent", SESSION, most_examples=9)
    server.arrived = [f"client-{i}" for i in range(4)]
    none = Shares(sealed={}, digests={}, commitment="0" * 64)
    server._shares = dict.fromkeys(server.arrived, none)
    server.add_unopened("client-2", Unopened(senders=["client-0", "client-1", "client-3"]))
    assert list(server.at_odds()) == ["client-2"]


def changed_answers(people, server, liars, kind, owner):
    """Answers to the letter that asks to unmask a sum, with wrong shares of one secret."""
    answers = {name: people[name].unmasking(server.asks_unmasking) for name in server.arrived}
    for name in liars:
        shares = getattr(answers[name], kind) | {owner: "0" * 64}
        answers[name] = answers[name].model_copy(update={kind: shares})
    return answers


@pytest.mark.parametrize(("kind", "owner"), [("seeds", "client-2"), ("keys", "client-5")])
def test_wrong_shares_are_found_out_and_done_without(kind, owner):
    people, server = begun(6, 3)
    send(people, server, without=["client-5"])
    liars = ["client-0", "client-2"]
    server.unmask(changed_answers(people, server, liars, kind, owner))
    np.testing.assert_array_equal(server.total["a"], np.full(5, 5, np.uint32))
    why = f"its shares of what masks {owner} are missing or wrong"
    assert server.faults == dict.fromkeys(liars, why)


def test_a_share_that_is_held_back_is_as_a_wrong_one():
    people, server = begun(5, 3)
    send(people, server)
    answers = {name: people[name].unmasking(server.asks_unmasking) for name in server.arrived}
    answers["client-1"] = Unmasking(seeds={}, keys={})
    server.unmask(answers)
    np.testing.assert_array_equal(server.total["a"], np.full(5, 5, np.uint32))
    assert list(server.faults) == ["client-1"]


def test_more_wrong_shares_than_are_to_spare_leave_the_sum_masked():
    people, server = begun(5, 3)
    send(people, server)
    before = server.total["a"].copy()
    liars = ["client-0", "client-1", "client-3"]
    with pytest.raises(InvalidMessage, match="2 of the 3 shares that it takes are there of what m"):
        server.unmask(changed_answers(people, server, liars, "seeds", "client-2"))
    assert list(server.faults) == liars
    np.testing.assert_array_equal(server.total["a"], before)


def test_who_deals_shares_of_something_else_is_named():
    """Each of them is what it has said of it, so that nobody else can be at fault."""
    people, server = begun(
        5,
        3,
        lambda name, shares: (
            shares.model_copy(update={"commitment": "0" * 64}) if name == "client-4" else shares
        ),
    )
    send(people, server)
    before = server.total["a"].copy()
    with pytest.raises(InvalidMessage, match="that clients have dealt do not unmask the sum"):
        unmask(people, server)
    assert server.faults == {
        "client-4": "the shares that it has dealt do not restore what masks it"
    }
    np.testing.assert_array_equal(server.total["a"], before)


@pytest.mark.parametrize("key", ["sealing", "masking"])
def test_a_key_that_nobody_can_agree_with_is_its_owners_failure_alone(key):
    """A point of small order, at which every other client would fail."""
    server = Coordinator(2, "run 1 parent", SESSION, most_examples=9)
    keys = parties(1, 2)["client-0"].keys(AskKeys(session=SESSION))
    for bad in ("0" * 64, "01" + "0" * 62, "ec" + "f" * 60 + "7f"):
        with pytest.raises(InvalidMessage, match="its keys are none"):
            server.add_keys("client-0", keys.model_copy(update={key: bad}))
    server.add_keys("client-0", keys)
    assert list(server.asks_shares.keys) == ["client-0"]


def test_parties_of_another_mind_have_masks_that_do_not_cancel():
    """As where the server tells them other weights, so that one of them would count alone."""
    people = parties(3, 2)
    server = Coordinator(2, "run 1 parent", SESSION, most_examples=9)
    for name, party in people.items():
        server.add_keys(name, party.keys(AskKeys(session=SESSION)))
    for name, party in people.items():
        ask = server.asks_shares
        if name == "client-2":
            ask = ask.model_copy(update={"most_examples": 10**9})
        server.add_shares(name, party.shares(ask))
    with pytest.raises(InvalidMessage, match="2 clients of one mind, and this one can use the sha"):
        people["client-2"].mask(server.asks_masked("client-2"), [])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_who_are_enough_get_the_sum_of_those_who_arrived(data):
    """Whatever the threshold, the width of codes, their shapes, and who is gone when."""
    count = data.draw(st.integers(2, 6), "clients")
    threshold = data.draw(st.integers(2, count), "threshold")
    bits = data.draw(st.sampled_from([16, 32, 64]), "bits")
    shapes = data.draw(
        st.dictionaries(st.sampled_from("cab"), st.lists(st.integers(0, 4), max_size=2), min_size=1)
    )
    last = [
        data.draw(st.sampled_from(["keys", "shares", "masked", "unmasking"]), f"last of {i}")
        for i in range(count)
    ]
    left = {
        stage: sum(STAGES.index(each) >= STAGES.index(stage) for each in last) for stage in STAGES
    }
    people = parties(count, threshold)
    server = Coordinator(threshold, "run 1 parent", SESSION, most_examples=9)
    generator = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    plain = {key: np.zeros(shape, f"u{bits // 8}") for key, shape in shapes.items()}
    stays = {name: STAGES.index(each) for name, each in zip(people, last, strict=True)}
    for name, party in people.items():
        server.add_keys(name, party.keys(AskKeys(session=SESSION)))
    for name, party in people.items():
        if stays[name] >= 1:
            server.add_shares(name, party.shares(server.asks_shares))
    for name, party in people.items():
        if stays[name] < 2:
            continue
        codes = {
            key: np.asarray(generator.integers(2**bits, size=shape, dtype=f"u{bits // 8}"))
            for key, shape in sorted(shapes.items())
        }
        masked_codes = {key: each.copy() for key, each in codes.items()}
        if left["shares"] < threshold:
            with pytest.raises(InvalidMessage, match="that sent shares"):
                party.mask(server.asks_masked(name), list(masked_codes.values()))
            return
        party.mask(server.asks_masked(name), list(masked_codes.values()))
        server.add(name, masked_codes.items())
        for key, each in codes.items():
            plain[key] += each
    if left["masked"] < threshold:
        for name in server.arrived:
            with pytest.raises(InvalidMessage, match=f"a sum needs {threshold}"):
                people[name].unmasking(server.asks_unmasking)
        return
    gone = [name for name in people if stays[name] < 3]
    if left["unmasking"] < threshold:
        with pytest.raises(InvalidMessage, match=f"of the {threshold} clients that it takes"):
            unmask(people, server, without=gone)
        return
    unmask(people, server, without=gone)
    for key, expected in plain.items():
        np.testing.assert_array_equal(server.total[key], expected)


# --- through the command line ---------------------------------------------------------------------


def test_of_a_number_without_a_code_the_server_learns_no_more(hedgerow, experiment, tmp_path):
    path = experiment(federation={"rounds": 1, "attempts": 1})
    secure = "federation.secure={largest: 1.0e-9}"
    result = hedgerow("run", path, "method=fedavg", secure, "--out", tmp_path / "run")
    assert result.code != 0
    assert "its update has a number above 1e-09 in magnitude (federation" in result.err


def test_another_try_is_of_the_clients_whose_sum_was_to_be_unmasked(
    hedgerow, experiment, tmp_path, monkeypatch
):
    """Two sums of one round that differ by a client would tell of it."""
    asked, trained, answered = [], LocalFleet.train, LocalFleet.ask

    def train(self, round, parent, clients, clock, letters=None):
        for result in trained(self, round, parent, clients, clock, letters):
            away = asked and result.client.name == "client-002"
            yield ClientResult(result.client, failure="away", absent=True) if away else result

    def ask(self, round, parent, letters, clock):
        for client, letter in letters:
            if isinstance(letter, AskUnmasking):
                asked.append(tuple(letter.arrived))
                if client.index:
                    yield ClientResult(client, failure="away", absent=True)
                    continue
            yield from answered(self, round, parent, [(client, letter)], clock)

    monkeypatch.setattr(LocalFleet, "train", train)
    monkeypatch.setattr(LocalFleet, "ask", ask)
    path = experiment(federation={"rounds": 1, "attempts": 2, "backoff": 0.0})
    secure = "federation.secure={threshold: 2}"
    result = hedgerow("run", path, "method=fedavg", secure, "--out", tmp_path / "run")
    assert result.code != 0
    assert "2 of the 3 clients that it takes stayed to the end in 2 tries" in result.err
    assert set(asked) == {("client-000", "client-001", "client-002")}


class Killed(BaseException):
    """The process ends."""


def test_a_killed_server_asks_for_the_same_sum_again_and_no_other(ten, tmp_path, monkeypatch):
    """It may have had it, and the difference from one without a client would be its update."""
    append, out = Ledger.append, tmp_path / "run"

    def killed(*arguments):
        raise Killed

    gone, other = ["client-009"], ["client-002"]  # the former has most examples
    settings = ["federation.secure=true", "federation.attempts=1"]
    loaded = load(ten, settings)
    monkeypatch.setattr(Ledger, "append", killed)
    with pytest.raises(Killed):
        local.run(loaded, out, Unwatched(), fleet=gone_after("keys", gone))
    monkeypatch.setattr(Ledger, "append", append)
    record = (out / UNMASKED).read_bytes()
    (asked,) = json.loads(record).values()
    assert asked == [f"client-{i:03d}" for i in range(9)]
    with pytest.raises(RunFailed) as caught:
        local.run(loaded, out, Unwatched(), resume=True, fleet=gone_after("keys", other))
    assert str(caught.value) == (
        "round 1 has no secure sum: 8 of the 9 clients that it takes stayed to the end: client-002 "
        f"failed because gone. The sum of the 9 clients that {out / UNMASKED} names was to be "
        "unmasked, and the difference from another would tell of single ones: go on with the run "
        "when all of them are there, or begin another run where one will not be"
    )
    assert (out / UNMASKED).read_bytes() == record
    local.run(loaded, out, Unwatched(), resume=True)  # client-009 is back, and left out
    bare = load(ten, [*settings, "federation.secure.masks=false"])
    local.run(bare, tmp_path / "bare", Unwatched(), fleet=gone_after("keys", gone))
    assert ledger_bytes(out) == ledger_bytes(tmp_path / "bare")
    failures = rows_of(out)[1]["failures"]
    assert failures == {"client-009": "the sum of others of this round was to be unmasked before"}


def test_who_is_drawn_when_others_have_joined_does_not_part_a_sum(ten, tmp_path, monkeypatch):
    """A round of eight is finished with them, though others would be drawn of those there now."""
    append, out = Ledger.append, tmp_path / "run"

    def killed(*arguments):
        raise Killed

    class Nine(LocalFleet):
        def gather(self):
            return [client for client in super().gather() if client.name != "client-000"]

    loaded = load(ten, ["federation.secure=true", "federation.clients_per_round=8"])
    monkeypatch.setattr(Ledger, "append", killed)
    with pytest.raises(Killed):
        local.run(loaded, out, Unwatched(), fleet=Nine)
    monkeypatch.setattr(Ledger, "append", append)
    (asked,) = json.loads((out / UNMASKED).read_bytes()).values()
    local.run(loaded, tmp_path / "whole", Unwatched())
    assert rows_of(tmp_path / "whole")[1]["participants"] != asked
    local.run(loaded, out, Unwatched(), resume=True)
    assert rows_of(out)[1]["participants"] == asked


def test_a_damaged_record_of_sums_is_not_written_over(hedgerow, experiment, tmp_path):
    path, out = experiment(federation={"rounds": 1}), tmp_path / "run"
    secure = ["method=fedavg", "federation.secure=true"]
    assert hedgerow("run", path, *secure, "--out", out).code == 0
    (out / UNMASKED).write_text("[]")
    result = hedgerow("run", path, *secure, "federation.rounds=2", "--out", out, "--resume")
    assert result.code == 2
    assert "secure.json is damaged: restore it from a copy" in " ".join(result.err.split())
    assert (out / UNMASKED).read_text() == "[]"


METHODS_OF_SUMS = [
    "{name: fedavg}",
    "{name: fed_sb, ranks: 4}",
    "{name: fedit, ranks: 4, server: adam}",
    "{name: ferret, coordinates: random, compression: 50, bits: 32}",
    "{name: ferret, error_feedback: true, compression: 32}",
    "{name: scaffold}",
]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.clients=[client_0.json]"], "a round has one client, and a sum of one is its"),
        (["federation.clients_per_round=1"], "a round has one client, and a sum of one is its"),
        (["federation.secure.threshold=4"], "4 is above the 3 clients of a round: take from 2 to"),
    ],
)
def test_a_sum_of_one_or_of_more_than_there_are_is_a_mistake(
    hedgerow, experiment, tmp_path, changes, said
):
    secure = ["method={name: fedavg}", "federation.secure={}"]
    result = hedgerow("run", experiment(), *secure, *changes, "--out", tmp_path / "run")
    assert (result.code, said in " ".join(result.err.split())) == (2, True), result.err
    assert not (tmp_path / "run").exists()


def gone_after(stage, gone):
    """A fleet in one process that some are gone from when a stage is over."""

    class Fleet(LocalFleet):
        def ask(self, round, parent, letters, clock):
            begins = STAGES.index(letters[0][1].stage)
            yield from self._without(super().ask(round, parent, letters, clock), begins)

        def train(self, round, parent, clients, clock, letters=None):
            found = super().train(round, parent, clients, clock, letters)
            yield from self._without(found, STAGES.index("masked"))

        def _without(self, found, begins):
            for result in found:
                lost = ClientResult(result.client, failure="gone", absent=True)
                is_gone = result.client.name in gone and begins > STAGES.index(stage)
                yield lost if is_gone else result

    return Fleet


@pytest.fixture
def ten(experiment, tmp_path):
    """An experiment on ten clients."""
    path = experiment(method={"name": "fedavg"}, federation={"rounds": 1, "backoff": 0})
    for index in range(10):
        rows = [{"instruction": f"Say {n}", "output": f"{index}" * 3} for n in range(3 + index)]
        (tmp_path / f"client_{index}.json").write_text(json.dumps(rows))
    path.write_text(path.read_text().replace("  ranks:\n  - 4\n  - 2\n  - 1\n", ""))
    return path


def test_half_of_the_clients_are_no_threshold(hedgerow, ten, tmp_path):
    """Either half could help a server that lies with another set."""
    secure = "federation.secure.threshold=5"
    result = hedgerow("run", ten, secure, "--out", tmp_path / "run")
    assert result.code == 2
    assert "5 is not more than half of the 10 clients of a round: take from 6 to 10" in result.err


@pytest.mark.parametrize("stage", STAGES[:3])
def test_three_of_ten_that_are_gone(ten, tmp_path, stage):
    """The ledger is that of the same sums without masks: of seven, or of all."""
    gone = ["client-001", "client-004", "client-008"]
    for name, secure in (("masked", "true"), ("bare", "{masks: false}")):
        experiment = load(ten, [f"federation.secure={secure}"])
        fleet = gone_after(stage, gone)
        local.run(experiment, tmp_path / name, Unwatched(), fleet=fleet)
    assert ledger_bytes(tmp_path / "masked") == ledger_bytes(tmp_path / "bare")
    rows = [rows_of(tmp_path / name)[1] for name in ("masked", "bare")]
    assert len(rows[0]["participants"]) == len(rows[1]["participants"])
    assert len(rows[0]["participants"]) == (10 if stage == "masked" else 7)
    assert list(rows[0]["failures"]) == gone


def hostile(spoil):
    """A fleet in one process in which client-003 sends other letters than it should."""

    class Fleet(LocalFleet):
        stages: list[str] = []  # noqa: RUF012

        def ask(self, round, parent, letters, clock):
            self.stages.append(letters[0][1].stage)
            for result in super().ask(round, parent, letters, clock):
                if result.client.name == "client-003" and result.answer is not None:
                    result = replace(result, answer=spoil(result.answer))
                yield result

    return Fleet


SPOILT = {
    "no share can be opened": (
        lambda a: tampered(a, a.sealed) if isinstance(a, Shares) else a,
        ["client-003"],
        "or theirs for it, could not be opened: one of two is at fault",
    ),
    "one share cannot be opened": (
        lambda a: tampered(a, ["client-000"]) if isinstance(a, Shares) else a,
        [],
        None,
    ),
    "its shares are wrong": (
        lambda a: (
            Unmasking(seeds=dict.fromkeys(a.seeds, "0" * 64), keys={})
            if isinstance(a, Unmasking)
            else a
        ),
        [],
        "its shares of what masks client-000, client-001, client-002 and 7 more are missing or wro",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_hostile_client_does_not_end_a_run(ten, tmp_path, what):
    """The sum is that of the others, or of all where it has harmed nobody but itself."""
    spoil, gone, why = SPOILT[what]
    fleet = hostile(spoil)
    settings = ["federation.secure=true", "federation.attempts=1"]
    local.run(load(ten, settings), tmp_path / "masked", Unwatched(), fleet=fleet)
    bare = load(ten, [*settings, "federation.secure.masks=false"])
    local.run(bare, tmp_path / "bare", Unwatched(), fleet=gone_after("shares", gone))
    masked, plain = (Ledger.open(tmp_path / n / "ledger").read(1) for n in ("masked", "bare"))
    assert masked.participants == plain.participants
    for name, tensor in masked.tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), plain.tensors[name].numpy())
    failures = rows_of(tmp_path / "masked")[1]["failures"]
    assert list(failures) == (["client-003"] if why else [])
    assert why is None or why in failures["client-003"]
    assert fleet.stages == ["keys", "shares"] * (2 if gone else 1) + ["unmasking"]


@pytest.mark.parametrize("stage", STAGES[:3])
def test_four_of_ten_that_are_gone(ten, hedgerow, monkeypatch, tmp_path, stage):
    """Six are fewer than the threshold: a sentence, and no result."""
    fleet = gone_after(stage, [f"client-{index:03d}" for index in range(4)])
    monkeypatch.setattr(local.run, "__kwdefaults__", local.run.__kwdefaults__ | {"fleet": fleet})
    arguments = ["federation.secure={}", "--out", tmp_path / "run"]
    result = hedgerow("run", ten, *arguments)
    said = " ".join(result.err.split())
    assert result.code == 1
    did = "have helped to unmask the sum" if stage == "masked" else "stayed to the end"
    assert f"round 1 has no secure sum: 6 of the 7 clients that it takes {did}" in said
    assert "in 3 tries: client-000 and 3 more failed because gone" in said
    assert not list((tmp_path / "run/ledger").glob("*.safetensors"))
    assert [row["round"] for row in rows_of(tmp_path / "run")] == [0]


@pytest.mark.parametrize("method", METHODS_OF_SUMS)
def test_the_ledger_is_that_of_the_same_sums_without_masks(hedgerow, experiment, tmp_path, method):
    """Byte for byte; and nearly that of plain updates."""
    path = experiment(federation={"rounds": 2})
    for name, secure in (("masked", "true"), ("bare", "{masks: false}"), ("plain", "null")):
        arguments = [path, f"method={method}", f"federation.secure={secure}"]
        result = hedgerow("run", *arguments, "--out", tmp_path / name)
        assert result.code == 0, result.err
    assert ledger_bytes(tmp_path / "masked") == ledger_bytes(tmp_path / "bare")
    rows = {name: rows_of(tmp_path / name) for name in ("masked", "bare", "plain")}
    for masked_row, bare, plain in zip(*rows.values(), strict=True):
        assert masked_row["train_loss"] == bare["train_loss"]
        assert "train_loss_by_client" not in masked_row
        assert masked_row["eval_loss"] == pytest.approx(plain["eval_loss"], abs=2e-3)
        if plain["round"]:
            assert masked_row["train_loss"] == pytest.approx(plain["train_loss"], abs=1e-2)
            assert masked_row["secure_bytes"] > bare["secure_bytes"]
    if "fedavg" in method:
        last = [
            list(Ledger.open(tmp_path / n / "ledger").entries())[-1] for n in ("masked", "plain")
        ]
        for name, each in last[0].tensors.items():
            other = last[1].tensors[name]
            assert (each - other).norm() < 1e-3 * other.norm()
