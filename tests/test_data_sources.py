import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hedgerow.data import sources
from hedgerow.data.rows import check
from hedgerow.data.sources import client_files, read
from hedgerow.errors import UserError
from hedgerow.settings import Fields

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROWS = [{"instruction": "Add, please", "output": "5"}, {"instruction": "“Hi”\n", "output": ""}]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        "\n " + json.dumps(ROWS, indent=2),
        "\ufeff" + json.dumps(ROWS),
        "\n".join(map(json.dumps, ROWS)),
        "\n".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    ],
    ids=["array", "indented array", "byte order mark", "lines", "lines and blank lines"],
)
def test_json_is_told_by_its_content(tmp_path, suffix, text):
    assert read(write(tmp_path / f"rows{suffix}", text), "train").rows == ROWS


def test_csv_and_parquet(tmp_path):
    long = "word " * 40_000
    text = f'instruction,output\n"Add, please",5\n"“Hi”\n",\nlong,{long}\n'
    rows = [*ROWS, {"instruction": "long", "output": long}]
    assert read(write(tmp_path / "rows.csv", text), "train").rows == rows
    folder = tmp_path / "year=2024"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    assert read(str(folder / "rows.parquet"), "train").rows == rows


def test_not_a_number_is_no_value(tmp_path):
    assert read(write(tmp_path / "rows.json", '[{"input": NaN}]'), "train").rows == [
        {"input": None}
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.json", '[{"a": 1},\n {"a": }]', "line 2 is not valid JSON"),
        ("rows.jsonl", '{"a": 1}\n\n{"a"\n', "line 3 is not valid JSON"),
        ("rows.json", '[{"a": 1}, "text"]', "item 2 is not an object"),
        ("rows.jsonl", '{"a": 1}\n7\n', "line 2 is not an object"),
        ("rows.csv", "a,b\n1,2\n1,2,3\n", "line 3 has 3 cells where the header has 2"),
        ("rows.csv", "a,a\n1,2\n", "2 columns have one name, 'a'"),
        ("rows.csv", 'a,b\n1,"2\n', "not valid CSV"),
        ("rows.csv", "a;b\n1;2\n", "its header is one column, 'a;b': .* commas, not by ';'"),
        ("rows.jsonl", '{"a": 1, "a": 2}', "the name 'a' stands twice"),
        ("rows.jsonl", '{"a": ' + "9" * 5000 + "}", "a number has thousands of digits"),
        ("rows.jsonl", '{"a": ' + "[" * 100_000, "nested too deeply"),
        ("rows.json", '{"data": [{"a": 1}, {"a": 2}]}', "one object around the rows.*'data'"),
        ("rows.json", '{"a": ["1", "2"], "b": ["3", "4"]}', "one object of columns"),
        ("rows.json", '{"a": {"0": "1"}, "b": {"0": "2"}}', "one object of columns"),
        ("rows.jsonl.gz", '{"a": 1}', "cannot be read .*Not a gzipped file"),
        ("rows.jsonl.xz", '{"a": 1}', "cannot be read"),
        ("rows.jsonl.bz2", '{"a": 1}', "cannot be read"),
        ("rows.jsonl.zst", '{"a": 1}', "cannot be read"),
        ("rows.parquet.gz", "nothing", r"files ending in '\.gz' are not known"),
        ("rows.xlsx", "nothing", "not known: save the sheet as CSV"),
        ("rows.parquet", "nothing", "not a valid Parquet file"),
        ("rows.txt", "nothing", r"files ending in '\.txt' are not known"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    with pytest.raises(UserError, match=f"{name}: .*{message}"):
        read(write(tmp_path / name, text), "train")


def test_packed_files(tmp_path):
    text = "\n".join(map(json.dumps, ROWS)).encode()
    packers = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
    }
    for suffix, pack in packers.items():
        path = tmp_path / f"rows.jsonl.{suffix}"
        path.write_bytes(pack(text))
        assert read(str(path), "train").rows == ROWS
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(text)[:-9])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: cannot be read"):
        read(str(path), "train")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="is no file"):
        read(str(tmp_path / "rows.jsonl"), "train")
    with pytest.raises(UserError, match="File name too long"):
        read(str(tmp_path / ("x" * 300 + ".jsonl")), "train")


