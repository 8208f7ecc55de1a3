import errno
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, trainers

from minigpt import tokenizer as tokenizer_module
from minigpt.core.settings import UserError
from minigpt.data.files import read_pieces
from minigpt.exporting.formats import write_hf
from minigpt.model import GPT, GPTConfig
from minigpt.tokenizer import END_OF_TEXT, Tokenizer, cut_texts
from tests.conftest import ROOT, naming

STORIES = [
    "Once upon a time there was a little dog named Max. Max liked to play.\n\nOne day he ran.",
    "Once there was a girl. She said, “Hello, Max!” and the dog said nothing at all.",
    "The girl and the dog don't run; they walk to the park, 12 times a day.",
] * 3

# Words, spaces of many kinds and control characters, beside any character there is.
TEXTS = st.text(
    st.one_of(
        st.sampled_from(list("aOMx1'., \n\t\r\x00\x1c\x1f\x7f\x85\xa0\u2003\u2028\u3000é日😀")),
        st.characters(exclude_categories=["Cs"]),
    )
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(STORIES, 300)


def test_training_twice_gives_the_same_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a.json")
    Tokenizer.train(iter(STORIES), 300).save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert Tokenizer.train(STORIES, 299).fingerprint != tokenizer.fingerprint


def test_vocabulary_counts_bytes_merges_and_end_of_text(tokenizer):
    assert tokenizer.vocab_size == 300
    assert tokenizer.end_of_text == 0
    assert tokenizer.token(0) == END_OF_TEXT
    assert " dog" in {tokenizer.token(id) for id in range(tokenizer.vocab_size)}
    assert Tokenizer.train([], 257).vocab_size == 257


def test_few_words_give_a_smaller_vocabulary_that_says_so():
    assert Tokenizer.train(["aab"], 1000).vocab_size < 300


@settings(deadline=None)
@given(TEXTS)
def test_any_text_comes_back_from_its_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 0 not in ids


@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}b", f" {END_OF_TEXT}\n", "\x00", ""])
def test_text_that_spells_end_of_text_is_ordinary_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert 0 not in ids
    assert tokenizer.decode(ids) == text


@settings(deadline=None)
@given(st.lists(TEXTS, max_size=5))
def test_stories_in_a_row_have_the_ids_of_each_and_end_of_text_behind(tokenizer, stories):
    expected = [id for ids in tokenizer.encode_batch(stories) for id in [*ids, 0]]
    assert tokenizer.encode_stories(stories).tolist() == expected
    assert tokenizer.encode_stories(stories).tolist() == expected  # now from known words


def test_texts_are_cut_only_where_the_library_ends_a_pre_token(monkeypatch):
    split = tokenizer_module._untrained().pre_tokenizer.pre_tokenize_str
    codes = [*range(0x3100), *range(0x3100, sys.maxunicode + 1, 5)]  # a fifth of the rest
    characters = [chr(code) for code in codes if not 0xD800 <= code < 0xE000]
    for first in range(0, len(characters), 10_000):
        text = "".join(f"{c}.a{c}b {c}" for c in characters[first : first + 10_000])
        ends = {end for _, (_, end) in split(text)}
        cuts = {match.start() for match in tokenizer_module._CUT.finditer(text)}
        assert cuts - {0} <= ends


@settings(deadline=None)
@given(st.lists(st.tuples(TEXTS, st.booleans())))
def test_pieces_have_the_ids_of_the_whole_text(tokenizer, texts):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("minigpt.tokenizer._PIECE", 3)
        pieces = list(cut_texts([*texts, ("", True)]))
    stories = [""]
    for text, ends in texts:
        stories[-1] += text
        stories += [""] if ends else []
    expected = [id for ids in tokenizer.encode_batch(stories) for id in [*ids, 0]]
    assert tokenizer.encode_pieces(pieces).tolist() == expected


@pytest.mark.parametrize("character", ["a", "字", "=", "\n"])
def test_a_run_without_a_boundary_is_cut_after_65536_characters(tokenizer, character):
    lengths = [2048 + 65536, 2048 + 65536, 1000]
    text = character * sum(lengths)
    for size in (len(text), 50_000):  # however the text comes
        starts = range(0, len(text), size)
        parts = [(text[start : start + size], start + size >= len(text)) for start in starts]
        pieces = list(cut_texts(parts))
        assert [len(piece) for piece, _ in pieces] == lengths
        assert [ends for _, ends in pieces] == [False, False, True]
    short = text[: 2048 + 65536]
    assert tokenizer.encode_stories([short]).tolist() == [*tokenizer.encode(short), 0]
    assert tokenizer.decode(tokenizer.encode_stories([text])[:-1].tolist()) == text


