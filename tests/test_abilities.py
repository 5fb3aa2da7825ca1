"""What methods allow, by their declarations: what a table says is what experiments accept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field
from support.configurations import METHOD_OPTIONS, method_of

from hedgerow.errors import UserError
from hedgerow.experiment import load
from hedgerow.methods import METHODS, FedAvg, FLoRA
from hedgerow.methods.abilities import ABILITIES, abilities, able, table, with_defaults
from hedgerow.model import Model
from hedgerow.settings import ModelSettings, TrainingSettings

PRIVACY = Path(__file__).parents[1] / "docs/privacy.md"
TABLE = re.compile(r"\n(\| method \|.*?\n)\n", re.DOTALL)


def test_the_table_of_the_documentation_is_that_of_the_declarations():
    """Where it is not: put what `hedgerow.methods.abilities.table()` returns into the file."""
    (written,) = TABLE.findall(PRIVACY.read_text())
    assert written == table()
    assert len(written.splitlines()) == 2 + len(METHODS)


ASKS = {
    "example_privacy": "privacy={level: example, clip: 1, noise_multiplier: 1, delta: 1e-3}",
    "client_privacy": "privacy={level: client, clip: 1, noise_multiplier: 1, delta: 1e-3}",
    "client_bands": (
        "privacy={level: client, clip: 1, noise_multiplier: 1, delta: 1e-3, bands: 2}"
    ),
    "secure": "federation.secure=true",
    "weights": "federation.weights=krum",
    "trainer": "training.trainer=transformers",
}


@pytest.mark.parametrize("asked", ASKS)
@pytest.mark.parametrize("name", METHODS)
def test_an_experiment_may_ask_for_what_a_method_allows(experiment, name, asked):
    path = experiment()
    section = f"method={json.dumps({'name': name})}"
    load(path, [section])
    if ABILITIES[asked].of(METHODS[name]()):
        load(path, [section, ASKS[asked]])
    else:
        with pytest.raises(UserError, match=rf"{asked.split('_')[0]}|federation\.weights") as info:
            load(path, [section, ASKS[asked]])
        (named,) = re.findall(r"take one of ([a-z_, ]+)", str(info.value))
        assert named == able(ABILITIES[asked].of)


@pytest.mark.parametrize("name", METHODS)
def test_clients_of_different_ranks_are_let_in_where_a_method_takes_them(tiny_model, name):
    answer = ABILITIES["ranks"].of(METHODS[name]())
    model = Model.load(ModelSettings(path=str(tiny_model), device="cpu"))
    if answer is None:  # there is no adapter, or one alone
        assert name == "centralized" or not hasattr(METHODS[name](), "same_rank")
        return
    method = METHODS[name](ranks=[4, 2, 1])
    if answer:
        method.check(model, 3, TrainingSettings())
    else:
        with pytest.raises(UserError, match="adapters of one rank"):
            method.check(model, 3, TrainingSettings())


def test_answers_are_of_the_options():
    def answer(name, **options):
        return ABILITIES[name].of(METHODS[options.pop("method")](**options))

    assert not answer("exact", method="flora", compress=True)
    assert not answer("exact", method="flora", upload_bits=8)
    assert not answer("exact", method="fedavg", up="top_k")
    assert answer("exact", method="fedavg")
    assert not answer("example_privacy", method="flora", scaling="adaptive")
    assert not answer("ranks", method="ffa_lora", server="adam")
    assert answer("ranks", method="ferret", over="lora") is False
    assert answer("secure", method="demo_sgd", gather=False)


def test_which_configurations_are_exact():
    """`check_method` compares each of them with the mean of its clients' models."""
    exact = {n for n in METHOD_OPTIONS if METHODS[n.split()[0]](**method_of(n)).is_exact}
    assert {"flora", "fedex_lora", "fedavg", "ffa_lora", "fed_sb"} <= exact
    assert not {"fedit", "zero_padding", "flexlora", "florist", "ferret"} & exact


class Cautious(FedAvg):
    """One's own, which says less of itself."""

    name: str = "cautious"
    summary: ClassVar[str] = "sums that are not only sums"
    reference: ClassVar[str] = ""

    @property
    def linear(self) -> bool:
        return False


class Demanding(FLoRA):
    """One's own, which has an option without a default."""

    name: str = "demanding"
    summary: ClassVar[str] = "needs to be told"
    reference: ClassVar[str] = ""

    needed: int = Field(ge=1)


def test_a_plugin_has_the_abilities_that_it_declares(monkeypatch, hedgerow):
    found = abilities(Cautious())
    assert (found["exact"], found["client_privacy"], found["secure"]) == (True, False, False)
    assert found["weights"] is False  # which follows, unless it says otherwise
    monkeypatch.setitem(METHODS._own, "cautious", Cautious)
    monkeypatch.setitem(METHODS._own, "demanding", Demanding)
    assert "cautious" in dict(with_defaults())
    assert "demanding" not in dict(with_defaults())
    assert "cautious" not in able(ABILITIES["secure"].of).split(", ")
    words = " ".join(hedgerow("methods", "cautious").out.split())
    assert "no, by default: DP of clients, correlated noise, secure sums, robust weights" in words
    assert "by default:" not in hedgerow("methods", "demanding").out


def test_the_command_line_says_what_a_method_allows(hedgerow):
    words = " ".join(hedgerow("methods", "flora").out.split())
    assert "yes, by default: exact aggregate, different ranks, DP of examples" in words
    assert "no, by default: DP of clients, correlated noise, secure sums" in words
    listed = {m["name"]: m["abilities"] for m in json.loads(hedgerow("methods", "--json").out)}
    one = json.loads(hedgerow("methods", "fedavg", "--json").out)["abilities"]
    assert one == listed["fedavg"]
    assert (one["secure sums"], one["different ranks"]) == (True, None)
