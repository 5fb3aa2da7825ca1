"""Rows: one check for all, whatever they are read from."""

import json

import datasets
import pandas as pd
import pytest

from hedgerow.data import as_records, read
from hedgerow.data.rows import Message, Records, Row, check, value_of
from hedgerow.errors import NothingToLearn, UserError
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
        ({"instruction": "", "output": ["secret"]}, "row 3: column 'output' .* not list"),
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
    with pytest.raises(NothingToLearn, match="no row can be used: 1 row left out: no answer"):
        checked([{"instruction": "Why?", "output": empty}])


def test_integers_with_gaps_stay_integers():
    rows = [{"instruction": "a", "output": 42.0}, {"instruction": "b", "output": float("nan")}]
    assert checked(rows)[0].output == "42"
    assert checked([*rows, {"instruction": "c", "output": 0.5}])[0].output == "42.0"
    assert checked(rows[:1])[0].output == "42.0"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "memory"])
@pytest.mark.parametrize("number", ["1", "1.0"])
def test_a_number_stays_as_it_was_written_also_beside_a_gap(tmp_path, suffix, number):
    path = tmp_path / f"a.{suffix}"
    lines = [f'{{"instruction": "a", "output": {value}}}' for value in (number, "null")]
    texts = {
        "json": f"[{', '.join(lines)}]",
        "jsonl": "\n".join(lines),
        "csv": f"instruction,output\na,{number}\na,\n",
    }
    if suffix == "memory":
        records = as_records([json.loads(line) for line in lines], "memory")
    else:
        path.write_text(texts[suffix])
        records = read(str(path), "train")
    assert [row.output for row in check(records, Fields())] == [number]


# --- conversations, and other layouts -----------------------------------------------------------


def chat(*turns, **more):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {"messages": [{"role": names[t[0]], "content": t[2:]} for t in turns]} | more


def test_a_conversation_is_its_last_answer_after_the_rest():
    (row,) = rows = checked([chat("s:Be short", "u:One?", "a:1", "u:Two?", "a:2")])
    assert (row.instruction, row.input, row.output) == ("Two?", "", "2")
    assert row.history == (
        Message("system", "Be short"),
        Message("user", "One?"),
        Message("assistant", "1"),
    )
    assert rows.remarks.sentences() == [
        "1 row with several answers, of which only the last counts (first: a.json row 1)",
        "1 row read from messages, for want of instruction (first: a.json row 1)",
    ]
    assert not checked([chat("u:One?", "a:1")], messages="messages").remarks.counts


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'},
        {"prompt": "Q", "completion": "A"},
        {
            "prompt": [{"role": "user", "content": "Q"}],
            "completion": [{"role": "assistant", "content": "A"}],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                {"role": "assistant", "content": "A", "tool_calls": None},
            ]
        },
    ],
)
def test_known_layouts_are_read_without_being_named(record):
    (row,) = checked([record])
    assert (row.instruction, row.output, row.history) == ("Q", "A", ())


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (chat("u:One?"), "no answer"),
        (chat("u:One?", "a:"), "no answer"),
        (chat("u: ", "a:1"), "nothing is asked"),
        (chat(), "every cell is empty"),
        (chat(id=3), "nothing is asked"),
        (chat("a:Hello", "u:One?", "a:1"), "turns that do not alternate"),
        (chat("u:One?", "a:1", "a:2"), "turns that do not alternate"),
        (chat("u:One?", "t:1", "a:1"), "turns of tools, which the prompt does not write"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]},
            "messages of more than text",
        ),
    ],
)
def test_conversations_that_cannot_be_learnt_are_left_out(record, why):
    rows = checked([chat("u:One?", "a:1"), record], messages="messages")
    assert [row.number for row in rows] == [1]
    (sentence,) = rows.remarks.sentences()
    assert sentence.startswith(f"1 row left out: {why}")


def test_a_question_at_the_end_is_not_used():
    rows = checked([chat("u:One?", "a:1", "u:Two?")], messages="messages")
    assert (rows[0].instruction, rows[0].output) == ("One?", "1")
    assert "1 row with a question at the end that has no answer" in rows.remarks.sentences()[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"role": "narrator", "content": "x"}], "message 1 has the role 'narrator'"),
        (["x"], "message 1 must have a role and content, not be str"),
        ("x", "must be a list of messages"),
        ("[x", "no list of messages in JSON"),
        ([{"role": "user", "content": "a\ud800"}], r"message 1 holds half a character"),
    ],
)
def test_what_is_no_conversation_is_refused(value, message):
    with pytest.raises(UserError, match=rf"a\.json: row 1: column 'messages'.*{message}"):
        checked([{"messages": value}])


def test_nested_columns_and_lists():
    rows = [
        {"q": {"text": "Who?"}, "answers": {"text": ["Ann", "Ann B."]}},
        {"q": {"text": "Where?"}, "answers": {"text": []}},
    ]
    found = checked(rows, instruction="q.text", output="answers.text")
    assert [(row.instruction, row.output) for row in found] == [("Who?", "Ann")]
    assert [s.split(" (")[0] for s in found.remarks.sentences()] == [
        "1 row with several values in column 'answers.text', of which the first counts",
        "1 row left out: no answer",
    ]
    with pytest.raises(UserError, match=r"no row has a column 'answers.txt'.*'answers.text'"):
        checked(rows, instruction="q.text", output="answers.txt")
    with pytest.raises(UserError, match=r"a\.json: row 1: column 'q' must be text"):
        checked(rows, instruction="q", output="answers.text")


