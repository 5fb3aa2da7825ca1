"""The files under experiments/, and what a file may say beside its experiment."""

import json
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.runs import rows_of

from hedgerow.bundled import MODEL, tasks
from hedgerow.comparison import plan
from hedgerow.data.sources import read
from hedgerow.errors import UserError
from hedgerow.experiment import load, load_comparison, without_folders

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
PAPERS = sorted([*EXPERIMENTS.glob("flora/*.yaml"), *EXPERIMENTS.glob("ferret/*.yaml")])
BENCHMARKS = [
    *sorted(EXPERIMENTS.glob("flowertune/*.yaml")),
    *sorted(EXPERIMENTS.glob("fedllm_bench/*.yaml")),
]
BESIDE = sorted(EXPERIMENTS.glob("*.yaml"))

SMALL = {"steps": 1, "batch_size": 4}
ON_THE_DEMO = {
    "model": {"path": "demo"},
    "data": {
        "source": "demo",
        "test": "demo",
        "test_share": 0.05,
        "partition": {"kind": "column", "column": "kind"},
        "prompt": "plain",
        "max_length": 96,
    },
    "training": SMALL,
    "federation": {"rounds": 1, "clients_per_round": 2},
}


def cells(path, smoke=False):
    given = load_comparison(path, smoke=smoke)
    experiment = partial(load, path, smoke=smoke)
    return plan(experiment, [], given.methods, given.sweep, given.seeds, Path("out"))


def write(tmp_path, **content):
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump({**ON_THE_DEMO, **content}, sort_keys=False))
    return path


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_each_file_of_a_paper_is_a_comparison_and_has_a_smoke_variant(path):
    experiment = load(path)
    assert experiment.about
    assert "arXiv 24" in experiment.about
    assert len(cells(path)) > 1
    # A name on the Hub is no path of this machine.
    assert not Path(experiment.model.path).is_absolute()
    assert not Path(experiment.data.source).is_absolute()
    # Where the main branch has pickled weights alone, which are refused.
    for cell in cells(path):
        pickled = cell.experiment.model.path.startswith(("datajuicer/", "openlm-research/"))
        assert cell.experiment.model.revision == ("refs/pr/1" if pickled else None)
    small = cells(path, smoke=True)
    assert len(small) > 1
    assert {cell.experiment.model.path for cell in small} == {"demo"}
    assert {cell.experiment.data.source for cell in small} == {"demo"}
    kinds = {cell.experiment.data.partition.kind for cell in small}
    assert kinds == {experiment.data.partition.kind}
    names = {cell.experiment.method.name for cell in small}
    assert names == {cell.experiment.method.name for cell in cells(path)}
    assert all(cell.experiment.federation.rounds <= 5 for cell in small)


def test_there_are_files_for_both_papers_and_both_benchmarks():
    assert len(PAPERS) >= 20
    assert len(BENCHMARKS) == 9
    readme = (EXPERIMENTS / "README.md").read_text()
    for path in [*PAPERS, *BENCHMARKS, *BESIDE]:
        assert f"{path.relative_to(EXPERIMENTS)}" in readme


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_each_file_of_a_benchmark_is_a_comparison_and_has_a_smoke_variant(path):
    whole, small = cells(path), cells(path, smoke=True)
    assert [cell.experiment.method.name for cell in small] == [
        cell.experiment.method.name for cell in whole
    ]
    assert len(small) > 1
    for cell in small:
        assert (cell.experiment.model.path, cell.experiment.data.source) == ("demo", "demo")
        assert cell.experiment.federation.rounds <= 2
        assert cell.experiment.objective == whole[0].experiment.objective
    experiment = whole[0].experiment
    assert experiment.about
    assert small[0].experiment.data.partition.kind == experiment.data.partition.kind
    # The baseline of either benchmark: LoRA whose factors are averaged, of some clients a round.
    assert experiment.method.name == "fedit"
    assert experiment.federation.clients_per_round in (2, 3, 4, 5, 10)


