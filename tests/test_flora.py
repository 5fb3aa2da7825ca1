"""FLoRA's warm starts, cut broadcasts and scaling factors, against plain matrices."""

import contextlib
import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import rows_of
from torch import nn

from hedgerow.adapters import adapter_pairs, adapter_tensors
from hedgerow.errors import InvalidMessage
from hedgerow.experiment import load
from hedgerow.ledger import Ledger
from hedgerow.lowrank import Factors, Projections, SumSketch
from hedgerow.methods import stacked
from hedgerow.methods.base import Client, ClientRound, Expected, ServerRound, Trained
from hedgerow.methods.flora import FLoRA
from hedgerow.methods.parts.scaling import LOSSES_ALONG
from hedgerow.methods.parts.truncation import Compress, ranks_to_keep
from hedgerow.methods.quantization import dequantize, quantize
from hedgerow.methods.weighting import LENGTHS, LONGEST, SHORTEST, adaptive_step
from hedgerow.model import Model
from hedgerow.seeds import Seeds
from hedgerow.settings import TrainingSettings
from hedgerow.testing.doubles import no_past
from hedgerow.training import line_search
from hedgerow.training.objectives.supervised import Supervised
from hedgerow.wire import (
    LARGEST_BROADCAST,
    LARGEST_SENT,
    Entry,
    Participant,
    Update,
    check_numbers,
)

SHAPES = {"q": (12, 10), "v": (7, 10), "up": (9, 16)}
SEEDS = Seeds(3)


class Matrices:
    """What FLoRA needs of a model: linear layers by name, and adapters beside them."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            m: torch.randn(shape, generator=generator, dtype=torch.float64)
            for m, shape in SHAPES.items()
        }
        self.factors = None
        self.beside = {}

    def attach(self, config, frozen=None):
        self.beside = {m: pair.product().double() for m, pair in adapter_pairs(frozen or {})}
        pairs = {
            m: Factors(torch.empty(config.r, n), torch.empty(o, config.r))
            for m, (o, n) in SHAPES.items()
        }
        return {name: nn.Parameter(t) for name, t in adapter_tensors(pairs).items()}

    def merge(self, module, factors):
        self.weights[module] += factors.B.double() @ factors.A.double()

    def function(self):
        """The matrices of the global model."""
        own = {m: p.B.double() @ p.A.double() for m, p in adapter_pairs(self.factors or {})}
        return {m: weight + own.get(m, 0) for m, weight in self.weights.items()}

    def function_with(self, parameters, scale):
        """Those of a client that has trained `parameters`."""
        trained = dict(adapter_pairs({n: p.detach() for n, p in parameters.items()}))
        return {
            m: weight + self.beside.get(m, 0) + scale * p.B.double() @ p.A.double()
            for m, weight, p in ((m, self.weights[m], trained[m]) for m in SHAPES)
        }


@dataclass
class Remembering:
    """A memory for one participant."""

    kept: dict = field(default_factory=dict)

    def load(self):
        return self.kept

    def save(self, tensors):
        self.kept = dict(tensors)


def play(method, sizes, rounds, check, absent=lambda round, client: False, moves=lambda _: True):
    """Rounds in which clients move their factors at random; `check` sees each round's end."""
    model, training = Matrices(), TrainingSettings(steps=3)
    clients = [Client(k, f"c{k}", size) for k, size in enumerate(sizes)]
    expected = Expected(SEEDS, SHAPES, training)
    memories = {client.name: Remembering() for client in clients}
    server, previous, begun = Remembering(), None, model.function()
    for round in range(1, rounds + 1):
        present = [c for c in clients if not absent(round, c.index)] or clients[:1]
        before = model.function()
        updates, changes = [], []
        for client in present:
            client_round = ClientRound(
                client, round, SEEDS, training, memories[client.name], no_past
            )
            parameters = method.start(model, client_round)
            rank = method.rank(client)
            start = model.function_with(parameters, method.scale(rank))
            for m in SHAPES:  # every participant starts from the same function
                torch.testing.assert_close(start[m], before[m], rtol=1e-5, atol=1e-5)
            generator = torch.Generator().manual_seed(1000 * round + client.index)
            with torch.no_grad():
                for parameter in parameters.values():
                    length = 0.1 if moves(round) else 0.0
                    parameter.add_(length * torch.randn(parameter.shape, generator=generator))
            changed = model.function_with(parameters, method.scale(rank))
            changes.append({m: changed[m] - start[m] for m in SHAPES})
            adaptive = method.scaling == "adaptive" and round > 1
            said = LOSSES_ALONG.said((1.2, 1.0, 0.9)) if adaptive else {}
            tensors, about = method.update(model, client_round, Trained(parameters, 1.0, said=said))
            update = Update(
                method=method.name,
                round=round,
                client=client.name,
                parent="p",
                num_examples=client.num_examples,
                train_loss=1.0,
                tensors=tensors,
                about=about,
            )
            method.check_update(client, update, expected)
            updates.append(update)
        server_round = ServerRound(round, present, previous, expected, server)
        aggregate = method.aggregate(updates, server_round)
        weights = aggregate.weights
        exact = {m: sum(p * c[m] for p, c in zip(weights, changes, strict=True)) for m in SHAPES}
        for update, change in zip(updates, changes, strict=True):
            shown = method.shown(update, server_round)
            s = float(shown.about["lora_alpha"]) / int(shown.about["r"])
            for m, pair in adapter_pairs(shown.tensors):
                error = float((s * pair.B.double() @ pair.A.double() - change[m]).norm())
                allowed = 1e-5 if method.upload_bits == 32 else 5e-2
                assert error < allowed * float(change[m].norm()) + 1e-12
        counted = zip(present, weights, strict=True)
        parts = [Participant(c.name, c.num_examples, weight) for c, weight in counted]
        method.check_weights(parts)
        previous = Entry(method.name, round, "p", parts, {}, aggregate.tensors)
        method.apply(model, previous)
        check(round, model.function(), before, exact, aggregate, begun)


