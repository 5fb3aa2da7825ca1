"""Rows: one check for all, whatever they are read from."""

import pytest

from hedgerow.data.rows import NothingUsable, Records, Row, check
from hedgerow.errors import UserError
from hedgerow.settings import Fields

ROWS = [{"instruction": "Add, please", "output": "5"}, {"instruction": "“Hi”\n", "output": "x"}]


def checked(rows, answered=True, **fields):
    return check(Records.of(rows, "a.json"), Fields(**fields), answered=answered)


def test_rows_are_text():
    rows = checked([*ROWS, {"instruction": 1, "input": None, "output": 2.5, "kind": 7}])
    assert rows[0] == Row("Add, please", "", "5", (), ROWS[0], 1)
    assert (rows[2].instruction, rows[2].input, rows[2].output) == ("1", "", "2.5")
    assert (rows[2].columns["kind"], rows[2].number) == (7, 3)
    assert not rows.remarks.sentences()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "", "output": [["secret"]]}, "row 3: column 'output' .* not list"),
        ({"instruction": "", "input": {"a": 1}, "output": ""}, "row 3: column 'input' .* not dict"),
        (
            {"instruction": "a\ud83d", "output": ""},
            r"row 3: column 'instruction' .*U\+D83D.* 1 char",
        ),
    ],
)
def test_what_is_no_text_is_refused(row, message):
    with pytest.raises(UserError, match=rf"a\.json: {message}") as caught:
        checked([*ROWS, row])
    assert "secret" not in str(caught.value)


def test_a_column_that_no_row_has_is_misspelt():
    with pytest.raises(UserError, match=r"a\.json: no row has a column 'q'.*fields\.instruction"):
        checked(ROWS, instruction="q")
    with pytest.raises(UserError, match=r"no row has a column 'contxt'.*'instruction', 'output'"):
        checked(ROWS, input="contxt")


@pytest.mark.parametrize("empty", ["", " \n", None, float("nan")])
def test_a_row_without_an_answer_is_left_out_and_counted(empty):
    rows = checked([*ROWS, {"instruction": "Why?", "output": empty}])
    assert [row.number for row in rows] == [1, 2]
    assert rows.remarks.sentences() == ["1 row left out: no answer (first: a.json row 3)"]
    assert len(checked([{"instruction": "Why?", "output": empty}], answered=False)) == 1
    with pytest.raises(NothingUsable, match="no row can be used: 1 row left out: no answer"):
        checked([{"instruction": "Why?", "output": empty}])


def test_integers_with_gaps_stay_integers():
    rows = [{"instruction": "a", "output": 42.0}, {"instruction": "b", "output": float("nan")}]
    assert checked(rows)[0].output == "42"
    assert checked([*rows, {"instruction": "c", "output": 0.5}])[0].output == "42.0"
    assert checked(rows[:1])[0].output == "42.0"
