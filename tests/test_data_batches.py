from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hedgerow.data.batches import batches, collate, epoch
from hedgerow.data.tokens import Example

lengths_of = st.lists(st.integers(1, 500), min_size=1, max_size=120).map(np.array)
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**32)


@given(lengths=lengths_of, batch_size=sizes, count=st.integers(1, 80), seed=seeds)
def test_everyone_has_a_turn_before_anyone_has_two(lengths, batch_size, count, seed):
    drawn = batches(lengths, batch_size, count, np.random.default_rng(seed))
    assert [batch.shape for batch in drawn] == [(batch_size,)] * count
    turns = Counter(np.concatenate(drawn).tolist())
    assert set(turns) <= set(range(len(lengths)))
    fewest = min(turns[i] for i in range(len(lengths)))
    assert max(turns.values()) - fewest <= 1


@given(lengths=lengths_of, batch_size=sizes, count=st.integers(1, 80), seed=seeds)
def test_an_example_meets_itself_only_between_permutations(lengths, batch_size, count, seed):
    drawn = batches(lengths, batch_size, count, np.random.default_rng(seed))
    repeats = sum(len(set(batch.tolist())) < batch_size for batch in drawn)
    if batch_size <= len(lengths):
        assert repeats <= count * batch_size // len(lengths)


@given(lengths=lengths_of, batch_size=sizes, seed=seeds)
def test_an_epoch_has_each_example_once(lengths, batch_size, seed):
    drawn = epoch(lengths, batch_size, np.random.default_rng(seed))
    assert sorted(np.concatenate(drawn).tolist()) == list(range(len(lengths)))
    assert len(drawn) == -(-len(lengths) // batch_size)
    assert all(len(batch) == batch_size for batch in drawn[:-1])


def test_order_is_seeded_random_and_saves_padding():
    lengths = np.random.default_rng(0).geometric(0.01, size=2000)

    def padding(drawn):
        padded = sum(lengths[batch].max() * len(batch) for batch in drawn)
        return 1 - sum(lengths[batch].sum() for batch in drawn) / padded

    for draw in [
        lambda seed: epoch(lengths, 8, np.random.default_rng(seed)),
        lambda seed: batches(lengths, 8, 50, np.random.default_rng(seed)),
    ]:
        drawn, again, other = draw(1), draw(1), draw(2)
        assert np.array_equal(drawn, again)
        assert not np.array_equal(drawn, other)
        assert padding(drawn) < 0.1
        means = [lengths[batch].mean() for batch in drawn[:50]]
        assert means != sorted(means)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=9))
def test_collate(masks):
    examples = [
        Example(
            np.arange(10, 10 + len(mask), dtype=np.int32), prompt_length=0, learnt=np.array(mask)
        )
        for mask in masks
    ]
    batch = {name: tensor.tolist() for name, tensor in collate(examples, pad_id=0).items()}
    assert list(batch) == ["input_ids", "labels"]
    longest = max(map(len, masks))
    for k, mask in enumerate(masks):
        padding = longest - len(mask)
        assert batch["input_ids"][k] == [*range(10, 10 + len(mask)), *[0] * padding]
        labels = [10 + n if is_learnt else -100 for n, is_learnt in enumerate(mask)]
        assert batch["labels"][k] == labels + [-100] * padding
