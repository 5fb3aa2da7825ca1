from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgerow.data.partition import partition
from hedgerow.data.rows import Row
from hedgerow.errors import UserError
from hedgerow.names import NAME


def how(kind, clients=None, column="topic", alpha=0.5, shards=2):
    return SimpleNamespace(kind=kind, clients=clients, column=column, alpha=alpha, shards=shards)


def topical(topics):
    return [Row("", columns={"topic": topic}, number=n) for n, topic in enumerate(topics, start=1)]


values = st.one_of(
    st.text(min_size=1, max_size=4).filter(str.strip), st.integers(-3, 3), st.booleans()
)


@settings(max_examples=40, deadline=None)
@given(
    topics=st.lists(values, min_size=1, max_size=40),
    kind=st.sampled_from(["iid", "dirichlet", "shard", "column"]),
    clients=st.integers(1, 6),
    shards=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_each_row_is_given_to_exactly_one_client(topics, kind, clients, shards, seed):
    rows = topical(topics)
    try:
        parts = partition(rows, how(kind, clients, shards=shards), seed)
    except UserError:
        assert kind != "column"
        return
    assert sorted(i for part in parts.values() for i in part) == list(range(len(rows)))
    assert all(parts.values()) or kind == "dirichlet"
    assert all(NAME.fullmatch(name) for name in parts)
    assert parts == partition(rows, how(kind, clients, shards=shards), seed)


def test_iid_is_even_random_and_seeded():
    rows = topical(range(101))
    parts = partition(rows, how("iid", 4, column=None), 0)
    assert list(parts) == ["client-000", "client-001", "client-002", "client-003"]
    assert sorted(map(len, parts.values())) == [25, 25, 25, 26]
    assert parts["client-000"] != list(range(26))
    assert parts != partition(rows, how("iid", 4, column=None), 1)


def test_shards_hold_few_values_and_all_rows():
    rows = topical(i % 10 for i in range(203))
    parts = partition(rows, how("shard", 5, shards=2), 0)
    assert sum(map(len, parts.values())) == 203
    assert all(len({rows[i].columns["topic"] for i in part}) <= 6 for part in parts.values())


def test_dirichlet_alpha_is_how_even_it_is():
    rows = topical(i % 2 for i in range(4000))

    def largest(alpha):
        parts = partition(rows, how("dirichlet", 4, alpha=alpha), 0)
        return max(map(len, parts.values()))

    assert largest(1000.0) < 1100 < 1500 < largest(0.2)


def test_a_very_uneven_draw_leaves_clients_without_rows():
    rows = topical(i % 10 for i in range(1000))
    parts = partition(rows, how("dirichlet", 200, alpha=0.1), 0)
    assert (len(parts), sum(map(len, parts.values()))) == (200, 1000)
    assert 0 < sum(not part for part in parts.values()) < 100


def test_a_value_inside_another_divides_as_well():
    rows = [
        Row("", columns={"meta": {"topic": topic}}, number=n) for n, topic in [(1, "a"), (2, 1)]
    ]
    assert partition(rows, how("column", column="meta.topic"), 0) == {"1": [1], "a": [0]}
    rows.append(Row("", columns={"meta": None}, number=3, where="a.json"))
    with pytest.raises(UserError, match=r"a\.json: row 3 has no value in 'meta\.topic'"):
        partition(rows, how("column", column="meta.topic"), 0)


def test_a_client_for_each_value():
    topics = ["Open QA", "open/qa", "été", "?", "日本", "open_qa"]
    parts = partition(topical(topics), how("column"), 0)
    by_row = {part[0]: name for name, part in parts.items()}
    assert [by_row[i] for i in range(6)] == [
        "open-qa",
        "open-qa-2",
        "ete",
        "client",
        "client-2",
        "open_qa",
    ]


def test_nothing_is_printed(capfd, recwarn):
    rows = topical(str(i % 5) for i in range(50))
    for settings_ in [how("iid", 3), how("dirichlet", 3, alpha=0.05), how("shard", 3)]:
        partition(rows, settings_, 0)
    partition(rows, how("column"), 0)
    assert capfd.readouterr() == ("", "")
    assert not [w for w in recwarn if "min_partition_size" in str(w.message)]


def test_mistakes():
    rows = topical("a" * 10)
    for settings_, message in [
        (how("iid", 11), "10 rows are too few for 11 clients: give at most 10"),
        (how("shard", 4, shards=3), "10 rows are too few for 3 shards for each of 4 clients"),
        (how("column", column="label"), r"row 1 has no value in 'label'.*columns there: topic"),
    ]:
        with pytest.raises(UserError, match=message):
            partition(rows, settings_, 0)
    for value in (None, "", " "):
        with pytest.raises(UserError, match="row 2 has no value in 'topic'"):
            partition(topical(["a", value]), how("column"), 0)
    with pytest.raises(UserError, match="row 1 has a list in 'topic'"):
        partition(topical([["a"]]), how("column"), 0)
