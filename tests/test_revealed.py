"""What an entry shows of single clients: sums without their factors, and `revealed_clients`."""

from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import ledger_bytes, rows_of

from hedgerow import lowrank
from hedgerow.adapters import adapter_pairs, adapter_tensors
from hedgerow.errors import InvalidMessage, UserError
from hedgerow.ledger import Ledger
from hedgerow.lowrank import Factors
from hedgerow.methods.base import REVEALED, Expected, ServerRound, revealed_by_sum
from hedgerow.methods.flora import FLoRA
from hedgerow.methods.flora_adalora import FLoRAAdaLoRA
from hedgerow.methods.parts.along_seeds import revealed
from hedgerow.seeds import Seeds
from hedgerow.settings import TrainingSettings
from hedgerow.testing.doubles import Forgetful
from hedgerow.wire import Entry, Participant, Update

shapes = st.tuples(st.integers(2, 40), st.integers(2, 40))
ranks = st.lists(st.integers(1, 8), min_size=2, max_size=5)


def a_round(shape, restart):
    expected = Expected(Seeds(0), {"q": shape}, TrainingSettings(steps=10))
    return {"restart": restart}, ServerRound(1, [], None, expected, Forgetful())


def sent(pairs):
    """Updates of clients with 1, 2, 3 … examples."""
    for index, pair in enumerate(pairs):
        about = {"r": str(pair.rank), "lora_alpha": str(2 * pair.rank)}
        tensors = adapter_tensors({"q": pair})
        yield Update("flora", 1, f"c{index}", "p", index + 1, 1.0, tensors, about)


def drawn(shape, ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    return [
        Factors(torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator))
        for r in ranks
    ]


def own_changes(pairs):
    """p_k s_k B_k A_k of each client, in float64."""
    total = sum(range(1, len(pairs) + 1))
    return [(index + 1) / total * 2 * pair.double().product() for index, pair in enumerate(pairs)]


@pytest.mark.parametrize("restart", ["own", "zero"])
@settings(max_examples=40, deadline=None)
@given(shapes, ranks, st.integers(0, 100))
def test_an_orthogonal_sum_is_exact_and_not_larger(restart, shape, ranks, seed):
    options, server_round = a_round(shape, restart)
    pairs = drawn(shape, ranks, seed)
    made = FLoRA(**options).aggregate(sent(pairs), server_round)
    ((_, pair),) = adapter_pairs(made.tensors)
    assert {pair.A.dtype, pair.B.dtype} == {torch.float32}
    assert pair.rank <= min(sum(ranks), *shape)
    exact = sum(own_changes(pairs))
    error = float((pair.product().double() - exact).norm() / exact.norm())
    assert error < 5e-7
    stated = made.metrics["aggregation_error"]
    assert stated < 5e-7
    float64 = float((pair.double().product() - exact).norm() / exact.norm())
    assert stated == pytest.approx(float64, rel=0.05, abs=1e-12)
    if sum(ranks) <= min(shape):
        # Both carry the square roots of the singular values.
        squares = [pair.A.double() @ pair.A.double().T, pair.B.double().T @ pair.B.double()]
        size = float(squares[0].diagonal().max())
        for square in squares:
            off = square - torch.diag(square.diagonal())
            assert float(off.abs().max()) < 1e-5 * size
        torch.testing.assert_close(*(s.diagonal() for s in squares), rtol=1e-4, atol=1e-6 * size)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100))
def test_an_orthogonal_sum_tells_the_sum_alone(seed):
    """Whatever clients' parts the same sum is made of, its factors are the same, up to signs."""
    shape = (30, 24)
    options, server_round = a_round(shape, "own")
    A, B = drawn(shape, [9], seed)[0].double()
    made = []
    for other, sizes in ((1, [3, 3, 3]), (2, [1, 6, 2])):
        # Σ p_k s_k B_k A_k = (B·G)(G⁻¹·A), divided among clients in another way.
        G = torch.linalg.qr(drawn((9, 9), [9], other)[0].A.double())[0]
        parts = zip((B @ G).split(sizes, dim=1), (G.T @ A).split(sizes), strict=True)
        pairs = [Factors(a * 3 / (k + 1), b).float() for k, (b, a) in enumerate(parts)]
        whole = FLoRA(**options).aggregate(sent(pairs), server_round)
        made.append(dict(adapter_pairs(whole.tensors))["q"])
    first, second = made
    assert first.rank == second.rank == 9
    for ours, theirs in ((first.A, second.A), (first.B.T, second.B.T)):
        signs = (ours * theirs).sum(dim=1).sign()[:, None]
        torch.testing.assert_close(ours, signs * theirs, rtol=1e-3, atol=1e-4)


