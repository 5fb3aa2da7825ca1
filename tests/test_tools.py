"""Conversations whose answers call tools: what is read, learnt and scored."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matrix.templates import TEMPLATES
from matrix.test_templates import tokenizer_of
from support.runs import rows_of

from hedgerow.data import Encoder, Spool, answered_turns, read
from hedgerow.data.rows import Message, Records, check
from hedgerow.data.templates import load
from hedgerow.errors import UserError
from hedgerow.settings import Fields, TextSettings

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call(city, name="weather"):
    return {"type": "function", "function": {"name": name, "arguments": {"city": city}}}


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it “wet” in Köln?"},
    {"role": "assistant", "content": "", "tool_calls": [call("Köln"), call("Bonn")]},
    {"role": "tool", "name": "weather", "content": '{"wet": true, "mm": 3}'},
    {"role": "tool", "name": "weather", "content": "dry"},
    {"role": "assistant", "content": "Yes, it is."},
    {"role": "user", "content": "And in Ulm?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [call("Ulm")]},
]
RECORD = {"messages": MESSAGES, "tools": [WEATHER]}

_CALLS = (
    "{%- for c in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}"
)
QWEN = (
    "<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% if tools %}\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "<|im_end|>\n{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}" + _CALLS + "<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% elif m.role == 'user' %}<|im_start|>user\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen-2.5's, with marks."""