def test_learning_stops_when_enough_distinct_pre_tokens_are_seen(monkeypatch):
    def stories(n):
        for number in range(n):
            reads.append(number)
            yield f"word{'abcdefghij'[number % 10]}{number:07} " * 20

    reads: list[int] = []
    monkeypatch.setattr("minigpt.tokenizer._DISTINCT_BYTES", 10_000)
    monkeypatch.setattr("minigpt.tokenizer._COUNTED_CHARACTERS", 1000)
    tokenizer = Tokenizer.train(stories(5000), 400)
    assert 900 < len(reads) < 2000  # " 0000123": 8 bytes, and the letters
    assert Tokenizer.train(stories(50_000), 400).fingerprint == tokenizer.fingerprint


def test_english_gives_the_tokenizer_that_the_library_learns_from_whole_stories():
    stories = [text for text, _ in read_pieces(ROOT / "tests/golden/stories.txt.xz")]
    stories.append("\n\n".join(stories))
    library = tokenizer_module._untrained()
    library.train_from_iterator(
        stories,
        trainers.BpeTrainer(
            vocab_size=3000,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert Tokenizer.train(stories, 3000).fingerprint == Tokenizer(library).fingerprint


def test_words_are_forgotten_before_they_fill_the_memory(tokenizer, monkeypatch):
    monkeypatch.setattr("minigpt.tokenizer._MAX_CACHED_WORDS", 10)
    for start in range(0, 200, 20):
        story = " ".join(str(n) for n in range(start, start + 20)) + " " + "long" * 20
        assert tokenizer.encode_stories([story]).tolist() == [*tokenizer.encode(story), 0]
        words = tokenizer._caches[-1]  # the one that was used last
        assert len(words) <= 10 + 22
        assert max(len(word or "") for word in words) <= 32


def test_words_at_both_sides_of_a_line_end_are_remembered_one_by_one(tokenizer):
    story = "\n\n".join(f"One {n}" for n in range(50)) + "\n\n\nTwo 7\n Three"
    assert tokenizer.encode_stories([story]).tolist() == [*tokenizer.encode(story), 0]
    words = tokenizer._caches[-1]
    assert {"49", "7", " Two"} <= words.keys()
    assert not any("\n" in word.strip() for word in words)


def test_threads_that_encode_at_the_same_time_get_the_same_ids(tokenizer):
    texts = [" ".join(f"{name}{n % 97}" for n in range(5000)) for name in ("one", "two", "six")] * 4
    with ThreadPoolExecutor(len(texts)) as pool:
        encoded = pool.map(lambda text: tokenizer.encode_stories([text]).tolist(), texts)
    assert list(encoded) == [[*tokenizer.encode(text), 0] for text in texts]


@pytest.mark.parametrize("use", [Tokenizer.encode, Tokenizer.encode_stories, Tokenizer.train])
def test_half_a_surrogate_pair_is_refused_in_one_line(tokenizer, use):
    text = "not \ud83d fine"
    arguments = {
        Tokenizer.encode: (tokenizer, text),
        Tokenizer.encode_stories: (tokenizer, ["fine", text]),
        Tokenizer.train: (["fine", text], 300),
    }
    with pytest.raises(UserError, match="surrogate") as error:
        use(*arguments[use])
    assert "\n" not in str(error.value)
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize("vocab_size", [0, 256, 65_537])
def test_vocabulary_sizes_out_of_range_are_refused(vocab_size):
    with pytest.raises(UserError, match=naming(str(vocab_size), "257", "65536")):
        Tokenizer.train(STORIES, vocab_size)


def test_what_a_corpus_raises_while_training_is_not_swallowed():
    def stories():
        yield "a story"
        raise UserError("byte 12 is not UTF-8")

    with pytest.raises(UserError, match="byte 12"):
        Tokenizer.train(stories(), 300)


def test_a_saved_tokenizer_is_the_same_one(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(f"the dog{END_OF_TEXT}") == tokenizer.encode(f"the dog{END_OF_TEXT}")
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_tokenizer_of_an_hf_export_is_the_same_one(tokenizer, tmp_path):
    net = GPT(GPTConfig(tokenizer.vocab_size, 8, d_model=4, n_layers=1, n_heads=1, d_ff=4))
    write_hf(net, tokenizer, tmp_path)
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("the dog") == tokenizer.encode("the dog")


def test_files_that_are_not_our_tokenizer_are_refused_in_one_line(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    whole = path.read_text(encoding="utf-8")
    other = json.loads(whole)
    other["pre_tokenizer"]["add_prefix_space"] = True
    without = json.loads(whole)
    without["added_tokens"] = []
    for content, names in [
        (None, [os.strerror(errno.ENOENT)]),
        (b"\xff\xfe", []),
        (whole[: len(whole) // 2].encode(), []),
        (json.dumps(other).encode(), [END_OF_TEXT]),
        (json.dumps(without).encode(), [END_OF_TEXT]),
    ]:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=naming(str(path), *names)) as error:
            Tokenizer.load(path)
        assert "\n" not in str(error.value)