def test_no_clients_factors_are_blocks_of_an_orthogonal_sum():
    shape, ranks = (60, 50), [4, 4, 4, 4]
    options, server_round = a_round(shape, "own")
    pairs = drawn(shape, ranks, 0)
    changes = own_changes(pairs)

    def farthest(broadcast):
        """How far the best block is from a client's change, relative to it, at most."""
        method = FLoRA(**options, broadcast=broadcast)
        A, B = dict(adapter_pairs(method.aggregate(sent(pairs), server_round).tensors))["q"]
        found = []
        for change in changes:
            blocks = [B[:, i : i + 4] @ A[i : i + 4] for i in range(len(A) - 3)]
            off = min(float((block.double() - change).norm()) for block in blocks)
            found.append(off / float(change.norm()))
        return found

    assert max(farthest("stack")) < 1e-6
    assert min(farthest("orthogonal")) > 0.5


def test_a_product_is_a_sum_and_stays_one():
    """Where clients have more rows than the matrix, it is broadcast as such, at no more cost."""
    options, server_round = a_round((6, 5), "own")
    pairs = drawn((6, 5), [3, 3], 0)
    made = [
        FLoRA(**options, broadcast=broadcast).aggregate(sent(pairs), server_round)
        for broadcast in ("stack", "orthogonal")
    ]
    assert all(
        torch.equal(made[0].tensors[name], made[1].tensors[name]) for name in made[0].tensors
    )
    assert [each.metrics[REVEALED] for each in made] == [0, 0]


def test_what_nobody_counts_in_is_not_sent():
    """Columns of a client of weight 0 stand in a stack, and are gone from the orthogonal sum."""
    options, server_round = a_round((20, 20), "own")
    pairs = drawn((20, 20), [2, 3, 4], 0)
    given = {"c0": 0.5, "c1": 0.0, "c2": 0.5}
    weighed = replace(server_round, given_weights=given)
    sums = {
        broadcast: FLoRA(**options, broadcast=broadcast).aggregate(sent(pairs), weighed)
        for broadcast in ("stack", "orthogonal")
    }
    ranks = {name: dict(adapter_pairs(s.tensors))["q"].rank for name, s in sums.items()}
    assert ranks == {"stack": 9, "orthogonal": 6}
    assert {name: s.metrics[REVEALED] for name, s in sums.items()} == {"stack": 3, "orthogonal": 0}


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 8), st.integers(0, 100))
def test_rounding_to_float32_is_measured(shape, rank, seed):
    pair = drawn(shape, [rank], seed)[0].double()
    pair = pair._replace(A=pair.A / 3, B=pair.B / 7)
    small, off = lowrank.rounded(pair)
    assert small.A.dtype == small.B.dtype == torch.float32
    found = float((small.double().product() - pair.product()).norm())
    assert off == pytest.approx(found, rel=1e-3, abs=1e-14)


def test_entries_are_checked_for_what_the_option_makes():
    shape = (20, 20)
    people = [Participant("a", 1, 0.5), Participant("b", 1, 0.5)]
    methods = {
        broadcast: FLoRA(ranks=3, restart="zero", broadcast=broadcast)
        for broadcast in ("stack", "orthogonal")
    }
    for rank, fits in ((6, methods), (5, ["orthogonal"]), (7, []), (0, [])):
        tensors = adapter_tensors({"q": drawn(shape, [rank], 0)[0]})
        entry = Entry("flora", 1, "p", people, {}, tensors)
        for broadcast, method in methods.items():
            if broadcast in fits:
                method.check_entry(entry, {"q": shape})
            else:
                with pytest.raises(InvalidMessage):
                    method.check_entry(entry, {"q": shape})


@pytest.mark.parametrize("other", [{"compress": True}, {"restart": "shared"}])
def test_a_stack_that_is_not_sent_is_refused(other):
    with pytest.raises(UserError, match=r"`broadcast: stack`: .* leave one of both out"):
        FLoRA(broadcast="stack", **other)


@pytest.mark.parametrize(
    ("weights", "found"), [([1, 1], 0), ([1], 1), ([0, 2, 0], 1), ([0.5, 1e-9], 0)]
)
def test_a_sum_reveals_who_is_alone_in_it(weights, found):
    assert revealed_by_sum(weights) == found


@pytest.mark.parametrize(
    ("directions", "found"),
    [([{1, 2}, {2, 1}], 0), ([{1, 2}, {2}], 1), ([{1}, {2}, {3}], 3), ([{5}], 1)],
)
def test_a_direction_that_one_client_took_reveals_it(directions, found):
    assert revealed(directions) == found