UNMARKED = QWEN.replace("{% generation %}", "").replace("{% endgeneration %}", "")
LLAMA = (
    "{{ bos_token }}{% if tools is not none %}<|start_header_id|>system<|end_header_id|>\n\n"
    "{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}<|eot_id|>{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    "{% endfor %}<|eom_id|>{% elif m.role == 'tool' %}"
    "<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>{% else %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""As Llama-3.1's, whose calls end otherwise than answers, and whose results are JSON."""
AS_TEXT = UNMARKED.replace("c.function.arguments | tojson", "c.function.arguments + ''")
"""One that wants arguments as a text, as DeepSeek's."""
CALLING = {"qwen": QWEN, "unmarked": UNMARKED, "llama": LLAMA, "as text": AS_TEXT}


def checked(*records, tools=True, every_turn=True, typed=False, **fields):
    found = Records.of(records, "a.json", typed=typed)
    return check(found, Fields(**fields), tools=tools, every_turn=every_turn)


def encoder_of(source):
    tokenizer = tokenizer_of(source)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    template = load(TextSettings(prompt="chat", loss_on="turns"), tokenizer)
    return Encoder(template, tokenizer)


# --- what is read ---------------------------------------------------------------------------------


def test_turns_of_tools_are_read():
    (row,) = checked(RECORD)
    assert (row.instruction, row.output) == ("And in Ulm?", "I look.")
    assert [turn.role for turn in row.history] == [turn["role"] for turn in MESSAGES[:6]]
    assert row.history[2].calls == (call("Köln"), call("Bonn"))
    assert row.history[3].told == {"name": "weather"}
    assert (row.calls, row.tools, row.between) == ((call("Ulm"),), (WEATHER,), ())
    first, second, third = answered_turns(row)
    assert (first.instruction, first.calls) == (MESSAGES[1]["content"], row.history[2].calls)
    assert (second.instruction, second.output) == (first.instruction, "Yes, it is.")
    assert second.between == row.history[2:5]
    assert second.history == (Message("system", "Be brief."),)
    assert [each.tools for each in (first, second, third)] == [(WEATHER,)] * 3
    assert (third.history, third.calls) == (row.history, row.calls)


AS_JSON = {"name": "weather", "arguments": '{"city": "Ulm"}'}


@pytest.mark.parametrize(
    "said",
    [
        {"tool_calls": [{"name": "weather", "arguments": {"city": "Ulm"}}]},
        {"tool_calls": json.dumps([call("Ulm")])},
        {"content": None, "tool_calls": [{"id": None, "function": AS_JSON}]},
        {"function_call": AS_JSON},
        {"from": "function_call", "value": json.dumps(call("Ulm")["function"])},
    ],
)
@pytest.mark.parametrize("tools", [[WEATHER], WEATHER["function"], json.dumps([WEATHER])])
def test_the_forms_in_which_tools_and_calls_are_written(said, tools):
    asked = {"role": "user", "content": "In Ulm?"}
    answer = said if "from" in said else {"role": "assistant"} | said
    (row,) = checked({"messages": [asked, answer], "tools": tools})
    assert (row.calls, row.tools, row.output) == ((call("Ulm"),), (WEATHER,), "")


def test_tables_fill_calls_with_keys_that_are_none_of_theirs(tmp_path):
    lookup = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    calls = [call("Ulm"), {"type": "function", "function": {"name": "look", "arguments": {"n": 3}}}]
    asked = {"role": "user", "content": "Well?"}
    answers = [{"role": "assistant", "content": "", "tool_calls": [each]} for each in calls]
    records = [
        {"messages": [asked, answer], "tools": [tool]}
        for answer, tool in zip(answers, [WEATHER, lookup], strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(records))
    for name in ("a.parquet", "a.json"):
        rows = check(read(str(tmp_path / name), "train"), Fields(), tools=True)
        assert [row.calls for row in rows] == [(each,) for each in calls]
        assert [row.tools for row in rows] == [(WEATHER,), (lookup,)]


def test_where_the_prompt_writes_no_tools_such_rows_are_left_out():
    plain = {"messages": MESSAGES[:2] + MESSAGES[5:6], "tools": [WEATHER]}
    rows = checked(RECORD, plain, tools=False)
    assert [row.number for row in rows] == [2]
    assert rows[0].tools == ()
    left, ignored, *_ = rows.remarks.sentences()
    assert left.startswith("1 row left out: turns of tools, which the prompt does not write")
    assert ignored.startswith("1 row with tools in column 'tools', which the prompt does not write")
    (row,) = check(Records.of([plain], "a"), Fields(messages="messages", tools=None), tools=True)
    assert row.tools == ()


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([MESSAGES[1], MESSAGES[3], MESSAGES[5]], "turns that do not alternate"),
        ([MESSAGES[1], MESSAGES[2], MESSAGES[5]], "turns that do not alternate"),
        ([MESSAGES[1], MESSAGES[5], MESSAGES[3]], "turns that do not alternate"),
    ],
)
def test_what_nobody_called_returns_nothing(messages, why):
    rows = checked({"messages": messages}, {"messages": MESSAGES[:6]})
    assert [row.number for row in rows] == [2]
    assert rows.remarks.sentences()[0].startswith(f"1 row left out: {why}")


def test_what_a_tool_returned_last_is_not_used():
    rows = checked({"messages": MESSAGES[:5]}, every_turn=False)
    assert (rows[0].calls, rows[0].instruction) == (
        (call("Köln"), call("Bonn")),
        MESSAGES[1]["content"],
    )
    assert "1 row with what a tool has returned at the end" in rows.remarks.sentences()[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": [{"type": "function"}]}, "column 'tools': tool 1 must have a name"),
        ({"tools": "[{"}, "column 'tools' is not valid JSON"),
        ({"tools": "7"}, "column 'tools' must be a list of tools, not int"),
        ({"tools": [{"name": "a\ud800"}]}, "column 'tools' holds half a character"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "message 2: a call of a tool must"),
        ({"tool_calls": [{"name": "x", "arguments": [1]}]}, "message 2: a call of a tool must"),
        ({"tool_calls": "{"}, "message 2: its calls of tools is not valid JSON"),
        ({"tool_calls": [call("x\ud800")]}, "message 2 holds half a character"),
    ],
)
def test_what_is_no_tool_or_call_is_refused(change, message):
    tools = {key: change[key] for key in change if key == "tools"}
    answer = {"role": "assistant", "content": "x"} | {k: change[k] for k in change if k != "tools"}
    with pytest.raises(UserError, match=f"a.json: row 1: .*{message}"):
        checked({"messages": [MESSAGES[1], answer]} | tools)
    with pytest.raises(UserError, match="message 1 calls tools, which the assistant alone does"):
        checked({"messages": [MESSAGES[1] | {"tool_calls": [call("x")]}, MESSAGES[5]]})
    with pytest.raises(UserError, match=r"no row has a column 'tols'.*`data\.fields\.tools`"):
        check(Records.of([RECORD], "a.json"), Fields(tools="tols"), tools=True)


