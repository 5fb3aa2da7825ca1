"""Every method's aggregate against the plain sums that it stands for."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import SERVER_ROUND, SHAPES, clients, error, exact, updates

from hedgerow.adapters import adapter_pairs
from hedgerow.errors import InvalidMessage
from hedgerow.lowrank import Factors
from hedgerow.methods import METHODS
from hedgerow.methods.base import Client, Expected
from hedgerow.methods.fedavg import FedAvg
from hedgerow.methods.fedit import FedIT
from hedgerow.methods.flora import FLoRA
from hedgerow.methods.parts.stacking import Part, exact_sum
from hedgerow.methods.zero_padding import ZeroPadding
from hedgerow.seeds import Seeds
from hedgerow.settings import TrainingSettings
from hedgerow.wire import Update


@settings(max_examples=50, deadline=None)
@given(clients, st.booleans(), st.integers(0, 100))
def test_flora_is_exact_for_any_ranks_alphas_and_sizes(clients, rslora, seed):
    aggregate = FLoRA().aggregate(updates(seed, clients, rslora), SERVER_ROUND)
    assert error(aggregate, exact(seed, clients, rslora)) < 1e-6
    assert aggregate.metrics["aggregation_error"] < 1e-6
    stacked = sum(rank for rank, _, _ in clients)
    for module, pair in adapter_pairs(aggregate.tensors):
        assert pair.rank <= min(stacked, *SHAPES[module])
    as_sent = FLoRA(restart="zero", broadcast="stack").aggregate(
        updates(seed, clients, rslora), SERVER_ROUND
    )
    assert error(as_sent, exact(seed, clients, rslora)) < 1e-6
    assert {pair.rank for _, pair in adapter_pairs(as_sent.tensors)} == {stacked}


@settings(max_examples=30, deadline=None)
@given(clients, st.integers(0, 100))
def test_the_reported_noise_of_averaging_is_the_noise(clients, seed):
    aggregate = ZeroPadding().aggregate(updates(seed, clients), SERVER_ROUND)
    measured = error(aggregate, exact(seed, clients))
    assert aggregate.metrics["aggregation_error"] == pytest.approx(measured, rel=1e-4, abs=1e-6)


def test_averaging_is_noisy_and_stacking_is_not():
    clients = [(2, 4.0, 1), (2, 4.0, 1)]
    assert (
        ZeroPadding().aggregate(updates(0, clients), SERVER_ROUND).metrics["aggregation_error"]
        > 0.1
    )
    assert FLoRA().aggregate(updates(0, clients), SERVER_ROUND).metrics["aggregation_error"] < 1e-6


@pytest.mark.parametrize(
    "lie",
    [
        {"about": {"r": "3", "lora_alpha": "8"}},
        {"about": {"r": "4", "lora_alpha": "nan"}},
        {"about": {"r": "4", "lora_alpha": "8", "use_rslora": "true"}},
        {"about": {}},
        {"tensors": {}},
        {"tensors": {"base_model.model.model.q.lora_A.weight": torch.ones(4, 5)}},
        {"tensors": next(updates(0, [(2, 8.0, 7)])).tensors},
    ],
)
def test_an_update_that_is_not_the_clients_adapter_is_refused(lie):
    client, expected = Client(0, "c0", 7), Expected(Seeds(0), SHAPES, TrainingSettings())
    (honest,) = updates(0, [(4, 8.0, 7)])
    honest = dataclasses.replace(honest, about={"r": "4", "lora_alpha": "8"})
    FLoRA(ranks=4).check_update(client, honest, expected)
    with pytest.raises(InvalidMessage):
        FLoRA(ranks=4).check_update(client, dataclasses.replace(honest, **lie), expected)


def test_fedit_averages_the_factors_apart():
    clients = [(2, 4.0, 1), (2, 4.0, 3)]
    first, second = (dict(adapter_pairs(u.tensors)) for u in updates(0, clients))
    aggregate = dict(adapter_pairs(FedIT().aggregate(updates(0, clients), SERVER_ROUND).tensors))
    for module in SHAPES:
        expected_A = 0.25 * first[module].A + 0.75 * second[module].A
        expected_B = 0.25 * first[module].B + 0.75 * second[module].B
        torch.testing.assert_close(aggregate[module].A, expected_A)
        torch.testing.assert_close(aggregate[module].B, 2 * expected_B)  # s = 4/2, once


def test_an_error_relative_to_nothing_is_no_number_of_an_entry():
    """Two clients whose changes cancel, while their factors' averages do not."""

    def cancelling():
        for client, a, b in (("c0", 1.0, 1.0), ("c1", -0.5, 2.0)):
            tensors = {
                "base_model.model.q.lora_A.weight": torch.full((1, 3), a),
                "base_model.model.q.lora_B.weight": torch.full((2, 1), b),
            }
            about = {"r": "1", "lora_alpha": "1"}
            yield Update("fedit", 1, client, "p", 1, 1.0, tensors, about)

    aggregate = FedIT(ranks=1).aggregate(cancelling(), SERVER_ROUND)
    (pair,) = (pair for _, pair in adapter_pairs(aggregate.tensors))
    assert pair.product().abs().min() > 0
    assert aggregate.metrics == {}


def test_one_client_alone_is_exact_for_everybody():
    for method in (FLoRA(), FedIT(), ZeroPadding()):
        aggregate = method.aggregate(updates(0, [(3, 6.0, 5)]), SERVER_ROUND)
        assert aggregate.metrics["aggregation_error"] < 1e-7


def test_fedavg_weighs_by_examples_and_folds_as_they_arrive():
    seen = []

    def arriving():
        for size in (1, 3):
            seen.append(size)
            yield Update("fedavg", 1, "c", "p", size, 1.0, {"w": torch.full((2,), float(size))})

    expected = replace(SERVER_ROUND.expected, shapes={"w": [2]})
    aggregate = FedAvg().aggregate(arriving(), replace(SERVER_ROUND, expected=expected))
    assert seen == [1, 3]
    assert aggregate.tensors["w"].tolist() == [2.5, 2.5]


def test_every_method_says_what_it_is():
    for name, method in METHODS.items():
        assert method().name == name
        assert method.summary
        assert "arXiv" in method.reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exact_sum_leaves_the_stack_as_it_is(dtype):
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(s, generator=generator, dtype=dtype) for s in ((5, 4), (3, 5)))
    parts = [Part(slice(0, 2), 0.25, 2.0), Part(slice(2, 5), 0.75, 0.5)]
    before = A.clone()
    summed = exact_sum(Factors(A, B), parts)
    assert torch.equal(A, before)
    expected = sum(p.weight * p.scale * B.double()[:, p.rows] @ A.double()[p.rows] for p in parts)
    torch.testing.assert_close(summed.product(), expected, rtol=1e-12, atol=0)