def relative(difference, exact):
    def norm(each):
        return float(sum(x.square().sum() for x in each.values())) ** 0.5

    return norm(difference) / norm(exact)


LOSSLESS = {"energy": 1.0, "bits": 32}
ranks = st.lists(st.integers(1, 6), min_size=2, max_size=5)


@pytest.mark.parametrize("restart", ["own", "shared", "zero"])
@pytest.mark.parametrize("compress", [None, LOSSLESS], ids=["stack", "re-factorised"])
@settings(max_examples=5, deadline=None)
@given(ranks, st.sampled_from(["size", "uniform", 0.3, "adaptive"]), st.integers(0, 3))
def test_everybody_holds_the_exact_sum_for_twenty_rounds(restart, compress, ranks, scaling, seed):
    """Base plus adapter is base plus Σ p_k s_k Δ(B_k A_k), whoever takes part."""
    method = FLoRA(ranks=ranks, restart=restart, compress=compress, scaling=scaling)
    total = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()}

    def check(round, after, before, exact, aggregate, begun):
        for m in SHAPES:
            total[m] += exact[m]
        lost = {m: after[m] - begun[m] - total[m] for m in SHAPES}
        assert relative(lost, total) < 1e-5
        assert aggregate.metrics["aggregation_error"] < 1e-6

    sizes = [5 + 3 * k for k in range(len(ranks))]
    play(method, sizes, 20, check, lambda round, client: (round + client + seed) % 4 == 0)


@pytest.mark.parametrize("restart", ["own", "shared"])
@pytest.mark.parametrize("bits", [8, 16])
def test_what_was_cut_is_carried_and_not_lost(restart, bits):
    """The error of all rounds together is that of one round, not their sum."""

    def error_of_all_rounds(carry):
        compress = {"bits": bits, "rank": 3, "carry": carry}
        method = FLoRA(ranks=[3, 2, 2], restart=restart, compress=compress)
        total = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()}
        errors = []

        def check(round, after, before, exact, aggregate, begun):
            for m in SHAPES:
                total[m] += exact[m]
            made = relative({m: after[m] - before[m] - exact[m] for m in SHAPES}, exact)
            if not carry or round == 1:
                assert aggregate.metrics["compression_error"] == pytest.approx(made, rel=1e-3)
            errors.append(relative({m: after[m] - begun[m] - total[m] for m in SHAPES}, total))

        play(method, [5, 6, 7], 12, check)
        return errors[-1]

    assert error_of_all_rounds(carry=True) < 0.6 * error_of_all_rounds(carry=False)


