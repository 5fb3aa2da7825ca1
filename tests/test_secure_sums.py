"""Secure sums: masks that cancel, shares that take them away, and codes that add exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.runs import ledger_bytes, rows_of

from hedgerow.engines.local import LocalFleet
from hedgerow.errors import InvalidMessage
from hedgerow.federation.fleet import ClientResult
from hedgerow.ledger import Ledger
from hedgerow.privacy.secure import masks
from hedgerow.privacy.secure.coordinator import Coordinator
from hedgerow.privacy.secure.fixed_point import FixedPoint
from hedgerow.privacy.secure.letters import AskKeys, AskUnmasking, Unmasking
from hedgerow.privacy.secure.party import Party
from hedgerow.privacy.secure.shares import combine, split

SESSION = "0" * 32


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
        server.add(name, codes)
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


def test_what_was_changed_on_its_way_is_refused():
    people = parties(3, 2)
    server = Coordinator(2, "run 1 parent", SESSION, most_examples=9)
    for name, party in people.items():
        server.add_keys(name, party.keys(AskKeys(session=SESSION)))
    for name, party in people.items():
        server.add_shares(name, party.shares(server.asks_shares))
    ask = server.asks_masked("client-0")
    first = ask.sealed["client-1"]
    changed = ask.model_copy(
        update={"sealed": {**ask.sealed, "client-1": ("0" if first[0] != "0" else "1") + first[1:]}}
    )
    with pytest.raises(InvalidMessage, match="shares from client-1: what is sealed was changed"):
        people["client-0"].mask(changed, [])


def test_a_wrong_share_is_found_out():
    people, _, _, server = masked()
    answers = {name: people[name].unmasking(server.asks_unmasking) for name in server.arrived}
    seeds = {**answers["client-0"].seeds, "client-2": "0" * 64}
    answers["client-0"] = Unmasking(seeds=seeds, keys={})
    with pytest.raises(InvalidMessage, match="shares of the mask of client-2 do not fit"):
        server.unmask(answers)


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
    with pytest.raises(InvalidMessage, match="changed on its way"):
        people["client-2"].mask(server.asks_masked("client-2"), [])


# --- through the command line ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["federation.secure=true", "federation.clients_per_round=1"],
            "federation.secure: a sum needs 2 clients, of which each round asks 1: have more",
        ),
        (
            ["federation.secure={threshold: 4}"],
            "federation.secure.threshold: a sum needs 4 clients, of which each round asks 3: have",
        ),
    ],
)
def test_rounds_of_fewer_clients_than_a_sum_needs_are_refused(
    hedgerow, experiment, tmp_path, arguments, sentence
):
    """The sum of one client's update would be that update."""
    result = hedgerow("run", experiment(), "method=fedavg", *arguments, "--out", tmp_path / "run")
    assert result.code == 2
    assert sentence in result.err
    assert not (tmp_path / "run").exists()


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


METHODS_OF_SUMS = [
    "{name: fedavg}",
    "{name: fed_sb, ranks: 4}",
    "{name: fedit, ranks: 4, server: adam}",
    "{name: ferret, coordinates: random, compression: 50}",
    "{name: ferret, error_feedback: true, compression: 32}",
    "{name: scaffold}",
]


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
