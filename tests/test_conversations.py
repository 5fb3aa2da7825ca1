"""Conversations all of whose answers are learnt, and scored (`data.loss_on: turns`)."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix.templates import DATED, TEMPLATES
from matrix.test_templates import DAY, THINKING, tokenizer_of
from support.runs import rows_of
from support.tokenizers import BOS, EOS, KINDS, TOKENIZER, words
from transformers import AutoModelForCausalLM, AutoTokenizer

from hedgerow.bundled import MODEL, tasks
from hedgerow.data import Encoder, Example, Row, Spool, answered_turns, collate, learnt_from
from hedgerow.data.rows import Message
from hedgerow.data.templates import TextTemplate, load
from hedgerow.errors import UserError
from hedgerow.evaluation.likelihood import batch_losses
from hedgerow.settings import TemplateSettings, TextSettings
from hedgerow.testing.models import byte_tokenizer
from hedgerow.training.loss import batch_loss

OTHER_ENDS = ("falcon", "olmo", "gpt-oss")
"""Chat templates that do not end earlier answers as they end the last one."""
OTHER_BEGINS = ("qwen-3", "qwen-3-thinking")
"""Chat templates that write thoughts before the last answer alone."""


def talk(*texts, system=None):
    """The row of a conversation, of the texts of user, assistant, user …"""
    roles = ("user", "assistant") * len(texts)
    turns = [Message(role, text) for role, text in zip(roles, texts, strict=False)]
    *history, asked, answer = turns
    opening = (Message("system", system),) if system else ()
    return Row(asked.content, output=answer.content, history=(*opening, *history))


TWO = talk("Hi", "Hello!", "And now?", "Yes.")


def encoder_of(tokenizer, prompt="chat", **template):
    text = TextSettings(prompt=prompt, loss_on="turns", template=TemplateSettings(**template))
    return Encoder(load(text, tokenizer), tokenizer)


def learnt(encoder, row):
    """The texts that are learnt of a row, once it is known to have the tokens that it had."""
    [example] = encoder.examples([row], "rows", every_turn=True)
    [alone] = encoder.examples([row], "rows")
    assert (example.prompt, example.answer) == (alone.prompt, alone.answer)
    assert example.learnt[-1] == alone.learnt[0]
    ids = example.prompt + example.answer
    return [encoder.tokenizer.decode(ids[start:stop]) for start, stop in example.learnt]


# --- which tokens are learnt ----------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_is_learnt_as_the_chat_template_writes_it(name):
    encoder = encoder_of(tokenizer_of(TEMPLATES[name]), date=DAY if name in DATED else None)
    first, last = learnt(encoder, TWO)
    alone = learnt(encoder, talk("Hi", "Hello!"))
    assert last.startswith(("Yes.", " Yes."))
    assert alone == [last.replace("Yes.", "Hello!")]
    end = {"olmo": "</s>", "gpt-oss": "<|return|>", "falcon": "</s>"}.get(name, "")
    assert first == alone[0].removesuffix(end)
    notes = " ".join(encoder.template.notes)
    assert ("does not end earlier answers as it ends the last" in notes) == (name in OTHER_ENDS)
    assert ("writes other text before earlier answers" in notes) == (name in OTHER_BEGINS)


@pytest.mark.parametrize("name", THINKING)
def test_thoughts_that_a_template_leaves_out_are_not_learnt(name):
    encoder = encoder_of(tokenizer_of(TEMPLATES[name]))
    thought = "<think>\nA greeting.\n</think>\n\nHello!"
    first, last = learnt(encoder, talk("Hi", thought, "And now?", "Yes."))
    assert first.strip() == learnt(encoder, TWO)[0]
    assert last.startswith("Yes.")


def test_blank_answers_are_not_learnt():
    encoder = encoder_of(tokenizer_of(TEMPLATES["chatml"]))
    row = talk("Hi", " ", "What?", "Two.", "And?", "Three.")
    assert learnt(encoder, row) == ["Two.<|im_end|>", "Three.<|im_end|>"]
    assert [each.output for each in answered_turns(row)] == ["Two.", "Three."]
    assert [each.columns["turn"] for each in answered_turns(row)] == [2, 3]


def test_an_answer_that_holds_what_follows_it():
    """Nothing but the whole conversation tells where it ends."""
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoder = encoder_of(tokenizer_of(source))
    gap = "\nuser: next\nassistant: "
    for said in (f"a{gap}a", f"  b{gap}a{gap}a  "):
        first, last = learnt(encoder, talk("Hi", said, "next", "Yes."))
        assert (first, last) == (said.strip(), "Yes.</s>")


def test_what_cannot_be_told_apart_is_refused():
    source = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.content | length > 20 and not loop.last %}[long] {% endif %}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    encoder = encoder_of(tokenizer_of(source))
    assert learnt(encoder, TWO) == ["Hello!<|end|>", "Yes.<|end|>"]
    row = talk("Hi", "an answer of many letters", "And now?", "Yes.")
    with pytest.raises(
        UserError, match=r"rows: .* cannot be told .* set `data\.loss_on` to answer"
    ):
        encoder.examples([row], "rows", every_turn=True)


MARKED = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("kind", ["bytes", "the demo's"])
def test_marks_are_read_as_transformers_reads_them(kind):
    tokenizer = byte_tokenizer() if kind == "bytes" else AutoTokenizer.from_pretrained(MODEL)
    names = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.chat_template = MARKED
    encoder = encoder_of(tokenizer)
    texts = ["Hi", "Hello there!", "And é now?", "Yes, 10.", "Why?", "Because\nit is."]
    row = talk(*texts, system="Be brief.")
    assert learnt(encoder, row) == [f"{text}<|end|>" for text in texts[1::2]]
    messages = [{"role": "system", "content": "Be brief."}]
    for place, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[place % 2], "content": text})
    theirs = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mine = Spool().tokenize("rows", [row], encoder, 512, "turns")[0]
    length = len(mine.tokens)  # without the newline after the last answer's end
    assert mine.tokens.tolist() == theirs["input_ids"][:length]
    assert mine.learnt.astype(int).tolist() == theirs["assistant_masks"][:length]
    assert not any(theirs["assistant_masks"][length:])
    unmarked = MARKED.replace("{% generation %}", "{% if true %}")
    unmarked = unmarked.replace("{% endgeneration %}", "{% endif %}")
    tokenizer.chat_template = unmarked
    other = Spool().tokenize("rows", [row], encoder_of(tokenizer), 512, "turns")[0]
    assert other.tokens.tolist() == mine.tokens.tolist()
    assert other.learnt.tolist() == mine.learnt.tolist()


def test_marks_without_an_end_have_one():
    source = MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    assert learnt(encoder_of(tokenizer_of(source)), TWO) == ["Hello!<|end|>", "Yes.<|end|>"]


def test_marks_on_the_last_answer_alone_are_said():
    source = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    encoder = encoder_of(tokenizer_of(source))
    assert learnt(encoder, TWO) == ["Yes.<|end|>"]
    assert "marks no earlier answers: the last is learnt alone" in encoder.template.notes[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["plain", "alpaca-short"])
def test_every_answer_in_a_text_ends_with_eos(kind, prompt):
    tokenizer = KINDS[kind]()
    encoder = encoder_of(tokenizer, prompt)
    for texts in (("Hi", "Hello!", "And now?", "Yes."), ("a </s> b", "2 </s> 3", "c", "d")):
        [example] = encoder.examples([talk(*texts)], "rows", every_turn=True)
        ids = example.prompt + example.answer
        spans = [ids[start:stop] for start, stop in example.learnt]
        assert [span[-1] for span in spans] == [tokenizer.eos_token_id] * 2
        read = [tokenizer.decode(s[:-1], clean_up_tokenization_spaces=False).strip() for s in spans]
        if tokenizer.unk_token_id not in ids:
            assert read == [texts[1], texts[3]]
        assert ids.count(tokenizer.eos_token_id) == 2


def test_a_slow_tokenizer_that_joins_answers_with_what_stands_around_them_is_refused():
    tokenizer = KINDS["slow"]()
    encoder = Encoder(TextTemplate("{instruction}", "test"), tokenizer)
    reader = encoder._plain
    assert reader.within("a bc", [(1, 3)])[1] == [(1, 3)]
    reader.ids = lambda texts: [[len(text)] for text in texts]
    with pytest.raises(UserError, match="joins an earlier answer"):
        reader.within("a bc", [(1, 3)])


# --- examples -------------------------------------------------------------------------------------


def test_an_example_of_one_answer_is_that_of_answer():
    encoder = encoder_of(TOKENIZER, "plain")
    row = Row("w0 w1", output="w2")
    one, other = (Spool().tokenize("rows", [row], encoder, 12, on)[0] for on in ("turns", "answer"))
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.learnt.tolist() == other.learnt.tolist() == [False] * 3 + [True] * 2
    assert one.prompt_length == other.prompt_length


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=4),
        min_size=1,
    ),
    max_length=st.integers(2, 24),
)
def test_what_is_cut_or_dropped_of_conversations_is_counted(sizes, max_length):
    rows, wholes = [], []
    for turns in sizes:
        rows.append(talk(*(words(count) for turn in turns for count in turn)))
        tokens, mask = [BOS], [False]
        for place, (asked, said) in enumerate(turns):
            is_learnt = said > 0 or place == len(turns) - 1
            for count, flag in ((asked, False), (said, is_learnt)):
                tokens += range(3, 3 + count)
                mask += [flag] * count
            tokens.append(EOS)
            mask.append(is_learnt)
        last = max((n for n, flag in enumerate(mask[:max_length]) if flag), default=0)
        wholes.append((tokens, mask, last))
    kept = [(tokens[: last + 1], mask[: last + 1]) for tokens, mask, last in wholes if last]
    encoder = encoder_of(TOKENIZER, "plain")
    if not kept:
        with pytest.raises(UserError, match="no label is left"):
            Spool().tokenize("rows", rows, encoder, max_length, "turns")
        return
    found = Spool().tokenize("rows", rows, encoder, max_length, "turns")
    assert [(e.tokens.tolist(), e.learnt.tolist()) for e in found] == kept
    assert found.rows.tolist() == [n for n, (_, _, last) in enumerate(wholes) if last]
    assert found.lengths.tolist() == [len(tokens) for tokens, _ in kept]
    assert found.prompt_lengths.tolist() == [mask.index(True) for _, mask in kept]
    assert found.dropped == len(rows) - len(kept)
    assert found.truncated == sum(len(t) > max_length for t, _, last in wholes if last)
    assert found.unknown == 0


def test_a_mask_takes_up_no_room():
    encoder = encoder_of(TOKENIZER, "plain")
    found = Spool().tokenize("rows", [talk(*(["w1 w2"] * 8))] * 300, encoder, 512, "turns")
    held = (found.starts, found.lengths, found.prompt_lengths, found.rows)
    assert sum(array.nbytes for array in held) == 20 * len(found)
    assert found.spool._end == found.lengths.sum()
    assert found[0].tokens.min() >= 0


def test_the_digest_knows_what_is_learnt():
    encoder = encoder_of(TOKENIZER, "plain")
    one = Spool().tokenize("rows", [talk("w0", "w1", "w2", "w3")], encoder, 12, "turns")
    other = Spool().tokenize("rows", [talk("w0", "w1", "w2", "w3")], encoder, 12, "answer")
    assert one.spool.read(0, 4).tolist() == [~BOS, ~3, 4, EOS]
    assert one[0].tokens.tolist() == other[0].tokens.tolist()
    assert one.digest() != other.digest()


@torch.inference_mode()
def test_the_loss_of_a_conversation_is_that_of_its_answers(tiny_model):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    encoder = encoder_of(byte_tokenizer(), "plain")
    rows = [TWO, talk("Hi", "Hello!"), talk("One?", "1", "Two?", "22", "Three?", "333")]
    examples = list(Spool().tokenize("rows", rows, encoder, 512, "turns"))
    apart = [
        [
            Example(each.tokens[:stop], start, learnt_from(start, stop))
            for start, stop in encoded.learnt
        ]
        for each, encoded in zip(
            examples, encoder.examples(rows, "rows", every_turn=True), strict=True
        )
    ]
    sums, counts = batch_losses(network, examples)
    for total, count, parts in zip(sums, counts, apart, strict=True):
        by_part, number = batch_losses(network, parts)
        assert total == pytest.approx(by_part.sum(), rel=1e-5)
        assert count == number.sum()
    loss, number = batch_loss(network, collate(examples, pad_id=0))
    assert float(loss) == pytest.approx(sums.sum(), rel=1e-5)
    assert number == counts.sum() == sum(int(each.learnt.sum()) for each in examples)
    # And each answer alone, after the prompt that generation would give it.
    turns = [turn for row in rows for turn in answered_turns(row)]
    alone = Spool().tokenize("rows", turns, encoder, 512, "answer")
    assert batch_losses(network, list(alone))[0].sum() == pytest.approx(sums.sum(), rel=1e-5)


# --- runs -----------------------------------------------------------------------------------------


def two_turns(rows, more):
    """Conversations in which one task follows another."""
    return [
        {
            "conversations": [
                {"from": "human", "value": f"{one['instruction']} {one['input']}".strip()},
                {"from": "gpt", "value": one["output"]},
                {"from": "human", "value": f"{two['instruction']} {two['input']}".strip()},
                {"from": "gpt", "value": two["output"]},
            ]
        }
        for one, two in zip(rows, more, strict=True)
    ]


@pytest.fixture
def talks(tmp_path):
    """A folder with a small set of conversations for each of two clients, and test data."""
    rows, folder = tasks.test_rows(per_kind=4), tmp_path / "talks"
    folder.mkdir()
    for name, part in (("north", rows[:16]), ("south", rows[16:32]), ("test", rows[32:])):
        (folder / f"{name}.json").write_text(json.dumps(two_turns(part, part[::-1])))
    return folder


def chosen(folder, **more):
    files = {name: str(folder / f"{name}.json") for name in ("north", "south")}
    options = {
        "data.clients": files,
        "data.test": str(folder / "test.json"),
        "data.prompt": "plain",
        "data.max_length": 256,
        "data.loss_on": "turns",
        "federation.rounds": 1,
        "method": "fedit",
        "evaluation.metrics": ["loss", "exact_match"],
        "evaluation.by": "turn",
        "evaluation.max_new_tokens": 4,
    } | more
    return [f"{key}={json.dumps(value)}" for key, value in options.items()]


def test_a_run_learns_and_scores_every_turn(talks, experiment, hedgerow, tmp_path):
    path, run = experiment(), tmp_path / "run"
    result = hedgerow("run", path, *chosen(talks), "--out", run)
    assert result.code == 0, result.err
    assert "of which only the last counts" not in result.out
    row = rows_of(run)[-1]
    by = row["eval_loss_by"]
    assert set(by) == set(row["exact_match_by"]) == {"1", "2"}
    scores = json.loads(hedgerow("evaluate", run, "--json").out)
    assert scores["rows"] == 16
    assert scores["eval_loss"] == pytest.approx(row["eval_loss"])
    last = hedgerow("evaluate", run, "data.loss_on=answer", "evaluation.by=null", "--json")
    assert json.loads(last.out)["rows"] == 8
    result = hedgerow("report", run, "--out", tmp_path / "page.html")
    assert result.code == 0, result.err
    audit = hedgerow("audit", run, "--rows", "4")
    assert audit.code == 0, audit.err
    result = hedgerow("run", path, *chosen(talks), "federation.rounds=2", "--out", run, "--resume")
    assert result.code == 0, result.err
    changed = chosen(talks, **{"data.loss_on": "answer", "evaluation.by": None})
    result = hedgerow("run", path, *changed, "federation.rounds=3", "--out", run, "--resume")
    assert result.code == 2
    assert "data.loss_on" in result.err or "have changed" in result.err


@pytest.mark.parametrize(
    "more",
    [
        {"method": "fedkseed"},
        {"method": "ferret"},
        {
            "method": "fedit",
            "privacy": {"level": "example", "noise_multiplier": 1.0, "clip": 1.0, "delta": 1e-3},
        },
        {"method": "centralized"},
    ],
    ids=["zeroth order", "ferret", "private", "centralized"],
)
def test_every_way_of_training_takes_conversations(talks, experiment, hedgerow, tmp_path, more):
    options = chosen(talks, **{"evaluation.metrics": ["loss"]} | more)
    result = hedgerow("run", experiment(), *options, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert np.isfinite(rows_of(tmp_path / "run")[-1]["eval_loss"])


def test_turns_have_scores_of_their_own_only_where_they_are_learnt(
    talks, experiment, hedgerow, tmp_path
):
    options = chosen(talks, **{"data.loss_on": "answer"})
    result = hedgerow("run", experiment(), *options, "--out", tmp_path / "run")
    assert result.code == 2
    assert "`evaluation.by`: " in result.err
    assert "has no column 'turn'" in result.err
    assert "`data.loss_on: turns`" in result.err


@pytest.mark.slow
def test_the_second_turn_is_learnt_as_well_as_the_first(hedgerow, tmp_path):
    """Within three points of exact match, on questions each of which is asked in both turns."""
    draw = random.Random(0)

    def paired(rows):
        """Each row first in one conversation, and second in another."""
        return two_turns(rows, draw.sample(rows, len(rows)))

    for name, rows in tasks.clients().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(paired(rows)))
    (tmp_path / "test.json").write_text(json.dumps(paired(tasks.test_rows())))
    content = {
        "model": {"path": str(MODEL)},
        "data": {
            "clients": {name: f"{name}.json" for name in tasks.CLIENTS},
            "test": "test.json",
            "prompt": "plain",
            "max_length": 192,
            "loss_on": "turns",
        },
        "method": {"name": "flora", "ranks": [32, 32, 16, 16, 8, 8, 4, 2], "alpha": "2r"},
        "training": {"steps": 25, "batch_size": 8, "learning_rate": 1.0e-3},
        "federation": {"rounds": 16},
        "evaluation": {
            "every": 16,
            "metrics": ["loss", "exact_match"],
            "max_new_tokens": 24,
            "batch_size": 64,
            "by": "turn",
        },
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(content))
    result = hedgerow("run", tmp_path / "experiment.yaml", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    before, after = rows_of(tmp_path / "run")[0], rows_of(tmp_path / "run")[-1]
    print(before["exact_match_by"], after["exact_match_by"], after["eval_loss_by"])
    assert set(after["eval_loss_by"]) == {"1", "2"}
    assert before["exact_match"] <= 5
    by_turn = after["exact_match_by"]
    assert min(by_turn.values()) >= 60
    assert abs(by_turn["1"] - by_turn["2"]) <= 3