@pytest.mark.parametrize("restart", ["own", "shared"])
@pytest.mark.parametrize("scaling", ["size", "uniform", 0.3, [0.1, 0.2, 0.3, 0.4]])
def test_sums_of_sketches_are_the_sums_where_they_are_wide_enough(monkeypatch, restart, scaling):
    monkeypatch.setattr(stacked, "MOST_SPOOLED", 0)
    compress = {"rank": 8, "bits": 32, "carry": False}

    def check(round, after, before, exact, aggregate, begun):
        made = relative({m: after[m] - before[m] - exact[m] for m in SHAPES}, exact)
        assert aggregate.metrics["sketch_error"] < 1e-5
        assert made == pytest.approx(aggregate.metrics["compression_error"], rel=1e-2, abs=1e-5)

    method = FLoRA(ranks=[3, 2, 4, 2], restart=restart, scaling=scaling, compress=compress)
    play(method, [5, 6, 9, 7], 4, check)


def test_a_sketch_knows_what_it_has_missed():
    generator = torch.Generator().manual_seed(0)
    tests = Projections.draw(60, 50, 6, generator)
    sketch, total = SumSketch(tests), torch.zeros(60, 50)
    for rank in (3, 5, 40):
        pair = Factors(
            torch.randn(rank, 50, generator=generator), torch.randn(60, rank, generator=generator)
        )
        scale = 0.02 if rank == 40 else 1.0
        sketch.add(pair, scale)
        total += scale * pair.product()
    found, missed, size = sketch.svd()
    off = float((found.factors().product() - total).norm())
    assert missed**0.5 == pytest.approx(off, rel=0.5)
    assert size**0.5 == pytest.approx(float(total.norm()), rel=0.5)
    best = float(torch.linalg.svdvals(total)[len(found.values) :].norm())
    assert off < 3 * best
    assert off < 0.1 * float(total.norm())


@pytest.mark.parametrize("restart", ["own", "shared"])
def test_sketches_that_are_too_narrow_say_so(monkeypatch, restart):
    """What they miss is in the errors, and they are better than nothing."""
    monkeypatch.setattr(stacked, "MOST_SPOOLED", 0)
    method = FLoRA(ranks=2, restart=restart, compress={"rank": 3, "bits": 32, "carry": False})
    errors = []

    def check(round, after, before, exact, aggregate, begun):
        made = relative({m: after[m] - before[m] - exact[m] for m in SHAPES}, exact)
        errors.append((made, aggregate.metrics["compression_error"]))

    monkeypatch.setattr("hedgerow.lowrank._PROBES", 100)
    play(method, [5 + k for k in range(8)], 4, check)
    for made, reported in errors:
        assert made < 1.0
        assert 0.95 * made < reported < 2 * made


@pytest.mark.parametrize("restart", ["own", "shared"])
def test_what_is_not_carried_is_known(restart):
    """After a round in which clients move, rounds in which they rest bring all but that."""
    method = FLoRA(ranks=2, restart=restart, compress={"rank": 3, "bits": 16})
    missing, dropped = [], []

    def check(round, after, before, exact, aggregate, begun):
        if round == 1:
            missing.append(exact)
            dropped.append(aggregate.metrics["dropped_error"])
        left = {m: after[m] - begun[m] - missing[0][m] for m in SHAPES}
        errors.append(relative(left, missing[0]))

    errors: list[float] = []
    play(method, [5] * 8, 8, check, moves=lambda round: round == 1)
    assert dropped[0] > 0.01
    assert errors[-1] == pytest.approx(dropped[0], rel=0.05)
    assert errors[0] > 1.5 * errors[-1]


@pytest.mark.parametrize("restart", ["own", "shared", "zero"])
@pytest.mark.parametrize("compress", [None, LOSSLESS, True], ids=["stack", "re-factorised", "cut"])
def test_the_largest_updates_make_an_entry_that_everybody_accepts(restart, compress):
    method = FLoRA(ranks=[6, 6, 5], restart=restart, compress=compress)
    clients = [Client(k, f"c{k}", 5) for k in range(3)]
    updates = []
    for client in clients:
        rank = method.rank(client)
        pairs = {
            m: Factors(torch.ones(rank, n), torch.ones(o, rank)) for m, (o, n) in SHAPES.items()
        }
        tensors = {name: LARGEST_SENT * t for name, t in adapter_tensors(pairs).items()}
        about = {"r": str(rank), "lora_alpha": str(2 * rank)}
        updates.append(Update("flora", 1, client.name, "p", 5, 1.0, tensors, about))
    server_round = ServerRound(
        1, clients, None, Expected(SEEDS, SHAPES, TrainingSettings(steps=3)), Remembering()
    )
    aggregate = method.aggregate(updates, server_round)
    parts = [Participant(c.name, 5, 1 / 3) for c in clients]
    entry = Entry("flora", 1, "p", parts, {}, aggregate.tensors)
    check_numbers(entry.tensors, LARGEST_BROADCAST)
    method.check_entry(entry, SHAPES)


