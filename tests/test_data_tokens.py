import errno
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers import BOS, EOS, TOKENIZER, UNKNOWN, build, words

from hedgerow.data.encoding import Encoder
from hedgerow.data.kept import KeptTokens
from hedgerow.data.rows import Row
from hedgerow.data.templates import TextTemplate
from hedgerow.data.tokens import Spool, Tokenized
from hedgerow.errors import UserError

TEMPLATE = TextTemplate("{instruction}", "test")


def row(prompt, answer):
    return Row(words(prompt), output=words(answer))


def tokenize(rows, spool=None, tokenizer=TOKENIZER, max_length=12, loss_on="answer"):
    encoder = Encoder(TEMPLATE, tokenizer)
    return (spool or Spool()).tokenize("ward", rows, encoder, max_length, loss_on)


def test_half_a_character_is_named_with_its_row():
    rows = [row(2, 1), Row("w0", output="w1 \ud83d", number=7)]
    with pytest.raises(UserError, match=r"ward: row 7: its text holds half a character \(U\+D83D"):
        tokenize(rows)


def test_an_example():
    example = tokenize([Row("w0 w1", output="w7")])[0]
    assert example.tokens.tolist() == [BOS, 3, 4, 10, EOS]
    assert example.tokens.dtype == np.int32
    assert example.prompt_length == 3
    assert example.learnt.tolist() == [False] * 3 + [True] * 2
    example = tokenize([Row("w0 w1", output="w7")], loss_on="all")[0]
    assert example.prompt_length == 3
    assert example.learnt.all()


def test_eos_stands_at_the_end_and_nowhere_else():
    tokenizer = build("<s> $A </s>")
    assert tokenize([row(2, 1)], tokenizer=tokenizer)[0].tokens.tolist() == [BOS, 3, 4, 3, EOS]
    answer = Row("w0", output="w1 </s>")
    tokenized = tokenize([answer, row(1, 1)])
    assert tokenized[0].tokens.tolist() == [BOS, 3, 4, UNKNOWN, EOS]
    assert (tokenized.spelt, tokenized.unknown) == (1, 1)


def test_a_template_with_special_tokens_gets_no_others():
    template = TextTemplate("<s> {instruction}", "test")
    tokenized = Spool().tokenize("ward", [row(1, 1)], Encoder(template, TOKENIZER), 12, "answer")
    assert tokenized[0].tokens.tolist() == [BOS, 3, 3, EOS]


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), min_size=1),
    max_length=st.integers(2, 14),
)
def test_what_is_cut_or_dropped_is_counted(sizes, max_length):
    whole = [(1 + prompt, answer + 1) for prompt, answer in sizes]  # with BOS, with EOS
    kept = [(p, a) for p, a in whole if p < max_length]
    rows = [row(*size) for size in sizes]
    if not kept:
        with pytest.raises(UserError, match=f"the shortest has {min(p for p, _ in whole)} tokens"):
            tokenize(rows, max_length=max_length)
        return
    tokenized = tokenize(rows, max_length=max_length)
    assert len(tokenized) == len(kept)
    assert tokenized.rows.tolist() == [i for i, (p, _) in enumerate(whole) if p < max_length]
    assert tokenized.dropped == len(sizes) - len(kept)
    assert tokenized.truncated == sum(p + a > max_length for p, a in kept)
    assert tokenized.lengths.tolist() == [min(p + a, max_length) for p, a in kept]
    for example, (prompt, answer) in zip(tokenized, kept, strict=True):
        text = [BOS, *range(3, 2 + prompt), *range(3, 2 + answer), EOS]
        assert example.tokens.tolist() == text[:max_length]
        assert example.prompt_length == prompt < len(example.tokens)


def test_many_clients_share_a_spool():
    spool = Spool()
    clients = [[row(i % 7, i % 5) for i in range(k, k + 1200)] for k in range(3)]
    tokenized = [tokenize(rows, spool) for rows in clients]
    pooled = Tokenized.concatenate(tokenized)
    alone = tokenize([row for rows in clients for row in rows])
    assert len(pooled) == len(alone) == 3600
    with ThreadPoolExecutor(8) as threads:
        examples = list(threads.map(pooled.__getitem__, range(len(pooled))))
    for example, other in zip(examples, alone, strict=True):
        assert example.tokens.tolist() == other.tokens.tolist()
        assert example.prompt_length == other.prompt_length
    with pytest.raises(ValueError, match="one spool"):
        Tokenized.concatenate([tokenized[0], alone])


