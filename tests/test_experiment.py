"""The experiment file: defaults, overrides, paths, and one sentence for every mistake."""

import pytest
import yaml

from hedgerow.errors import UserError
from hedgerow.experiment import Experiment, load, validate
from hedgerow.experiment.file import load_comparison, parse_yaml
from hedgerow.experiment.overrides import split_override
from hedgerow.methods import FLoRA


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


@pytest.mark.parametrize("word", [True, False, None])
def test_an_override_reaches_into_a_section_that_is_given_by_a_word(experiment, word):
    path = experiment(federation={"secure": word})

    def secure(*overrides):
        return load(path, ["method=fedavg", *overrides]).federation.secure

    assert (secure() is not None) == bool(word)
    after = secure("federation.secure.masks=false")
    assert (after.masks, after.bits) == (False, 32)
    both = ["federation.secure=true", "federation.secure.bits=16"]
    assert secure(*both).bits == 16
    assert secure(*both, "federation.secure=false") is None


@pytest.mark.parametrize("key", ["method.ranks", "evaluation", "federation.says"])
def test_a_word_where_there_is_no_such_section_stays_a_mistake(experiment, key):
    with pytest.raises(UserError, match=f"`{key.split('.')[-1]}` is a value, it has no keys"):
        load(experiment(), [f"{key}=true", f"{key}.x=3"])


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
        ("method.use_dora=true", "`method.use_dora` is not a known key: DoRA divides a weight by"),
        ("method.modules_to_save=[lm_head]", "nothing is trained beside adapters; take `fedavg`"),
        ("model.device_map=auto", "a model is on one device, which `device` names"),
        ("model.load_in_4bit=true", "not a known key: give `quantization: nf4`; see `hedgerow ex"),
        ("training.lr=1", "`training.lr` is not a known key: give `learning_rate`; see"),
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
        ("data.clients={true: x.json}", "client name true is a boolean in YAML.*in quotes"),
        ("data.clients={1: x.json}", "client name 1 is a number in YAML.*in quotes"),
        ("data.clients={null: x.json}", "client name null is no value in YAML.*in quotes"),
        ("data.clients=[{name: 1, file: x.json}]", "client name 1 is a number in YAML"),
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


PLAIN = {
    "training.steps=1:30": "`training.steps`: must be a whole number, not '1:30'",
    "training.steps=yes": "`training.steps`: must be a whole number, not 'yes'",
    "training.steps=true": "`training.steps`: must be a number, not true",
    "training.steps=[1]": "`training.steps`: must be a whole number, not [1]",
    "training.steps={a: 1}": """`training.steps`: must be a whole number, not {"a": 1}""",
    "training.steps=2020-01-01": "must be a whole number, not '2020-01-01'",
    "training.learning_rate=null": "`training.learning_rate`: must be a number, not null",
    "training.learning_rate=on": "`training.learning_rate`: must be a number, not 'on'",
    "training=null": "`training`: must be a mapping, not null",
    "training.optimizer={name: adamw, betas: 0.9}": "betas`: must be a list, not 0.9",
    "training.optimizer={name: adamw, amsgrad: 3}": "must be true or false, not 3",
    "training.optimizer={name: adamw, 5: 6}": "a name must be a text: write it in quotes, as '5'",
    "method={name: flora, 5: 6}": "`method.5` is not a known key",
    "method.ranks=true": "`method.ranks`: must be a number, not true",
    "method.alpha=off": "a multiple of the rank such as 2r, not 'off'",
    "federation.deadline=10m": "`federation.deadline`: must be a number, not '10m'",
    "federation={rounds: 1, 5: 6}": "`federation.5`: must have a text as its name",
    "about=[" + "9" * 5000 + "]": "a number has more than 100 characters",
    "about=[0x" + "f" * 5000 + "]": "a number has more than 100 characters",
    "about=" + "[" * 5000: "nested more than 50 levels deep",
    "about=!!int 'abc'": "what stands there is no int, as its tag says",
    "about=!!timestamp 2001-13-45": "the tag tag:yaml.org,2002:timestamp is not known",
    "about=&a [*a]": "*a stands in what it names",
    ".".join("a" * 1000) + "=1": "is not an override",
    "training={steps: 2": "line 1, column 10: a { is not closed",
}


@pytest.mark.parametrize("change", PLAIN, ids=lambda change: change[:40])
def test_a_mistake_is_told_in_plain_words(experiment, change):
    with pytest.raises(UserError) as told:
        load(experiment(), [change])
    assert PLAIN[change] in str(told.value)
    for word in ("nput should", "valid", "string", "tuple", "type"):
        assert word not in str(told.value).replace("is not valid YAML", "")


YAML = {
    "training: {steps: 010}": ("training", "steps", 10),
    "training: {steps: 1_000}": ("training", "steps", 1000),
    "training: {steps: 0x10}": ("training", "steps", 16),
    "training: {steps: 1e1}": ("training", "steps", 10),
    "training: {learning_rate: 1e-3}": ("training", "learning_rate", 0.001),
    "training: {learning_rate: 1E+0}": ("training", "learning_rate", 1.0),
    "method: {name: flora, alpha: 1e1}": ("method", "alpha", 10.0),
    "federation: {keep_updates: yes}": ("federation", "keep_updates", True),
    "federation: {keep_updates: off}": ("federation", "keep_updates", False),
    "tracking: {name: no}": ("tracking", "name", "no"),
    "tracking: {name: 2026-01-01}": ("tracking", "name", "2026-01-01"),
    "tracking: {name: 12:30}": ("tracking", "name", "12:30"),
    "tracking: {<<: {name: merged}}": ("tracking", "name", "merged"),
}