@pytest.mark.parametrize("bits", [8, 16])
def test_updates_in_fewer_bits_are_nearly_the_same(bits):
    def check(round, after, before, exact, aggregate, begun):
        step = {m: after[m] - before[m] for m in SHAPES}
        lost = relative({m: step[m] - exact[m] for m in SHAPES}, exact)
        assert lost < {8: 2e-2, 16: 1e-4}[bits]
        assert lost < 3 * aggregate.metrics["upload_error"]

    play(FLoRA(ranks=[3, 2], upload_bits=bits, restart="own"), [5, 6], 3, check)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_quantization_is_as_fine_as_its_bits(bits):
    generator = torch.Generator().manual_seed(0)
    pair = Factors(torch.randn(4, 9, generator=generator), torch.randn(6, 4, generator=generator))
    pair.A[1] = 0
    tensors = adapter_tensors({"q": pair})
    back = dequantize(quantize(tensors, bits))
    for name, factor in tensors.items():
        dim = 1 if ".lora_A." in name else 0
        step = factor.abs().amax(dim, keepdim=True) / (2 ** (bits - 1) - 1)
        # Beside the rounding to integers there is float32's own.
        assert ((back[name] - factor).abs() <= 0.51 * step + 1e-7 * factor.abs()).all()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), min_size=1, max_size=4),
    st.floats(0, 1),
    st.integers(0, 200),
)
def test_the_smallest_for_their_size_are_left_out(values, spare, numbers):
    spectra = {f"m{i}": torch.tensor(sorted(v, reverse=True)) for i, v in enumerate(values)}
    shapes = {f"m{i}": (5 * (i + 1), 3) for i in range(len(values))}
    total = sum(float(s.double().square().sum()) for s in spectra.values())
    kept = ranks_to_keep(spectra, shapes, numbers, spare * total)
    assert all(kept.values())
    spent = sum(kept[m] * sum(shapes[m]) for m in spectra)
    assert spent <= max(numbers, sum(map(sum, shapes.values())))
    left = sum(float(spectra[m][kept[m] :].double().square().sum()) for m in spectra)
    gains = {m: spectra[m].double().square() / sum(shapes[m]) for m in spectra}
    best_left = max(
        (float(gains[m][kept[m]]) for m in spectra if kept[m] < len(gains[m])), default=0
    )
    least_kept = min((float(gains[m][kept[m] - 1]) for m in spectra if kept[m] > 1), default=1e9)
    assert best_left <= least_kept
    if numbers >= sum(len(s) * sum(shapes[m]) for m, s in spectra.items()):
        assert left <= spare * total * (1 + 1e-9)


def test_a_default_cut_is_as_large_as_the_largest_client():
    assert Compress().largest(8) == 20
    assert Compress(bits=16).largest(8) == 10
    assert Compress(energy=0.9).largest(8) is None
    assert Compress(rank=5).largest(8) == 5
    assert FLoRA(compress=True).compress == Compress()
    assert FLoRA(compress=False).compress is None


@given(st.floats(-3, 3), st.floats(0.3, 3))
def test_adaptive_steps_go_to_the_minimum_of_the_loss_along_the_last(best, last):
    losses = [(length - best) ** 2 + 5 for length in LENGTHS]
    expected = last * min(max(best, 1 / 1.5), 1.5)
    assert adaptive_step(last, [losses] * 3, [5, 1, 2]) == pytest.approx(expected, rel=1e-6)


def test_adaptive_steps_where_there_is_no_minimum_go_downhill_within_bounds():
    assert adaptive_step(1.0, [[3.0, 2.5, 1.0]], [1]) == 1.5
    assert adaptive_step(1.0, [[1.0, 2.5, 3.0]], [1]) == pytest.approx(1 / 1.5)
    assert adaptive_step(LONGEST, [[3.0, 2.0, 1.0]], [1]) == LONGEST
    assert adaptive_step(SHORTEST, [[1.0, 2.0, 3.0]], [1]) == SHORTEST
    assert adaptive_step(0.7, [[3.0, 3.0, 3.0]], [1]) == 0.7
    assert adaptive_step(0.7, [[LARGEST_SENT] * 3], [1]) == 0.7


