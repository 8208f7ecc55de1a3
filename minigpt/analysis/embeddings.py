"""Nearest neighbours and analogies of words in the token embedding.

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

Tokens = list[tuple[str, float]]  # with their cosines, nearest first

_MINUS = "−–-"  # minus sign, en dash, hyphen (last, as it goes into [...])
_WORD, _SIGN = rf"([^\s+{_MINUS}]+)", rf"([+{_MINUS}])"
_ANALOGY = re.compile(rf"\s*{_WORD}\s*{_SIGN}\s*{_WORD}\s*{_SIGN}\s*{_WORD}\s*")


class SplitWordError(UserError):
    """The tokenizer has no single token for a word, so the word has no embedding of its own."""


def parse_analogy(text: str) -> tuple[str, str, str]:
    """Return `princess - girl + boy` as (word, minus, plus); `princess + boy - girl` is the same.

    Raises:
        UserError: `text` is not three words, one of them subtracted and one added.
    """
    match = _ANALOGY.fullmatch(text)
    if match:
        word, first, second, sign, third = match.groups()
        if sign == "+" != first:
            return word, second, third
        if first == "+" != sign:
            return word, third, second
    words = " ".join(text.split())
    raise UserError(f"'{words}' is not an analogy of three words such as 'princess - girl + boy'")


def tokens_or_reason(query: Callable[..., Tokens], *words: str) -> Tokens | str:
    """Return `query(*words)`, or why there is no answer, where a word is not a single token."""
    try:
        return query(*words)
    except SplitWordError as error:
        return str(error)


class EmbeddingProbe:
    """Cosine geometry of the token embedding.

    A word stands for the token that it is inside a story, with a space before it (" dad"), or,
    where there is none, for the bare token ("Once"). In lower case there is no such fallback, as
    bare tokens are pieces of longer words: "art" of "started". Results have no space, each word
    once at its best cosine, without the words of the query in either spelling.
    """

    def __init__(self, net: GPT | Tensor, tokenizer: Tokenizer) -> None:
        """`net`: a model, or an embedding matrix (V, d) itself."""
        matrix = net.embedding.weight if isinstance(net, GPT) else net
        known = matrix[: tokenizer.vocab_size]  # a model may have room for more
        self.unit = F.normalize(known.detach().float().cpu(), dim=-1)  # (V, d), rows of length 1
        self.tokenizer = tokenizer

    def neighbours(self, word: str, k: int = 5) -> Tokens:
        """Return the k nearest tokens to `word` with their cosines, nearest first.

        Raises:
            SplitWordError: `word` is not a single token.
        """
        return self._nearest(self.vectors([word])[0], k, leave_out={word.strip()})

    def analogy(self, word: str, minus: str, plus: str, k: int = 5) -> Tokens:
        """Return the k tokens nearest to `word` − `minus` + `plus`, with their cosines.

        The three vectors have length one before they are added (Mikolov, Yih and Zweig 2013,
        section 4).

        Raises:
            SplitWordError: one of the three is not a single token.
        """
        a, b, c = self.vectors((word, minus, plus))
        return self._nearest(a - b + c, k, leave_out={w.strip() for w in (word, minus, plus)})

    def single(self, words: Iterable[str]) -> list[str]:
        """Return those of `words` that are single tokens, in their order."""
        singles = []
        for word in words:
            with contextlib.suppress(SplitWordError):
                self.token_id(word)
                singles.append(word)
        return singles

    def vectors(self, words: Iterable[str]) -> Tensor:
        """Return the unit embeddings (n, d) of n words.

        Raises:
            SplitWordError: one of them is not a single token.
        """
        return self.unit[[self.token_id(word) for word in words]]

    def token_id(self, word: str) -> int:
        """Return the id of the single token that `word` is.

        Raises:
            SplitWordError: `word` is several tokens, or empty.
        """
        word = word.strip()
        if not word:
            raise SplitWordError("an empty word has no embedding; give a word such as dad")
        spaced, bare = self.tokenizer.encode(f" {word}"), self.tokenizer.encode(word)
        for ids in (spaced,) if word.islower() else (spaced, bare):
            if len(ids) == 1:
                return ids[0]
        pieces = " + ".join(f"'{self.tokenizer.token(i)}'" for i in spaced)
        problem = f"'{word}' is {len(spaced)} tokens to this tokenizer ({pieces})"
        raise SplitWordError(f"{problem} and has no embedding of its own; give a more common word")

    def _nearest(self, target: Tensor, k: int, leave_out: set[str]) -> Tokens:
        cosines = self.unit @ F.normalize(target, dim=-1)  # (V,)
        nearest: dict[str, float] = {}
        for token_id in torch.argsort(cosines, descending=True).tolist():
            if len(nearest) == k:
                break
            text = self.tokenizer.token(token_id).removeprefix(" ")
            if text not in leave_out and text not in nearest:
                nearest[text] = cosines[token_id].item()
        return list(nearest.items())