def test_the_leaderboards_tracks_are_as_its_project_has_them():
    clients = {"general_nlp": 20, "finance": 50, "medical": 20, "code": 10}
    for name, count in clients.items():
        it = load(EXPERIMENTS / "flowertune" / f"{name}.yaml")
        assert (it.model.path, it.data.partition.clients) == ("mistralai/Mistral-7B-v0.3", count)
        share = 0.2 if name == "code" else 0.1
        assert it.federation.clients_per_round == count * share
        assert (it.federation.rounds, it.method.ranks, it.method.alpha) == (200, 32, "2r")
        assert Path(it.data.prompt).read_text().endswith("### Response: ")


@pytest.mark.parametrize("path", BESIDE, ids=lambda path: path.stem)
def test_files_for_data_beside_the_repository_are_comparisons(path):
    assert load(path).about
    assert len(cells(path)) > 1


def test_the_smoke_variant_of_preferences_prefers_too():
    path = EXPERIMENTS / "preferences.yaml"
    whole, small = (load(path, smoke=smoke) for smoke in (False, True))
    assert small.objective == whole.objective
    assert small.objective.name == "dpo"
    assert small.data.partition is not None


# --- compare, smoke and about -----------------------------------------------------------------


def test_a_file_may_be_a_whole_comparison(hedgerow, tmp_path):
    path = write(
        tmp_path,
        about="A trial.",
        compare={
            "methods": ["ferret over=lora ranks=2 budget=4000", "fedavg training.steps=2"],
            "sweep": {"training.learning_rate": [1e-3, "2e-3", 0.003]},
            "seeds": 2,
            "target": 3.5,
        },
        smoke={"compare.sweep": {}, "compare.seeds": 1, "training.batch_size": 2},
    )
    assert len(cells(path)) == 12
    assert {cell.sweep["training.learning_rate"] for cell in cells(path)} == {
        "0.001",
        "2e-3",
        "0.003",
    }
    assert [cell.experiment.training.steps for cell in cells(path, smoke=True)] == [1, 2]
    out = tmp_path / "out"
    result = hedgerow("compare", path, "--smoke", "--out", out)
    assert result.code == 0, result.err
    table = json.loads((out / "comparison.json").read_text())
    assert [row["method"] for row in table] == [
        "ferret over=lora ranks=2 budget=4000",
        "fedavg training.steps=2",
    ]
    assert {row["target"] for row in table} == {3.5}
    for run in (out / "runs").iterdir():
        resolved = yaml.safe_load((run / "experiment.yaml").read_text())
        assert resolved["about"] == "A trial."
        assert resolved["training"]["batch_size"] == 2
        assert not {"compare", "smoke"} & set(resolved)
    # Options on the command line win over the file, and overrides over its smoke variant.
    more = ["--methods", "fedavg", "--seeds", "2", "--target", "4", "training.batch_size=3"]
    other = tmp_path / "other"
    result = hedgerow("compare", path, "--smoke", *more, "--out", other)
    assert result.code == 0, result.err
    runs = sorted((other / "runs").iterdir())
    assert [run.name for run in runs] == ["fedavg,seed=0", "fedavg,seed=1"]
    assert load(runs[0] / "experiment.yaml").training.batch_size == 3


def test_a_run_of_a_file_without_a_method_is_of_the_first_that_it_compares(tmp_path):
    methods = ["flora ranks=3 training.steps=4", "fedit"]
    path = write(tmp_path, compare={"methods": methods})
    assert (load(path).method.name, load(path).method.ranks) == ("flora", 3)
    assert load(path).training.steps == 4
    assert load(path, ["method.name=fedit"]).method.ranks == 16
    # The first one's options are not the second one's.
    assert [cell.experiment.method.ranks for cell in cells(path)] == [3, 16]
    assert [cell.experiment.training.steps for cell in cells(path)] == [4, 1]
    assert load(write(tmp_path, method="fedavg", compare={"methods": methods})).method.name == (
        "fedavg"
    )