def test_nobody_decides_an_adaptive_step_alone():
    honest = [[2.0, 2.1, 2.5]] * 20
    for liar in ([LARGEST_SENT, LARGEST_SENT / 2, 0.0], [0.0, LARGEST_SENT / 2, LARGEST_SENT]):
        assert adaptive_step(1.0, [*honest, liar], [1] * 21) == adaptive_step(1.0, honest, [1] * 20)


@pytest.mark.parametrize("steps", [3, 10])
def test_losses_along_a_step_are_those_of_the_models_on_its_ends(
    hedgerow, experiment, tmp_path, monkeypatch, steps
):
    """Whether clients go on from averages or from their own A."""
    seen = []
    measured = line_search.losses_along

    def watched(job, step, lengths, order):
        step = list(step)
        ends = measured(job, step, [0.0, 1.0], copy.deepcopy(order))
        seen.append((job, copy.deepcopy(order), ends))
        return measured(job, step, lengths, order)

    monkeypatch.setattr(line_search, "losses_along", watched)
    changes = ["method.scaling=adaptive", f"training.steps={steps}", "federation.rounds=3"]
    assert hedgerow("run", experiment(), *changes, "--out", tmp_path / "run").code == 0
    loaded = load(tmp_path / "run" / "experiment.yaml")
    model, ledger = Model.load(loaded.model), Ledger.open(tmp_path / "run" / "ledger")
    losses = []
    for round in range(3):
        ledger.replay(loaded.method, model, round, after=max(round - 1, 0))
        held = model.with_factors(model.factors) if model.factors else contextlib.nullcontext()
        with held:
            losses.append(
                [
                    measured(replace(job, network=model.network), [], [1.0], copy.deepcopy(order))
                    for job, order, _ in seen
                ]
            )
    for client, (_, _, (before, after)) in enumerate(seen):
        round = 1 + client // 3
        assert before == pytest.approx(losses[round - 1][client][0], rel=1e-5)
        assert after == pytest.approx(losses[round][client][0], rel=1e-5)
    assert len(seen) == 6
    sizes = [row["step_size"] for row in rows_of(tmp_path / "run")[1:]]
    assert sizes[0] == 1.0
    assert sizes[1] != 1.0


def test_losses_along_a_step_take_no_more_memory_than_training(
    hedgerow, experiment, tmp_path, monkeypatch
):
    shapes, whole = set(), Supervised.total

    def watched(objective, network, batch):
        shapes.add(len(batch["input_ids"]))
        return whole(objective, network, batch)

    monkeypatch.setattr(Supervised, "total", watched)
    changes = [
        "method.scaling=adaptive",
        "training.batch_size=2",
        "training.gradient_accumulation=3",
    ]
    assert hedgerow("run", experiment(), *changes, "--out", tmp_path / "run").code == 0
    assert shapes == {1, 2}  # of five examples a client has, and of six that it may have


@pytest.mark.parametrize(
    "said", ["1 2", "1 2 nan", "1 2 3 4", "1 2 -3", "1 2 1e11", "", None, "1  2 3", "1 2 3e999"]
)
def test_losses_along_a_step_that_are_no_losses_are_refused(said):
    method, client = FLoRA(ranks=1, scaling="adaptive"), Client(0, "c0", 5)
    pairs = {m: Factors(torch.ones(1, n), torch.ones(o, 1)) for m, (o, n) in SHAPES.items()}
    about = {"r": "1", "lora_alpha": "2"}
    update = Update("flora", 2, "c0", "p", 5, 1.0, adapter_tensors(pairs), about)
    expected = Expected(SEEDS, SHAPES, TrainingSettings())
    good = {"losses_along": "1 2.25 3e-05"}
    method.check_update(client, replace(update, about=about | good), expected)
    wrong = {} if said is None else {"losses_along": said}
    with pytest.raises(InvalidMessage):
        method.check_update(client, replace(update, about=about | wrong), expected)
    with pytest.raises(InvalidMessage):  # there is no last step yet
        method.check_update(client, replace(update, round=1, about=about | good), expected)


