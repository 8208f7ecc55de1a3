import pytest
import torch

from minigpt.analysis.embeddings import (
    EmbeddingProbe,
    SplitWordError,
    parse_analogy,
    tokens_or_reason,
)
from minigpt.core.settings import UserError
from minigpt.model import GPT, GPTConfig
from minigpt.tokenizer import Tokenizer
from tests.conftest import naming

WORDS = ("dad", "mom", "king", "queen", "man", "woman", "apple")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Whole words of WORDS with a space before them; "dad" and "mom" without one too."""
    stories = [f"dad {a} dad\nmom {b} mom\ndad" for a in WORDS for b in WORDS]
    return Tokenizer.train(stories * 3, 330)


@pytest.fixture
def matrix(tokenizer) -> torch.Tensor:
    """Each token on its own axis: cosines are zero until a test changes them."""
    return torch.eye(tokenizer.vocab_size, 400)


def ids(tokenizer: Tokenizer, *words: str) -> list[int]:
    tokens = [tokenizer.encode(word) for word in words]
    assert all(len(ids) == 1 for ids in tokens), tokens
    return [ids[0] for ids in tokens]


def test_neighbours_come_nearest_first_with_their_cosines(tokenizer, matrix):
    dad, mom, king = ids(tokenizer, " dad", " mom", " king")
    matrix[mom] = 3 * (0.8 * matrix[dad] + 0.6 * matrix[mom])  # the length does not matter
    matrix[king] = 0.6 * matrix[dad] + 0.8 * matrix[king]
    neighbours = EmbeddingProbe(matrix, tokenizer).neighbours("dad", k=2)
    assert neighbours == [("mom", pytest.approx(0.8)), ("king", pytest.approx(0.6))]


def test_word_is_the_token_with_a_space_before_it(tokenizer, matrix):
    spaced, bare = ids(tokenizer, " dad", "dad")
    probe = EmbeddingProbe(matrix, tokenizer)
    assert probe.token_id("dad") == probe.token_id(" dad ") == spaced != bare


def test_lower_case_piece_of_longer_words_is_not_a_word(matrix):
    tokenizer = Tokenizer.train(["start started starts Yes"] * 9, 290)
    bare = tokenizer.encode("start")
    probe = EmbeddingProbe(matrix, tokenizer)
    assert len(bare) == len(tokenizer.encode("Yes")) == 1 or len(bare) == 1
    with pytest.raises(SplitWordError, match=naming("tart")):
        probe.token_id("tart")


def test_neighbours_leave_out_the_word_and_second_spellings(tokenizer, matrix):
    spaced, bare, mom, bare_mom, king = ids(tokenizer, " dad", "dad", " mom", "mom", " king")
    for row, cosine in ((bare, 0.99), (bare_mom, 0.9), (mom, 0.8), (king, 0.6)):
        matrix[row] = cosine * matrix[spaced] + (1 - cosine**2) ** 0.5 * matrix[row]
    neighbours = EmbeddingProbe(matrix, tokenizer).neighbours("dad", k=2)
    assert neighbours == [("mom", pytest.approx(0.9)), ("king", pytest.approx(0.6))]


def test_analogy_adds_unit_vectors_and_leaves_out_its_three_words(tokenizer, matrix):
    king, man, woman, queen = ids(tokenizer, " king", " man", " woman", " queen")
    matrix[queen] = matrix[king] - matrix[man] + matrix[woman]
    matrix[king] *= 5
    matrix[man] *= 0.1
    (best, cosine), *_ = EmbeddingProbe(matrix, tokenizer).analogy("king", "man", "woman")
    assert best == "queen"
    assert cosine == pytest.approx(1.0)
    every = EmbeddingProbe(matrix, tokenizer).analogy("king", "man", "woman", k=1000)
    assert not {"king", "man", "woman"} & {word for word, _ in every}


@pytest.mark.parametrize(
    ("word", "message"), [("dadaists", naming("dadaists", "' dad'")), (" ", naming("empty"))]
)
def test_word_of_several_tokens_is_an_error_with_its_pieces(word, message, tokenizer, matrix):
    probe = EmbeddingProbe(matrix, tokenizer)
    for ask in (probe.neighbours, lambda w: probe.analogy("dad", w, "mom")):
        with pytest.raises(SplitWordError, match=message) as error:
            ask(word)
        assert "\n" not in str(error.value)


def test_probe_of_a_model_uses_its_embedding_matrix(tokenizer):
    net = GPT(GPTConfig(tokenizer.vocab_size, 8, d_model=16, n_layers=1, n_heads=2, d_ff=8))
    of_net = EmbeddingProbe(net, tokenizer).neighbours("dad")
    assert of_net == EmbeddingProbe(net.embedding.weight, tokenizer).neighbours("dad")
    assert len(of_net) == 5


@pytest.mark.parametrize(
    "text",
    [
        "princess - girl + boy",
        " princess −girl  +boy ",
        "princess-girl+boy",
        "princess + boy - girl",
        "princess – girl + boy",
    ],
)
def test_analogy_is_parsed_with_any_minus_sign_and_order(text):
    assert parse_analogy(text) == ("princess", "girl", "boy")


@pytest.mark.parametrize("text", ["", "princess", "a - b", "a - b - c", "a + b + c", "a b - c + d"])
def test_invalid_analogy_is_an_error_with_an_example(text):
    with pytest.raises(UserError, match=naming("princess - girl + boy")):
        parse_analogy(text)


def test_single_keeps_the_words_that_have_a_vector(tokenizer, matrix):
    probe = EmbeddingProbe(matrix, tokenizer)
    assert probe.single(["king", "dadaists", "dad"]) == ["king", "dad"]
    king, dad = ids(tokenizer, " king", " dad")
    assert probe.vectors(["king", "dad"]).equal(probe.unit[[king, dad]])


def test_tokens_or_reason_is_the_message_for_a_split_word(tokenizer, matrix):
    probe, words = EmbeddingProbe(matrix, tokenizer), ("king", "man", "woman")
    assert tokens_or_reason(probe.analogy, *words) == probe.analogy(*words)
    reason = tokens_or_reason(probe.neighbours, "grandpapa")
    assert isinstance(reason, str)
    assert "'grandpapa'" in reason
