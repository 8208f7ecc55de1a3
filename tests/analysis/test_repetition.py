import pytest

from minigpt.analysis.repetition import measure, ngrams, split_words


def test_words_are_compared_without_case_and_punctuation():
    assert split_words('"Don\'t go," said ÉLOÏSE — 2 cats!') == ["don't", "go", "said", "éloïse", "2", "cats"]  # fmt: skip  # noqa: E501


def test_ngrams_are_all_the_runs_of_n_words():
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert ngrams(["a", "b"], 3) == []


def test_shares_are_those_counted_by_hand():
    # 4-grams of the first text: abca bcab cabc abca; of the second: abcd.
    (found,), n = measure([["A b c a b c a.", "a b c d"]], ["x y", "say: B, C; a b!"])
    assert n == 2
    assert found.words == pytest.approx(5.5)
    assert found.distinct == pytest.approx((4 / 11, 4 / 9, 4 / 7))
    assert found.repeated == pytest.approx(1 / 5)  # the second abca; abcd is new in its own text
    assert found.novel == pytest.approx(4 / 5)  # the training has bcab


def test_a_group_without_words_and_a_training_without_stories_give_no_shares():
    (empty, short), n = measure([[], ["one two"]], [])
    assert n == 0
    assert (empty.words, empty.distinct, empty.repeated) == (0, (None, None, None), None)
    assert short.distinct == (1, 1, None)
    assert short.novel is None


def test_training_stories_are_streamed_past_and_not_kept():
    def endless():
        for i in range(30_000):
            yield f"story {i} goes on and on"

    (found,), n = measure([["story 29999 goes on", "story 30000 goes on"]], endless())
    assert n == 30_000
    assert found.novel == pytest.approx(1 / 2)
