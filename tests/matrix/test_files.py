"""Each file through run and evaluate, beside the rows that it should be read as."""

import json
import re
from typing import NamedTuple

import pytest

from .files import CLIENT_OF, FILES, Rows

SETTINGS = {
    "method": {"name": "fedavg"},
    "training": {"steps": 1, "batch_size": 4, "learning_rate": 0.01},
    "federation": {"rounds": 1},
}
TEXT = ["data.prompt=plain", "data.max_length=64"]


class Read(NamedTuple):
    """What a run and an evaluation make of data."""

    entry: str
    """Hash of the run's entry: the bytes of an update, which other texts would change."""
    losses: list[float]
    rows: int
    """Rows that were evaluated."""
    loss: float
    said: str = ""


class Refused(NamedTuple):
    """The sentences by which a run and an evaluation refuse data."""

    run: str
    evaluate: str


@pytest.fixture
def read(hedgerow, tiny_model, tmp_path):
    """Run on a file and evaluate it, by command line."""
    path = tmp_path / "experiment.yaml"
    path.write_text(json.dumps(SETTINGS | {"model": {"path": str(tiny_model)}}))

    def read(data, overrides):
        out = tmp_path / "run"
        where = [f"data.clients={json.dumps({'a': str(data)})}"]
        if overrides == CLIENT_OF:
            where = [f"data.source={json.dumps(str(data))}"]
        test = f"data.test={json.dumps(str(data))}"
        run = hedgerow("run", path, *TEXT, *where, test, *overrides, "--out", out)
        asked = [each for each in overrides if not each.startswith("data.partition")]
        evaluate = hedgerow("evaluate", tiny_model, *TEXT, *asked, "--data", data, "--json")
        for output in (run, evaluate):
            assert output.code in (0, 2), output.err
            assert "Traceback" not in output.err
        if run.code:
            assert not out.exists()
            return Refused(run.err, evaluate.err if evaluate.code else "")
        assert not evaluate.code, f"refused by evaluate alone: {evaluate.err}"
        index = json.loads((out / "ledger" / "ledger.json").read_text())
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        scores = json.loads(evaluate.out)
        return Read(
            entry=index["entries"][0]["sha256"],
            losses=[row["eval_loss"] for row in rows],
            rows=scores["rows"],
            loss=scores["eval_loss"],
            said=f"{run.out}{run.err}",
        )

    return read


_expected: dict[str, Read] = {}
_fates: dict[str, str] = {}
"""Whether files were read or refused, as far as this process has tried them."""


def expected(read, folder, rows: Rows, overrides) -> Read:
    """What becomes of the rows as the plainest file; of equal ones once."""
    asked = () if overrides != CLIENT_OF else overrides
    key = json.dumps([rows, asked])
    if key not in _expected:
        plain = folder / "plain.json"
        plain.write_text(json.dumps(rows))
        _expected[key] = read(plain, asked)
        assert isinstance(_expected[key], Read), _expected[key]
        (folder / "run").rename(folder / "expected")
    return _expected[key]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_is_read_as_its_rows_or_refused(file, read, tmp_path):
    right = None if file.rows is None else expected(read, tmp_path, file.rows, file.overrides)
    data = tmp_path / file.name
    file.write(data)
    found = read(data, file.overrides)
    _fates[file.what] = type(found).__name__
    if isinstance(found, Refused):
        assert file.refused, found.run
        for sentence in (found.run, found.evaluate):
            divides = file.overrides == CLIENT_OF and not sentence  # evaluation divides nothing
            assert divides or re.search(file.refused, sentence.replace("\n", " ")), sentence
        return
    assert right is not None, f"read, though it should be refused: {found.rows} rows"
    assert found.rows == right.rows
    assert found[:4] == right[:4]
    assert re.search(file.said, found.said.replace("\n", " "), re.IGNORECASE), found.said


@pytest.mark.parametrize("alike", sorted({file.alike for file in FILES if file.alike}))
def test_the_same_in_every_format_has_the_same_fate(alike, read, tmp_path):
    fates = {}
    for number, file in enumerate(file for file in FILES if file.alike == alike):
        if file.what not in _fates:
            folder = tmp_path / str(number)
            folder.mkdir()
            file.write(folder / file.name)
            _fates[file.what] = type(read(folder / file.name, file.overrides)).__name__
            if (tmp_path / "run").exists():
                (tmp_path / "run").rename(folder / "run")
        fates[file.what] = _fates[file.what]
    assert len(set(fates.values())) == 1, fates