def test_threads_may_write_one_spool():
    spool = Spool()
    with ThreadPoolExecutor(4) as threads:
        tokenized = list(threads.map(lambda k: tokenize([row(k, 2)] * 20, spool), range(8)))
    for k, client in enumerate(tokenized):
        assert {tuple(e.tokens) for e in client} == {(BOS, *range(3, 3 + k), 3, 4, EOS)}


def test_tokenized_examples_outlive_their_spool_and_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tokenized = tokenize([row(1, 1)])
    assert tokenized[0].tokens.tolist() == [BOS, 3, 3, EOS]
    assert list(tmp_path.iterdir()) == []


def test_long_texts_bring_no_warning(capfd, caplog):
    tokenize([row(2, 9)])
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_mistakes(monkeypatch):
    with pytest.raises(UserError, match="ward: has no examples"):
        tokenize([])
    with pytest.raises(UserError, match=r"ward: no label is left.*`data\.max_length` \(12\)"):
        tokenize([row(30, 1), row(11, 1)])
    with pytest.raises(UserError, match="has no EOS token"):
        tokenize([row(1, 1)], tokenizer=build(eos_token=None))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"cannot hold the tokens .*TMPDIR"):
        tokenize([row(1, 1)])


PAIRS = [Row("w0 w1", output="w7", other="w5 w6"), Row("w2", output="w3", desirable=False)]


def kept_of(folder, rows, *, paired=False):
    encoder = Encoder(TEMPLATE, TOKENIZER)
    rows = [replace(row, other=row.other or "w1") for row in rows] if paired else rows
    shard = Spool().tokenize("ward", rows, encoder, 12, "answer", paired=paired)
    shard = replace(shard, source_digest="a")
    KeptTokens(folder / "tokens").save({"north": tokenize([row(1, 1)]), "ward": shard})
    return shard


@pytest.mark.parametrize("paired", [False, True])
def test_tokens_that_are_kept_are_those_that_were_made(tmp_path, paired):
    shard = kept_of(tmp_path, PAIRS, paired=paired)
    kept = KeptTokens(tmp_path / "tokens")
    found = kept.find("ward", "a", Spool())
    kept.forget()
    assert list(tmp_path.iterdir()) == []
    assert (found.digest(), found.source_digest) == (shard.digest(), "a")
    assert found.desirable.tolist() == [True, False]
    assert found.rows.tolist() == [0, 1]
    for index in range(2):
        assert found[index].tokens.tolist() == shard[index].tokens.tolist()
    if paired:
        assert found.other[1].tokens.tolist() == shard.other[1].tokens.tolist()


def test_tokens_of_other_rows_or_clients_are_not_found(tmp_path):
    kept_of(tmp_path, PAIRS)
    kept = KeptTokens(tmp_path / "tokens")
    assert kept.find("ward", "b", Spool()) is None
    assert kept.find("nobody", "a", Spool()) is None
    assert KeptTokens(tmp_path / "nowhere").find("ward", "a", Spool()) is None


@pytest.mark.parametrize("name", ["spool", "examples", "clients.json"])
@given(data=st.data())
def test_kept_tokens_that_are_damaged_are_not_found(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("kept")
    shard = kept_of(folder, PAIRS)
    file = folder / "tokens" / name
    content = file.read_bytes()
    damage = data.draw(st.sampled_from(["gone", "empty", "cut", "longer", "flipped"]))
    if damage == "gone":
        file.unlink()
    elif damage == "flipped":
        place = data.draw(st.integers(0, len(content) - 1))
        bit = 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
    else:
        cut = data.draw(st.integers(1, len(content) - 1))
        file.write_bytes({"empty": b"", "cut": content[:cut], "longer": content + b"1"}[damage])
    found = KeptTokens(folder / "tokens").find("ward", "a", Spool())
    # What is not of this client may be damaged; whatever is found is what was kept.
    if found is not None:
        assert name == "spool"
        assert found.digest() == shard.digest()


def test_kept_tokens_are_for_their_owner_alone(tmp_path):
    kept_of(tmp_path, PAIRS)
    assert (tmp_path / "tokens").stat().st_mode & 0o777 == 0o700
