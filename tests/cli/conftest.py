"""A probe of an embedding in which king − man + woman is queen."""

import pytest
import torch

from minigpt.analysis.embeddings import EmbeddingProbe
from minigpt.tokenizer import Tokenizer

WORDS = ("king", "queen", "man", "woman", "apple")


@pytest.fixture(scope="module")
def probe() -> EmbeddingProbe:
    tokenizer = Tokenizer.train([f"the {a} {b}\n" for a in WORDS for b in WORDS] * 3, 330)
    king, man, woman, queen = (
        tokenizer.encode(f" {w}")[0] for w in ("king", "man", "woman", "queen")
    )
    matrix = torch.eye(tokenizer.vocab_size, 400)
    matrix[queen] = matrix[king] - matrix[man] + matrix[woman]
    return EmbeddingProbe(matrix, tokenizer)