ALONE = {"federation.clients_per_round": 1}
KRUM = {"federation.weights": "krum", "federation.min_clients": 3}
PRIVATE = {"privacy": "{level: client, clip: 0.5, noise_multiplier: 1.0, delta: 1e-5, seed: 1}"}
TOP_K = "{name: top_k, k: 4, tile: 64}"
FOUND = {
    "a stack": ({"name": "flora", "restart": "own", "broadcast": "stack"}, {}, 3),
    "an orthogonal sum": ({"name": "flora", "restart": "own"}, {}, 0),
    "an orthogonal sum of one": ({"name": "flora", "restart": "own"}, ALONE, 1),
    "a cut": ({"name": "flora", "restart": "own", "compress": "true"}, {}, 0),
    "a shared start": ({"name": "flora", "restart": "shared"}, {}, 0),
    "uneven ranks, stacked": ({"name": "flora_adalora", "broadcast": "stack"}, {}, 3),
    "uneven ranks": ({"name": "flora_adalora"}, {}, 0),
    "cut to the largest rank": ({"name": "flexlora"}, {}, 0),
    "averages": ({"name": "fedit"}, {}, 0),
    "an average of one": ({"name": "fedit"}, ALONE, 1),
    "averages that a rule weighs": ({"name": "fedit"}, KRUM, 1),
    "averages with noise": ({"name": "fedit"}, {**ALONE, **PRIVATE}, 0),
    "all weights": ({"name": "fedavg"}, {}, 0),
    "all that was sent": ({"name": "sparseloco", "up": TOP_K, "gather": "true"}, {}, 3),
    "one sketch": ({"name": "ferret", "compression": 64}, {}, 0),
    "a sketch for each": ({"name": "ferret", "paper": "true"}, {}, 3),
    "each client's directions": ({"name": "fedzo"}, {}, 3),
    "directions of two": ({"name": "fedkseed", "candidates": 1}, {}, 0),
    "nothing": ({"name": "standalone"}, {}, None),
    "one participant": ({"name": "centralized"}, {}, None),
}


@pytest.mark.parametrize("case", FOUND)
def test_a_row_says_how_many_clients_an_entry_shows(hedgerow, experiment, tmp_path, case):
    method, settings, found = FOUND[case]
    given = {f"method.{key}": value for key, value in method.items()}
    if method["name"] not in ("fedavg", "sparseloco", "ferret", "fedzo", "fedkseed"):
        given["method.ranks"] = 2
    changes = [f"{key}={value}" for key, value in (given | settings).items()]
    path = experiment()
    content = yaml.safe_load(path.read_text())
    del content["method"]
    path.write_text(yaml.safe_dump(content))
    result = hedgerow("run", path, *changes, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    first, *rows = rows_of(tmp_path / "run")
    assert first["revealed_clients"] is None
    assert [row["revealed_clients"] for row in rows] == [found] * 2


@pytest.mark.parametrize("method", [FLoRA, FLoRAAdaLoRA])
def test_a_run_of_before_there_was_a_choice_goes_on_with_stacks(
    hedgerow, experiment, tmp_path, method
):
    """Its experiment.yaml lacks the option, and its third round is what it would have been."""
    name = method.own_name()
    changes = [f"method.name={name}", "method.ranks=2", "method.targets=[q_proj,v_proj]"]
    changes += ["method.restart=own"] if name == "flora" else ["method.initial=1"]
    path, old = experiment(), tmp_path / "old"
    stack = [*changes, "method.broadcast=stack"]
    whole = hedgerow("run", path, *stack, "federation.rounds=3", "--out", tmp_path / "whole")
    assert whole.code == 0, whole.err
    assert hedgerow("run", path, *stack, "--out", old).code == 0
    file = old / "experiment.yaml"
    content = yaml.safe_load(file.read_text())
    del content["method"]["broadcast"]
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    assert hedgerow("ledger", "verify", old).code == 0
    other = hedgerow("run", path, *changes, "federation.rounds=3", "--out", old, "--resume")
    assert other.code == 2
    assert "method.broadcast=stack" in other.err
    result = hedgerow("run", file, "federation.rounds=3", "--out", old, "--resume")
    assert result.code == 0, result.err
    assert ledger_bytes(old) == ledger_bytes(tmp_path / "whole")
    ranks = {pair.rank for _, pair in adapter_pairs(Ledger.open(old / "ledger").read(3).tensors)}
    assert ranks == {6}
    assert [row["revealed_clients"] for row in rows_of(old)] == [None, 3, 3, 3]