def test_about_may_change_when_a_run_goes_on(hedgerow, tmp_path):
    path = write(tmp_path, about="One.", method="fedavg")
    assert hedgerow("run", path, "--out", tmp_path / "run").code == 0
    path = write(tmp_path, about="Two.", method="fedavg")
    changed = ["federation.rounds=2", "--resume", "--out", tmp_path / "run"]
    result = hedgerow("run", path, *changed)
    assert result.code == 0, result.err
    assert load(tmp_path / "run" / "experiment.yaml").about == "Two."
    assert len(rows_of(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("content", "arguments", "sentence"),
    [
        ({"compare": {"method": ["flora"]}}, [], "`compare.method` is not a known key, did you"),
        ({"compare": {"methods": "flora"}}, [], "`compare.methods`"),
        ({"compare": {"methods": ["flroa"]}}, [], "there is no 'flroa', did you mean `flora`"),
        ({"compare": {"methods": ["flora name=fedit"]}}, [], "give one name"),
        ({"compare": {"methods": ["flora"], "seeds": 0}}, [], "`compare.seeds`"),
        ({"compare": {"methods": ["flora"], "sweep": {"training.steps": 3}}}, [], "needs a list"),
        ({"compare": {"methods": ["flora"], "sweep": {"training.step": [3]}}}, [], "training.step"),
        (
            {"compare": {"methods": ["flora"], "sweep": {"federation.seed": [3]}}},
            [],
            "give --seeds instead",
        ),
        (
            {"compare": {"methods": ["flora ranks=2"], "sweep": {"method.ranks": [3]}}},
            [],
            "sets method.ranks: leave that out",
        ),
        ({"compare": {"methods": ["flora federation.seed=3"]}}, [], "give --seeds instead"),
        (
            {"compare": {"methods": ["flora"], "sweep": {"training.steps": [1, 2]}}},
            ["training.steps=3"],
            "training.steps is set and swept",
        ),
        ({"compare": {"methods": ["flora training.stepz=3"]}}, [], "training.stepz"),
        ({"method": "flora"}, [], "name at least one method"),
        ({"compare": None, "method": "flora"}, [], "`compare`"),
        ({"compare": {"methods": ["flora"]}}, ["--smoke"], "has no `smoke`"),
        ({"compare": {"methods": ["flora"]}, "smoke": [1]}, ["--smoke"], "`smoke` must hold pairs"),
        ({"compare": {"methods": ["flora"]}, "smoke": {"a..b": 1}}, ["--smoke"], "is no key"),
        (
            {"compare": {"methods": ["flora"]}, "smoke": {"training.stepz": 1}},
            ["--smoke"],
            "`training.stepz` is not a known key",
        ),
        ({"compare": {"methods": ["flora"]}, "abuot": "x"}, [], "`abuot` is not a known key"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(hedgerow, tmp_path, content, arguments, sentence):
    path = write(tmp_path, **content)
    result = hedgerow("compare", path, *arguments, "--out", tmp_path / "out")
    assert result.code == 2
    assert sentence in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_smoke_variant_has_none(hedgerow, tmp_path):
    path = write(tmp_path, method="flora")
    result = hedgerow("run", path, "--smoke", "--out", tmp_path / "out")
    assert result.code == 2
    assert "has no `smoke`" in result.err


# --- what is built in -------------------------------------------------------------------------


def test_the_demo_is_built_in_wherever_a_run_goes_on(hedgerow, tmp_path, monkeypatch):
    """Its name, and no path, is in the run; exports, scores and going on find it by that."""
    path = write(tmp_path, method={"name": "flora", "ranks": 2})
    run = tmp_path / "run"
    assert hedgerow("run", path, "--out", run).code == 0
    resolved = load(run / "experiment.yaml")
    names = (resolved.model.path, resolved.data.source, resolved.data.test)
    assert names == ("demo", "demo", "demo")
    assert str(MODEL) not in (run / "experiment.yaml").read_text()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    more = ["federation.rounds=2", "--resume", "--out", run]
    assert hedgerow("run", path, *more).code == 0
    shown = hedgerow("ledger", "show", run)
    assert "base demo: LlamaForCausalLM" in shown.out
    loss = rows_of(run)[-1]["eval_loss"]
    packed, adapter, merged = (elsewhere / name for name in ("packed", "adapter", "merged"))
    for out, kind in ((packed, "ledger"), (adapter, "adapter"), (merged, "merged")):
        result = hedgerow("export", run, out, "--to", kind)
        assert result.code == 0, result.err
    test = ["--data", "demo", "data.prompt=plain", "data.max_length=96", "data.test_share=0.05"]
    for target in (run, packed, adapter, merged):
        result = hedgerow("evaluate", target, *test, "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out)["eval_loss"] == pytest.approx(loss, rel=1e-4)


def test_a_folder_called_demo_beside_the_file_wins(tmp_path, tiny_model):
    path = write(tmp_path, method="fedavg")
    assert load(path).model.path == "demo"
    (tmp_path / "demo").symlink_to(tiny_model)
    assert load(path).model.path == str(tmp_path / "demo")


def test_the_demo_has_two_splits():
    train, test = read("demo", "train"), read("demo", "test")
    assert (len(train), len(test)) == (1000, 200)
    for records in (train, test):
        assert {row["kind"] for row in records.rows} == set(tasks.KINDS)
    with pytest.raises(UserError, match="demo: has no split 'dev': give train or test"):
        read("demo", "dev")


def test_a_name_on_the_hub_stays_whole_where_folders_are_left_out(tmp_path):
    content = ON_THE_DEMO["data"] | {"source": "org/set", "test": str(tmp_path / "test.json")}
    data = without_folders(load(write(tmp_path, method="fedavg", data=content))).data
    assert (data.source, data.test) == ("org/set", "test.json")


# --- datasets as the Hub has them -------------------------------------------------------------


@pytest.fixture
def mmlu(tmp_path, monkeypatch):
    """A folder in the form of cais/mmlu: subsets, splits, columns."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "mmlu"
    configs = []
    for subset, count in (("all", 12), ("law", 3)):
        rows = [
            {
                "question": f"What is {i} and {i}?",
                "subject": "law" if i % 2 else "art",
                "choices": [str(2 * i), "none", "all", "both"],
                "answer": i % 4,
            }
            for i in range(count)
        ]
        (folder / subset).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / subset / "test-00000-of-00001.parquet")
        files = [{"split": "test", "path": f"{subset}/test-*"}]
        configs.append({"config_name": subset, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return folder


def test_a_subset_of_a_dataset_is_named(mmlu, tmp_path):
    assert len(read(str(mmlu), "test", "all")) == 12
    assert len(read(str(mmlu), "test", "law")) == 3
    with pytest.raises(UserError, match=r"'all', 'law'.*`data.subset`") as caught:
        read(str(mmlu), "test")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="of the subset 'art' cannot be loaded"):
        read(str(mmlu), "test", "art")


def test_a_share_of_the_rows_is_the_same_every_time(mmlu, tmp_path):
    """And the same rows of a file as of a dataset, in their order."""
    rows = read(str(mmlu), "test", "all").rows
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    half = read(str(mmlu), "test", "all", share=0.5).rows
    assert half == read(str(file), "test", share=0.5).rows
    assert len(half) == 6
    assert half == [row for row in rows if row in half]
    assert len(read(str(file), "test", share=1e-9)) == 1


def test_mmlu_as_on_the_hub_is_scored_beside_other_training_data(hedgerow, mmlu, tmp_path):
    data = ON_THE_DEMO["data"] | {
        "test": str(mmlu),
        "test_subset": "all",
        "test_split": "test[50%:]",
        "test_share": 1.0,
        "test_fields": {"instruction": "question", "input": None, "output": "answer"},
    }
    evaluation = {"metrics": ["multiple_choice"], "by": "subject"}
    path = write(tmp_path, method="fedavg", data=data, evaluation=evaluation)
    result = hedgerow("run", path, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    last = rows_of(tmp_path / "run")[-1]
    assert last["accuracy_chance"] == 25
    assert set(last["accuracy_by"]) == {"art", "law"}
    # Of other data than the run's own, all rows count, and their columns are those of `fields`.
    asked = ["--data", "demo", "--metrics", "loss", "--by", "kind", "--json"]
    result = hedgerow("evaluate", tmp_path / "run", *asked)
    assert result.code == 0, result.err
    assert json.loads(result.out)["rows"] == 200
