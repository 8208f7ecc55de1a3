"""Synthetic texts in scripts that a tokenizer made for English handles badly.

The words consist of random letters, and their frequencies follow Zipf's law, as in real text. They
are separated by the punctuation and white space of the script.
"""

from __future__ import annotations

import base64
import string
from collections.abc import Iterator

import numpy as np

# Letters, word separator, and marks that end a clause.
SCRIPTS = {
    "chinese": ("".join(map(chr, range(0x4E00, 0x5800))), "", "，，，、。！\n"),
    "japanese": (
        "".join(map(chr, [*range(0x3041, 0x3097), *range(0x4E00, 0x5000)])),
        "",
        "、、。\n",
    ),
    "thai": ("".join(map(chr, [*range(0x0E01, 0x0E3B), *range(0x0E40, 0x0E4F)])), "", " "),
    "arabic": ("".join(map(chr, range(0x0621, 0x064B))), " ", "،.؟\n"),
    "hindi": ("".join(map(chr, range(0x0904, 0x094E))), " ", ",।\n"),
    "words": (string.ascii_lowercase, " ", ",."),
    "minified": (string.ascii_letters + "_$", "", "(){};,.=+!&|[]:?'\""),
}
TEXTS = [*SCRIPTS, "base64"]
_CLAUSE, _LENGTHS = 7, (1, 2, 2, 2, 3, 4)  # mean words per clause, characters per word


def stories(name: str, n_bytes: float, story_bytes: int = 2000, seed: int = 1) -> Iterator[str]:
    """Yield stories in script `name`: in UTF-8 `story_bytes` each and about `n_bytes` in total."""
    n_bytes -= story_bytes // 10
    rng = np.random.default_rng(seed)
    if name == "base64":
        while n_bytes > 0:
            yield (story := base64.b64encode(rng.bytes(story_bytes * 3 // 4)).decode())
            n_bytes -= len(story)
        return
    letters, space, marks = SCRIPTS[name]
    alphabet = rng.permutation(list(letters))
    lengths = rng.choice(_LENGTHS, 20_000) * (1 if space == "" and name != "minified" else 2)
    flat = "".join(rng.choice(alphabet, lengths.sum(), p=_zipf(len(alphabet))))
    ends = lengths.cumsum()
    words = np.array([flat[e - n : e] for e, n in zip(ends, lengths, strict=True)], dtype=object)
    p = _zipf(len(words))
    word_bytes = len("".join(words).encode()) / len(words) + len(space) + 1 / _CLAUSE
    n_words = max(round(story_bytes / word_bytes), 1)
    while n_bytes > 0:
        text = words[rng.choice(len(words), n_words, p=p)]
        mark = np.array(list(marks), dtype=object)[rng.integers(len(marks), size=n_words)]
        text = text + np.where(rng.random(n_words) < 1 / _CLAUSE, mark, "") + space
        story = "".join(text).strip()
        yield story
        n_bytes -= len(story.encode())


def _zipf(n: int) -> np.ndarray:
    weights = 1 / np.arange(3, n + 3)
    return weights / weights.sum()