def test_missing_and_unreadable(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: does not exist"):
        read("gone.json", "train")
    with pytest.raises(UserError, match="does not exist"):
        read("/nowhere/at/all", "train")
    with pytest.raises(UserError, match="holds no data file that is known"):
        read(str(tmp_path), "train")
    (tmp_path / "latin.csv").write_bytes("a\né".encode("latin-1"))
    with pytest.raises(UserError, match="not text in UTF-8"):
        read(str(tmp_path / "latin.csv"), "train")


def test_hub(monkeypatch):
    import datasets

    hub = {"someone/rows": datasets.Dataset.from_list(ROWS)}

    def load_dataset(name, subset, split):
        if name == "someone/large":
            raise OSError("Not enough disk space. Needed: 3 TiB (download: 1 TiB)")
        if name == "someone/packed":
            raise ImportError("Please pip install zstandard")
        if name == "someone/offline":
            raise ConnectionError("no network")
        if name not in hub:
            raise datasets.exceptions.DatasetNotFoundError("no")
        if split != "train":
            raise ValueError("Unknown split \"dev\".\nShould be one of ['train'].")
        return hub[name]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("someone/rows", "train").rows == ROWS
    with pytest.raises(UserError, match=r"someone/rows: the split 'dev' .*one of \['train'\]"):
        read("someone/rows", "dev")
    with pytest.raises(UserError, match="someone/else: is neither a file nor a dataset"):
        read("someone/else", "train")
    with pytest.raises(UserError, match="cannot be reached"):
        read("someone/offline", "train")
    with pytest.raises(UserError, match=r"someone/large: does not fit on the disk: .*`data\.rows`"):
        read("someone/large", "train")
    with pytest.raises(UserError, match=r"someone/packed: .*a package that is not installed \(Ple"):
        read("someone/packed", "train")


def numbered(count):
    return [{"instruction": f"{n}?", "output": f"{n}"} for n in range(count)]


def test_a_dataset_is_streamed_up_to_the_rows_that_are_asked_for(tmp_path, monkeypatch):
    import datasets

    folder, cache = tmp_path / "rows", tmp_path / "cache"
    folder.mkdir()
    for shard in range(3):
        write(folder / f"train-{shard}.jsonl", "\n".join(map(json.dumps, numbered(9))))
    (folder / "train-3.jsonl").write_text("no JSON")  # which nobody gets to
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    records = read(str(folder), "train", first=11)
    assert records.rows == [*numbered(9), *numbered(2)]
    assert list(records.numbers) == list(range(1, 12))
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} <= {".lock"}
    half = read(str(folder), "train", share=0.5, first=8)
    assert len(half) == 4
    assert max(half.numbers) <= 8
    with pytest.raises(UserError, match=r"rows: the split 'train' cannot be loaded"):
        read(str(folder), "train", first=28)
    datasets.Dataset.from_list(numbered(4)).save_to_disk(tmp_path / "saved")
    assert read(str(tmp_path / "saved"), "train", first=3).rows == numbered(3)
    assert read(str(tmp_path / "saved"), "train", first=5).rows == numbered(4)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson.zst", "a.csv", "a.parquet"])
def test_the_first_rows_of_a_file(tmp_path, name):
    text = "\n\n".join(map(json.dumps, numbered(1500)))
    path = tmp_path / name
    if name == "a.json":
        write(path, json.dumps(numbered(1500)))
    elif name == "a.csv":
        lines = ("{instruction},{output}".format(**row) for row in numbered(1500))
        write(path, "\n\n".join(["instruction,output", *lines]))
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(numbered(1500)), path)
    elif name.endswith("zst"):
        path.write_bytes(pa.Codec("zstd").compress(text.encode(), asbytes=True))
    else:
        write(path, text)
    for first in (1, 1023, 1024, 1025, 2000, None):
        assert read(str(path), "train", first=first).rows == numbered(1500)[:first]


def test_what_is_packed_beyond_all_measure_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LARGEST", 100_000)
    packed = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
    }
    blank = json.dumps(ROWS[0]).encode() + b"\n" * 10_000_000
    for suffix, pack in packed.items():
        path = tmp_path / f"rows.jsonl.{suffix}"
        path.write_bytes(pack(blank))
        with pytest.raises(UserError, match=rf"rows\.jsonl\.{suffix}: holds more than .* times"):
            read(str(path), "train")
        path.write_bytes(pack(blank[:50_000]))
        assert read(str(path), "train").rows == ROWS[:1]
    repeated = pa.table({"instruction": pa.array(["x" * 10_000] * 3_000)})
    pq.write_table(repeated, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet: holds more than .* times its size"):
        read(str(tmp_path / "rows.parquet"), "train")


def test_client_files(tmp_path):
    for name in ["train_0.json", "train_1.json", "ward b.json"]:
        write(tmp_path / name, "[]")
    first, second = str(tmp_path / "train_0.json"), str(tmp_path / "train_1.json")
    assert client_files(str(tmp_path / "train_{}.json")) == {
        "client-000": [Path(first)],
        "client-001": [Path(second)],
    }
    assert client_files({"a": first, "b": [second, first]}) == {
        "a": [Path(first)],
        "b": [Path(second), Path(first)],
    }
    for own in (second, [first, second]):
        assert client_files([first, SimpleNamespace(name="b", file=own)]) == {
            "train_0": [Path(first)],
            "b": list(map(Path, [own] if own == second else own)),
        }

    for clients, message in [
        (str(tmp_path / "none_{}.json"), r"none_0\.json does not exist"),
        (first, r"train_0\.json has no \{\}"),
        ([], "names no client"),
        ([first, first], "two clients are called 'train_0'"),
        ([str(tmp_path / "ward b.json")], "'ward b' cannot be a client's name"),
        ({"../up": first}, r"'\.\./up' cannot be a client's name"),
        ({"a": first, "b": "gone.json"}, r"gone\.json, the file of client 'b', does not exist"),
        ({"a": [first, "gone.json"]}, r"gone\.json, a file of client 'a', does not exist"),
        ({"a": [first, first]}, r"train_0\.json stands twice for 'a'"),
    ]:
        with pytest.raises(UserError, match=message):
            client_files(clients)


def test_a_gap_in_the_numbers_drops_nobody_silently(tmp_path):
    for number in (0, 1, 3):
        write(tmp_path / f"train_{number}.json", "[]")
    with pytest.raises(UserError, match=r"train_2\.json does not exist, but .*train_3\.json does"):
        client_files(str(tmp_path / "train_{}.json"))


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_shared_files():
    mmlu = read(os.fspath(SHARED / "mmlu" / "mmlu_test_1444.jsonl"), "test")
    assert len(mmlu) == 1444
    assert len(check(mmlu, Fields())) == 1444
    dolly = client_files(os.fspath(SHARED / "dolly" / "local_training_{}.json"))
    assert list(dolly) == [f"client-{number:03d}" for number in range(10)]
    rows = read(os.fspath(dolly["client-003"][0]), "train")
    fields = Fields(instruction="instruction", input="context", output="response")
    assert len(check(rows, fields)) == 1492
