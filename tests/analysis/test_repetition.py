import pytest

from minigpt.analysis.repetition import measure, ngrams, split_words


def test_words_are_compared_without_case_and_punctuation():
    assert split_words('"Don\'t go," said ÉLOÏSE — 2 cats!') == ["don't", "go", "said", "éloïse", "2", "cats"]  # fmt: skip  # noqa: E501


def test_ngrams_are_all_sequences_of_n_words():
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert ngrams(["a", "b"], 3) == []


def test_shares_are_those_counted_by_hand():
    # 4-grams of the first text: abca bcab cabc abca; of the second: abcd.
    (repetition,), n = measure([["A b c a b c a.", "a b c d"]], ["x y", "say: B, C; a b!"])
    assert n == 2
    assert repetition.words == pytest.approx(5.5)
    assert repetition.distinct == pytest.approx((4 / 11, 4 / 9, 4 / 7))
    assert repetition.repeated == pytest.approx(1 / 5)  # the second abca
    assert repetition.novel == pytest.approx(4 / 5)  # the training has bcab


def test_shares_of_no_words_and_no_training_stories_are_none():
    (empty, short), n = measure([[], ["one two"]], [])
    assert n == 0
    assert (empty.words, empty.distinct, empty.repeated) == (0, (None, None, None), None)
    assert short.distinct == (1, 1, None)
    assert short.novel is None


def test_training_stories_are_streamed():
    def endless():
        for i in range(30_000):
            yield f"story {i} goes on and on"

    (repetition,), n = measure([["story 29999 goes on", "story 30000 goes on"]], endless())
    assert n == 30_000
    assert repetition.novel == pytest.approx(1 / 2)
