"""Nearest neighbours and analogies of words, from their token embeddings.

>>> probe = EmbeddingProbe(run.load_model(), run.tokenizer)
>>> probe.neighbours("dad")
>>> probe.analogy("princess", minus="girl", plus="boy")
>>> probe.analogy(*parse_analogy("princess - girl + boy"))
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.core.settings import UserError
from minigpt.model import GPT
from minigpt.tokenizer import Tokenizer

Tokens = list[tuple[str, float]]  # tokens and their cosine similarities, nearest first

_MINUS = "−–-"  # minus sign, en dash, hyphen (last, for use in [...])
_WORD, _SIGN = rf"([^\s+{_MINUS}]+)", rf"([+{_MINUS}])"
_ANALOGY = re.compile(rf"\s*{_WORD}\s*{_SIGN}\s*{_WORD}\s*{_SIGN}\s*{_WORD}\s*")


class SplitWordError(UserError):
    """Error raised for a word that is not a single token and therefore has no embedding."""


def parse_analogy(text: str) -> tuple[str, str, str]:
    """Parse an analogy, such as `princess - girl + boy` or `princess + boy - girl`.

    Args:
        text: three words, one of them subtracted and one added.

    Returns:
        The words (word, minus, plus). For both examples, they are ("princess", "girl", "boy").

    Raises:
        UserError: `text` has another form.
    """
    if match := _ANALOGY.fullmatch(text):
        word, first, second, sign, third = match.groups()
        if sign == "+" != first:
            return word, second, third
        if first == "+" != sign:
            return word, third, second
    words = " ".join(text.split())
    raise UserError(f"'{words}' is not an analogy: type three words as in 'princess - girl + boy'")


def tokens_or_reason(query: Callable[..., Tokens], *words: str) -> Tokens | str:
    """Return `query(*words)`, or the error message if a word is not a single token.

    Args:
        query: a method of `EmbeddingProbe`.
        *words: arguments of the method.
    """
    try:
        return query(*words)
    except SplitWordError as error:
        return str(error)


class EmbeddingProbe:
    """Cosine similarities between token embeddings.

    A word is looked up as a token with a leading space (" dad"), because a word inside a story
    follows a space. If there is no such token, the token without a space is used ("Once"), but not
    for a lower-case word: a lower-case token without a space is a piece of a longer word, such as
    "art" in "started".

    Results have no leading spaces. If a word is a token both with and without the space, it appears
    once, with the higher cosine similarity. The words of the query are left out, and so are tokens
    that are only a part of a character.

    Args:
        net: a model, or an embedding matrix (V, d).
        tokenizer: the tokenizer of the model.
    """

    def __init__(self, net: GPT | Tensor, tokenizer: Tokenizer) -> None:
        matrix = net.embedding.weight if isinstance(net, GPT) else net
        rows = matrix[: tokenizer.vocab_size]  # a model may have capacity for more tokens
        self.unit = F.normalize(rows.detach().float().cpu(), dim=-1)  # (V, d), rows of length 1
        self.tokenizer = tokenizer

    def neighbours(self, word: str, k: int = 5) -> Tokens:
        """Return the `k` tokens nearest to `word` with their cosine similarities, nearest first.

        Args:
            word: the word, with or without a leading space.
            k: number of tokens.

        Raises:
            SplitWordError: `word` is not a single token.
        """
        return self._nearest(self.vectors([word])[0], k, leave_out={word.strip()})

    def analogy(self, word: str, minus: str, plus: str, k: int = 5) -> Tokens:
        """Return the `k` tokens nearest to `word` − `minus` + `plus`, nearest first.

        The three vectors are normalised to length one before they are added (Mikolov, Yih and
        Zweig 2013, "Linguistic Regularities in Continuous Space Word Representations", section 4).

        Args:
            word: first word of the analogy, such as princess.
            minus: word to subtract, such as girl.
            plus: word to add, such as boy.
            k: number of tokens.

        Returns:
            The tokens with their cosine similarities.

        Raises:
            SplitWordError: one of the three words is not a single token.
        """
        a, b, c = self.vectors((word, minus, plus))
        return self._nearest(a - b + c, k, leave_out={w.strip() for w in (word, minus, plus)})

    def single(self, words: Iterable[str]) -> list[str]:
        """Return those of `words` that are single tokens, in the same order."""
        singles = []
        for word in words:
            with contextlib.suppress(SplitWordError):
                self.token_id(word)
                singles.append(word)
        return singles

    def vectors(self, words: Iterable[str]) -> Tensor:
        """Return the embeddings (n, d) of n words, normalised to length one.

        Args:
            words: the words, each a single token.

        Raises:
            SplitWordError: one of the words is not a single token.
        """
        return self.unit[[self.token_id(word) for word in words]]

    def token_id(self, word: str) -> int:
        """Return the id of the single token for `word`.

        Args:
            word: the word, with or without a leading space.

        Raises:
            SplitWordError: `word` is empty or consists of several tokens.
        """
        word = word.strip()
        if not word:
            raise SplitWordError("an empty word has no embedding; give a word such as dad")
        spaced, bare = self.tokenizer.encode(f" {word}"), self.tokenizer.encode(word)
        for ids in (spaced,) if word.islower() else (spaced, bare):
            if len(ids) == 1:
                return ids[0]
        pieces = " + ".join(f"'{self.tokenizer.token(i)}'" for i in spaced)
        problem = f"'{word}' has no embedding of its own, since it is {len(spaced)} tokens"
        raise SplitWordError(f"{problem} ({pieces}); give a more common word")

    def _nearest(self, target: Tensor, k: int, leave_out: set[str]) -> Tokens:
        cosines = self.unit @ F.normalize(target, dim=-1)  # (V,)
        nearest: dict[str, float] = {}
        for token_id in torch.argsort(cosines, descending=True).tolist():
            if len(nearest) == k:
                break
            text = self.tokenizer.token(token_id).removeprefix(" ")
            is_part = "\N{REPLACEMENT CHARACTER}" in text  # the token is only a part of a character
            if not is_part and text not in leave_out and text not in nearest:
                nearest[text] = cosines[token_id].item()
        return list(nearest.items())