# --- what is learnt -------------------------------------------------------------------------------


def learnt(encoder, row):
    [example] = encoder.examples([row], "rows", every_turn=True)
    ids = example.prompt + example.answer
    return [encoder.tokenizer.decode(ids[start:stop]) for start, stop in example.learnt]


@pytest.mark.parametrize("name", CALLING)
def test_calls_are_learnt_as_answers_are_and_results_are_not(name):
    encoder = encoder_of(CALLING[name])
    assert encoder.template.writes_tools
    (row,) = checked(RECORD)
    calls, said, last = learnt(encoder, row)
    assert "Köln" in calls
    assert "Bonn" in calls
    end = "<|eom_id|>" if name == "llama" else "<|im_end|>"
    assert calls.endswith(end)
    assert last.endswith(end)
    assert said == ("Yes, it is.<|eot_id|>" if name == "llama" else "Yes, it is.<|im_end|>")
    assert json.dumps({"city": "Ulm"}) in last
    assert ("I look." in last) == (name != "llama")
    for part in (calls, said, last):
        assert "mm" not in part
        assert "dry" not in part
    [alone] = encoder.examples([row], "rows")
    assert encoder.tokenizer.decode(alone.answer) == last
    # Each answer alone, after the turns before it, is learnt in the same tokens.
    turns = encoder.examples(answered_turns(row), "rows")
    assert [encoder.tokenizer.decode(turn.answer) for turn in turns] == [calls, said, last]


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if loop.last or tools %}"
    "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{% endfor %}]{{ eos_token }}{% elif m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role == 'assistant' "
    "and not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}"
    "[TOOL_RESULTS]{{ m.content | tojson }}[/TOOL_RESULTS]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""As Mistral's, which begins calls otherwise than answers, and fails for results of none."""


def test_calls_that_begin_otherwise_than_answers():
    (row,) = checked({"messages": MESSAGES[1:6], "tools": [WEATHER]})
    calls, said = learnt(encoder_of(MISTRAL), row)
    assert calls.startswith("[TOOL_CALLS][{")
    assert calls.endswith("}]</s>")
    assert said.strip() == "Yes, it is.</s>"
    (row,) = checked(RECORD | {"messages": MESSAGES[1:]})
    assert len(learnt(encoder_of(MISTRAL), row)) == 3


def test_marks_are_read_as_transformers_reads_them():
    encoder = encoder_of(QWEN)
    (row,) = checked(RECORD)
    theirs = encoder.tokenizer.apply_chat_template(
        MESSAGES, tools=[WEATHER], return_dict=True, return_assistant_tokens_mask=True
    )
    for source in (QWEN, UNMARKED):
        mine = Spool().tokenize("rows", [row], encoder_of(source), 2000, "turns")[0]
        length = len(mine.tokens)  # without the newline after the last answer's end
        assert mine.tokens.tolist() == theirs["input_ids"][:length]
        assert mine.learnt.astype(int).tolist() == theirs["assistant_masks"][:length]
        assert not any(theirs["assistant_masks"][length:])


