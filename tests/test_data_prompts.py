import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hedgerow.data.encoding import Encoder
from hedgerow.data.rows import Message, Row
from hedgerow.data.templates import TextTemplate, in_turns, load
from hedgerow.errors import UserError
from hedgerow.settings import TemplateSettings, TextSettings
from hedgerow.testing.models import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def named(prompt, template=None, **settings):
    """The template of a name, of a tokenizer of bytes whose chat template this is."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return load(TextSettings(prompt=prompt, template=TemplateSettings(**settings)), tokenizer)


def test_alpaca_word_for_word():
    template = named("alpaca")
    assert template.prompt(Row("Add.", "2 and 3", "5")) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n"
    )
    assert template.prompt(Row("Add.")) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    prompt = template.prompt(Row("Add."))
    assert list(template.examples([Row("Add.", output="5")])) == [(prompt, "5", "")]


@pytest.mark.parametrize(
    ("name", "with_input", "without"),
    [
        (
            "alpaca-short",
            "### Instruction:\nQ\n\n### Input:\nC\n\n### Response:\n",
            "### Instruction:\nQ\n\n### Response:\n",
        ),
        ("plain", "Q\n\nC\n\n", "Q\n\n"),
    ],
)
def test_short_templates(name, with_input, without):
    template = named(name)
    assert template.prompt(Row("Q", "C")) == with_input
    for row in [Row("Q", " \n"), Row("Q")]:
        assert template.prompt(row) == without


@given(instruction=st.text(), context=st.text())
def test_values_are_never_read_as_templates(instruction, context):
    template = TextTemplate("<{instruction}|{input}>", "test")
    row = Row(instruction + "{input}", context + "{instruction} \\1")
    assert template.prompt(row) == f"<{row.instruction}|{row.input}>"


def test_template_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text('{"ask": "{instruction}"{?input}, "of": "{input}"{/input}}\n', encoding="utf-8")
    template = named(str(path))
    assert template.prompt(Row("Why?", "sky")) == '{"ask": "Why?", "of": "sky"}\n'
    assert template.prompt(Row("Why?")) == '{"ask": "Why?"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Answer:", r"must hold \{instruction\}"),
        ("{?input}{instruction}{/input}", r"must hold \{instruction\} outside"),
        ("{instruction} {question}", r"\{question\} is not a known placeholder"),
        ("{instruction} {?context}", r"\{\?context\} is not a known placeholder"),
        ("{instruction} {?input}", r"\{\?input\} stands alone"),
        ("{instruction} {/input}", r"\{/input\} stands alone"),
    ],
)
def test_bad_template_files(tmp_path, text, message):
    path = tmp_path / "mine.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"mine\.txt: {message}"):
        named(str(path))


def test_unknown_name():
    with pytest.raises(UserError, match=r"alpacca is neither a file .* nor one of alpaca, "):
        named("alpacca")


def test_a_template_file_may_have_a_bom(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("{instruction}\n", encoding="utf-8-sig")
    assert named(str(path)).prompt(Row("Why?")) == "Why?\n"


@pytest.mark.parametrize("text", [CHATML, "{{ messages[0]['content'] }}", "{{instruction}}\n"])
def test_a_jinja_file_gets_a_sentence(text, tmp_path):
    path = tmp_path / "chat_template.jinja"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"chat_template\.jinja: is written in Jinja.* data\.prompt"
    ):
        named(str(path))


def test_earlier_turns_in_a_text():
    history = (Message("system", "Be brief."), Message("user", "One"), Message("assistant", "1"))
    assert named("alpaca-short").prompt(Row("Two", "2", history=history)) == (
        "Be brief.\n\n### Instruction:\nOne\n\n### Response:\n1\n\n"
        "### Instruction:\nTwo\n\n### Input:\n2\n\n### Response:\n"
    )
    assert in_turns(["One", "1", "Two"]) == Row("Two", history=history[1:])


def test_chat():
    template = named("chat", CHATML)
    prompt = "<|user|>Add.\n\n2 and 3<|end|>\n<|assistant|>"
    row = Row("Add.", "2 and 3", "5")
    assert template.prompt(row) == prompt
    assert list(template.examples([row])) == [(prompt, "5", "<|end|>")]


def test_one_of_several_chat_templates():
    other = CHATML.replace("user", "human")
    both = {"rag": CHATML, "tool_use": other}
    assert named("chat", both, name="rag").prompt(Row("a")).startswith("<|user|>a")
    with_default = {"default": CHATML, "rag": CHATML.replace("<|end|>", "<|rag|>")}
    assert named("chat", with_default).prompt(Row("a")) == "<|user|>a<|end|>\n<|assistant|>"
    assert named("chat", {"only": CHATML}).prompt(Row("a")).startswith("<|user|>a")
    for several, name, message in [
        (both, None, r"`data\.template\.name`: .* several chat templates \(rag, tool_use\)"),
        (both, "rga", r"no chat template 'rga', did you mean `rag`\?.* one of rag, tool_use"),
        (CHATML, "rag", r"`data\.template\.name`: 'rag': .* has one chat template"),
    ]:
        with pytest.raises(UserError, match=message):
            named("chat", several, name=name)


def test_chat_mistakes():
    for chat_template, message in [
        (None, "has no chat template"),
        ("{{ raise_exception('only system') }}", "fails .*only system"),
    ]:
        with pytest.raises(UserError, match=message):
            named("chat", chat_template)


def test_another_begin_of_answers_in_generation():
    template = named("chat", CHATML.replace("<|assistant|>{%", "<|bot|>{%"))
    assert template.prompt(Row("a")).endswith("<|assistant|>")
    assert "'bot|>'" in template.notes[0]
    assert "'assistant|>'" in template.notes[0]


@pytest.mark.parametrize("date", ["2026-13-01", "tomorrow", 2026])
def test_a_date_is_a_day(date):
    with pytest.raises(ValueError, match="is no day: write it as 2026-11-25"):
        TemplateSettings(date=date)


FILLS = "{{ 'a' * 10 ** 10 }}"
AT_BOOM = CHATML + "{% if 'boom' in messages[0].content %}WHAT{% endif %}"


def test_a_row_that_a_template_cannot_write_is_named():
    template = named(
        "chat", CHATML + "{% if 'boom' in messages[0].content %}{{ 1 / 0 }}{% endif %}"
    )
    encoder = Encoder(template, byte_tokenizer())
    rows = [Row("boom" if n == 301 else f"Row {n}", output="Yes", number=n) for n in range(1, 600)]
    assert len(encoder.prompts(rows[:300], "rows.json")) == 300
    for write in (encoder.examples, encoder.prompts):
        with pytest.raises(UserError, match=r"^rows\.json: row 301: .* fails \(division by zero\)"):
            write(rows, "rows.json")


def test_rows_with_which_a_template_needs_too_much_are_named():
    template = named(
        "chat", CHATML + f"{{% if 'boom' in messages[0].content %}}{FILLS}{{% endif %}}"
    )
    encoder = Encoder(template, byte_tokenizer())
    rows = [Row("boom" if n == 301 else f"Row {n}", output="Yes", number=n) for n in range(1, 600)]
    sentence = r"^rows\.json: row 257: .* more than 512 MB of memory, here or in the 255 rows after"
    with pytest.raises(UserError, match=sentence):
        encoder.examples(rows, "rows.json")


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "other.jinja"])
def test_the_file_of_a_template_is_named(tmp_path, place):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "other": FILLS} if "other" in place else FILLS
    tokenizer.save_pretrained(tmp_path)
    if place == "tokenizer_config.json":
        (tmp_path / "chat_template.jinja").unlink()
        config = json.loads((tmp_path / place).read_text()) | {"chat_template": FILLS}
        (tmp_path / place).write_text(json.dumps(config))
    read = AutoTokenizer.from_pretrained(tmp_path)
    settings = TemplateSettings(name="other" if "other" in place else None)
    with pytest.raises(UserError) as caught:
        load(TextSettings(prompt="chat", template=settings), read)
    [file] = tmp_path.rglob(place)
    assert str(caught.value) == (
        f"`data.prompt`: the tokenizer's chat template ({file}) needs more than 512 MB of memory: "
        "choose another `data.prompt`, as alpaca"
    )


THINKER = CHATML.replace(
    "<|assistant|>{% endif %}",
    "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}{{ style.tone if style }}{% endif %}",
)


def test_a_template_is_given_variables():
    assert named("chat", THINKER).notes == ()
    template = named("chat", THINKER, enable_thinking=False, style={"tone": "warm"})
    assert "opens '<think></think>warm' in generation" in template.notes[0]
    settings = TextSettings(prompt="chat", template={"enable_thinking": False})
    assert settings.model_dump(mode="json")["template"] == {
        "name": None,
        "date": None,
        "enable_thinking": False,
    }


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"messages": []}, "'messages' is hedgerow's or the tokenizer's to give"),
        ({"add_generation_prompt": True}, "no variable of yours"),
        ({"bos_token": "<s>"}, "no variable of yours"),
        ({"date_string": "today"}, "no variable of yours"),
        ({"a b": 1}, "'a b' is none"),
        ({"style": float("nan")}, "the variable 'style' must be text, a finite number"),
        ({"style": {"a": [{1: 2}]}}, "the variable 'style' must be"),
        ({"style": object()}, "the variable 'style' must be"),
    ],
)
def test_variables_that_no_template_may_have(variables, message):
    with pytest.raises(ValueError, match=message):
        TemplateSettings(**variables)


def test_variables_that_are_not_read():
    with pytest.raises(
        UserError, match=r"`data\.template\.enable_thinkin`: .* reads no .*enable_th"
    ):
        named("chat", THINKER, enable_thinkin=False)
    with pytest.raises(UserError, match=r"`data\.template\.nmae`: .*did you mean `name`"):
        named("chat", CHATML, nmae="rag")
    with pytest.raises(ValueError, match=r"`template\.enable_thinking` .* `prompt: chat` alone"):
        TextSettings(template={"enable_thinking": False})