def test_a_client_goes_on_with_its_moments_and_its_a(hedgerow, experiment, tmp_path):
    """Two rounds differ from two first rounds, and a resumed run from neither."""
    losses = {}
    for restart in ("own", "shared", "zero"):
        arguments = [f"method.restart={restart}", "federation.rounds=3"]
        assert hedgerow("run", experiment(), *arguments, "--out", tmp_path / restart).code == 0
        losses[restart] = [row["eval_loss"] for row in rows_of(tmp_path / restart)]
    assert losses["own"][1] == losses["zero"][1]
    assert losses["own"][2] != losses["zero"][2]
    assert losses["shared"][2] not in (losses["own"][2], losses["zero"][2])
    assert not (tmp_path / "zero" / "clients").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["method.scaling=[1, 2]"], "method.scaling has 2 factors for 3 clients"),
        (
            ["method.compress.rank=2"],
            "a broadcast of rank 2 has no room beside the adapter of rank 4",
        ),
        (["method.compress={bits: 32}"], "a broadcast of rank 4 has no room"),
        (["method.compress={energy: 2}"], "method.compress.energy"),
        (["method.upload_bits=4"], "method.upload_bits"),
        (["method.scaling=0"], "method.scaling"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(
    hedgerow, experiment, tmp_path, changes, sentence
):
    result = hedgerow("run", experiment(), *changes, "--out", tmp_path / "run")
    assert result.code == 2
    assert sentence in result.err
    assert not (tmp_path / "run").exists()


# --- server steps ---------------------------------------------------------------------------------


def stepped(changes, server):
    """Global changes that plain matrices make, one round after another, in float64."""
    eta, beta = server.get("learning_rate", 1.0), server.get("momentum", 0.9)
    momentum = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()}
    for change in changes:
        if server["name"] == "sgd":
            yield {m: eta * change[m] for m in SHAPES}
            continue
        momentum = {m: beta * momentum[m] + change[m] for m in SHAPES}
        ahead = server["name"] == "nesterov"
        yield {m: eta * (change[m] + beta * momentum[m] if ahead else momentum[m]) for m in SHAPES}


STEPS = {
    "sgd": {"name": "sgd", "learning_rate": 0.6},
    "momentum": {"name": "momentum", "learning_rate": 0.5, "momentum": 0.8},
    "nesterov": {"name": "nesterov", "learning_rate": 0.7, "momentum": 0.5},
}


@pytest.mark.parametrize("restart", ["own", "shared", "zero"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("compress", [None, {"rank": 20, "bits": 32}], ids=["whole", "wide"])
def test_the_server_steps_along_stacks_as_along_matrices(restart, name, compress):
    """With room for all components, what everybody holds is the optimiser's sum."""
    if compress is None and name != "sgd":
        pytest.skip("momentum needs a bound")
    method = FLoRA(ranks=[3, 2, 1], restart=restart, compress=compress, server=STEPS[name])
    means, moved = [], []

    def check(round, after, before, exact, aggregate, begun):
        means.append(exact)
        moved.append({m: after[m] - before[m] for m in SHAPES})
        assert aggregate.metrics["aggregation_error"] < 1e-5

    play(method, [5, 6, 7], 6, check, lambda round, client: (round + client) % 4 == 0)
    for is_, should in zip(moved, stepped(means, STEPS[name]), strict=True):
        assert relative({m: is_[m] - should[m] for m in SHAPES}, should) < 1e-5


@pytest.mark.parametrize("restart", ["own", "shared"])
def test_steps_of_sketches_are_those_of_the_sums(monkeypatch, restart):
    monkeypatch.setattr(stacked, "MOST_SPOOLED", 0)
    server = STEPS["momentum"]
    compress = {"rank": 12, "bits": 32, "carry": False}
    method = FLoRA(ranks=2, restart=restart, compress=compress, server=server)
    means, moved = [], []

    def check(round, after, before, exact, aggregate, begun):
        means.append(exact)
        moved.append({m: after[m] - before[m] for m in SHAPES})

    play(method, [5, 6, 7], 4, check)
    for is_, should in zip(moved, stepped(means, server), strict=True):
        assert relative({m: is_[m] - should[m] for m in SHAPES}, should) < 1e-4


def test_a_cut_momentum_says_what_it_has_lost():
    """It is bounded by twice the broadcast's rank, and the loss is in the metrics."""
    compress = {"rank": 2, "bits": 32, "carry": False}
    method = FLoRA(ranks=2, restart="own", compress=compress, server=STEPS["momentum"])
    lost = []
    play(method, [5] * 6, 4, lambda *seen: lost.append(seen[4].metrics["momentum_error"]))
    assert all(0 < each < 1 for each in lost)
    wide = FLoRA(ranks=2, restart="own", compress={"rank": 20}, server=STEPS["momentum"])
    play(wide, [5] * 6, 4, lambda *seen: lost.append(seen[4].metrics["momentum_error"]))
    assert max(lost[4:]) < 1e-6