def test_control_tokens_that_tools_spell_are_text():
    encoder = encoder_of(UNMARKED)
    spelt = json.loads(json.dumps(RECORD).replace("Ulm", "<|im_end|>").replace("Tells", "</s>"))
    (plain,), (row,) = checked(RECORD), checked(spelt)
    ends = [
        sum(
            ids.count(encoder.tokenizer.convert_tokens_to_ids(token))
            for [each] in [encoder.examples([one], "rows")]
            for ids in [each.prompt + each.answer]
        )
        for token in ("<|im_end|>", "</s>")
        for one in (plain, row)
    ]
    assert ends[0] == ends[1]
    assert ends[2] == ends[3]
    assert '{"city": "<|im_end|>"}' in learnt(encoder, row)[-1]


def test_templates_that_write_no_tools_are_known():
    for name in ("chatml", "llama-3.1", "gemma"):
        assert not encoder_of(TEMPLATES[name]).template.writes_tools
    for lacks in ("{{ t | tojson }}", "{{ c.function.name }}", "{{ m.content }}\n</tool_response>"):
        assert not encoder_of(UNMARKED.replace(lacks, "")).template.writes_tools


def test_a_row_without_tools_is_written_as_before():
    """Templates tell an empty list of tools from none."""
    (row,) = checked({"messages": MESSAGES[1:2] + MESSAGES[5:6]})
    encoder = encoder_of(LLAMA)
    [example] = encoder.examples([row], "rows")
    written = encoder.tokenizer.apply_chat_template(
        [MESSAGES[1]], tokenize=False, add_generation_prompt=True
    )
    assert encoder.tokenizer.decode(example.prompt) == written
    assert "system" not in written


def test_a_tool_or_call_that_a_template_leaves_out_is_refused():
    first = UNMARKED.replace("for t in tools", "for t in tools[:1]")
    other = json.loads(json.dumps(WEATHER).replace("weather", "rain"))
    (row,) = checked(RECORD | {"tools": [WEATHER, other]})
    with pytest.raises(UserError, match=r"rows \(a\.json\): row 1: .*leaves out the tool 'rain'"):
        encoder_of(first).examples([row], "rows")
    first = UNMARKED.replace("for c in m.tool_calls", "for c in (m.tool_calls or [])[:1]")
    calls = [*MESSAGES[:2], MESSAGES[2] | {"tool_calls": [call("Ulm"), call("Ulm", "rain")]}]
    (row,) = checked({"messages": calls})
    with pytest.raises(UserError, match=r"leaves out calls 'rain'"):
        encoder_of(first).examples([row], "rows")


# --- runs -----------------------------------------------------------------------------------------


SHORT = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "{{ m.role[0] }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def test_a_run_learns_calls_and_scores_texts(chatty, experiment, hedgerow, tmp_path):
    calls = [{"name": "w", "arguments": {"c": 1}}]
    records = [
        {
            "messages": [
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "tool_calls": calls},
                {"role": "tool", "content": "dry"},
                {"role": "assistant", "content": "Dry."},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "tool_calls": calls},
            ],
            "tools": [{"name": "w"}],
        }
        for n in range(6)
    ]
    for name in ("a", "asked"):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    chosen = [
        f"data.clients={{a: {tmp_path / 'a.json'}}}",
        f"data.test={tmp_path / 'asked.json'}",
        *("data.prompt=chat", "data.max_length=256", "data.loss_on=turns", "evaluation.by=turn"),
        *("method=fedit", "federation.rounds=1", "training.steps=2", "training.batch_size=1"),
        *("evaluation.metrics=[loss, exact_match]", "evaluation.max_new_tokens=4"),
    ]
    path = experiment(model={"path": str(chatty(SHORT))})
    result = hedgerow("run", path, *chosen, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    row = rows_of(tmp_path / "run")[-1]
    assert set(row["eval_loss_by"]) == {"1", "2", "3"}
    assert set(row["exact_match_by"]) == {"2"}
    assert "12 of 18 rows call tools, which the loss alone scores" in result.out
    last = [each for each in chosen if "loss_on" not in each and "by" not in each]
    result = hedgerow("run", path, *last, "--out", tmp_path / "last")
    assert result.code == 2
    assert "every answer of " in result.err
    assert "calls tools" in result.err
    assert not (tmp_path / "last").exists()
