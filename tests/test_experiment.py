"""The experiment file: defaults, overrides, paths, and one sentence for every mistake."""

import pytest
import yaml

from hedgerow.errors import UserError
from hedgerow.experiment import Experiment, load, validate
from hedgerow.experiment.file import parse_yaml
from hedgerow.experiment.overrides import split_override


def test_a_dump_loads_to_the_same_experiment(experiment, tmp_path):
    loaded = load(experiment(method={"name": "flora", "ranks": [4, 2, 1], "alpha": "2r"}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "experiment.yaml").write_text(loaded.dump())
    assert load(tmp_path / "run" / "experiment.yaml") == loaded


def test_relative_paths_are_relative_to_the_file(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    loaded = load(experiment())
    assert loaded.data.clients == str(tmp_path / "client_{}.json")
    assert loaded.data.test == str(tmp_path / "test.json")


def test_overrides_win_and_their_paths_may_be_relative_to_here(experiment, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    (here / "other.json").write_text("[]")
    monkeypatch.chdir(here)
    path = experiment()
    loaded = load(path, ["training.steps=7", "data.test=other.json", "method.alpha=3r"])
    assert loaded.training.steps == 7
    assert loaded.training.learning_rate == 0.01
    assert loaded.data.test == str(here / "other.json")
    assert loaded.method.alpha == "3r"
    assert load(path, ["data.test=test.json"]).data.test == str(tmp_path / "test.json")


def test_an_override_replaces_what_its_key_held(experiment):
    assert load(experiment(), ["method={name: flora}"]).method.ranks == 16
    assert load(experiment(), ["method=fedavg"]).method.name == "fedavg"
    assert load(experiment(), ["method=fedit", "method.ranks=3"]).method.ranks == 3
    assert load(experiment(), ["method.name=fedavg"]).method.name == "fedavg"
    assert load(experiment(), ["method.name=zero_padding"]).method.ranks == [4, 2, 1]
    assert load(experiment(), ["method.ranks=3"]).method.alpha == "2r"
    with pytest.raises(UserError, match="`seed` is a value"):
        load(experiment(federation={"seed": 1}), ["federation.seed.x=3"])


def test_scientific_notation_without_a_dot_is_a_number(experiment):
    assert load(experiment(), ["training.learning_rate=1e-4"]).training.learning_rate == 1e-4


def test_a_hub_name_stays_a_name(experiment):
    loaded = load(experiment(), ["model.path=org/model-1b", "data.test=org/set"])
    assert loaded.model.path == "org/model-1b"
    assert loaded.data.test == "org/set"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.lerning_rate=1", "`training.lerning_rate` is not a known key, did you mean"),
        ("method.rank=4", "`method.rank` is not a known key, did you mean `ranks`"),
        ("method.name=floral", "there is no 'floral', did you mean `flora`"),
        ("training.steps=0", "`training.steps`: must be at least 1"),
        ("training.steps=few", "`training.steps`: must be a whole number, not 'few'"),
        ("training.epochs=1", "`training`: give `steps` or `epochs`, not both"),
        ("method.alpha=r2", "`method.alpha`: must be a number, or a multiple of the rank"),
        ("method.ranks=[4, 0, 1]", "`method.ranks.1`"),
        ("data.source=x.csv", "`data`: give either `clients`"),
        ("federation.rounds=-1", "`federation.rounds`"),
        ("evaluation.metrics=[los]", r"`evaluation.metrics.0`"),
        ("data.clients={a b: x.json}", "client name 'a b'"),
        ("nonsense", "is not an override"),
        ("training.steps=[", "is not valid YAML"),
    ],
)
def test_a_mistake_is_named(experiment, override, says):
    with pytest.raises(UserError, match=says) as caught:
        load(experiment(), [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("partition", "says"),
    [
        ({"kind": "iid"}, "needs `clients`"),
        ({"kind": "dirichlet", "clients": 3}, "needs `column`"),
        ({"kind": "column", "column": "c", "clients": 3}, "leave it out"),
    ],
)
def test_an_incomplete_partition_is_named(partition, says):
    content = {"model": {"path": "m"}, "method": "flora"}
    content["data"] = {"source": "x.csv", "partition": partition}
    with pytest.raises(UserError, match=says):
        validate(content, "file", Experiment)


def test_a_name_that_stands_twice_is_a_mistake():
    with pytest.raises(UserError, match="'a' stands twice"):
        parse_yaml("data: {clients: {a: x.json, a: y.json}}", "file")


@pytest.mark.parametrize(
    "text", ["- a\n- b", "just text", "a: [", "a: !!python/object:os.system {}"]
)
def test_a_file_that_is_no_experiment_is_refused(text):
    with pytest.raises(UserError):
        parse_yaml(text, "file")


def test_an_override_is_split_at_the_first_equals():
    assert split_override("data.prompt=a=b") == (["data", "prompt"], "a=b")


def test_every_default_is_written_out(experiment):
    content = yaml.safe_load(load(experiment()).dump())
    assert content["training"]["optimizer"] == "adamw"
    assert content["method"]["targets"] == "all-linear"