def test_a_column_with_dots_in_its_name_is_meant_first():
    row = {"q.text": "Who?", "q": {"text": "no"}, "a.b": {"c": ["Ann"]}, "a": {"b": {"d": "yes"}}}
    (found,) = checked([row], instruction="q.text", output="a.b.c")
    assert (found.instruction, found.output) == ("Who?", "Ann")
    (found,) = checked([row], instruction="q.text", output="a.b.d")
    assert found.output == "yes"
    assert value_of(row, "a.b.e") is None
    assert value_of(row, "q.text.x", "nothing") == "nothing"


@pytest.mark.parametrize("column", ["context", "System", "history"])
def test_a_column_that_nobody_named_is_said(column):
    rows = [*ROWS, ROWS[0] | {column: "so"}, ROWS[0] | {column: None}]
    assert checked(rows).remarks.sentences() == [
        f"1 row with a column {column!r}, which `data.fields` does not name (first: a.json row 3)"
    ]
    assert not checked(rows, input=column).remarks.counts


def test_messages_come_alone():
    with pytest.raises(ValueError, match="give `messages`, or the columns"):
        Fields(messages="chat", output="reply")
    with pytest.raises(ValueError, match="give `messages`, or the columns"):
        Fields(messages="chat", prompt="p", completion="c")


PROMPTED = [
    [{"p": "One?", "c": "1", "context": "x"}, {"p": "Two?", "c": None}, {"p": "", "c": "2"}],
    [{"p": [{"role": "user", "content": "One?"}], "c": [{"role": "assistant", "content": "1"}]}],
    [{"p": "One?", "c": {"text": ["1"]}}],
]


@pytest.mark.parametrize("rows", PROMPTED, ids=["texts", "messages", "nested"])
def test_prompt_and_completion_are_other_words_for_instruction_and_output(rows):
    answer = "c.text" if isinstance(rows[0]["c"], dict) else "c"
    context = {"input": "context"} if "context" in rows[0] else {}
    named = checked(rows, prompt="p", completion=answer, **context)
    meant = checked(rows, instruction="p", output=answer, **context)
    assert list(named) == list(meant)
    assert (named[0].instruction, named[0].output) == ("One?", "1")
    assert named.remarks.sentences() == meant.remarks.sentences()


def test_a_prompt_column_that_is_not_there_is_told_by_its_own_key():
    with pytest.raises(UserError, match=r"no row has a column 'q': set `data\.fields\.prompt` to"):
        checked(PROMPTED[0], prompt="q", completion="c")
    with pytest.raises(UserError, match=r"no row has a column 'a'.*`data\.fields\.completion` to"):
        checked(PROMPTED[0], prompt="p", completion="a")
    assert len(checked(PROMPTED[0], answered=False, prompt="p", completion="a")) == 2


# --- one rule for all formats --------------------------------------------------------------------

TABLE = {
    "instruction": ["Name a pet.", None, "How many?", "Add.", None],
    "input": [None, None, "cats", None, None],
    "output": [None, None, 42, 3, 7],
}


def test_every_format_gives_the_same_rows(tmp_path):
    frame = pd.DataFrame(TABLE)  # whose integers with gaps are floats
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.csv.gz", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "a.json.gz", orient="records")
    datasets.Dataset.from_pandas(frame).save_to_disk(tmp_path / "saved")
    sources = [read(str(path), "train") for path in sorted(tmp_path.iterdir())]
    assert len(sources) == 7
    written_as_floats = (".csv", ".csv.gz", ".tsv", ".jsonl", ".json.gz")
    for records in [*sources, as_records(frame, "memory")]:
        rows = check(records, Fields())
        found = [(row.instruction, row.input, row.output, row.number) for row in rows]
        end = ".0" if records.where.endswith(written_as_floats) else ""
        asked = [("How many?", "cats", f"42{end}", 3), ("Add.", "", f"3{end}", 4)]
        assert found == asked, records.where
        assert rows.remarks.counts == {
            "left out: no answer": 1,
            "left out: every cell is empty": 1,
            "left out: nothing is asked": 1,
        }


def test_booleans_are_spelt_as_in_csv():
    assert checked([{"instruction": "a", "output": True}])[0].output == "true"


def test_numbers_of_classes_are_their_names(tmp_path):
    features = datasets.Features(
        instruction=datasets.Value("string"), output=datasets.ClassLabel(names=["bad", "good"])
    )
    data = datasets.Dataset.from_dict(
        {"instruction": ["a", "b"], "output": [1, None]}, features=features
    )
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "a.parquet")
    read_back = [read(str(tmp_path / name), "train") for name in ("saved", "a.parquet")]
    for records in [*read_back, as_records(data, "memory")]:
        assert [row.output for row in check(records, Fields())] == ["good"]


def test_a_saved_dictionary_of_datasets_has_splits(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path)
    assert len(read(str(tmp_path), "test")) == 1
    with pytest.raises(UserError, match=r"the split 'dev' .*train, test.*data\.split"):
        read(str(tmp_path), "dev")


def test_two_columns_of_one_name_are_refused():
    frame = pd.DataFrame([["a", "b", "c"]], columns=["instruction", "output", "output"])
    with pytest.raises(UserError, match="memory: 2 columns have one name, 'output'"):
        as_records(frame, "memory")


def test_an_evaluation_says_what_it_leaves_out(hedgerow, tiny_model, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output\nName a pet.,\n,\nHi,Yes\n")
    result = hedgerow("evaluate", tiny_model, "data.prompt=plain", "--data", path, "--json")
    assert (result.code, json.loads(result.out)["rows"]) == (0, 1)
    assert f"1 row left out: no answer (first: {path} row 1)" in result.err
    assert f"1 row left out: every cell is empty (first: {path} row 2)" in result.err