@pytest.mark.parametrize("text", YAML)
def test_scalars_are_what_they_look_like_and_survive_a_resolved_experiment(
    experiment, tmp_path, text
):
    path, (section, key, value) = experiment(), YAML[text]
    content = yaml.safe_load(path.read_text())
    content.pop(section, None)
    path.write_text(f"{yaml.safe_dump(content)}{text}\n")
    found = load(path)
    assert getattr(getattr(found, section), key) == value
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(found.dump())
    assert load(resolved) == found


@pytest.mark.parametrize(
    "name", ["on", "no", "1e5", "012", "1:30", "null", "~", "1.0", "2020-01-01"]
)
def test_a_text_is_quoted_where_a_reader_of_yaml_might_take_it_for_more(experiment, tmp_path, name):
    found = load(experiment(), [f"tracking.name='{name}'"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(found.dump())
    assert load(resolved).tracking.name == name
    assert yaml.safe_load(found.dump())["tracking"]["name"] == name


BROKEN = {
    "": "is empty",
    "# a comment": "is empty",
    "a:\n\tb: 1": "line 2, column 1: a tab stands where only spaces may",
    "a: b: c": "line 1, column 5: a colon stands where none may",
    "a: 1\na: 2": "line 2, column 1: the name 'a' stands twice",
    "a: 1\n---\nb: 2": "line 2, column 1: a second document begins",
    "a: *b": "line 1, column 4: found undefined alias 'b'",
    "? [1, 2]\n: 3": "line 1, column 3: a key must be a text or a number",
    "a: !foo x": "the tag !foo is not known",
    'a: "x': "a quote that was opened is not closed",
    "a:\n  b: 1\n c: 2": "line 3, column 2: a key is indented otherwise",
    "a: \x07": "character 4 cannot be shown",
    "? {a: 1}\n: 3": "line 1, column 3: a key must be a text or a number",
    "? !!timestamp 2001-01-01\n: 3": "line 1, column 3: the tag tag:yaml.org,2002:timestamp",
    "a: &b 1\nc: &b 2": "an anchor (&) of that name stands above",
    "a: !!bool abc": "line 1, column 4: what stands there is no bool, as its tag says",
    "a: !!float ''": "line 1, column 4: what stands there is no float, as its tag says",
    "a: !!null 1": "line 1, column 4: what stands there is no null, as its tag says",
    "a: !!int [1]": "line 1, column 4: a text or a number must stand there",
    "a: !!map b": "line 1, column 4: a mapping must stand there",
    "a: !!set {b, c}": "the tag tag:yaml.org,2002:set is not known: leave it out",
    "a: !!binary '%'": "the tag tag:yaml.org,2002:binary is not known: leave it out",
    'a: "\\uD800"': "line 1, column 4: a text has half of a character",
    'a: "\\U00110000"': "line 1, column 7: there is no character of the number that is escaped",
    'a: "\\UFFFFFFFF"': "line 1, column 7: there is no character of the number that is escaped",
    "#" + "x" * 10_000_000: "it has 10,000,001 characters, and may have 10,000,000",
    "compare: {sweep: {a: ["
    + "&a0 [1], "
    + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))
    + "]}}": "more than 200,000 values, with those of aliases",
    "a:\n- &a0 [1]\n"
    + "".join(f"- &a{i} [*a{i - 1}]\n" for i in range(1, 100)): "nested more than 50 levels deep",
    "compare: {sweep: {a: [" + "9" * 5000 + "]}}": "a number has more than 100 characters",
    "compare: {sweep: {a: [{? [1] : 2}]}}": "a key must be a text or a number",
}


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:40])
def test_what_is_no_yaml_is_told_with_its_place(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError) as told:
        load(tmp_path / "x.yaml")
    assert BROKEN[text] in str(told.value)
    assert "unicode string" not in str(told.value)
    with pytest.raises(UserError) as told:
        load_comparison(tmp_path / "x.yaml")
    assert BROKEN[text] in str(told.value)


def test_what_json_escapes_in_two_halves_is_one_character():
    assert parse_yaml('{"a": "\\ud83d\\ude00"}', "file") == {"a": "😀"}


def test_a_long_text_is_shown_in_part(experiment):
    with pytest.raises(UserError, match=r"`federation.rounds`: must be a whole number") as told:
        load(experiment(), [f"federation.rounds='{'x' * 5000}'"])
    assert len(str(told.value)) < 400


def test_keys_of_a_smoke_variant_that_lead_nowhere_are_named(experiment, tmp_path):
    path = experiment(smoke={".".join("a" * 1000): 1})
    with pytest.raises(UserError, match=r"`smoke`: 'a.a.*… is no key"):
        load(path, smoke=True)


def test_a_method_that_is_made_in_python_says_what_is_wrong_in_the_same_words():
    with pytest.raises(UserError, match=r"`method.rank` is not a known key, did you mean `ranks`"):
        FLoRA(rank=3)
    with pytest.raises(UserError, match=r"`method.ranks`: must be a whole number or a list"):
        FLoRA(ranks="x")
